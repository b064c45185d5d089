"""The optimizer, the learning rate over time, and clipping.

In:  a model and a learning rate.  Out: one object with `step`, `zero_grad`, `scale_lr`, `state_dict`: Muon (muon.py) for the
     matrices of the blocks and the connector, AdamW for everything else.
"""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.utils._pytree import tree_map

from model import sharding
from model.muon import Muon
from model.recipe import Train
from model.registry import UserError
from model.vlm import VLM


def lr_multiplier(step: int, *, warmup: int, total: int, floor: float = 0.05) -> float:
    """The share of its peak that a learning rate has at a step: linear warm-up, then a cosine down to `floor` at step `total`.

    Source: arXiv 1608.03983. UserError for a floor outside 0..1.
    """
    if not 0 <= floor <= 1:
        raise UserError(f"the last learning rate is a share of the peak, 0 to 1, not {floor} (--lr_end)")
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm of `max_norm` at most; returns the norm before. FloatingPointError if not finite."""
    norm = sharding.clip_grad_norm([p for p in model.parameters() if p.grad is not None], max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower --lr, or look at the data with --check_data")
    return norm


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
    optimizers: list[torch.optim.Optimizer] = []
    if hidden:
        optimizers.append(Muon(groups(hidden, weight_decay), lr=lr, weight_decay=weight_decay))
    if others or not hidden:
        optimizers.append(torch.optim.AdamW(
            groups([p for p in others if p.ndim >= 2], weight_decay) + groups([p for p in others if p.ndim < 2], 0.0),
            lr=lr, betas=(0.9, 0.95), fused=True))
    return OptimizerGroup(*optimizers)
