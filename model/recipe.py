"""Recipes: which tensors of the three parts are trained, and at which learning rate.

    freeze      none
    full        all
    partial:K   the last K layers
    lora:R      adapters of rank R beside every linear map of the layers, with alpha = 2 R (model/lora.py)
    full:lr=1e-4, lora:8,lr=1e-3        the same, with the part's own learning rate

The layers of a part are its blocks. Most connectors have none: their layers are their linear maps, in the order of definition.
The modes of the three parts combine freely.

In:  a model and a mode for each part (`Train` and `Mode` of model/flags.py).  Out: the same model with `requires_grad` set.
"""

from pathlib import Path

from torch import nn

from model import lora, recompute
from model.flags import Mode, Train
from model.registry import UserError
from model.vlm import VLM, count_parameters


def set_trainable(part: nn.Module, mode: Mode) -> None:
    """Set which tensors of a part are trained; UserError for a mode that does not suit the part."""
    part.requires_grad_(mode.name == "full")
    if mode.name == "lora":
        lora.apply(part, rank=mode.count, alpha=2 * mode.count)
    if mode.name == "partial":
        layers = lora.layers(part)
        if not 0 < mode.count <= len(layers):
            raise UserError(f"partial:{mode.count}: the part has {len(layers)} layers")
        for layer in layers[-mode.count:]:
            layer.requires_grad_(True)


def count_trainable(part: nn.Module) -> int:
    """Number of trained parameters of a part."""
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def apply(model: VLM, train: Train, checkpointing: bool = False, adapter: Path | None = None) -> None:
    """Give each part its mode; UserError if nothing would be trained.

    checkpointing   compute activations again instead of storing them (model/recompute.py)
    adapter         adapter.safetensors of an earlier LoRA run, to continue from (model/lora.py: `load`)
    """
    for name, mode in train.modes().items():
        set_trainable(model.parts[name], mode)
    if not count_trainable(model):
        raise UserError("every part is frozen: nothing to train; set --train.llm full, for example")
    if adapter:
        requested = lora.facts(model)
        lora.load(model, adapter)
        if lora.facts(model) != requested:  # the file has adapters for a part that --train gives none
            raise UserError(f"{adapter} has adapters of {', '.join(sorted(lora.facts(model)))}, --train of "
                            f"{', '.join(sorted(requested)) or 'nothing'}: give the same --train flags as its run")
    if checkpointing:
        recompute.apply(model)


def summary(model: VLM) -> str:
    """"encoder 2,416,704 (0 trained), connector ..., llm ...": one line for the log."""
    return ", ".join(f"{name} {count_parameters(part):,} ({count_trainable(part):,} trained)"
                     for name, part in model.parts.items())
