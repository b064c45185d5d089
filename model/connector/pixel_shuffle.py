"""Pixel shuffle: neighbouring patches laid side by side in one token, then one matrix. A quarter of the tokens for side 2.

In:  features (N, P, D) of a square of patches, with or without a class token, and the picture's number in its conversation.
Out: (N, P / side^2, C). Three things stand in the tokens that a small model would need many steps to gather, or never could:
     how many tokens look alike (model/connector/alike.py); in several pictures a learned vector for the number of each; and,
     by a matrix of its own, what the picture before shows at the same place and how far this one is from it, |now - before|.
     Whether two things are the same no sum of the two can say: a model that got only "now" and "before" saw what came and what
     went, and took whatever had become another thing for the same.
Source: space-to-depth, as in Idefics3 (arXiv 2408.12637) and SmolVLM, the inverse of the shuffle of arXiv 1609.05158; the
     distance of features as in siamese change detection (FC-Siam-diff, arXiv 1810.08462).
"""

import math

import torch
from torch import Tensor, nn

from model.connector.alike import Alike
from model.connector.linear import projection
from model.registry import CONNECTORS


@CONNECTORS.register("pixel_shuffle")
class PixelShuffle(nn.Module):
    """A projection of every square of side x side patches, and the three things above; pictures past the last number share its
    vector.

    A picture in tiles (tiles.py) counts as many as it has views: by their numbers its tiles are told apart, and "the
    picture before" is then the view before, of the same picture or the last tile of another.
    """

    def __init__(self, encoder, channels: int, side: int = 2, pictures: int = 16):
        super().__init__()
        self.side, self.skip = side, int(encoder.has_cls)  # a class token has no neighbours: it is left out
        self.edge = math.isqrt(encoder.tokens - self.skip)  # patches along an edge of the picture
        if self.edge**2 != encoder.tokens - self.skip or side < 1 or self.edge % side:
            raise ValueError(f"pixel_shuffle:side={side} needs a square of patches whose edge it divides, "
                             f"not {encoder.tokens - self.skip} patches")
        self.tokens = (self.edge // side) ** 2
        self.proj = projection(encoder, channels, side**2)
        self.before = nn.Linear(2 * channels, channels, bias=False)
        nn.init.zeros_(self.before.weight)
        self.number = nn.Embedding(pictures, channels)
        nn.init.normal_(self.number.weight, std=0.5)  # about as large as the tokens it is added to
        self.alike = Alike(projection(encoder, channels, side**2), self.tokens, channels)

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        """(N, P, D), (N,) -> (N, P / side^2, C)."""
        grid = features[:, self.skip:].unflatten(1, (self.edge // self.side, self.side, self.edge // self.side, self.side))
        squares = grid.transpose(2, 3).flatten(3, 5).flatten(1, 2)  # (N, P / side^2, side * side * D)
        seen = self.proj(squares)
        later = numbers.nonzero().squeeze(1)  # each but the first of a conversation; the one before it is the row above
        tokens = seen + self.number(numbers.clamp(max=self.number.num_embeddings - 1))[:, None] + self.alike(squares, later)
        now, before = seen[later], seen[later - 1]
        return tokens.index_add(0, later, self.before(torch.cat((before, (now - before).abs()), -1)).to(tokens.dtype))
