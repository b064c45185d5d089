"""MiniMind and MiniMind-V, as they are published: their names and settings as Llama's, and what a bare .pth leaves open.

In:  the tensors of a .pth, .bin or .safetensors and the values of config.json, if there is one.
Out: Llama's settings and names for model/llm/gpt.py, and the projection of a MiniMind-V.

    MiniMind 1 and the first 2    tok_embeddings, wq, w1 ...; RoPE turns neighbours      MiniMind-V 1, MiniMind2-V
    MiniMind 2 from April 2025    Hugging Face's names                                   MiniMind2-V
    MiniMind 3                    the same with qk-norm                                  MiniMind-3V: its projection is a network
Source: jingyaogong/minimind (LMConfig.py, model.py, model_minimind.py) and jingyaogong/minimind-v (model_vlm.py).
"""

import json
import re
from pathlib import Path

from torch import Tensor

from model.registry import UserError

NAMES = {  # of the first form, part by part
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm", "layers": "model.layers",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn", "wq": "q_proj",
    "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # what torch.compile and DDP put before every name
PROJECTION = {"vision_proj.vision_proj.0.weight": "layers.0.weight", "vision_proj.vision_proj.0.bias": "layers.0.bias"}
CONNECTOR = "mlp:depth=1"  # one linear map with a bias
TRAINED_ON = ("--encoder huggingface:openai/clip-vit-base-patch32 for MiniMind-V 1, "
              "--encoder select:huggingface:openai/clip-vit-base-patch16,cls=false for MiniMind2-V")  # fmt: skip


def half_split(weight: Tensor, heads: int) -> Tensor:
    """(H * K, C) whose RoPE pairs are neighbours (2i, 2i + 1) -> the same map with half-split pairs (i, i + K/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_llama(values: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Settings and tensors of the first form as Llama's; always tied. UserError for a missing setting, or one that cannot be."""
    missing = sorted({"dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "max_seq_len"} - values.keys())
    if missing:
        raise UserError(f"config.json of a MiniMind v1 has no {', '.join(missing)}: add the values that it was trained with")
    heads = values["n_heads"]
    kv_heads = values.get("n_kv_heads") or heads
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(("wq.weight", "wk.weight")):
            count = heads if name.endswith("wq.weight") else kv_heads
            if len(tensor) * heads != count * values["dim"]:
                raise UserError(f"{name} has {len(tensor)} rows; {count} of {heads} heads of dim {values['dim']} would have "
                                f"{count * values['dim'] // heads}: write the n_heads and n_kv_heads of training in config.json")
            tensor = half_split(tensor, count)
        renamed[".".join(NAMES.get(part, part) for part in name.split("."))] = tensor
    settings = {
        "hidden_size": values["dim"], "num_hidden_layers": values["n_layers"], "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": values["vocab_size"], "rms_norm_eps": values["norm_eps"],
        "max_position_embeddings": values["max_seq_len"], "rope_theta": values.get("rope_theta", 10_000.0),
        "intermediate_size": len(renamed["model.layers.0.mlp.gate_proj.weight"]), "tie_word_embeddings": True,
    }  # fmt: skip
    return settings, renamed


# ---------------------------------------------------------------- MiniMind-V


def split(tensors: dict[str, Tensor], where: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """(language model, projection under our names, number of the encoder's tensors) of the weights of a MiniMind-V.

    The encoder comes by name and is left out. UserError for the projection of MiniMind-3V.
    """
    unwrapped = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    language = {name: tensor for name, tensor in unwrapped.items() if not name.startswith(("vision_proj.", "vision_encoder."))}
    found = {name: tensor for name, tensor in unwrapped.items() if name.startswith("vision_proj.")}
    if found and found.keys() != PROJECTION.keys():
        raise UserError(f"{where}: its projection ({', '.join(found)}) is the network of MiniMind-3V over normalised features of "
                        f"SigLIP2, which no connector here computes. Its language model is published by itself, as MiniMind 3")
    return language, {PROJECTION[name]: tensor for name, tensor in found.items()}, len(unwrapped) - len(language) - len(found)


# ---------------------------------------------------------------- a bare .pth


def no_config(folder: Path, tensors: dict[str, Tensor]) -> str:
    """What to do where config.json is missing: the text of the one that fits names and shapes, if it is a MiniMind."""
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in tensors.items()}
    told = f"no config.json in {folder}. Weights alone do not show heads, eps and theta"
    if any(".experts." in name for name in tensors):
        return f"{told}, and a mixture of experts is not computed here: choose a MiniMind without MoE"
    for release, values in (("MiniMind 1 or 2", first_form(tensors)), ("MiniMind 2 or 3", second_form(tensors))):
        if values:
            return (f"{told}. Names and shapes are those of a {release}: write {json.dumps(values)} into "
                    f"{folder / 'config.json'}, with the heads, eps and theta that it was trained with")
    return f"{told}: add the config.json that was published with them"


def first_form(tensors: dict[str, Tensor]) -> dict:
    """The config.json of weights with the names of MiniMind 1, {} for others. A half as many keys as queries: MiniMind 1."""
    if not {"tok_embeddings.weight", "layers.0.attention.wk.weight"} <= tensors.keys():
        return {}
    vocab_size, dim = tensors["tok_embeddings.weight"].shape
    one = 2 * len(tensors["layers.0.attention.wk.weight"]) == dim
    heads = {"n_heads": 16, "n_kv_heads": 8} if one else {"n_heads": 8, "n_kv_heads": 2}
    reach = {"max_seq_len": 512, "rope_theta": 1e4} if one else {"max_seq_len": 8192, "rope_theta": 1e6}
    return {"model_type": "minimind", "dim": dim, "n_layers": layers(tensors, "layers"), **heads, "vocab_size": vocab_size,
            "norm_eps": 1e-5, **reach}  # fmt: skip


def second_form(tensors: dict[str, Tensor]) -> dict:
    """The config.json of weights with Hugging Face's names, {} for others. qk-norm shows the channels of a head: MiniMind 3."""
    names = {"model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"}
    if not names <= tensors.keys():
        return {}
    vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
    attention = "model.layers.0.self_attn."
    norm = tensors.get(f"{attention}q_norm.weight")
    heads, kv_heads = (len(tensors[f"{attention}{name}_proj.weight"]) for name in "qk")
    kv_heads = 8 * kv_heads // heads if norm is None else kv_heads // len(norm)
    heads = 8 if norm is None else heads // len(norm)
    return {"model_type": "minimind", "hidden_size": hidden_size, "num_hidden_layers": layers(tensors, "model.layers"),
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, **({} if norm is None else {"head_dim": len(norm)}),
            "intermediate_size": len(tensors["model.layers.0.mlp.gate_proj.weight"]), "vocab_size": vocab_size,
            "rms_norm_eps": 1e-5 if norm is None else 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6}  # fmt: skip


def layers(tensors: dict[str, Tensor], prefix: str) -> int:
    """The number of blocks whose tensors begin with `prefix`."""
    return len({name.removeprefix(f"{prefix}.").partition(".")[0] for name in tensors if name.startswith(f"{prefix}.")})
