"""A pretrained language model to start from: its shape, its weights and the folder of its tokenizer.

In:  gpt:SOURCE, where SOURCE is a folder (config.json, tokenizer.json, and model.safetensors, its shards, pytorch_model.bin or a
     .pth), a file of weights in such a folder, or a name on the Hugging Face hub. model/llm/gpt.py computes these families:
     Llama, Qwen2, Qwen3, MiniMind. Of a MiniMind-V the projection is read, too.
Out: a `Start`: `config` is that of a complete model with this language model, `fill` copies the weights into the decoder.

    python 1-pretrain_vlm.py --llm gpt:HuggingFaceTB/SmolLM2-135M-Instruct --train.llm freeze --optimizer adamw --lr 3e-3
    python 1-pretrain_vlm.py --preset small --llm gpt:v2/sft_vlm_512.pth --encoder select:huggingface:FOLDER,cls=false
Nothing is guessed: a setting that the decoder does not compute, or a missing, unexpected or misshapen tensor is an error.
"""

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from model import checkpoint
from model.config import PRESETS, LLMConfig, VLMConfig
from model.hub import local_folder, read_json, read_tensors
from model.llm import minimind
from model.llm.rope import scaling
from model.registry import PRETRAINED, UserError

FAMILIES = {
    "llama": {}, "qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}, "minimind": {}, "minimind-v": {},
}  # fmt: skip
ONLY = {  # settings that change the mathematics: key of config.json, the one value that the decoder computes
    "hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False, "use_moe": False, "quantization_config": None,
    "partial_rotary_factor": 1.0, "inference_rope_scaling": False, "pretraining_tp": 1,
}  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|attention\.mask)|pos_cis|(model\.)?freqs_(cos|sin)")  # follow from the config


@dataclasses.dataclass
class Start:
    """Where a language model's weights come from; this base class: random weights. `folder` holds a pretrained tokenizer."""

    name: str = ""  # of LLMS; "": the preset's
    folder: Path | None = None

    def config(self, base: VLMConfig) -> VLMConfig:
        """The preset with this language model instead of its own."""
        return dataclasses.replace(base, llm_name=self.name or base.llm_name)

    def fill(self, llm: nn.Module, connector: nn.Module | None = None) -> str:
        """Copy the weights into the language model, and a published projection into the connector; returns text for the log."""
        return "the language model begins with random weights"


