"""A checkpoint as LLaVA: the values of config.json, and the tensors under the names that llava-hf publishes.

In:  a `VLM` of model/checkpoint.py (LoRA is merged in a checkpoint) and how its end of turn is numbered.
Out: values of config.json and tensors by name. Nothing is rounded: they are the same numbers.

    encoder      CLIPVisionModel: hidden states after its last block, before its last norm, with or without CLS
    connector    linear_1, activation, linear_2. A single matrix is linear_1; linear_2 is then the identity, which adds nothing
    llm          Llama, Qwen2 (biases of q, k and v) or Qwen3 (norms of q and k), by the switches of its config
A connector of another form is computed by its own source beside the weights (own_code.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.connector.identity import Identity
from model.connector.linear import Linear
from model.connector.mlp import MLP
from model.encoder.clip import ViT
from model.encoder.huggingface import RENAMED
from model.encoder.select import Selected
from model.llm.gpt import GPT
from model.registry import CONNECTORS, UserError
from model.vlm import VLM

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What stands before the names of the encoder, the connector, the language model and its head.
NAMES = ("vision_tower.vision_model", "multi_modal_projector", "language_model.model", "language_model.")  # as llava-hf publishes
NAMES_OF_CLASSES = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "")


def require_exportable(model: VLM) -> None:
    """UserError names the part that no class of transformers computes."""
    config = model.config
    if not isinstance(vit(model), ViT):
        raise UserError(f"--encoder {config.encoder} cannot be exported: LLaVA's class takes a CLIP ViT (tiny_clip, clip_random, "
                        f"open_clip: and huggingface: of a plain CLIP, select: of these), and this is another tower")
    if not isinstance(model.llm, GPT) or type(model.llm).__name__ != "GPT":
        raise UserError(f"--llm {config.llm_name} cannot be exported: only gpt is a Llama, Qwen2 or Qwen3 of transformers")
    if config.tiles:
        raise UserError(f"a model with --tiles {config.tiles} cannot be exported: LLaVA's processor shows every picture once. "
                        f"Train it without tiles")


def vit(model: VLM) -> nn.Module:
    """The encoder, without the selection around it."""
    return model.encoder.encoder if isinstance(model.encoder, Selected) else model.encoder


def is_llava(connector: nn.Module) -> bool:
    """Whether LLaVA's own projector computes this connector: at most two maps of single tokens."""
    return isinstance(connector, Identity | Linear) or isinstance(connector, MLP) and len(connector.layers) <= 3


# ---------------------------------------------------------------- config.json


def config_json(model: VLM, stop_ids: list[int]) -> dict[str, Any]:
    """The values of config.json. `pupil` holds those of our checkpoint, for the way back."""
    connector = model.connector
    values = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": "float32",
        "image_token_index": model.config.image_token_id, "image_seq_length": model.image_tokens,
        "text_config": text_config(model, stop_ids), "vision_config": vision_config(model.encoder, vit(model)),
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full" if model.encoder.has_cls else "default",
        "tie_word_embeddings": model.config.llm.tie_word_embeddings, "pupil": model.config.to_dict(),
    }  # fmt: skip
    if is_llava(connector):
        two = isinstance(connector, MLP) and len(connector.layers) == 3
        return {**values, "projector_hidden_act": "gelu" if two else "linear",
                "multimodal_projector_bias": isinstance(connector, MLP)}  # fmt: skip
    encoder, (_, options) = model.encoder, CONNECTORS.parsed(model.config.connector, encoder=None, channels=0)
    facts = {"dim": encoder.dim, "tokens": encoder.tokens, "has_cls": encoder.has_cls}
    return {  # programs that look `architectures` up in transformers find the class that auto_map leads on from
        **values, "architectures": ["AutoModelForImageTextToText"], "model_type": "pupil", "connector_options": options,
        "encoder_facts": facts, "auto_map": {"AutoConfig": "modeling_pupil.PupilConfig",
                                             "AutoModelForImageTextToText": "modeling_pupil.LlavaForConditionalGeneration"},
    }  # fmt: skip


