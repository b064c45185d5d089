"""Muon: momentum made orthogonal, for the matrices of the blocks and the connector.

In:  matrices and their gradients.  Out: updates that move a matrix in all directions alike instead of in the few that dominate.

K. Jordan 2024, kellerjordan.github.io/posts/muon. Scaled to half the size of an AdamW update (after arXiv 2502.16982) it shares
AdamW's learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model import sharding


def orthogonal(updates: Tensor, steps: int = 5) -> Tensor:
    """(n, A, B) -> (n, A, B): each matrix with its singular values moved to about 1, by Newton-Schulz iteration.

    The quintic x -> a x + b x^3 + c x^5 is steep at 0, so five steps bring all but the tiniest values to 0.7..1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.mT if updates.shape[1] > updates.shape[2] else updates  # the smaller side first: smaller products
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x.mT if updates.shape[1] > updates.shape[2] else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for matrices alone; matrices of one shape are treated together."""

    def __init__(self, params: Iterable, *, lr: float, weight_decay: float, momentum: float = 0.85):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            updates: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
                    updates[p.shape].append(sharding.full(self.momentum(p, p.grad, group["momentum"])))
            for shape, matrices in by_shape.items():
                update = orthogonal(torch.stack(updates[shape]))
                scale = 0.1 * max(shape) ** 0.5  # half the root mean square of AdamW's updates: embeddings want twice the rate
                for p, direction in zip(matrices, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(sharding.divided(direction, p), alpha=-group["lr"] * scale)

    def momentum(self, p: nn.Parameter, grad: Tensor, beta: float) -> Tensor:
        """Nesterov's: the running mean of the gradients, looked at one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"], state["step"] = torch.zeros_like(p), torch.tensor(0.0)
        state["step"] += 1  # as AdamW keeps it: a checkpoint tells how many updates it holds
        state["mean"].lerp_(grad, 1 - beta)
        return grad.lerp(state["mean"], beta)
