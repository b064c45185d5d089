"""LoRA: every linear map of a finished model's blocks gets a small trainable detour (arXiv 2106.09685, section 4.1).

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero: at the start nothing has changed

In:  a part with `blocks`, a rank, alpha.  Out: the same part; W keeps its name and is frozen, A and B are trained.

    lora.apply(model.llm, rank=8, alpha=16)
    with lora.switched_off(model):      the model as it was: the reference of DPO, at no memory
        ...
    lora.merge(model)                   ordinary linear maps again, with what was learned inside them
"""

import contextlib
import math
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear map of any shape, sharing the tensors of the one it replaces, with its detour."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear begins
        self.scale, self.on = alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b) if self.on else y

    def merged_weight(self) -> Tensor:
        """W + scale * B A, (out, in), in the precision of W."""
        return (self.weight + self.scale * self.lora_b @ self.lora_a).detach()


def adapters(module: nn.Module) -> list[LoRALinear]:
    """All maps with a detour."""
    return [part for part in module.modules() if isinstance(part, LoRALinear)]


def replace(module: nn.Module, kind: type, make) -> int:
    """Put `make(linear)` in the place of every linear map of exactly this kind; returns how many there were."""
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    found = [place for place in children if type(place[2]) is kind]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


def apply(module: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a part and give every nn.Linear of its blocks a detour that is trained.

    The maps that CLIP writes as one bare matrix (q, k and v of the encoder) have no nn.Linear and stay as they are.
    ValueError for a part without blocks, a rank that is no compression, or one that has adapters.
    """
    blocks = getattr(module, "blocks", [])
    if not blocks:
        raise ValueError(f"lora:{rank}: a {type(module).__name__} has no blocks; use full or freeze for this part")
    if adapters(module):
        raise ValueError("the part has LoRA adapters already: merge them first")
    narrowest = min(min(part.weight.shape) for block in blocks for part in block.modules() if isinstance(part, nn.Linear))
    if not 0 < rank <= narrowest:
        raise ValueError(f"lora:{rank}: the rank is 1 to {narrowest}, the narrowest side of a matrix in these blocks")
    module.requires_grad_(False)
    for block in blocks:
        replace(block, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha))


def merged(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module as they would be called and valued without adapters: what a checkpoint stores."""
    tensors = module.state_dict()
    for name, part in module.named_modules():
        if isinstance(part, LoRALinear):
            tensors[f"{name}.weight"] = part.merged_weight()
            del tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return tensors


def merge(module: nn.Module) -> None:
    """Put what the adapters learned into the matrices, and ordinary frozen linear maps back in their places."""

    def plain(part: LoRALinear) -> nn.Linear:
        linear = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(part.merged_weight(), requires_grad=False), part.bias
        return linear

    if not replace(module, LoRALinear, plain):
        raise ValueError("no LoRA adapters to merge: lora.apply was never called on this model")


@contextlib.contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """Inside the block the model is the one that `apply` was given; ValueError without adapters, when it would be itself."""
    found = adapters(module)
    if not found:
        raise ValueError("no LoRA adapters to switch off: the model would be its own reference")
    for part in found:
        part.on = False
    try:
        yield
    finally:
        for part in found:
            part.on = True
