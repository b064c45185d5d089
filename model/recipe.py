"""Recipes: which tensors of the three parts move.

    freeze      none
    full        all
    partial:K   the last K layers
    lora:R      adapters of rank R beside every linear map of the layers, with alpha = 2 R (model/lora.py)

The layers of the language model and of the encoder are their blocks. A connector has those blocks that it states; where it states
none, as most of them, its linear maps in the order of their definition. Every part goes with every mode of the others: 63
recipes, and one that trains nothing and is refused.

In:  a model and a mode for each part.  Out: the same model with `requires_grad` set, and how many parameters move.
"""

from pathlib import Path

from torch import nn

from model import lora, recompute
from model.vlm import VLM


def trainable(part: nn.Module, mode: str) -> int:
    """Set which tensors of a part move and return how many parameters do; ValueError for a mode that the part cannot have."""
    name, _, count = mode.partition(":")
    if mode not in ("freeze", "full") and not (name in ("partial", "lora") and count.isdecimal()):
        raise ValueError(f"a part is trained freeze, full, partial:K or lora:R, not {mode!r}")
    part.requires_grad_(name == "full")
    if name == "lora":
        lora.apply(part, rank=int(count), alpha=2 * int(count))
    if name == "partial":
        layers = lora.layers(part)
        if not 0 < int(count) <= len(layers):
            raise ValueError(f"partial:{count}: the part has {len(layers)} layers")
        for layer in layers[-int(count):]:
            layer.requires_grad_(True)
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def apply(model: VLM, modes: dict[str, str], checkpointing: bool, adapter: Path | None = None) -> dict[str, int]:
    """Give each part its mode; returns part -> trained parameters. ValueError where nothing moves.

    checkpointing   compute activations again instead of keeping them (model/recompute.py)
    adapter         what an earlier LoRA run learned, to go on from (model/lora.py: `load`)
    """
    moving = {name: trainable(part, modes[name]) for name, part in model.parts.items()}
    if not sum(moving.values()):
        raise ValueError("every part is frozen: nothing to train; set --train.llm full, for example")
    if adapter:
        asked = lora.facts(model)
        lora.load(model, adapter)
        if lora.facts(model) != asked:  # it put adapters where none were asked for
            raise ValueError(f"{adapter} has adapters of {', '.join(sorted(lora.facts(model)))}, --train of "
                             f"{', '.join(sorted(asked)) or 'nothing'}: give the same --train flags as its run")
    if checkpointing:
        recompute.apply(model)
    return moving
