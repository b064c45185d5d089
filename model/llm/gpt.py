"""The language model, written out: RMSNorm, RoPE, grouped-query attention, SwiGLU (Llama, Qwen2 and Qwen3).

In:  embeddings x (T, C) of packed sequences: the tokens of all documents on one axis, no padding.
Out: logits (kept, V) at the positions asked for.

    x (T, C) -> blocks: x + attention(norm(x)), then x + mlp(norm(x)) -> norm -> one matrix -> logits (kept, V)

Parameters carry Hugging Face's names, so pretrained Llama-family weights load as they are.
Legend: B sequences, T tokens, C channels, H heads, K channels per head, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import LLMConfig
from model.llm import LanguageModel
from model.llm.attention import PackedSequences, attend
from model.llm.cache import Cache
from model.llm.rope import frequencies
from model.registry import LLMS


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 (arXiv 1910.07467).

    Every block then reads inputs of the same size, however large the sum of the blocks before has grown. LayerNorm also takes
    off the mean and adds a bias; both turned out not to be needed.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_angles(position_ids: Tensor, config: LLMConfig) -> tuple[Tensor, Tensor]:
    """(T,) -> cos, sin (T, 1, K): pair i of a head's channels turns by position x its frequency (arXiv 2104.09864, eq. 15).

    A query at position m and a key at n are turned by m and n steps. Their product depends on the angle between them alone, and
    that is m - n steps: attention learns "three tokens back" once, for every position.
    """
    angles = position_ids[:, None].float() * frequencies(config, position_ids.device)  # (T, K / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (T, 1, K), the same for every head
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (T, H, K) by its angles; channel i pairs with i + K/2 (Llama's weights expect this half-split form)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Several query heads share one key and value head (arXiv 2305.13245): the cache of generation shrinks by as much. With
    qk_norm every query and key head is normed, so that no product of the two can grow without bound (Qwen3).
    """

    attend = staticmethod(attend)  # another may take its place on an instance, as in tests/speed.py

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.layer, self.head_channels = layer, config.head_channels
        inner = config.num_attention_heads * config.head_channels
        shared = config.num_key_value_heads * config.head_channels
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_channels, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_channels, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packed: PackedSequences | None, kept: Tensor | slice,
                cache: Cache | None) -> Tensor:
        """x (T, C) -> (kept, C): what each kept token gathers from its own document up to itself."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_channels))  # (T, H, K); of k and v fewer H
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            out = cache.attend(self.layer, q, k, v, packed)
        elif packed is not None:
            out = self.attend(q, k, v, packed)
        else:
            raise ValueError("without a cache the tokens of packed sequences are wanted")
        return self.o_proj(out.flatten(1)[kept])  # (kept, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x): one half says what to write, the other how much of it (arXiv 2002.05202)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then MLP, each normed on the way in and added to the stream."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packed: PackedSequences | None, kept: Tensor | slice,
                cache: Cache | None) -> Tensor:
        """x (T, C) -> (kept, C)."""
        x = x[kept] + self.self_attn(self.input_layernorm(x), rope, packed, kept, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The embedding, the blocks and the last norm, under Hugging Face's names."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


@LLMS.register("gpt")
class GPT(LanguageModel):
    """The hand-written decoder: Llama, Qwen2 and Qwen3 by switches of its config."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.config, self.dim = config, config.hidden_size
        self.model = Decoder(config)
        self.lm_head = None  # tied: a token is written by the vector that it is read by, and the matrix is stored once
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        for block in self.model.layers:  # every block adds twice to the stream: keep its variance (GPT-2, section 2.3)
            for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                nn.init.normal_(block.get_parameter(name), std=0.02 / (2 * config.num_hidden_layers) ** 0.5)

    @staticmethod
    def init_weights(module: nn.Module) -> None:
        """GPT-2's: normal with standard deviation 0.02, biases 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.layers)

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) -> (T, C)."""
        return self.model.embed_tokens(input_ids)

    def cache(self, rows: int, room: int) -> Cache:
        """An empty cache for `rows` sequences of at most `room` tokens."""
        return Cache(self.config, rows, room, like=self.model.embed_tokens.weight)

    def forward(self, x: Tensor, position_ids: Tensor, packed: PackedSequences | None, logits_to_keep: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """x (T, C), position_ids (T,), logits_to_keep (T,) bool -> logits (kept, V), all of them where it is None.

        packed None: one new token for every row of the cache. With packed sequences, row i of the cache is document i.
        """
        rope = rope_angles(position_ids, self.config)
        everything = slice(None)
        kept = everything if logits_to_keep is None else logits_to_keep.nonzero().squeeze(1)
        *early, last = self.blocks
        for block in early:
            x = block(x, rope, packed, everything, cache)
        x = last(x, rope, packed, kept, cache)  # (kept, C): after the last block no token sees another, so compute no more
        if cache is not None:
            cache.advance(1, 1) if packed is None else cache.advance(packed.lengths, packed.longest)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.model.norm(x), head.weight)
