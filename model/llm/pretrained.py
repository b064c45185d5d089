"""A pretrained language model to start from: its shape, its weights and the folder of its tokenizer.

In:  gpt:SOURCE, where SOURCE is a folder (config.json, tokenizer.json, and model.safetensors, its shards, pytorch_model.bin or a
     .pth) or a name on the Hugging Face hub. model/llm/gpt.py computes these families: Llama, Qwen2, Qwen3, MiniMind.
Out: a `Start`: `config` is that of a complete model with this language model, `fill` copies the weights into the decoder.

    python 1-pretrain_vlm.py --llm gpt:HuggingFaceTB/SmolLM2-135M-Instruct --train.llm freeze --optimizer adamw --lr 3e-3
Nothing is guessed: a setting that the decoder does not compute, or a missing, unexpected or misshapen tensor is an error.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model import checkpoint
from model.config import LLMConfig, VLMConfig
from model.llm.rope import scaling
from model.registry import PRETRAINED, UserError

FAMILIES = {"llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}, "minimind": {}}
ONLY = {  # settings that change the mathematics: key of config.json, the one value that the decoder computes
    "hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "use_moe": False, "quantization_config": None,
    "partial_rotary_factor": 1.0, "inference_rope_scaling": False, "pretraining_tp": 1,
}  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attention\.mask)|pos_cis|(model\.)?freqs_(cos|sin)")  # follow from the config
MINIMIND = {  # the names of MiniMind v1, part by part
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm", "layers": "model.layers",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attention": "self_attn", "wq": "q_proj",
    "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip


@dataclasses.dataclass
class Start:
    """Where a language model's weights come from; this base class: random weights. `folder` holds a pretrained tokenizer."""

    name: str = ""  # of LLMS; "": the preset's
    folder: Path | None = None

    def config(self, base: VLMConfig) -> VLMConfig:
        """The preset with this language model instead of its own."""
        return dataclasses.replace(base, llm_name=self.name or base.llm_name)

    def fill(self, llm: nn.Module) -> str:
        """Copy the weights into the language model; returns one line for the log."""
        return "the language model begins with random weights"


@dataclasses.dataclass
class Pretrained(Start):
    """A language model that was trained elsewhere."""

    shape: LLMConfig = dataclasses.field(kw_only=True)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict, kw_only=True)
    tables: tuple[str, ...] = dataclasses.field(default=TABLES, kw_only=True)  # which tensors have a row for each token

    def config(self, base: VLMConfig) -> VLMConfig:
        """The preset with this shape; <image> takes an unused row of the embedding table, or a new one at its end."""
        tokens, rows = base.llm.vocab_size, self.shape.vocab_size
        if tokens > rows + 1:
            raise UserError(f"{self.folder}: {tokens} tokens in the tokenizer, {rows} rows in the embedding table: "
                             f"they belong to different models")
        return dataclasses.replace(base, llm=dataclasses.replace(self.shape, vocab_size=max(tokens, rows)), llm_name=self.name)

    def fill(self, llm: nn.Module) -> str:
        """Copy the weights; UserError names every tensor that is missing, unexpected or of another shape."""
        expected, tensors = llm.state_dict(), dict(self.tensors)
        for name in set(self.tables) & expected.keys() & tensors.keys():
            table, missing = tensors[name], len(expected[name]) - len(tensors[name])
            if missing > 0:  # a new token starts as the mean of all rows: neither likely nor unlikely
                tensors[name] = torch.cat([table, table.float().mean(0, keepdim=True).to(table.dtype).expand(missing, -1)])
        matched = checkpoint.load_weights(llm, tensors, str(self.folder), with_encoder=True)
        self.tensors.clear()  # the module holds them now
        return f"{self.folder}: {matched} tensors matched, 0 missing, 0 unexpected"


def start(spec: str) -> Start:
    """The Start that --llm names: NAME for random weights, NAME:SOURCE for pretrained ones."""
    return PRETRAINED.make(spec) if ":" in spec else Start(spec)


@PRETRAINED.register("gpt")
def gpt(source: str) -> Pretrained:
    """The hand-written decoder with the weights of a Llama, Qwen2, Qwen3 or MiniMind."""
    folder = local_folder(str(source))
    shape, tensors = to_llama(read_config(folder), read_tensors(folder), folder)
    return Pretrained("gpt", folder, shape=shape, tensors=tensors)


def local_folder(source: str) -> Path:
    """The folder itself, or a hub name's folder after a download; FileNotFoundError says what to do without a network."""
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileNotFoundError(f"{source} is a file: name its folder, with config.json and tokenizer.json in it")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.jinja", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(source, allow_patterns=["*.bin", "*.pth"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and the Hugging Face hub gave no model of that name. With a network, "
            f"`hf download {source}` fetches it once; without one, name a local folder. The error was: {error}") from error
    return folder