@dataclasses.dataclass
class Pretrained(Start):
    """A language model that was trained elsewhere."""

    shape: LLMConfig = dataclasses.field(kw_only=True)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict, kw_only=True)
    tables: tuple[str, ...] = dataclasses.field(default=TABLES, kw_only=True)  # which tensors have a row for each token
    projection: dict[str, Tensor] = dataclasses.field(default_factory=dict, kw_only=True)  # of a MiniMind-V
    left_out: int = dataclasses.field(default=0, kw_only=True)  # tensors of an encoder, which comes by name

    def config(self, base: VLMConfig) -> VLMConfig:
        """The preset with this shape; <image> takes an unused row of the embedding table, or a new one at its end."""
        if all(dataclasses.replace(base.llm, vocab_size=known.llm.vocab_size) != known.llm for known in PRESETS.values()):
            raise UserError(f"{self.folder} has a shape of its own: leave out the options of --preset, or --llm")
        if self.projection:
            base = self.with_projection(base)
        tokens, rows = base.llm.vocab_size, self.shape.vocab_size
        if tokens > rows + 1:
            raise UserError(f"{self.folder}: {tokens} tokens in the tokenizer, {rows} rows in the embedding table: "
                             f"they belong to different models")
        return dataclasses.replace(base, llm=dataclasses.replace(self.shape, vocab_size=max(tokens, rows)), llm_name=self.name)

    def with_projection(self, base: VLMConfig) -> VLMConfig:
        """The config with a connector that holds the projection. UserError for an encoder that it was not trained with."""
        if base.connector not in ("linear", minimind.CONNECTOR):
            raise UserError(f"the weights in {self.folder} hold a linear projection, and the connector is {base.connector}: "
                            f"write --preset small, or --connector {minimind.CONNECTOR}")
        if base.encoder in {preset.encoder for preset in PRESETS.values()}:
            raise UserError(f"the projection in {self.folder} fits the encoder that it was trained with alone: "
                            f"{minimind.TRAINED_ON}; a local folder may stand in place of the name")
        return dataclasses.replace(base, connector=minimind.CONNECTOR)

    def fill(self, llm: nn.Module, connector: nn.Module | None = None) -> str:
        """Copy the weights; UserError names every tensor that is missing, unexpected or of another shape."""
        expected, tensors = llm.state_dict(), dict(self.tensors)
        for name in set(self.tables) & expected.keys() & tensors.keys():
            table, missing = tensors[name], len(expected[name]) - len(tensors[name])
            if missing > 0:  # a new token starts as the mean of all rows: neither likely nor unlikely
                mean = table.float().mean(0, keepdim=True).to(table.dtype)
                tensors[name] = torch.cat([table, mean.expand(missing, *table.shape[1:])])  # a bias has one number per token
        matched = checkpoint.load_weights(llm, tensors, str(self.folder), with_encoder=True)
        self.tensors.clear()  # the module holds them now
        return f"{self.folder}: {matched} tensors matched, 0 missing, 0 unexpected{self.fill_projection(connector)}"

    def fill_projection(self, connector: nn.Module | None) -> str:
        """Copy the projection, if there is one, into the connector; returns what the log tells of it and of the encoder."""
        told = f"\n{self.left_out} tensors of its encoder are not read: the encoder comes by name" if self.left_out else ""
        if not self.projection:
            return told
        if connector is None:
            raise UserError(f"the weights in {self.folder} hold a projection, and there is no connector to copy it to")
        try:
            matched = checkpoint.load_weights(connector, self.projection, f"the projection in {self.folder}", with_encoder=True)
        except UserError as error:
            raise UserError(f"{error}. Name the encoder that it was trained with: {minimind.TRAINED_ON}") from error
        self.projection.clear()
        return f"\nits projection: {matched} tensors matched, 0 missing, 0 unexpected{told}"


def start(spec: str) -> Start:
    """The Start that --llm names: NAME for random weights, NAME:SOURCE for pretrained ones."""
    return PRETRAINED.make(spec) if ":" in spec else Start(spec)


@PRETRAINED.register("gpt")
def gpt(source: str) -> Pretrained:
    """The hand-written decoder with the weights of a Llama, Qwen2, Qwen3 or MiniMind."""
    folder = local_folder(str(source))
    stored = read_tensors(Path(source) if Path(source).is_file() else folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(minimind.no_config(folder, stored))
    language, projection, left_out = minimind.split(stored, folder)
    shape, tensors = to_llama(read_json(folder / "config.json"), language, folder)
    return Pretrained("gpt", folder, shape=shape, tensors=tensors, projection=projection, left_out=left_out)


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
        values, tensors = minimind.to_llama(values, tensors)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    is_minimind = str(family).startswith("minimind")  # always tied; an older config.json does not say so
    tied = values.get("tie_word_embeddings", is_minimind or "lm_head.weight" not in tensors)
    settings = {
        "num_key_value_heads": values.get("num_key_value_heads") or values.get("num_attention_heads"),
        "head_dim": values.get("head_dim"), "tie_word_embeddings": tied, "rope_scaling": scaling(rope),
        "rope_theta": float(rope.get("rope_theta") or values.get("rope_theta") or 10_000.0), **FAMILIES[family],
    }  # fmt: skip
    if is_minimind:  # some releases have qk-norm, and no key of the config says so
        settings["qk_norm"] = any(name.endswith("q_norm.weight") for name in tensors)
        if values.get("intermediate_size", 0) is None:  # computed by its code from hidden_size
            values = {**values, "intermediate_size": len(tensors.get("model.layers.0.mlp.gate_proj.weight", ()))}
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "rms_norm_eps"):  # fmt: skip
        if values.get(key) is None:
            raise UserError(f"{folder}/config.json has no {key!r}: add the value that the model was trained with")
        settings[key] = values[key]
    head = tensors.get("lm_head.weight")
    if tied and head is not None and torch.equal(head, tensors.get("model.embed_tokens.weight", head)):
        del tensors["lm_head.weight"]  # the tied matrix, stored twice
    return LLMConfig(**settings), tensors
