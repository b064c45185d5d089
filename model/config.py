"""The configuration of a model: the language model's shape, and the names of the other parts.

In:  PRESETS["nano"], or the config.json of a checkpoint.
Out: LLMConfig (Hugging Face's names), VLMConfig.
Run: python -c "from model.config import PRESETS; print(PRESETS['nano'].to_json())"
"""

import dataclasses
import json
from typing import Any

from model.registry import UserError, option_and_value, split_options, typed


def from_dict(cls: type, values: dict):
    """A dataclass from a dict; UserError names unknown keys, so that a typo does not become a default."""
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise UserError(f"unknown key(s) for {cls.__name__}: {', '.join(unknown)}")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """The shape of a Llama. Qwen2 adds attention_bias; Qwen3 adds qk_norm and a head_dim of its own."""

    vocab_size: int
    hidden_size: int  # C
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # fewer than H: grouped-query attention (arXiv 2305.13245)
    intermediate_size: int
    head_dim: int | None = None  # K; None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: dict | None = None  # how to stretch RoPE to longer texts (model/llm/rope.py)
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_bias: bool = False  # only of q, k and v, as in Qwen2
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE, as in Qwen3
    transformers: dict | None = None  # full config of a model that transformers runs (model/llm/huggingface.py)

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise UserError(f"{name} must be above 0, not {value}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                f"set head_dim"
            )
        if self.head_channels % 2:
            raise UserError(f"RoPE rotates pairs of channels: head_dim {self.head_channels} must be even")

    @property
    def head_channels(self) -> int:
        """K, channels per head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """A complete model: config.json of a checkpoint. Parts are names for model/registry.py."""

    llm: LLMConfig
    encoder: str
    connector: str
    image_token_id: int  # the placeholder that image tokens replace; from the tokenizer
    llm_name: str = "gpt"
    template: str = "pupil"  # how a conversation is written; the same in training and chat, as are the next two
    fit: str = "square"  # how a picture is fitted into the encoder's square: square (crop) | pad | stretch
    tiles: int = 0  # most tiles that a large picture is cut into; 0: none

    def __post_init__(self):
        if self.tiles < 0 or self.tiles == 1:
            raise UserError(f"tiles {self.tiles}: the most tiles of a picture are 0 (none) or at least 2")

    def to_dict(self) -> dict:
        """Plain values, nested as the dataclasses are."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "VLMConfig":
        """The inverse of to_dict; UserError names unknown keys."""
        return from_dict(cls, {**values, "llm": from_dict(LLMConfig, values["llm"])})

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "VLMConfig":
        """The inverse of to_json; UserError names unknown keys."""
        return cls.from_dict(json.loads(text))


def _preset(encoder: str, connector: str, **llm) -> VLMConfig:
    # -1 is refused by the model: dataclasses.replace(PRESETS[name], image_token_id=tokenizer.image)
    return VLMConfig(LLMConfig(vocab_size=6400, **llm), encoder, connector, image_token_id=-1)


PRESETS = {
    # 2.2M parameters in llm + connector: learns the embedded world in minutes on a CPU. Few layers with many heads that are not
    # too narrow find names in pictures in fewer steps than more layers with few, wide heads.
    "nano": _preset(
        "tiny_clip",
        "pixel_shuffle_compare",
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        intermediate_size=640,
        rope_theta=10000.0,
        qk_norm=True,
    ),
    # 26M and 104M: the shapes of MiniMind-V
    "small": _preset(
        "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "linear",
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=1408,
        max_position_embeddings=8192,
        rope_theta=1e6,
    ),
    "base": _preset(
        "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "linear",
        hidden_size=768,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=2048,
        max_position_embeddings=8192,
        rope_theta=1e6,
    ),
}


SIZES = {  # what may stand after the name of a preset; the vocabulary is the tokenizer's
    field.name: field.type for field in dataclasses.fields(LLMConfig)
    if field.name not in ("vocab_size", "rope_scaling", "transformers")
}  # fmt: skip


def preset(spec: str, *, vocab_size: int, image_token_id: int, **names: Any) -> VLMConfig:
    """The config of a preset, NAME or NAME:size=value, for a tokenizer; each of `names` that is not empty replaces a part's name.

    small:hidden_size=640,num_hidden_layers=10 has these sizes in place of its own (the fields of LLMConfig).
    """
    name, _, options = spec.partition(":")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    base = PRESETS[name]
    sizes: dict[str, Any] = {}
    for option in split_options(options):
        key, value = option_and_value(option)
        if key not in SIZES or key in sizes:
            raise UserError(f"--preset {spec}: {option!r} is {'given twice' if key in sizes else 'no option'}. "
                            f"Options of a preset: {', '.join(SIZES)}")
        sizes[key] = typed(value, SIZES[key], f"--preset {spec}: {option!r}")
    llm = dataclasses.replace(base.llm, **sizes, vocab_size=vocab_size)
    return dataclasses.replace(
        base, llm=llm, image_token_id=image_token_id, **{key: value for key, value in names.items() if value}
    )
