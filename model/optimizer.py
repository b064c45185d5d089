"""Optimizers: Muon for the matrices of the blocks and the connector, AdamW for everything else; the learning rate; clipping.

In:  a model and a learning rate.  Out: one object with `step`, `zero_grad`, `scale_lr`, `state_dict`.

Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon) makes each update of a matrix orthogonal, so that it moves in all
directions alike instead of in the few that dominate the gradient. Scaled to half the size of an AdamW update (after arXiv
2502.16982) it shares AdamW's learning rate.
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from model import sharding
from model.recipe import Train
from model.registry import UserError
from model.vlm import VLM


def lr_multiplier(step: int, *, warmup: int, total: int, floor: float = 0.05) -> float:
    """The share of its peak that a learning rate has at a step: linear warm-up over `warmup` steps, then a cosine down to `floor`.

    The cosine ends at step `total` (arXiv 1608.03983). UserError for a floor outside 0..1.
    """
    if not 0 <= floor <= 1:
        raise UserError(f"the last learning rate is a share of the peak, 0 to 1, not {floor} (--lr_end)")
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm of `max_norm` at most; returns the norm before. FloatingPointError where it is not finite."""
    norm = sharding.clip_grad_norm([p for p in model.parameters() if p.grad is not None], max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower --lr, or look at the data with --check_data")
    return norm


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
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, matrices in by_shape.items():
                update = orthogonal(torch.stack([sharding.full(self.momentum(p, group["momentum"])) for p in matrices]))
                scale = 0.1 * max(shape) ** 0.5  # half the root mean square of AdamW's updates: embeddings want twice the rate
                for p, direction in zip(matrices, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(sharding.divided(direction, p), alpha=-group["lr"] * scale)

    def momentum(self, p: nn.Parameter, beta: float) -> Tensor:
        """Nesterov's: the running mean of the gradients, looked at one step ahead."""
        state = self.state[p]
        if not state:
            state["mean"], state["step"] = torch.zeros_like(p), torch.tensor(0.0)
        state["step"] += 1  # as AdamW keeps it: a checkpoint tells how many updates it holds
        state["mean"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["mean"], beta)


class OptimizerGroup:
    """Several optimizers as one. `base_lrs` are the learning rates that their groups were made with, which a schedule scales."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def scale_lr(self, multiplier: float) -> dict[str, float]:
        """Give every group this multiple of its own rate; returns the rates for the log: `lr`, or where they differ `lr_PART`."""
        for group, base_lr in zip(self.param_groups, self.base_lrs):
            group["lr"] = base_lr * multiplier
        rates = {f"lr_{part}": group["lr"] for group in self.param_groups for part in group["parts"]}
        return rates if len(set(self.base_lrs)) > 1 else {"lr": next(iter(rates.values()))}

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        """The state of each by its name; every process calls this, for a divided state is gathered."""
        return {type(optimizer).__name__: tree_map(sharding.full, optimizer.state_dict()) for optimizer in self.optimizers}

    def load_state_dict(self, states: dict) -> None:
        """The inverse; UserError unless the same tensors are trained by the same optimizers, in the same groups."""
        mine = {type(optimizer).__name__: optimizer for optimizer in self.optimizers}
        names = [[[group["names"] for group in groups] for groups in (of[name]["param_groups"] for name in sorted(of))]
                 for of in (states, {name: optimizer.state_dict() for name, optimizer in mine.items()})]
        if states.keys() != mine.keys() or names[0] != names[1]:
            raise UserError(f"the run was started with {', '.join(states)} on other groups of tensors: resume with the same "
                             f"--optimizer, --shard and --train flags")
        for name, optimizer in mine.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: {key: sharding.divided(value, parameters[index]) for key, value in kept.items()}
                     for index, kept in states[name]["state"].items()}
            optimizer.load_state_dict({**states[name], "state": state})


def make_optimizer(model: VLM, name: str, *, lr: float, weight_decay: float, train: Train | None = None) -> OptimizerGroup:
    """`muon` or `adamw` (arXiv 1711.05101) over what is trained; only matrices decay, not norms and biases.

    train: the recipe, whose parts may have a learning rate of their own (model/recipe.py). UserError for an unknown name.
    """
    if name not in ("muon", "adamw"):
        raise UserError(f"--optimizer is muon or adamw, not {name!r}")
    own_lr = train.learning_rates() if train else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [block for part in (model.llm, model.encoder) for block in part.blocks]
    inside = {p for module in (*blocks, model.connector) for p in module.parameters() if p.ndim == 2}
    inside -= {m.weight for m in model.connector.modules() if isinstance(m, nn.Embedding)}  # a table of vectors is not a matrix
    names = {p: name for name, p in model.named_parameters()}

    def groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
        """A group for every learning rate, and for tensors that --shard divides: one call of AdamW takes either kind."""
        apart: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            part = names[p].partition(".")[0]
            apart[own_lr.get(part, lr), sharding.is_divided(p)].append(p)
        return [{"params": chosen, "lr": rate, "weight_decay": weight_decay, "names": [names[p] for p in chosen],
                 "parts": sorted({names[p].partition(".")[0] for p in chosen})} for (rate, _), chosen in apart.items()]

    hidden = [p for p in trained if name == "muon" and p in inside]
    others = [p for p in trained if p not in set(hidden)]
    optimizers: list[torch.optim.Optimizer] = [Muon(groups(hidden, weight_decay), lr=lr, weight_decay=weight_decay)] if hidden else []
    if others or not hidden:
        optimizers.append(torch.optim.AdamW(
            groups([p for p in others if p.ndim >= 2], weight_decay) + groups([p for p in others if p.ndim < 2], 0.0),
            lr=lr, betas=(0.9, 0.95), fused=True))
    return OptimizerGroup(*optimizers)
