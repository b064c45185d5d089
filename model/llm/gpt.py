"""The language model, written out: RMSNorm, RoPE, grouped-query attention, SwiGLU (Llama, Qwen2 and Qwen3).

In:  embeddings x (T, C) of packed sequences: the tokens of all documents on one axis, no padding.
Out: logits (selected, V) of the tokens that logits_to_keep selects.

    x (T, C) -> blocks: x + attention(norm(x)), then x + mlp(norm(x)) -> norm -> one matrix -> logits (selected, V)

Parameters carry Hugging Face's names, so pretrained Llama-family weights load as they are.
Legend: T tokens of all documents, C channels, H heads, K channels per head, V vocabulary.
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

    Blocks add to x, so x grows from block to block; a norm gives every block inputs of the same size. LayerNorm also subtracts
    the mean and adds a bias; both turned out to be unnecessary.
    """

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_angles(position_ids: Tensor, config: LLMConfig) -> tuple[Tensor, Tensor]:
    """(T,) -> cos, sin (T, 1, K): channel pair i rotates by position x frequency i (RoPE, arXiv 2104.09864, eq. 15).

    RoPE rotates a query at position m by m steps and a key at n by n steps. Their product depends only on the difference of the
    angles, m - n steps. So attention learns "three tokens back" once, for every position.
    """
    angles = position_ids[:, None].float() * frequencies(config, position_ids.device)  # (T, K / 2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (T, 1, K), the same for every head
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (T, H, K) by its angles; channel i pairs with i + K/2 (Llama's weights expect this half-split form)."""
    first, second = x.chunk(2, dim=-1)  # (T, H, K / 2) each
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions.

    Several query heads share one key and value head, which shrinks the key-value cache by that factor (arXiv 2305.13245).
    qk_norm applies RMSNorm to every query and key head, so that their product cannot grow without bound (Qwen3).
    """

    attend = staticmethod(attend)  # tests/speed/legs.py replaces it on instances

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.layer, self.head_channels = layer, config.head_channels
        q_channels = config.num_attention_heads * config.head_channels
        kv_channels = config.num_key_value_heads * config.head_channels
        self.q_proj = nn.Linear(config.hidden_size, q_channels, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_channels, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_channels, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_channels, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_channels, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_channels, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packed: PackedSequences | None, selected: Tensor | slice,
                cache: Cache | None) -> Tensor:
        """x (T, C) -> (selected, C): what each selected token gathers from its own document up to itself."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_channels))  # (T, H, K); k and v have fewer heads
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            out = cache.attend(self.layer, q, k, v, packed)  # (T, H, K)
        elif packed is not None:
            out = self.attend(q, k, v, packed)  # (T, H, K)
        else:
            raise ValueError("attention needs packed sequences or a cache")
        return self.o_proj(out.flatten(1)[selected])  # (selected, H * K) -> (selected, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). `up` proposes values, `gate` decides how much of each passes (arXiv 2002.05202)."""

    def __init__(self, config: LLMConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (T, C) -> (T, intermediate_size) -> (T, C)


class Block(nn.Module):
    """Attention, then the MLP; each reads a normed x and adds its output to x (the residual stream)."""

    def __init__(self, config: LLMConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], packed: PackedSequences | None, selected: Tensor | slice,
                cache: Cache | None) -> Tensor:
        """x (T, C) -> (selected, C)."""
        x = x[selected] + self.self_attn(self.input_layernorm(x), rope, packed, selected, cache)
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
        self.lm_head = None  # tied: one matrix (V, C) embeds tokens and predicts them, so a small model has fewer parameters
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        for block in self.model.layers:  # every block adds twice to x: keep its variance (GPT-2, section 2.3)
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

    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for `rows` sequences of at most `capacity` tokens, in the precision of the attention that reads it."""
        weight = self.model.embed_tokens.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return Cache(self.config, rows, capacity, like=weight.new_empty(0, dtype=dtype))

    def forward(self, x: Tensor, position_ids: Tensor, packed: PackedSequences | None, logits_to_keep: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:
        """x (T, C), position_ids (T,), logits_to_keep (T,) bool or None for all -> logits (selected, V).

        With packed sequences, document i fills row i of the cache. packed None: one new token for every row of the cache.
        """
        rope = rope_angles(position_ids, self.config)
        all_tokens = slice(None)
        selected = all_tokens if logits_to_keep is None else logits_to_keep.nonzero().squeeze(1)
        *early, last = self.blocks
        for block in early:
            x = block(x, rope, packed, all_tokens, cache)  # (T, C)
        x = last(x, rope, packed, selected, cache)  # (selected, C): no later block reads the other tokens
        if cache is not None:
            cache.advance(1, 1) if packed is None else cache.advance(packed.lengths, packed.longest)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(self.model.norm(x), head.weight)  # (selected, V)
