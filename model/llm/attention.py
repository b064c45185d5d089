"""Who sees whom: packed sequences, causal attention inside each document, and the key-value cache.

In:  queries, keys and values of packed sequences: the tokens of all documents on one axis, no padding.
Out: what each token gathered from its own document up to itself.
Legend: B sequences, T tokens, H heads, K channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import LLMConfig

DOCUMENTS_PER_CALL = 8  # of the attention kernel


class Padding:
    """Where the tokens of a stretch of packed documents lie when each document is a row, padded on the right to the longest."""

    def __init__(self, lengths: Tensor, owner: Tensor, longest: int):
        """lengths (documents,); owner (T,): the document of every token, counted from 0; longest: max(lengths)."""
        self.rows, self.longest = len(lengths), longest
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(len(owner), device=owner.device) - starts[owner]
        self.slots = owner * longest + offsets  # (T,)

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (rows, longest, ...), zeros on the right."""
        padded = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return padded.view(self.rows, self.longest, *x.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(rows, longest, ...) -> (T, ...), the inverse of pad."""
        return padded.flatten(0, 1).index_select(0, self.slots)


class PackedSequences:
    """Where documents begin and end on the packed axis, made once per forward pass from document_ids (B, T).

        document_ids   0 0 0 1 1        packed   a a a b b c c c        padded   a a a
                       2 2 2 . .                 (. = -1, padding)               b b .
                                                                                 c c c
    A document lies in one row of the batch, and its tokens are neighbours. `parts` are the same documents, a few at a time: each
    is padded to its own longest document, because attention costs the square of the length, and a batch comes sorted by length.
    """

    def __init__(self, document_ids: Tensor):
        real = document_ids.flatten() >= 0
        begins = torch.ones_like(document_ids, dtype=torch.bool)  # every row begins a document
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.positions = real.nonzero().squeeze(1)  # (T packed,) where the packed tokens lie in (B * T)
        self.owner = begins.flatten()[self.positions].cumsum(0) - 1  # (T packed,) document of every token
        self.lengths = self.owner.bincount()  # (documents,)
        self.count, parts = len(self.lengths), self.lengths.split(DOCUMENTS_PER_CALL)
        tokens, longest = torch.stack([torch.stack([part.sum(), part.max()]) for part in parts]).T.tolist()
        self.longest = max(longest)
        self.padding = Padding(self.lengths, self.owner, self.longest)
        self.tokens = tokens  # of each part
        self.parts = [Padding(part, owner - k * DOCUMENTS_PER_CALL, wide)
                      for k, (part, owner, wide) in enumerate(zip(parts, self.owner.split(tokens), longest))]

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) -> (T packed,): the real tokens on one axis."""
        return x.flatten()[self.positions]


def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """Causal attention inside each document, (T, H, K) and twice (T, fewer H, K) -> (T, H, K).

    For one document and one head, written out:

        scores = q @ k.T / K**0.5                     # (T, T): how much token i wants to know of token j
        scores[j > i] = -inf                          # nobody sees the future
        return softmax(scores, dim=-1) @ v            # (T, K): a weighted mean of what the tokens before have to say

    Here documents become padded rows for this step only, a kernel call for every few of them. Padding on the right needs no
    mask: no real token looks to its right.
    """
    out = []
    parts = (x.split(packed.tokens) for x in (q, k, v))  # one gradient for all parts; of a slice each, they would be summed
    for padding, *of_part in zip(packed.parts, *parts):
        rows = (padding.pad(x).transpose(1, 2) for x in of_part)  # (documents, H, longest, K)
        out.append(padding.unpad(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)))
    return torch.cat(out)


class Cache:
    """Keys and values of B sequences of different lengths, written from the left into room for `room` tokens."""

    def __init__(self, config: LLMConfig, rows: int, room: int, like: Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, room, config.head_channels)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)  # tokens held by each row
        self.longest = 0  # bounds every length, known without asking the device

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences | None) -> Tensor:
        """Store k and v; attend over all that is stored. packed: whole prompts; None: one new token per row."""
        keys, values = self.keys[layer], self.values[layer]  # (B, fewer H, room, K)
        if packed is not None:
            keys[:, :, : packed.longest] = packed.padding.pad(k).transpose(1, 2)
            values[:, :, : packed.longest] = packed.padding.pad(v).transpose(1, 2)
            return attend(q, k, v, packed)
        rows = torch.arange(len(q), device=q.device)
        keys[rows, :, self.lengths] = k.to(keys.dtype)
        values[rows, :, self.lengths] = v.to(values.dtype)
        stored = torch.arange(self.longest + 1, device=q.device) <= self.lengths[:, None]  # (B, longest + 1)
        keys, values = keys[:, :, : self.longest + 1], values[:, :, : self.longest + 1]
        # The query heads that share a key head take the place of query positions: no key is copied.
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=stored[:, None, None]).reshape(q.shape)

    def advance(self, lengths: Tensor | int, longest: int) -> None:
        """Count the tokens that all layers have stored: lengths per row, and their greatest."""
        self.lengths, self.longest = self.lengths + lengths, self.longest + longest

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (indices), in this order: finished answers leave, and cost nothing more.

        In place, and only what is filled: rows leave in most steps, and a copy of all the room would cost as much as the model.
        """
        filled = slice(0, self.longest)
        for name in ("keys", "values"):
            stored = getattr(self, name)
            selected = stored[:, :len(rows)]
            selected[:, :, :, filled] = stored[:, :, :, filled][:, rows]
            setattr(self, name, selected)
        self.lengths = self.lengths[rows]

    def repeat(self, times: int) -> None:
        """Each row `times` times, neighbours: one prompt, computed once, for several answers."""
        self.keys, self.values = (tensor.repeat_interleave(times, dim=1) for tensor in (self.keys, self.values))
        self.lengths = self.lengths.repeat_interleave(times)
