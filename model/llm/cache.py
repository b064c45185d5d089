"""The key-value cache of generation: it stores the keys and values of earlier tokens, so that only the new token is computed.

In:  keys and values of prompts, then of one new token per row.  Out: what the new tokens gather from all stored values.
Legend: B sequences, T tokens, H heads, K channels per head.
"""

import torch
from torch import Tensor

from model.attention import attention
from model.config import LLMConfig
from model.llm.attention import PackedSequences, attend


class Cache:
    """Keys and values of B sequences of different lengths, stored from the left; each row holds up to `capacity` tokens."""

    def __init__(self, config: LLMConfig, rows: int, capacity: int, like: Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, capacity, config.head_channels)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)  # tokens held by each row
        self.longest = 0  # upper bound of `lengths`, as an int: reading a tensor waits for the device

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences | None) -> Tensor:
        """Store k and v, then attend to all stored tokens -> (T, H, K). packed None: one new token per row, T = B."""
        keys, values = self.keys[layer], self.values[layer]  # (B, fewer heads, capacity, K)
        if packed is not None:
            keys[:, :, : packed.longest] = packed.padding.pad(k).transpose(1, 2)
            values[:, :, : packed.longest] = packed.padding.pad(v).transpose(1, 2)
            return attend(q, k, v, packed)
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, self.lengths] = k.to(keys.dtype)
        values[rows, :, self.lengths] = v.to(values.dtype)
        stored = torch.arange(self.longest + 1, device=q.device) <= self.lengths[:, None]  # (B, longest + 1)
        keys, values = keys[:, :, : self.longest + 1], values[:, :, : self.longest + 1]
        # Query heads that share a key head are passed as query positions, so that no key is copied.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])  # (B, fewer heads, query heads per key head, K)
        return attention(grouped, keys, values, mask=stored[:, None, None]).reshape(q.shape)

    def advance(self, lengths: Tensor | int, longest: int) -> None:
        """Count the tokens that all layers have stored: `lengths` per row, `longest` their maximum."""
        self.lengths, self.longest = self.lengths + lengths, self.longest + longest

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (indices), in this order, so that finished answers cost nothing more.

        Moves the filled slots in place: rows finish in most steps, and to copy the full capacity would cost as much as the model.
        """
        filled = slice(0, self.longest)
        for name in ("keys", "values"):
            stored = getattr(self, name)
            selected = stored[:, :len(rows)]
            selected[:, :, :, filled] = stored[:, :, :, filled][:, rows]
            setattr(self, name, selected)
        self.lengths = self.lengths[rows]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, side by side: a prompt is computed once for several answers."""
        if times > 1:  # a copy of all that was allocated takes a tenth of the time of a short answer
            self.keys, self.values = (tensor.repeat_interleave(times, dim=1) for tensor in (self.keys, self.values))
            self.lengths = self.lengths.repeat_interleave(times)
