"""Pixel shuffle with comparisons: each token also gets its image's index, the change from the image before, a similarity count.

In:  features (N, P, D) of a square grid of patches, and each image's position in its conversation.    Out: (N, P / side^2, C).
Legend: N images, P patches per image, D channels of the encoder, C channels of the LLM.

The default of `nano`. From plain tokens a small model learns these three slowly or never:
    image index         which of several images a token belongs to: a learned vector per index
    difference          the image before at the same place, and |now - before|: attention adds values up, and no sum of the two
                        shows whether two objects are the same
    similarity count    how many tokens of the image are similar (similarity_count.py): attention takes a mean, which cannot count
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
    """Pixel shuffle plus each image's index, its difference to the image before, and a count of similar tokens.

    Each tile of a picture (dataset/vision/tiles.py) has an index of its own, and "the image before" is then the tile before.
    Images past the last index share its vector.
    """

    looks_back = 1

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
        squares = self.squares(features)  # (N, tokens, side^2 * D)
        plain = self.proj(squares)  # (N, tokens, C)
        later = image_index.nonzero().squeeze(1)  # images that are not the first of their conversation; row - 1 is the one before
        index = self.index(image_index.clamp(max=self.index.num_embeddings - 1))[:, None]  # (N, 1, C)
        tokens = plain + index + self.similarity_count(squares, later)
        now, before = plain[later], plain[later - 1]  # (later images, tokens, C)
        changed = self.difference(torch.cat((before, (now - before).abs()), -1))
        return tokens.index_add(0, later, changed.to(tokens.dtype))
