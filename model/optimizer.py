"""The optimizer, the learning rate over time, and gradient clipping.

In:  a model and a learning rate.  Out: an OptimizerGroup: Muon (muon.py) for the matrices of the blocks and the connector,
     AdamW (adamw.py) for everything else.
"""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.utils._pytree import tree_map

from model import sharding
from model.adamw import AdamW
from model.muon import Muon
from model.recipe import Train
from model.registry import UserError
from model.vlm import VLM


def lr_multiplier(step: int, *, warmup: int, total: int, floor: float = 0.05) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then a cosine down to `floor` at step `total`.

    Source: arXiv 1608.03983. UserError for a floor outside 0..1.
    """
    if not 0 <= floor <= 1:
        raise UserError(f"--lr_end is a share of the peak learning rate, 0 to 1, not {floor}")
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients so that their norm is at most `max_norm`; returns the norm before, which may be infinite or NaN."""
    return sharding.clip_grad_norm([p for p in model.parameters() if p.grad is not None], max_norm).item()


class OptimizerGroup:
    """Several optimizers as one. `base_lrs` are the peak learning rates of their groups, which the schedule scales."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def scale_lr(self, multiplier: float) -> dict[str, float]:
        """Set each group's rate to this multiple of its base; returns them for the log: `lr`, or `lr_PART` if they differ."""
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
        """The state of each optimizer by its name. Every rank calls this, because sharded states are gathered."""
        return {type(optimizer).__name__: tree_map(sharding.gather_tensor, optimizer.state_dict())
                for optimizer in self.optimizers}

    def load_state_dict(self, states: dict) -> None:
        """Load what state_dict returned; UserError unless the same optimizers train the same tensors, in the same groups."""
        optimizers = {type(optimizer).__name__: optimizer for optimizer in self.optimizers}
        saved = {name: [group["names"] for group in state["param_groups"]] for name, state in states.items()}
        if saved != {name: [group["names"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}:
            raise UserError(f"the run was started with {', '.join(states)} on other groups of tensors: resume with the same "
                            f"--optimizer, --shard and --train flags")
        for name, optimizer in optimizers.items():
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {index: {key: sharding.shard_like(value, parameters[index]) for key, value in values.items()}
                     for index, values in states[name]["state"].items()}
            optimizer.load_state_dict({**states[name], "state": state})


def make_optimizer(model: VLM, name: str, *, lr: float, weight_decay: float, train: Train | None = None,
                   dtype: torch.dtype = torch.float32) -> OptimizerGroup:
    """`muon` or `adamw` for all trained tensors; only matrices decay, not norms and biases.

    train   the recipe; its parts may have their own learning rates (model/recipe.py)
    dtype   what Muon orthogonalises in
    UserError for an unknown name.
    """
    if name not in ("muon", "adamw"):
        raise UserError(f"--optimizer is muon or adamw, not {name!r}")
    own_lr = train.learning_rates() if train else {}
    trained = [p for p in model.parameters() if p.requires_grad]
    blocks = [block for part in (model.llm, model.encoder) for block in part.blocks]
    matrices = {p for module in (*blocks, model.connector) for p in module.parameters() if p.ndim == 2}
    matrices -= {m.weight for m in model.connector.modules() if isinstance(m, nn.Embedding)}  # tables of separate vectors
    names = {p: name for name, p in model.named_parameters()}

    def groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict]:
        """One group per learning rate, sharded tensors apart from ordinary ones: AdamW cannot update both in one call."""
        grouped: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            part = names[p].partition(".")[0]
            grouped[own_lr.get(part, lr), sharding.is_sharded(p)].append(p)
        return [{"params": group, "lr": rate, "weight_decay": weight_decay, "names": [names[p] for p in group],
                 "parts": sorted({names[p].partition(".")[0] for p in group})} for (rate, _), group in grouped.items()]

    by_muon = [p for p in trained if name == "muon" and p in matrices]
    others = [p for p in trained if p not in set(by_muon)]
    optimizers: list[torch.optim.Optimizer] = []
    if by_muon:
        optimizers.append(Muon(groups(by_muon, weight_decay), lr=lr, weight_decay=weight_decay, dtype=dtype))
    if others or not by_muon:
        optimizers.append(AdamW(
            groups([p for p in others if p.ndim >= 2], weight_decay) + groups([p for p in others if p.ndim < 2], 0.0),
            lr=lr, betas=(0.9, 0.95), fused=True))
    return OptimizerGroup(*optimizers)
