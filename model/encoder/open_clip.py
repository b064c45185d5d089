"""Any image encoder ("tower") of open_clip: a plain CLIP ViT is copied into ours (clip.py), any other runs through the library.

In:  pixels (N, 3, S, S), normalised by the tower's mean and std.
Out: (N, P, D): the CLS token, if the tower has one, and all patches after the last block, before the last norm.
Legend: N images, P tokens per image, D channels of the encoder, S pixels a side.

open_clip:NAME/TAG    weights that open_clip fetches once: open_clip:ViT-B-32/laion2b_s34b_b79k, open_clip:ViT-B-16-SigLIP2/webli
open_clip:NAME/FILE   the same architecture with the weights of a local file; NAME-quickgelu if they were trained with quick_gelu,
                      as OpenAI's, MetaCLIP's and DFN's were (the tags say so themselves)
open_clip:FOLDER      a folder fetched from the Hugging Face Hub, with open_clip_config.json and weights; also hf-hub:OWNER/NAME.
                      Hugging Face's own form of a CLIP is read, too (huggingface.py)
size=384              pictures of another size than in training; position embeddings are interpolated
Sources: CLIP arXiv 2103.00020, SigLIP 2303.15343, SigLIP2 2502.14786, EVA 2303.15389, MobileCLIP 2311.17049.
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.encoder import Encoder
from model.encoder.clip import ViT
from model.encoder.huggingface import huggingface, is_clip
from model.encoder.timm import SOURCES, Tower
from model.hub import at_once, one_line
from model.registry import ENCODERS, UserError


class Transformer(Tower):
    """One of open_clip's own ViTs that is not a plain CLIP: layer scale, no first norm, other pooling (CoCa, CLIPA)."""

    @property
    def blocks(self) -> Any:
        return getattr(getattr(self.trunk, "transformer", None), "resblocks", None)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D), the CLS token first."""
        out = self.trunk.forward_intermediates(
            pixels, indices=1, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True)  # fmt: skip
        return torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], dim=1)


@ENCODERS.register("open_clip")
def open_clip(weights: str, size: int = 0) -> Encoder:
    """A pretrained tower through open_clip (CLIP, SigLIP, EVA, MobileCLIP): NAME/TAG, NAME/FILE, or the FOLDER of one."""
    if Path(weights).is_dir():
        if not (Path(weights) / "open_clip_config.json").is_file() and is_clip(Path(weights)) and not size:
            return huggingface(weights)
        weights = f"local-dir:{weights}"
    import open_clip as library  # takes seconds, and only this function needs it

    name, _, tag = (weights, "", "") if weights.startswith(SOURCES) else weights.partition("/")
    facts = {} if name.startswith(SOURCES) else facts_of_weights(library, name, tag)
    try:
        with at_once(), errors_told_once():
            # Without require_pretrained, a folder without weights would give random ones and a warning.
            model: Any = library.create_model(
                name, pretrained=tag or None, force_image_size=size or None, require_pretrained=True, **facts)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"could not get {weights} from open_clip. {remedy(library, name, tag)}. "
                        f"The error was: {one_line(error)}") from error
    return tower(model.visual, name.rpartition("/")[2])


def facts_of_weights(library: Any, name: str, tag: str) -> dict[str, Any]:
    """What create_model is told besides NAME and TAG, or FILE: open_clip only warns where the weights need another activation.

    quick_gelu is used where the name or the tag says so. Pixels of a FILE are normalised as all tags of the architecture say;
    where these differ, as OpenAI's CLIP. UserError for a name or tag that there is not.
    """
    known, tags = library.list_models(), library.list_pretrained_tags_by_model(name)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UserError(f"open_clip knows no model {name!r}, and there is no folder {name}. Near it: {', '.join(near) or 'none'}")
    if not tag:
        raise UserError(f"open_clip:{name} does not say which weights: write open_clip:{name}/TAG with one of {', '.join(tags)}")
    if of_tag := library.get_pretrained_cfg(name, tag):
        return {"force_quick_gelu": bool(of_tag.get("quick_gelu"))}
    if not Path(tag).is_file():
        raise UserError(f"open_clip:{name}/{tag}: neither a tag ({', '.join(tags) or 'this model has none'}) nor a file")
    stated = {(cfg.get("mean"), cfg.get("std")) for cfg in (library.get_pretrained_cfg(name, one) for one in tags)}
    (mean, std) = stated.pop() if len(stated) == 1 else (None, None)
    return {"force_preprocess_cfg": {"mean": mean, "std": std}} if mean and std else {}


def remedy(library: Any, name: str, tag: str) -> str:
    """How to fetch weights once, and how to name them afterwards without a network."""
    cfg = {} if name.startswith(SOURCES) else library.get_pretrained_cfg(name, tag)
    if cfg.get("quick_gelu") and f"{name}-quickgelu" in library.list_models():
        name = f"{name}-quickgelu"  # a file does not say so itself
    command = f"`hf download {cfg['hf_hub'].strip('/')}`; " if cfg.get("hf_hub") else ""
    return (f"Fetch it once with a network ({command}it stays in the Hugging Face cache), or name a local file: "
            f"open_clip:{name}/path/to/open_clip_model.safetensors; --encoder tiny_clip needs neither")


@contextlib.contextmanager
def errors_told_once() -> Iterator[None]:
    """open_clip logs an error before it raises it; inside, only the exception tells."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def tower(visual: Any, name: str) -> Encoder:
    """Our own ViT if it can hold these weights, else the library's; UserError if there are no patch tokens."""
    size, facts = visual.image_size[0], visual.preprocess_cfg
    if hasattr(visual, "trunk"):  # timm's: SigLIP, EVA, MobileCLIP, ConvNeXt
        return Tower(visual.trunk, name, size, facts["mean"], facts["std"])
    try:
        return copy_tower(visual, facts["mean"], facts["std"])
    except NotPlain:
        quick = any(type(module).__name__ == "QuickGELU" for module in visual.modules())
        return Transformer(visual, f"{name}, quick_gelu" if quick else name, size, facts["mean"], facts["std"])


