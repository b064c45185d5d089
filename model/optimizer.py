"""Optimizers: Muon for the matrices of the blocks and the connector, AdamW for everything else.

In:  a model and a learning rate.  Out: one object with `step`, `zero_grad`, `param_groups`, `state_dict`.

Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal, so that it moves in all
directions alike instead of in the few that dominate the gradient. Scaled to half the size of an AdamW update (after arXiv
2502.16982) it shares AdamW's learning rate. Seen once each: captions (4,000 rows, batch 8), loss 0.36, AdamW 1.07; recall of
one of four pairs of bare tokens, learned in 200 steps, with AdamW (one learning rate tried) not in 300.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from model.vlm import VLM


def orthogonal(updates: Tensor, steps: int = 5) -> Tensor:
    """(n, A, B) -> (n, A, B): each matrix with its singular values moved to about 1, by Newton-Schulz iteration.

    The quintic x -> a x + b x^3 + c x^5 is steep at 0, so five steps bring all but the tiniest values to 0.7..1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.mT if updates.shape[1] > updates.shape[2] else updates  # the smaller side first: smaller products
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if updates.shape[1] > updates.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices alone; matrices of one shape are treated together."""

    def __init__(self, params, *, lr: float, weight_decay: float, momentum: float = 0.85):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, matrices in alike.items():
                update = orthogonal(torch.stack([self.momentum(p, group["momentum"]) for p in matrices]))
                scale = 0.1 * max(shape) ** 0.5  # half the root mean square of AdamW's updates: embeddings want twice the rate
                for p, direction in zip(matrices, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"] * scale)

    def momentum(self, p: nn.Parameter, beta: float) -> Tensor:
        """Nesterov's: the running mean of the gradients, looked at one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"], state["step"] = torch.zeros_like(p), torch.tensor(0.0)
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["mean"], beta)


class Together:
    """Several optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self.optimizers}

    def load_state_dict(self, states: dict) -> None:
        if states.keys() != self.state_dict().keys():
            raise ValueError(f"the run was started with {', '.join(states)}: resume with the same --optimizer and --train flags")
        for optimizer in self.optimizers:
            optimizer.load_state_dict(states[type(optimizer).__name__])


def make_optimizer(model: VLM, name: str, *, lr: float, weight_decay: float) -> Together:
    """`muon` or `adamw` (arXiv 1711.05101) over what is trained; only matrices decay, not norms and biases.

    Raises ValueError when everything is frozen, or for an unknown name.
    """
    if name not in ("muon", "adamw"):
        raise ValueError(f"--optimizer is muon or adamw, not {name!r}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("every part is frozen: nothing to train; set --train.llm full, for example")
    blocks = [block for part in (model.llm, model.encoder) for block in part.blocks]
    inside = {p for module in (*blocks, model.connector) for p in module.parameters() if p.ndim == 2}
    inside -= {m.weight for m in model.connector.modules() if isinstance(m, nn.Embedding)}  # a table of vectors, no matrix
    hidden = [p for p in trained if name == "muon" and p in inside]
    groups = [{"params": [p for p in trained if p.ndim >= 2 and p not in set(hidden)], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [Muon(hidden, lr=lr, weight_decay=weight_decay)] if hidden else []
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True))
    return Together(*optimizers)