def read_config(folder: Path) -> dict:
    """config.json as a dict; FileNotFoundError says how to write one for bare weights."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}. Weights alone do not show heads, eps and theta; for a .pth of MiniMind v1 write "
            '{"model_type": "minimind", "dim": 512, "n_layers": 8, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 6400, '
            '"norm_eps": 1e-5, "max_seq_len": 8192, "rope_theta": 1e6} with the values it was trained with')
    return json.loads(file.read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder, in any of the stored forms; FileNotFoundError if there are none, or a shard is missing."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if absent := [name for name in names if not (folder / name).is_file()]:
                raise FileNotFoundError(f"{index} names {', '.join(absent)}, not in the folder: fetch the rest of the model")
            return {key: tensor for name in names for key, tensor in read_file(folder / name).items()}
        if single.is_file():
            return read_file(single)
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} holds no model.safetensors, no pytorch_model.bin and {len(files)} .pth files: it "
                                f"should hold the weights of one model")
    return read_file(files[0])


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, read without running code."""
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """(H * K, C) whose RoPE pairs are neighbours (2i, 2i + 1) -> the same map with half-split pairs (i, i + K/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_llama(values: dict, tensors: dict[str, Tensor], folder: Path) -> tuple[LLMConfig, dict[str, Tensor]]:
    """A config.json and its tensors as LLMConfig and Llama's names; UserError for settings that the decoder does not compute."""
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{folder}: model_type {family!r} is not one that model/llm/gpt.py computes ({', '.join(FAMILIES)}); "
                         f"--llm huggingface:{folder} runs it through transformers")
    unsupported = [f"{key} = {values[key]!r}" for key, allowed in ONLY.items() if values.get(key, allowed) != allowed]
    if values.get("attention_bias") and family != "qwen2":
        unsupported.append("attention_bias = True")
    if "sliding_attention" in (values.get("layer_types") or ()):
        unsupported.append("layer_types with sliding_attention")
    if unsupported:
        raise UserError(f"{folder}/config.json has {', '.join(unsupported)}, which model/llm/gpt.py does not compute; "
                         f"--llm huggingface:{folder} runs it through transformers")
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    if "tok_embeddings.weight" in tensors:
        values, tensors = minimind_to_llama(values, tensors)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    tied = values.get("tie_word_embeddings", "lm_head.weight" not in tensors)
    settings = {
        "num_key_value_heads": values.get("num_key_value_heads") or values.get("num_attention_heads"),
        "head_dim": values.get("head_dim"), "tie_word_embeddings": tied, "rope_scaling": scaling(rope),
        "rope_theta": float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))), **FAMILIES[family],
    }  # fmt: skip
    if family == "minimind":  # some releases have qk-norm, and no key of the config says so
        settings["qk_norm"] = any(name.endswith("q_norm.weight") for name in tensors)
    try:
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                    "max_position_embeddings", "rms_norm_eps"):  # fmt: skip
            settings[key] = values[key]
    except KeyError as error:
        raise UserError(f"{folder}/config.json has no {error}: add the value that the model was trained with") from error
    head = tensors.get("lm_head.weight")
    if tied and head is not None and torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
        del tensors["lm_head.weight"]  # the tied matrix, stored twice
    return LLMConfig(**settings), tensors


def minimind_to_llama(values: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """MiniMind v1's settings and names (jingyaogong/minimind, model/LMConfig.py and model.py) as Llama's; always tied."""
    missing = sorted({"dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "max_seq_len"} - values.keys())
    if missing:
        raise UserError(f"config.json of a MiniMind v1 has no {', '.join(missing)}: add the values that it was trained with")
    heads = values["n_heads"]
    kv_heads = values.get("n_kv_heads") or heads
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith(("wq.weight", "wk.weight")):
            tensor = half_split(tensor, heads if name.endswith("wq.weight") else kv_heads)
        renamed[".".join(MINIMIND.get(part, part) for part in name.split("."))] = tensor
    settings = {
        "hidden_size": values["dim"], "num_hidden_layers": values["n_layers"], "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": values["vocab_size"], "rms_norm_eps": values["norm_eps"],
        "max_position_embeddings": values["max_seq_len"], "rope_theta": values.get("rope_theta", 10_000.0),
        "intermediate_size": len(renamed["model.layers.0.mlp.gate_proj.weight"]), "tie_word_embeddings": True,
    }  # fmt: skip
    return settings, renamed