def text_config(model: VLM, stop_ids: list[int]) -> dict[str, Any]:
    """The language model's own config.json. One with both biases and norms is a Qwen3; its o_proj then has a bias of 0."""
    llm = model.config.llm
    family = "qwen3" if llm.qk_norm else "qwen2" if llm.attention_bias else "llama"
    rope = {"rope_theta": llm.rope_theta, **(llm.rope_scaling or {"rope_type": "default"})}
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
            "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    return {
        "architectures": [FAMILIES[family]], "model_type": family, "hidden_act": "silu", "head_dim": llm.head_channels,
        "attention_bias": llm.attention_bias, "rope_parameters": rope, "rope_theta": llm.rope_theta, "dtype": "float32",
        "rope_scaling": llm.rope_scaling, "bos_token_id": None, "eos_token_id": stop_ids, "pad_token_id": None,
        **{name: getattr(llm, name) for name in same},
    }  # fmt: skip


def vision_config(encoder: Any, tower: Any) -> dict[str, Any]:
    """CLIPVisionConfig. Blocks that `select` removed are not there."""
    facts = tower.facts
    return {
        "model_type": "clip_vision_model", "image_size": facts["size"], "patch_size": facts["patch"], "layer_norm_eps": 1e-5,
        "hidden_size": facts["width"], "num_hidden_layers": len(encoder.blocks), "num_attention_heads": facts["heads"],
        "intermediate_size": facts["mlp"], "hidden_act": facts["activation"], "num_channels": 3, "dtype": "float32",
        "projection_dim": facts["output"] or facts["width"],
    }  # fmt: skip


# ---------------------------------------------------------------- tensors


def tensors(model: VLM) -> dict[str, Tensor]:
    """Every tensor of the model in fp32, under llava-hf's names; beside code of our own, under those of its classes."""
    plain = is_llava(model.connector)
    vision, connector, llm, head = NAMES if plain else NAMES_OF_CLASSES
    projection = projector(model.connector, model.llm.dim) if plain else model.connector.state_dict()
    result = {f"{vision}.{name}": tensor for name, tensor in clip_tensors(vit(model).state_dict()).items()}
    result |= {f"{connector}.{name}": tensor for name, tensor in projection.items()}
    for name, tensor in model.llm.state_dict().items():
        their_name = f"{llm}.{name.removeprefix('model.')}" if name.startswith("model.") else f"{head}{name}"
        result[their_name] = tensor
        if name.endswith("v_proj.bias") and model.config.llm.qk_norm:
            result[their_name.replace("v_proj", "o_proj")] = tensor.new_zeros(model.config.llm.hidden_size)
    return {name: tensor.detach().float().contiguous() for name, tensor in result.items()}


def clip_tensors(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our ViT as CLIPVisionModel's: the inverse of model/encoder/huggingface.py. `proj` has no place in it."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for their_name, our_name in RENAMED.items():
            name = f".{name}.".replace(f".{our_name}.", f".{their_name}.").strip(".")
        if "in_proj_" in name:
            theirs |= {name.replace("in_proj_", f"{part}_proj."): third for part, third in zip("qkv", tensor.chunk(3))}
        elif name != "proj":
            theirs[name] = tensor
    return theirs


def projector(connector: nn.Module, channels: int) -> dict[str, Tensor]:
    """LLaVA's linear_1 and linear_2 of an identity, a linear map, or an MLP of one or two maps."""
    nothing = {"weight": torch.eye(channels), "bias": torch.zeros(channels)}  # the map that changes nothing
    maps = [map_.state_dict() for map_ in connector.modules() if isinstance(map_, nn.Linear)]
    names = maps[0].keys() if maps else ("weight",)
    while len(maps) < 2:
        maps.append({name: nothing[name].clone() for name in names})
    return {f"linear_{place}.{name}": tensor for place, map_ in enumerate(maps, 1) for name, tensor in map_.items()}
