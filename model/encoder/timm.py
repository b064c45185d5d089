"""Any image encoder ("tower") of timm that has patch tokens: DINOv2, SigLIP, EVA, ConvNeXt, FastViT and others.

In:  pixels (N, 3, S, S), normalised by the tower's mean and std.
Out: (N, P, D): the CLS token, if the tower has one, and all patches in reading order after the last block, before the last norm,
     as in clip.py. Register tokens (arXiv 2309.16588) describe no patch and are left out.
Legend: N images, P tokens per image, D channels of the encoder, S pixels a side.

timm:NAME           weights that timm fetches once: timm:vit_small_patch14_dinov2.lvd142m (arXiv 2304.07193)
timm:NAME/FILE      the same architecture with the weights of a local file
timm:FOLDER         a folder fetched from the Hugging Face Hub, with config.json and weights; also hf-hub:OWNER/NAME
size=224            pictures of another size than in training: fewer or more patches, position embeddings interpolated
"""

import difflib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.encoder import Encoder, fingerprint
from model.hub import at_once, one_line
from model.registry import ENCODERS, UserError

SOURCES = ("hf-hub:", "local-dir:")  # what timm and open_clip write before a repository and a folder


class Tower(Encoder):
    """A timm model up to its last block. Its facts are measured, not guessed from its name."""

    def __init__(self, trunk: Any, name: str, size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.trunk: Any
        self.trunk, self.name, self.size, self.mean, self.std = trunk, name, size, tuple(mean), tuple(std)
        self.has_cls = getattr(trunk, "cls_token", getattr(trunk, "class_embedding", None)) is not None
        if not hasattr(trunk, "prune_intermediate_layers") or not self.blocks:
            raise UserError(f"{name} ({type(trunk).__name__}) gives no patch tokens: choose a ViT, EVA, ConvNeXt or FastViT")
        trunk.prune_intermediate_layers(1, prune_norm=True, prune_head=True)  # drop unused parameters
        self.eval()
        with torch.no_grad():
            self.tokens, self.dim = self(torch.zeros(1, 3, size, size)).shape[1:]

    @property
    def blocks(self) -> Any:
        """Its blocks, or its stages if it is built of stages."""
        return next((part for name in ("blocks", "stages", "layers") if (part := getattr(self.trunk, name, None))), None)

    def train(self, mode: bool = True) -> "Tower":
        """Stay in evaluation mode: batch norms keep their pretrained statistics, and a picture's features do not depend on other
        pictures of the batch, so they can be cached."""
        return super().train(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D), the CLS token first if there is one."""
        if not self.has_cls:
            (grid,) = self.trunk.forward_intermediates(pixels, indices=1, intermediates_only=True)  # (N, D, edge, edge)
            return grid.flatten(2).mT  # (N, P, D)
        ((grid, prefix),) = self.trunk.forward_intermediates(
            pixels, indices=1, intermediates_only=True, return_prefix_tokens=True)  # fmt: skip
        return torch.cat([prefix[:, :1], grid.flatten(2).mT], dim=1)  # (N, 1 + patches, D)

    def fingerprint(self) -> str:
        """A hash of name, size, normalisation and weights: equal fingerprints mean equal features."""
        return fingerprint({"name": self.name, "size": self.size, "mean": list(self.mean), "std": list(self.std)}, self)


@ENCODERS.register("timm")
def timm(weights: str, size: int = 0) -> Tower:
    """A pretrained tower through timm (DINOv2 and others): NAME, NAME/FILE, or the FOLDER of one."""
    import timm as library  # takes seconds, and only this function needs it

    if Path(weights).is_dir():
        weights = f"local-dir:{weights}"
    name, _, file = (weights, "", "") if weights.startswith(SOURCES) else weights.partition("/")
    if not name.startswith(SOURCES) and not library.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name, library.list_models(pretrained=True), n=3)
        raise UserError(f"timm knows no model {name!r}. Near it: {', '.join(near) or 'none'}")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"timm:{weights}: no file {file}; after the name comes the path of weights, timm:{name}/FILE")
    try:
        overlay = {"file": file} if file else None
        with at_once():
            trunk: Any = library.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay)
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # KeyError: weights of another model
        raise UserError(
            f"could not get {weights} from timm. Fetch it once with a network (it stays in the Hugging Face cache), or name "
            f"a local file: timm:{name}/path/to/model.safetensors. The error was: {one_line(error)}"
        ) from error
    facts = trunk.pretrained_cfg
    if size and hasattr(trunk, "set_input_size"):  # ViTs only: a convolutional tower takes any size
        trunk.set_input_size(size)
    label = facts["architecture"] + (", quick_gelu" if with_quick_gelu(library, trunk) else "")
    return Tower(trunk, label, size or facts["input_size"][-1], facts["mean"], facts["std"])


def with_quick_gelu(library: Any, trunk: Any) -> bool:
    """Set a tower's activation to quick_gelu if its weights were trained with it, and its architecture's name does not say so.

    timm's list of weights notes that of CLIPs by OpenAI, MetaCLIP and DFN ("natively QuickGELU, use quickgelu model variant").
    """
    facts = trunk.pretrained_cfg
    listed = library.get_pretrained_cfg(".".join(filter(None, (facts["architecture"], facts.get("tag")))))
    if "quickgelu" in facts["architecture"] or "QuickGELU" not in str(listed and listed.notes):
        return False
    for block in trunk.blocks:
        block.mlp.act = library.layers.QuickGELU()
    return True
