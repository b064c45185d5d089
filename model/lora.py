"""LoRA: every linear map of a finished part gets a small trainable adapter (arXiv 2106.09685, section 4.1).

    y = W x + (alpha / rank) B A x        A (rank, in) random, B (out, rank) zero: at the start nothing has changed

In:  a part, a rank, alpha.  Out: the same part; W is frozen, A and B are trained. The maps are those of the part's `blocks`, or,
     of a part without blocks as most connectors are, all that it has.

    lora.apply(model.llm, rank=8, alpha=16)
    with lora.switched_off(model):      the model as it was: the reference of DPO, at no memory
        ...
    lora.save(model, file)              what was learned alone, a small file; lora.load(base, file) puts it on a base again
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from model.registry import UserError
from model.vlm import VLM


def adapter_pair(weight: Tensor, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a matrix (out, in)."""
    a, b = nn.Parameter(weight.new_empty(rank, weight.shape[1])), nn.Parameter(weight.new_zeros(weight.shape[0], rank))
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as nn.Linear begins
    return a, b


class LoRALinear(nn.Linear):
    """A linear map of any shape, sharing the tensors of the one it replaces, with its adapter."""

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
    """The adapter of a bare matrix that is not an nn.Linear, as q, k and v of CLIP: W is read as W + scale * B A.

    A parametrization of torch: whoever reads the matrix gets the sum, so the file of the encoder knows nothing of it. It costs
    a matrix of the size of W at every forward pass, which the adapter of LoRALinear does not.
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
    """What a recipe counts in a part: its blocks; of a part that states none, its linear maps in the order of their definition.

    UserError where there is neither.
    """
    found = list(getattr(part, "blocks", ())) or [module for module in part.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise UserError(f"{type(part).__name__} has neither blocks nor linear maps: train this part freeze or full")
    return found


def replace(module: nn.Module, kind: type, make) -> int:
    """Put `make(linear)` in the place of every linear map of exactly this kind; returns how many there were."""
    children = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    found = [place for place in children if type(place[2]) is kind]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)


def bare_matrices(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of matrices that no nn.Linear holds: in_proj_weight, say. A table of vectors is no map."""
    return [(owner, name) for owner in module.modules() if type(owner) is not nn.Linear and not isinstance(owner, nn.Embedding)
            for name, weight in owner.named_parameters(recurse=False) if weight.ndim == 2 and name.endswith("weight")]


def apply(module: nn.Module, rank: int, alpha: float) -> None:
    """Freeze a part and give every linear map of its layers an adapter that is trained.

    UserError for a part without a map, a rank that is no compression, or a part that has adapters.
    """
    if adapters(module):
        raise UserError("the part has LoRA adapters already")
    blocks = layers(module) if getattr(module, "blocks", ()) else [module] * bool(layers(module))
    bare = [place for block in blocks for place in bare_matrices(block)]
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
    """The tensors of a module as they would be called and valued without adapters: what a checkpoint stores."""
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
    """Inside the block the model is the one that `apply` was given; UserError without adapters, when it would be itself."""
    found = adapters(module)
    if not found:
        raise UserError("no LoRA adapters to switch off: the model would be its own reference")
    for part in found:
        part.on = False
    try:
        yield
    finally:
        for part in found:
            part.on = True


# ---------------------------------------------------------------- adapters alone

def facts(model: VLM) -> dict[str, dict[str, float]]:
    """Part -> rank and alpha of its adapters, for the parts that have them."""
    found = {name: adapters(part) for name, part in model.parts.items()}
    return {name: {"rank": parts[0].lora_a.shape[0], "alpha": parts[0].alpha} for name, parts in found.items() if parts}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """A hash of names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(model: VLM, file: Path) -> None:
    """Write all that was trained, and nothing else: the adapters, and the tensors of parts that were trained without.

    The file's metadata say rank and alpha for each part, and a hash of what it belongs to, all that was not trained.
    """
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("value_head.")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name in tensors}
    base = fingerprint({name: tensor for name, tensor in tensors.items() if name not in trained})
    save_file({name: tensors[name].contiguous() for name in sorted(trained)}, file,
              {"adapters": json.dumps(facts(model)), "base": base})


def load(model: VLM, file: Path) -> None:
    """Put a saved file on the base that it was trained on: the same model as when it was saved, to use or to train further.

    Parts that have no adapters yet get them. Raises FileNotFoundError, and UserError where rank or alpha, names, shapes or the
    base are others.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no adapters at {file}: a run with, say, --train.llm lora:8 writes OUT/adapter.safetensors")
    with safe_open(file, "pt") as opened:
        said = opened.metadata() or {}
        saved = {name: opened.get_tensor(name) for name in opened.keys()}
    if "adapters" not in said:
        raise UserError(f"{file} holds no adapters, as adapter.safetensors of a LoRA run does")
    wanted = json.loads(said["adapters"])
    for name in wanted.keys() - facts(model).keys():
        apply(model.parts[name], int(wanted[name]["rank"]), wanted[name]["alpha"])
    if facts(model) != wanted:
        raise UserError(f"{file} was saved with {wanted}, the model has {facts(model)}: give the same --train flags")
    tensors = model.state_dict()
    wrong = sorted(name for name in saved if name not in tensors or tensors[name].shape != saved[name].shape)
    if wrong:
        raise UserError(f"{file} does not fit the model: {len(wrong)} tensors are missing or have another shape, {wrong[:4]}")
    base = fingerprint({name: tensor for name, tensor in tensors.items() if name not in saved})
    if base != said["base"]:
        raise UserError(f"{file} was trained on another base ({said['base']}) than this one ({base}): --init the checkpoint "
                         f"that its run started from")
    with torch.no_grad():
        for name, tensor in saved.items():
            tensors[name].copy_(tensor)
