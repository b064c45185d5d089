"""Which token attends to which: packed sequences, and causal attention inside each document.

In:  queries, keys and values of packed sequences: the tokens of all documents on one axis, no padding.
Out: what each token gathers from its own document up to itself.
Legend: B sequences, T tokens (in (B, T) of one sequence, elsewhere of all documents), H heads, K channels per head.
"""

import torch
from torch import Tensor

from model.attention import attention

DOCUMENTS_PER_CALL = 8  # documents that one call of the attention kernel takes


class Padding:
    """The slots of packed tokens when each document is a row, padded on the right to the longest."""

    def __init__(self, lengths: Tensor, owner: Tensor, longest: int):
        """lengths (documents,); owner (T,): index of every token's document; longest: max(lengths)."""
        self.rows, self.longest = len(lengths), longest
        starts = lengths.cumsum(0) - lengths
        offsets = torch.arange(len(owner), device=owner.device) - starts[owner]
        self.slots = owner * longest + offsets  # (T,) indices into the flattened rows

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (documents, longest, ...), zeros on the right."""
        padded = x.new_zeros(self.rows * self.longest, *x.shape[1:]).index_copy(0, self.slots, x)
        return padded.view(self.rows, self.longest, *x.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """(documents, longest, ...) -> (T, ...), the inverse of pad."""
        return padded.flatten(0, 1).index_select(0, self.slots)


class PackedSequences:
    """Where documents begin and end on the packed axis, computed once per forward pass from document_ids (B, T).

        document_ids   0 0 0 1 1        packed   a a a b b c c c        padded   a a a
                       2 2 2 . .                 (. = -1, padding)               b b .
                                                                                 c c c
    The tokens of a document are neighbours in one row of the batch. `parts` are the same documents, a few at a time. Each part is
    padded to its own longest document: attention costs the square of that length, and batches arrive sorted by length.
    """

    def __init__(self, document_ids: Tensor):
        real = document_ids.flatten() >= 0
        begins = torch.ones_like(document_ids, dtype=torch.bool)  # every row begins a document
        begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        self.positions = real.nonzero().squeeze(1)  # (T,) indices of the packed tokens in (B * T)
        self.owner = begins.flatten()[self.positions].cumsum(0) - 1  # (T,) document of every token
        self.lengths = self.owner.bincount()  # (documents,)
        self.count, parts = len(self.lengths), self.lengths.split(DOCUMENTS_PER_CALL)
        tokens, longest = torch.stack([torch.stack([part.sum(), part.max()]) for part in parts]).T.tolist()
        self.longest = max(longest)
        self.padding = Padding(self.lengths, self.owner, self.longest)
        self.tokens = tokens  # of each part
        self.parts = [Padding(part, owner - index * DOCUMENTS_PER_CALL, width)
                      for index, (part, owner, width) in enumerate(zip(parts, self.owner.split(tokens), longest))]

    def pack(self, x: Tensor) -> Tensor:
        """(B, T) -> (T,): the real tokens on one axis."""
        return x.flatten()[self.positions]


def attend(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """Causal attention inside each document: q (T, H, K), k and v (T, fewer heads, K) -> (T, H, K).

    For one document and one head, written out:

        scores = q @ k.T / K**0.5                     # (T, T): how well key j matches query i; / sqrt(K) keeps variance 1
        scores[j > i] = -inf                          # causal: no token sees a later one
        return softmax(scores, dim=-1) @ v            # (T, K): the mean of the values up to token i, weighted by the match

    Documents become padded rows for this step only, and a kernel call takes a few of them. Padding on the right needs no mask:
    no real token attends to its right.
    """
    out = []
    parts = (x.split(packed.tokens) for x in (q, k, v))  # split joins gradients in one step; slices would sum one each
    for padding, *of_part in zip(packed.parts, *parts):
        q, k, v = (padding.pad(x).transpose(1, 2) for x in of_part)  # (documents, H or fewer heads, longest, K)
        out.append(padding.unpad(attention(q, k, v, causal=True).transpose(1, 2)))  # (T of this part, H, K)
    return torch.cat(out)


