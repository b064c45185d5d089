"""Counting: each token gets a vector for how many tokens of its image are similar to it.

Attention takes a weighted mean, and the mean over six strawberries is the mean over one: the number is lost. So this module
compares the tokens of an image before the language model reads them, counts the similar ones, and returns a learned vector for
the count. For an image with another before it, a second vector gives the count over both images.

In:  tokens before the projection, (N, tokens, side^2 * D), and the rows with an image before them.  Out: (N, tokens, C).
Source: "soft attention cannot count", and counting by similarity: Zhang, Hare and Prügel-Bennett (arXiv 1802.05766, section 3).
     Theirs separates overlapping boxes; tokens do not overlap, so a sum is enough.
Legend: N images, D channels of the encoder, C channels of the LLM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# This cosine separates tokens of the same object from tokens of two objects, in CLIP's features of drawings.
THRESHOLD, SHARPNESS = 0.6, 25.0


class SimilarityCount(nn.Module):
    """A learned vector for the count of similar tokens; pixel_shuffle_compare.py adds it to its tokens."""

    def __init__(self, proj: nn.Linear, tokens: int, channels: int):
        super().__init__()
        self.proj = proj  # a map of its own: in the language model's, two oranges may lie far apart
        self.one, self.both = nn.Embedding(tokens + 1, channels), nn.Embedding(2 * tokens + 1, channels)
        for table in (self.one, self.both):
            nn.init.zeros_(table.weight)  # 0 at first, so that names are learned before counts

    def forward(self, squares: Tensor, later: Tensor) -> Tensor:
        """(N, tokens, side^2 * D), `later`: indices of images whose row above is the image before -> (N, tokens, C)."""
        unit = F.normalize(self.proj(squares).float(), dim=-1)  # (N, tokens, C), length 1
        one = count_similar(unit, unit)  # (N, tokens); a token counts itself
        both = one[later] + count_similar(unit[later], unit[later - 1])
        return lerp(one, self.one.weight).index_add(0, later, lerp(both, self.both.weight))


def count_similar(tokens: Tensor, others: Tensor) -> Tensor:
    """(N, tokens, C), (N, others, C), all of length 1 -> (N, tokens): how many others are similar to each, nearly an integer."""
    return torch.sigmoid(SHARPNESS * (tokens @ others.transpose(1, 2) - THRESHOLD)).sum(-1)


def lerp(counts: Tensor, table: Tensor) -> Tensor:
    """(N, tokens), (rows, C) -> (N, tokens, C): the table's row for each count, interpolated so that counts have a gradient."""
    rows = torch.arange(len(table), device=counts.device)
    return (1 - (counts[..., None] - rows).abs()).clamp(min=0).to(table.dtype) @ table
