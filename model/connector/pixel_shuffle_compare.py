"""Pixel shuffle that compares: tokens also say which picture they are of, what changed since the last one, how many are alike.

In:  features (N, P, D) of a square of patches, and which image of its conversation each one is.    Out: (N, P / side^2, C).

The default of `nano`. A small model could gather these three from the plain tokens by attention only in many steps, or never:
    image index         in several pictures, a learned vector for the number of each
    difference          what the picture before shows at the same place, and |now - before|. No sum of the two can say whether
                        two objects are the same
    similarity count    how many tokens look alike (similarity_count.py): a mean over six is the mean over one
Source: the distance of features as in siamese change detection (FC-Siam-diff, arXiv 1810.08462).
"""

import torch
from torch import Tensor, nn

from model.connector.pixel_shuffle import PixelShuffle
from model.connector.shared_space import begin_in_shared_space
from model.connector.similarity_count import SimilarityCount
from model.encoder import Encoder
from model.registry import CONNECTORS


@CONNECTORS.register("pixel_shuffle_compare")
class PixelShuffleCompare(PixelShuffle):
    """Pixel shuffle, and in its tokens the image's index, the difference to the image before, and a count of similar tokens.

    A picture in tiles (dataset/vision/tiles.py) counts as many as it has tiles: by their indices its tiles are told apart, and
    "the image before" is then the tile before. Images past the last index share its vector.
    """

    def __init__(self, encoder: Encoder, channels: int, side: int = 2, images: int = 16):
        super().__init__(encoder, channels, side)
        self.difference = nn.Linear(2 * channels, channels, bias=False)
        nn.init.zeros_(self.difference.weight)
        self.index = nn.Embedding(images, channels)
        nn.init.normal_(self.index.weight, std=0.5)  # about as large as the tokens it is added to
        compared = nn.Linear(side**2 * encoder.dim, channels, bias=False)
        begin_in_shared_space(compared, encoder)
        self.similarity_count = SimilarityCount(compared, self.tokens, channels)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D), (N,) -> (N, P / side^2, C)."""
        squares = self.squares(features)
        seen = self.proj(squares)
        later = image_index.nonzero().squeeze(1)  # each but the first of a conversation; the one before it is the row above
        index = self.index(image_index.clamp(max=self.index.num_embeddings - 1))[:, None]  # (N, 1, C)
        tokens = seen + index + self.similarity_count(squares, later)
        now, before = seen[later], seen[later - 1]
        changed = self.difference(torch.cat((before, (now - before).abs()), -1))
        return tokens.index_add(0, later, changed.to(tokens.dtype))