class NotPlain(ValueError):
    """A tower that the ViT of clip.py cannot represent."""


def copy_tower(visual: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> ViT:
    """Our ViT with the weights of an open_clip visual tower; NotPlain if that is not a plain CLIP ViT."""
    refusal = f"{type(visual).__name__} is not a plain CLIP ViT, the only one that model/encoder/clip.py computes"
    if type(visual).__name__ != "VisionTransformer":
        raise NotPlain(refusal)
    first = visual.transformer.resblocks[0]
    encoder = ViT(
        size=visual.image_size[0],
        patch=visual.patch_size[0],
        width=len(visual.class_embedding),
        layers=len(visual.transformer.resblocks),
        heads=first.attn.num_heads,
        mlp=first.mlp.c_fc.out_features,
        output=visual.output_dim,
        # Read from the module, since the name leaves it open (ViT-B-32 is quick_gelu from OpenAI, gelu from LAION).
        activation="quick_gelu" if type(first.mlp.gelu).__name__ == "QuickGELU" else "gelu",
        mean=mean,
        std=std,
    )
    try:
        encoder.load_state_dict(visual.state_dict())
    except RuntimeError as error:
        raise NotPlain(f"{refusal}: {error}") from error
    # Equal parameter names do not guarantee equal computation (pooling, say): compare one embedding.
    with torch.no_grad():
        pixels = torch.randn(1, 3, encoder.size, encoder.size)
        difference = (encoder.embed(pixels) - F.normalize(visual.eval()(pixels), dim=-1)).abs().max().item()
    if difference > 1e-4:
        raise NotPlain(f"{refusal}: its embedding differs from ours by {difference:.1e} (allowed 1e-4)")
    return encoder
