"""The value head of ppo: how much reward is still to come, from the policy's own last hidden state.

In:  a finished model.  Out: the same with `value_head`, and `ActorCritic`, a module whose forward gives logits and values.

A linear map of the state from which the next token is read. No gradient goes from it into the model: at this size a critic's
errors would cost the policy more than a critic of its own would help. A checkpoint for others does not hold it; resuming does.
"""

import torch
from torch import Tensor, nn

from model.vlm import VLM


def apply(model: VLM) -> "ActorCritic":
    """Give the model a value head that begins with 0 everywhere; returns what is trained in its place."""
    model.value_head = nn.Linear(model.llm.dim, 1).to(next(model.llm.parameters()).device)
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    return ActorCritic(model)


class ActorCritic(nn.Module):
    """A model with a value head as one module, to be wrapped: batch, keep (B, T) -> logits (kept, V), values (kept,)."""

    def __init__(self, model: VLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict, keep: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = self.model.llm.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            logits = self.model(batch, keep)
        finally:
            hook.remove()
        (hidden,) = seen  # (kept, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return logits, self.model.value_head(hidden.detach().float()).squeeze(1)
