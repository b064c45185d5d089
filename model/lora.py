"""LoRA: every linear map of a finished part gets a small trainable adapter (arXiv 2106.09685, section 4.1).

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero: at the start nothing has changed

In:  a part, a rank, alpha.  Out: the same part; W is frozen, A and B are trained. The maps are those of the part's `blocks`, or
     all of its maps if it has no blocks, as most connectors.

    lora.apply(model.llm, rank=8, alpha=16)
    with lora.switched_off(model):      the model without its adapters: the reference of DPO, without a copy
        ...
    lora.save(model, file)              a small file with only the trained tensors; lora.load(base, file) adds them to a base
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model import tensor_file
from model.registry import UserError
from model.vlm import VLM


def adapter_pair(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a matrix (out, in)."""
    a, b = nn.Parameter(weight.new_empty(rank, weight.shape[1])), nn.Parameter(weight.new_zeros(weight.shape[0], rank))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear begins
    return a, b


class LoRALinear(nn.Linear):
    """A linear map with an adapter; it shares the tensors of the map that it replaces."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = adapter_pair(base.weight, rank)
        self.alpha, self.scale, self.on = alpha, alpha / rank, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b) if self.on else y

    def merged_weight(self) -> Tensor:
        """W + scale * B A, (out, in), in the precision of W."""
        return (self.weight + self.scale * self.lora_b @ self.lora_a).detach()


class LoRAMatrix(nn.Module):
    """The adapter of a matrix outside an nn.Linear, such as CLIP's q, k and v: reading W gives W + scale * B A.

    It is a torch parametrization, so the encoder's file needs no change. Unlike LoRALinear, it computes a matrix of the size of
    W at every forward pass.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        self.lora_a, self.lora_b = adapter_pair(weight, rank)
        self.alpha, self.scale, self.on = alpha, alpha / rank, True

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.lora_b @ self.lora_a if self.on else weight


def adapters(module: nn.Module) -> list[LoRALinear | LoRAMatrix]:
    """All adapters."""
    return [part for part in module.modules() if isinstance(part, LoRALinear | LoRAMatrix)]


def layers(part: nn.Module) -> list[nn.Module]:
    """The layers that a recipe counts: the part's blocks, or if none its linear maps, in the order of definition."""
    modules = list(getattr(part, "blocks", ())) or [module for module in part.modules() if isinstance(module, nn.Linear)]
    if not modules:
        raise UserError(f"{type(part).__name__} has neither blocks nor linear maps: train this part freeze or full")
    return modules


def replace(module: nn.Module, kind: type, make) -> int:
    """Replace every child of exactly this class by `make(child)`; returns their number."""
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()
                if type(child) is kind]
    for parent, name, child in children:
        setattr(parent, name, make(child))
    return len(children)


def bare_matrices(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of matrices outside nn.Linear, such as in_proj_weight; not nn.Embedding, a table of vectors."""
    return [(owner, name) for owner in module.modules() if type(owner) is not nn.Linear and not isinstance(owner, nn.Embedding)
            for name, weight in owner.named_parameters(recurse=False) if weight.ndim == 2 and name.endswith("weight")]


def apply(module: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a part and give every linear map of its layers a trainable adapter.

    UserError for a part without linear maps, a rank above the smallest side of a matrix, or a part that has adapters already.
    """
    if adapters(module):
        raise UserError("the part has LoRA adapters already")
    blocks = layers(module) if getattr(module, "blocks", ()) else [module] * bool(layers(module))
    bare = [matrix for block in blocks for matrix in bare_matrices(block)]
    linears = [part.weight for block in blocks for part in block.modules() if type(part) is nn.Linear]
    narrowest = min(min(weight.shape) for weight in (*linears, *(getattr(owner, name) for owner, name in bare)))
    if not 0 < rank <= narrowest:
        raise UserError(f"lora:{rank}: the rank is 1 to {narrowest}, the narrowest side of a matrix in these layers")
    module.requires_grad_(False)
    for block in blocks:
        replace(block, nn.Linear, lambda linear: LoRALinear(linear, rank, alpha))
    for owner, name in bare:
        parametrize.register_parametrization(owner, name, LoRAMatrix(getattr(owner, name), rank, alpha))


def merged(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module with adapters merged into the weights, under plain names: what a checkpoint stores."""
    tensors = module.state_dict()
    for name, part in module.named_modules():
        if isinstance(part, LoRALinear):
            tensors[f"{name}.weight"] = part.merged_weight()
        if isinstance(part, LoRAMatrix):  # OWNER.parametrizations.WEIGHT.0, beside OWNER.parametrizations.WEIGHT.original
            weight = tensors.pop(f"{name.removesuffix('.0')}.original")
            product = part.scale * part.lora_b @ part.lora_a
            tensors[name.removesuffix(".0").replace("parametrizations.", "")] = (weight + product).detach()
        if isinstance(part, LoRALinear | LoRAMatrix):
            del tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return tensors


@contextlib.contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """Inside the block the adapters have no effect; UserError if the module has none."""
    parts = adapters(module)
    if not parts:
        raise UserError("no LoRA adapters to switch off: the model would be its own reference")
    for part in parts:
        part.on = False
    try:
        yield
    finally:
        for part in parts:
            part.on = True


# ---------------------------------------------------------------- files of adapters

def facts(model: VLM) -> dict[str, dict[str, float]]:
    """Part -> rank and alpha of its adapters, for the parts that have them."""
    by_part = {name: adapters(part) for name, part in model.parts.items()}
    return {name: {"rank": parts[0].lora_a.shape[0], "alpha": parts[0].alpha} for name, parts in by_part.items() if parts}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model: VLM, file: Path) -> None:
    """Write only the trained tensors: the adapters, and those of parts that were trained without adapters.

    The file's metadata hold each part's rank and alpha, and a hash of the base, which is all that was not trained.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("value_head.")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name in tensors}
    base = fingerprint({name: tensor for name, tensor in tensors.items() if name not in trained})
    tensor_file.save({name: tensors[name].contiguous() for name in sorted(trained)}, file,
                     {"adapters": json.dumps(facts(model)), "base": base})


def load(model: VLM, file: Path) -> None:
    """Load what `save` wrote into the base that it was trained on; parts without adapters get them first.

    FileNotFoundError without a file; UserError if rank, alpha, names, shapes or the base differ.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no adapters at {file}: a run with, say, --train.llm lora:8 writes OUT/adapter.safetensors")
    saved, metadata = tensor_file.read(file), tensor_file.facts(file)
    if "adapters" not in metadata:
        raise UserError(f"{file} holds no adapters, as adapter.safetensors of a LoRA run does")
    settings = json.loads(metadata["adapters"])
    for name in settings.keys() - facts(model).keys():
        apply(model.parts[name], int(settings[name]["rank"]), settings[name]["alpha"])
    if facts(model) != settings:
        raise UserError(f"{file} was saved with {settings}, the model has {facts(model)}: give the same --train flags")
    tensors = model.state_dict()
    wrong = sorted(name for name in saved if name not in tensors or tensors[name].shape != saved[name].shape)
    if wrong:
        raise UserError(f"{file} does not fit the model: {len(wrong)} tensors are missing or have another shape, {wrong[:4]}")
    base = fingerprint({name: tensor for name, tensor in tensors.items() if name not in saved})
    if base != metadata["base"]:
        raise UserError(f"{file} was trained on another base ({metadata['base']}) than this one ({base}): --init the checkpoint "
                         f"that its run started from")
    tensor_file.require_sound(file, saved, tensors)
    with torch.no_grad():
        for name, tensor in saved.items():
            tensors[name].copy_(tensor)
