"""The critic of ppo: a value head that reads from the policy's last hidden state how much reward is still to come.

In:  a finished model.  Out: the same with `value_head`, and `ActorCritic`, a module whose forward gives logits and values.

It is one linear map of the state from which the next token is read. No gradient goes from it into the model: at this size a
critic's errors would cost the policy more than a critic of its own would help. A checkpoint for others leaves the value head
out; the state for resuming holds it.
Legend: L learned tokens of a batch, A answers of a batch, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from model.losses import Score
from model.rl.advantages import gae
from model.runtime import Run, StepMetrics
from model.vlm import VLM

DISCOUNT = 1.0  # an answer is worth as much late as early
VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.5


class ActorCritic(nn.Module):
    """A model with a value head as one module, to be wrapped: batch, keep (B, T) -> logits (kept, V), values (kept,)."""

    def __init__(self, model: VLM):
        super().__init__()
        self.model = model

    def forward(self, batch: dict, logits_to_keep: Tensor) -> tuple[Tensor, Tensor]:
        states: list[Tensor] = []
        norm: nn.Module = self.model.llm.get_submodule("model.norm")
        hook = norm.register_forward_hook(lambda module, inputs, output: states.append(output))
        try:
            logits = self.model(batch, logits_to_keep)
        finally:
            hook.remove()
        (hidden,) = states  # (kept, C)
        with torch.autocast(hidden.device.type, enabled=False):
            return logits, self.model.value_head(hidden.detach().float()).squeeze(1)


def apply(model: VLM) -> ActorCritic:
    """Give the model a value head that begins with 0 everywhere; returns the module to train in its place."""
    model.value_head = nn.Linear(model.llm.dim, 1).to(next(model.llm.parameters()).device)
    nn.init.zeros_(model.value_head.weight)
    nn.init.zeros_(model.value_head.bias)
    return ActorCritic(model)


@torch.no_grad()
def add_advantages(batches: Sequence[dict], rewards: Tensor, policy: nn.Module, lam: float, run: Run) -> None:
    """Give each batch `advantages`, `returns` and `values`, (L,) each, from the value head; rewards (Q, G).

    The reward stands at the last token of an answer. Advantages are whitened over the update, on all ranks.
    """
    for batch in batches:
        with run.autocast():
            values = values_of(run.score(policy, batch))  # (L,)
        answers, lengths = batch["answer_ids"].unique_consecutive(return_counts=True)  # (A,)
        by_answer = pad_sequence(values.split(lengths.tolist()), batch_first=True)  # (A, longest)
        given = torch.zeros_like(by_answer)
        given[torch.arange(len(lengths)), lengths - 1] = rewards.flatten()[answers]
        real = torch.arange(by_answer.shape[1], device=values.device) < lengths[:, None]
        advantages, returns = gae(given, by_answer, DISCOUNT, lam)
        batch.update(values=values, advantages=advantages[real], returns=returns[real])
    found = torch.cat([batch["advantages"] for batch in batches]).double()
    count, total, squares = (run.sum(float(part)) for part in (len(found), found.sum(), found.square().sum()))
    mean = total / count
    deviation = max(0.0, squares / count - mean * mean) ** 0.5
    for batch in batches:
        batch["advantages"] = (batch["advantages"] - mean) / (deviation + 1e-8)


def value_loss(values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
    """max((v - R)^2, (v_clipped - R)^2) / 2, (L,): v_clipped stays near the value before the update (PPO's code)."""
    clipped = before + (values - before).clamp(-VALUE_CLIP, VALUE_CLIP)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2


def values_of(scores: Score) -> Tensor:
    """(L,): the values that a model with a value head gave."""
    if scores.values is None:
        raise ValueError("this model has no value head: critic.apply was never called on it")
    return scores.values


def weighted_value_loss(scores: Score, batch: dict, metrics: StepMetrics) -> Tensor:
    """(L,): what is added to the losses; the value loss itself goes to the log."""
    loss = value_loss(values_of(scores), batch["values"], batch["returns"])
    metrics.add(value_loss=loss)
    return VALUE_WEIGHT * loss
