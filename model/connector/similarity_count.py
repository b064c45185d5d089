"""Counting: each token is told how many tokens of its picture look as it does.

Attention is a weighted mean, and the mean over six strawberries is the mean over one: what a model looks up has to know its
number already, or the number is lost. So the tokens of a picture are compared with each other before the language model reads
them, what looks alike is added up, and a learned vector for the sum is added to each. For a later picture of a conversation a
second vector tells how many there are in it and in the picture before together.

In:  what is compared, (N, tokens, F), and which pictures have one before them.    Out: (N, tokens, C), 0 at birth.
Source: "soft attention cannot count", and counting by the similarity of what is seen: Zhang, Hare and Prügel-Bennett
     (arXiv 1802.05766, section 3). Theirs takes apart overlapping boxes; tokens do not overlap, so a sum is enough.
Legend: N pictures, F channels of a token before the projection (side^2 patches of the encoder), C channels of the language model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of CLIP's tokens of drawings, 99 % of those of the same object have a cosine above 0.6, and 99 % of those of two objects below.
THRESHOLD, SHARPNESS = 0.6, 25.0


class SimilarityCount(nn.Module):
    """A vector for the number of similar tokens; registers nothing: pixel_shuffle_compare.py adds it to its tokens."""

    def __init__(self, proj: nn.Linear, tokens: int, channels: int):
        super().__init__()
        self.proj = proj  # its own map, not the one that the language model reads: there two oranges may lie far apart
        self.one, self.both = nn.Embedding(tokens + 1, channels), nn.Embedding(2 * tokens + 1, channels)
        for table in (self.one, self.both):
            nn.init.zeros_(table.weight)  # silent at birth: names are learned first, numbers later

    def forward(self, squares: Tensor, later: Tensor) -> Tensor:
        """(N, tokens, F), (later,) rows whose conversation has another picture in the row above -> (N, tokens, C)."""
        seen = F.normalize(self.proj(squares).float(), dim=-1)
        one = count_similar(seen, seen)  # (N, tokens), each counts itself
        both = one[later] + count_similar(seen[later], seen[later - 1])
        return lerp(one, self.one.weight).index_add(0, later, lerp(both, self.both.weight))


def count_similar(tokens: Tensor, others: Tensor) -> Tensor:
    """(N, tokens, C), (N, others, C), all of length 1 -> (N, tokens): how many others are similar to each, nearly whole."""
    return torch.sigmoid(SHARPNESS * (tokens @ others.transpose(1, 2) - THRESHOLD)).sum(-1)


def lerp(numbers: Tensor, table: Tensor) -> Tensor:
    """(N, tokens), (most + 1, C) -> (N, tokens, C): the table's row for each number, or between two rows, for a gradient."""
    rows = torch.arange(len(table), device=numbers.device)
    return (1 - (numbers[..., None] - rows).abs()).clamp(min=0).to(table.dtype) @ table
