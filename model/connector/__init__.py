"""Connectors, one file each, found by name in CONNECTORS. What each must offer stands in `Connector`.

attention.py and shared_space.py register nothing: they hold what several connectors share.
"""

from torch import Tensor, nn


class Connector(nn.Module):
    """From the encoder's tokens to the language model's: `Name(encoder, channels, options...)`.

    It reads the facts it needs (encoder.dim, .tokens, .has_cls) and keeps no reference to the encoder.
    tokens   placeholders that an image takes in the text
    """

    tokens: int

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """features (N, P, D), image_index (N,): which image of its conversation each is, from 0 -> (N, tokens, C)."""
        raise NotImplementedError
