"""Pixel shuffle: squares of neighbouring patches are concatenated into one token each, then one matrix projects the tokens.

In:  features (N, P, D) of a square grid of patches, with or without a CLS token.    Out: (N, P / side^2, C).

    a b e f
    c d g h        side 2: one token from [a b c d], one from [e f g h], ...: no value is lost, and the sequence is four times
    i j m n        shorter (attention costs the square of the length)
    k l o p

Legend: N images, P patches per image, D channels of the encoder, C channels of the LLM.
Source: space-to-depth, as in Idefics3 (arXiv 2408.12637) and SmolVLM, the inverse of the shuffle of arXiv 1609.05158.
"""

import math

from torch import Tensor, nn

from model.connector import Connector
from model.connector.shared_space import begin_in_shared_space
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


@CONNECTORS.register("pixel_shuffle")
class PixelShuffle(Connector):
    """One bias-free projection of every square of side x side patches (SmolVLM)."""

    def __init__(self, encoder: Encoder, channels: int, side: int = 2):
        super().__init__()
        self.side, self.skip = side, int(encoder.has_cls)  # the CLS token has no place in the grid: it is left out
        self.edge = math.isqrt(encoder.tokens - self.skip)  # patches along an edge of the image
        if self.edge**2 != encoder.tokens - self.skip or side < 1 or self.edge % side:
            raise UserError(f"pixel_shuffle:side={side} needs a square of patches whose edge it divides, "
                             f"not {encoder.tokens - self.skip} patches")
        self.tokens = (self.edge // side) ** 2
        self.proj = nn.Linear(side**2 * encoder.dim, channels, bias=False)
        begin_in_shared_space(self.proj, encoder)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, P / side^2, C); image_index is not used."""
        return self.proj(self.squares(features))

    def squares(self, features: Tensor) -> Tensor:
        """(N, P, D) -> (N, P / side^2, side^2 * D): the patches of each square, concatenated."""
        squares = self.edge // self.side  # along an edge
        grid = features[:, self.skip:].unflatten(1, (squares, self.side, squares, self.side))
        return grid.transpose(2, 3).flatten(3, 5).flatten(1, 2)  # (N, squares, squares, side, side, D) before flatten
