"""Hugging Face's folder of a CLIP, copied into our ViT (clip.py); transformers is not needed.

In:  config.json, model.safetensors (or shards, or pytorch_model.bin), and preprocessor_config.json, if there is one.
Out: a `ViT` with the same features: `vision_model(pixels).last_hidden_state`, the CLS token first.

huggingface:FOLDER        a folder as the hub gives it, or as `save_pretrained` writes it
huggingface:OWNER/NAME    fetched once: huggingface:openai/clip-vit-base-patch32
A folder of the vision tower alone has no map into the space shared with text, so connectors then begin with random weights.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from model.encoder.clip import ACTIVATIONS, MEAN, STD, ViT
from model.hub import local_folder, one_line, read_json, read_tensors
from model.registry import ENCODERS, UserError

DEFAULTS = {  # of CLIPVisionConfig: a config.json states what differs
    "image_size": 224, "patch_size": 32, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
}  # fmt: skip
KINDS = ("clip", "clip_vision_model")
ELSEWHERE = {  # other encoders in Hugging Face's form, and where the same weights are read
    "siglip": "open_clip:ViT-B-16-SigLIP/webli", "siglip_vision_model": "open_clip:ViT-B-16-SigLIP/webli",
    "siglip2": "open_clip:ViT-B-16-SigLIP2/webli", "siglip2_vision_model": "open_clip:ViT-B-16-SigLIP2/webli",
    "dinov2": "timm:vit_base_patch14_dinov2.lvd142m",
}  # fmt: skip
RENAMED = {
    "embeddings.class_embedding": "class_embedding", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "encoder.layers":
    "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
}  # fmt: skip


@ENCODERS.register("huggingface")
def huggingface(weights: str) -> ViT:
    """A CLIP in Hugging Face's form: FOLDER, or OWNER/NAME on the hub."""
    folder = local_folder(weights)
    settings = vision_settings(folder)
    tensors = renamed(read_tensors(folder))
    computed = {"hidden_act": tuple(ACTIVATIONS), "layer_norm_eps": (1e-5,), "num_channels": (3,)}
    if other := [f"{key} = {settings[key]!r}" for key, allowed in computed.items() if settings[key] not in allowed]:
        raise UserError(f"{folder}/config.json has {', '.join(other)}, which model/encoder/clip.py does not compute")
    mean, std = normalisation(folder)
    width = settings["hidden_size"]
    tensors.setdefault("proj", torch.empty(width, 0))  # of a vision tower alone
    encoder = ViT(
        size=settings["image_size"], patch=settings["patch_size"], width=width, layers=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"], mlp=settings["intermediate_size"], output=tensors["proj"].shape[1],
        activation=settings["hidden_act"], mean=mean, std=std,
    )  # fmt: skip
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} are not those of its config.json: {one_line(error)}") from error
    return encoder


def is_clip(folder: Path) -> bool:
    """Whether a folder holds a CLIP in Hugging Face's form."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("model_type") in KINDS


def vision_settings(folder: Path) -> dict:
    """The settings of the vision tower; UserError for another kind of model, and where to look for it."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}: fetch the whole folder of the model")
    values = read_json(folder / "config.json")
    kind = values.get("model_type")
    if kind not in KINDS:
        hint = f": take {ELSEWHERE[kind]}" if kind in ELSEWHERE else ""
        raise UserError(f"{folder} holds a {kind}, and of Hugging Face's form only CLIP is read as an encoder{hint}")
    return {**DEFAULTS, **(values.get("vision_config") or {} if kind == "clip" else values)}


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the pixels; CLIP's own where no file states them, as in transformers."""
    values: dict = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not values and (folder / name).is_file():
            values = read_json(folder / name)
    values = values.get("image_processor") or values
    return tuple(values.get("image_mean") or MEAN), tuple(values.get("image_std") or STD)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a CLIP, with or without its text tower, as those of our ViT: q, k and v of a block in one matrix."""
    whole = any(name.startswith("vision_model.") for name in tensors)
    ours: dict[str, Tensor] = {}
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "visual_projection.weight":
            ours["proj"] = tensor.float().T
            continue
        if whole and not name.startswith("vision_model.") or name.endswith("position_ids"):
            continue  # the text tower and the temperature; numbers that follow from the size
        name = name.removeprefix("vision_model.")
        for theirs, mine in RENAMED.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\1{mine}", name)
        (apart if re.search(r"\.[qkv]_proj\.", name) else ours)[name] = tensor.float()
    for name in [name for name in apart if ".q_proj." in name]:
        parts = [apart[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        ours[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return ours
