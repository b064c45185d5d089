"""Who sees whom: documents on the flat stream, causal attention inside each of them, and the key-value cache.

In:  queries, keys and values of a flat stream: the tokens of all documents on one axis, no padding.
Out: what each token gathered from its own document up to itself.
Legend: S tokens of the flat stream, B sequences, T tokens, H heads, K channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LLMConfig

BAND = 8  # documents in a call of the attention kernel


class Grid:
    """Documents of a stretch of the flat stream as rows, padded on the right to the longest of them."""

    def __init__(self, lengths: Tensor, index: Tensor, longest: int):
        """lengths (documents,); index (S,): the document of every token, counted from 0; longest: max(lengths)."""
        self.rows, self.longest = len(lengths), longest
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(len(index), device=index.device) - starts[index]
        self.slots = index * longest + offsets  # (S,) where the stream's tokens lie in the grid

    def fold(self, x: Tensor) -> Tensor:
        """(S, ...) -> (rows, longest, ...), zeros on the right."""
        grid = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return grid.view(self.rows, self.longest, *x.shape[1:])

    def unfold(self, grid: Tensor) -> Tensor:
        """(rows, longest, ...) -> (S, ...), the inverse of fold."""
        return grid.flatten(0, 1).index_select(0, self.slots)


class Documents:
    """Where documents begin and end on the flat stream, made once per forward from document_ids (B, T).

        document_ids   0 0 0 1 1        flat stream   a a a b b c c c        grid   a a a
                       2 2 2 . .                      (. = -1, padding)             b b .
                                                                                    c c c
    A document lies in one row, and its tokens are neighbours. `bands` are the same rows, a few at a time: each as wide as its
    own longest document, because attention costs the square of the width, and a batch comes sorted by length.
    """

    def __init__(self, document_ids: Tensor):
        real = document_ids.flatten() >= 0
        begins = torch.ones_like(document_ids, dtype=torch.bool)  # every row begins a document
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.positions = real.nonzero().squeeze(1)  # (S,) where the stream's tokens lie in (B * T)
        self.index = begins.flatten()[self.positions].cumsum(0) - 1  # (S,) document of every token
        self.lengths = self.index.bincount()  # (documents,)
        self.count, bands = len(self.lengths), self.lengths.split(BAND)
        tokens, longest = torch.stack([torch.stack([band.sum(), band.max()]) for band in bands]).T.tolist()
        self.longest = max(longest)
        self.grid = Grid(self.lengths, self.index, self.longest)
        self.tokens = tokens  # of each band
        self.bands = [Grid(band, index - k * BAND, wide)
                      for k, (band, index, wide) in enumerate(zip(bands, self.index.split(tokens), longest))]

    def flat(self, x: Tensor) -> Tensor:
        """(B, T) -> (S,): the real tokens on one axis."""
        return x.flatten()[self.positions]


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention inside each document, (S, H, K) and twice (S, fewer H, K) -> (S, H, K).

    Documents become rows of a grid for this step only: padding on the right needs no mask, since no real token
    looks to its right. A fast kernel call for every few documents, on any device.
    """
    out = []
    parts = (x.split(documents.tokens) for x in (q, k, v))  # one gradient for all bands; of a slice each, they would be summed
    for grid, *of_band in zip(documents.bands, *parts):
        rows = (grid.fold(x).transpose(1, 2) for x in of_band)  # (documents, H, longest, K)
        out.append(grid.unfold(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)))
    return torch.cat(out)


class Cache:
    """Keys and values of B sequences of different lengths, written from the left into room for `room` tokens."""

    def __init__(self, config: LLMConfig, rows: int, room: int, like: Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, room, config.head_channels)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)  # tokens held by each row
        self.longest = 0  # bounds every length, known without asking the device

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """Store k and v; attend over all that is stored. documents: whole prompts; None: one new token per row."""
        keys, values = self.keys[layer], self.values[layer]  # (B, fewer H, room, K)
        if documents is not None:
            keys[:, :, : documents.longest] = documents.grid.fold(k).transpose(1, 2)
            values[:, :, : documents.longest] = documents.grid.fold(v).transpose(1, 2)
            return attend(q, k, v, documents)
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, self.lengths] = k.to(keys.dtype)
        values[rows, :, self.lengths] = v.to(values.dtype)
        seen = torch.arange(self.longest + 1, device=q.device) <= self.lengths[:, None]  # (B, longest + 1)
        keys, values = keys[:, :, : self.longest + 1], values[:, :, : self.longest + 1]
        # The query heads that share a key head take the place of query positions: no key is copied.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=seen[:, None, None]).reshape(q.shape)

    def advance(self, lengths: Tensor | int, longest: int) -> None:
        """Count the tokens that all layers have stored: lengths per row, and their greatest."""
        self.lengths, self.longest = self.lengths + lengths, self.longest + longest

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (indices), in this order: finished answers leave, and cost nothing more.

        In place, and only what is filled: rows leave in most steps, and a copy of all the room cost as much as the model.
        """
        filled = slice(0, self.longest)
        for name in ("keys", "values"):
            stored = getattr(self, name)
            kept = stored[:, :len(rows)]
            kept[:, :, :, filled] = stored[:, :, :, filled][:, rows]
            setattr(self, name, kept)
        self.lengths = self.lengths[rows]

    def repeat(self, times: int) -> None:
        """Each row `times` times, neighbours: one prompt, computed once, for several answers."""
        self.keys, self.values = (tensor.repeat_interleave(times, dim=1) for tensor in (self.keys, self.values))
        self.lengths = self.lengths.repeat_interleave(times)
