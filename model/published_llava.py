"""What a published LLaVA is made of, in the names of our parts.

In:  the values of its config.json, in llava-hf's form or the original one, and its tensors by part (model/from_llava.py).
Out: `Parts`: names for the registries, and tensors under our names. UserError names what our parts do not compute.
Sources: LlavaForConditionalGeneration of transformers; llava_arch.py and the builders beside it in haotian-liu/LLaVA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.encoder.clip import MEAN, STD
from model.encoder.huggingface import DEFAULTS, normalisation, renamed
from model.llm.pretrained import FAMILIES, Pretrained, to_llama
from model.registry import UserError

OTHERS = (  # what begins the model_type of models whose parts are not ours, and which part
    ("qwen2_vl", "Qwen2-VL's tower has rotary positions and pictures of any size"),
    ("qwen2_5_vl", "Qwen2.5-VL's tower has windows, rotary positions and pictures of any size"),
    ("qwen3_vl", "Qwen3-VL's tower feeds several layers of the language model"),
    ("internvl", "InternVL's tower, InternViT, has a scale at every layer and another norm"),
    ("omnilmm", "OmniLMM's tower is EVA-02, and a resampler joins it"), ("minicpmv", "MiniCPM-V's tower is SigLIP in slices"),
    ("llava_next", "LLaVA-NeXT cuts pictures into tiles with a learned sign at every line end"),
    ("llava_onevision", "LLaVA-OneVision's tower is SigLIP, with tiles and a learned sign at every line end"),
)  # fmt: skip
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # LlamaConfig's: llava-hf states what differs  # fmt: skip


@dataclass
class Parts:
    """A model of others: names of our parts, and the tensors of each under our names (tower: {} where it comes by name)."""

    encoder: str
    connector: str
    fit: str
    tower: dict[str, Tensor]
    projection: dict[str, Tensor]
    language: Pretrained


def require_llava(values: dict[str, Any], folder: Path) -> None:
    """UserError for a model whose parts are known to be others, or that is no LLaVA."""
    kind = str(values.get("model_type"))
    for start, why in OTHERS:
        if kind.startswith(start):
            raise UserError(f"{folder} is a {kind}: {why}, which no encoder here computes. Its answers can be compared through "
                            f"transformers")
    if "text_config" not in values and "mm_vision_tower" not in values:
        raise UserError(f"{folder} is a {kind}, not a LLaVA: its config.json has neither text_config nor mm_vision_tower")


def parts_of(values: dict[str, Any], tensors: dict[str, dict[str, Tensor]], folder: Path) -> Parts:
    """The parts of a LLaVA; UserError names what ours do not compute."""
    kind, hf_form = str(values.get("model_type")), "text_config" in values
    encoder, tower = hf_tower(values, tensors, folder) if hf_form else original_tower(values, tensors, folder)
    text = values["text_config"] if hf_form else {**values, "model_type": kind.removeprefix("llava_").replace("llava", "llama")}
    tied = any(config.get("tie_word_embeddings") for config in (values, text)) or not tensors["head"]
    text = {"model_type": "llama", **text, "tie_word_embeddings": tied}
    if text["model_type"] not in FAMILIES:
        raise UserError(f"{folder}: its language model is a {text['model_type']}, not one of {', '.join(FAMILIES)}")
    language = {**{f"model.{name}": tensor for name, tensor in tensors["llm"].items()}, **tensors["head"]}
    shape, language = to_llama({**(LLAMA if text["model_type"] == "llama" else {}), **text}, language, folder)
    connector, projection = mlp(tensors["projector"], values, folder)
    fits = {None: "square", "square": "square", "pad": "pad"}
    if values.get("image_aspect_ratio") not in fits:
        raise UserError(f"{folder}: image_aspect_ratio = {values['image_aspect_ratio']!r} cuts pictures as no --fit here does")
    return Parts(encoder, connector, fits[values.get("image_aspect_ratio")], tower, projection,
                 Pretrained("gpt", folder, shape=shape, tensors=language))  # fmt: skip


def hf_tower(values: dict, tensors: dict, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """(encoder's name, its tensors) by vision_config."""
    vision = {**DEFAULTS, **values["vision_config"]}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise UserError(f"{folder}: its tower is a {vision['model_type']}, and of LLaVA's towers only CLIP is read here")
    if normalisation(folder) != (MEAN, STD):
        raise UserError(f"{folder}: its pictures are normalised by {normalisation(folder)}, and not as CLIP's: not read here")
    layer, select = values.get("vision_feature_layer", -2), values.get("vision_feature_select_strategy", "default")
    shape = {"size": "image_size", "patch": "patch_size", "width": "hidden_size", "heads": "num_attention_heads",
             "mlp": "intermediate_size", "activation": "hidden_act"}  # fmt: skip
    return tower(tensors["tower"], {ours: vision[theirs] for ours, theirs in shape.items()}, layer, select == "full", folder)


def original_tower(values: dict, tensors: dict, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """(encoder's name, its tensors) by mm_vision_tower: OpenAI's CLIP, with heads of 64 channels and quick_gelu."""
    name, layer = values["mm_vision_tower"], values.get("mm_vision_select_layer", -2)
    if "clip" not in name.lower() or "siglip" in name.lower():
        raise UserError(f"{folder}: its tower is {name}, and of LLaVA's towers only CLIP is read here")
    cls = values.get("mm_vision_select_feature", "patch") == "cls_patch"
    if not tensors["tower"]:
        return f"select:huggingface:{name},layer={layer},cls={str(cls).lower()}", {}
    patch, places = (tensors["tower"][f"embeddings.{name}_embedding.weight"] for name in ("patch", "position"))
    width, side = patch.shape[0], patch.shape[-1]
    shape = {"size": round((len(places) - 1) ** 0.5) * side, "patch": side, "width": width, "heads": width // 64,
             "mlp": len(tensors["tower"]["encoder.layers.0.mlp.fc1.weight"]), "activation": "quick_gelu"}  # fmt: skip
    return tower(tensors["tower"], shape, layer, cls, folder)


def tower(tensors: dict[str, Tensor], shape: dict, layer: Any, cls: bool, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """(name, tensors) of a CLIP up to the layer that LLaVA reads; blocks after it are left out."""
    ours = renamed(tensors)
    blocks = 1 + max((int(name.split(".")[2]) for name in ours if ".resblocks." in name), default=-1)
    kept = layer if isinstance(layer, int) and layer > 0 else blocks + 1 + layer if isinstance(layer, int) else 0
    if not 1 <= kept <= blocks:
        raise UserError(f"{folder}: features of layer {layer} of {blocks} are not those of one block, as an encoder here gives")
    spec = "clip_random:" + ",".join(f"{key}={value}" for key, value in {**shape, "layers": kept}.items())
    late = [name for name in ours if ".resblocks." in name and int(name.split(".")[2]) >= kept]
    if late:
        print(f"{folder}: {len(late)} tensors of {blocks - kept} blocks after layer {layer} are not read: no feature needs them")
    return (spec if cls else f"select:({spec}),cls=false"), {name: ours[name] for name in ours.keys() - set(late)}


def mlp(projector: dict[str, Tensor], values: dict, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """(connector's name, its tensors): linear_1 and linear_2 of llava-hf; 0, 2, ... or one bare map of the original."""
    kind = values.get("projector_hidden_act", "gelu") if "text_config" in values else values.get("mm_projector_type", "linear")
    places = {"linear_1": "layers.0", "linear_2": "layers.2", "weight": "layers.0.weight", "bias": "layers.0.bias"}
    named = {}
    for name, tensor in projector.items():
        first, _, rest = name.partition(".")
        named[".".join(filter(None, (places.get(first, f"layers.{first}"), rest)))] = tensor
    depth = sum(name.endswith("weight") for name in named)
    known = ("gelu",) if "text_config" in values else (f"mlp{depth}x_gelu", "linear")
    if kind not in known or not all(name.replace("weight", "bias") in named for name in named):
        raise UserError(f"{folder}: its projector is of the kind {kind!r} with {', '.join(projector)}; read are linear maps with "
                        f"biases and exact GELU between them")
    return f"mlp:depth={depth}", named
