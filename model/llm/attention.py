"""Who sees whom: packed sequences, causal attention inside each document, and the key-value cache.

In:  queries, keys and values of packed sequences: the tokens of all documents on one axis, no padding.
Out: what each token gathered from its own document up to itself.
Legend: B sequences, T tokens, H heads, K channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
        q, k, v = (padding.pad(x).transpose(1, 2) for x in of_part)  # (documents, H, longest, K)
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out.append(padding.unpad(gathered.transpose(1, 2)))
    return torch.cat(out)


