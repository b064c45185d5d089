"""Muon: orthogonalised momentum, for the matrices of the blocks and the connector.

In:  matrices and their gradients.  Out: updates that change a matrix equally in all directions, not only in a few dominant ones.

K. Jordan 2024, kellerjordan.github.io/posts/muon. Its updates are scaled to half the size of AdamW's (after arXiv 2502.16982), so
that both optimizers share one learning rate. Of several processes each computes its share of the updates, as in that article.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import all_gather_into_tensor, get_rank, get_world_size, is_initialized

from model import sharding


def orthogonal(updates: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """(matrices, rows, columns) -> the same shape: each matrix with singular values of about 1, by Newton-Schulz iteration.

    The quintic x -> a x + b x^3 + c x^5 is steep at 0, so five steps bring all but the tiniest values to 0.7..1.2. They need no
    more than bf16, and are computed in the precision of the run.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.to(dtype)
    x = x.mT if x.shape[1] > x.shape[2] else x  # the smaller side first: x @ x.mT is then smaller
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return (x.mT if updates.shape[1] > updates.shape[2] else x).to(updates.dtype)


def shared_out(updates: Tensor, dtype: torch.dtype) -> Tensor:
    """`orthogonal` of a stack of matrices that all processes hold: each computes its share, and gets those of the others."""
    count, world = len(updates), get_world_size() if is_initialized() else 1
    if world == 1 or count == 1:
        return orthogonal(updates, dtype)
    padded = F.pad(updates, (0, 0, 0, 0, 0, -count % world))  # a share is as large as any other
    together = torch.empty_like(padded)
    all_gather_into_tensor(together, orthogonal(padded.chunk(world)[get_rank()], dtype).contiguous())
    return together[:count]


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum, only for matrices; matrices of one shape are updated in one batch."""

    def __init__(self, params: Iterable, *, lr: float, weight_decay: float, momentum: float = 0.85,
                 dtype: torch.dtype = torch.float32):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = dtype  # of the Newton-Schulz iteration

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            updates: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
                    updates[p.shape].append(sharding.gather_tensor(self.momentum(p, p.grad, group["momentum"])))
            for shape, matrices in by_shape.items():
                update = shared_out(torch.stack(updates[shape]), self.dtype)
                scale = 0.1 * max(shape) ** 0.5  # half the RMS of AdamW's updates: embeddings need twice the rate
                for p, direction in zip(matrices, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(sharding.shard_like(direction, p), alpha=-group["lr"] * scale)

    def momentum(self, p: nn.Parameter, grad: Tensor, beta: float) -> Tensor:
        """Nesterov momentum: the running mean of the gradients, one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"], state["step"] = torch.zeros_like(p), torch.tensor(0.0)
        state["step"] += 1  # as in AdamW: a checkpoint shows how many updates it holds
        state["mean"].lerp_(grad, 1 - beta)
        return grad.lerp(state["mean"], beta)
