"""Connectors, one file each, found by name in CONNECTORS. What each must offer stands in `Connector`.

attention.py, shared_space.py and similarity_count.py register nothing: they hold parts of connectors.
"""

from torch import Tensor, nn


class Connector(nn.Module):
    """Maps the encoder's tokens to the language model's: `Name(encoder, channels, options...)`.

    It reads the facts that it needs (encoder.dim, .tokens, .has_cls) and keeps no reference to the encoder.
    tokens       placeholders that an image takes in the text
    looks_back   how many images before it, of its conversation, an image's tokens depend on (model/context_parallel.py)
    """

    tokens: int
    looks_back = 0

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """features (N, P, D), image_index (N,): position of each image in its conversation, from 0 -> (N, tokens, C)."""
        raise NotImplementedError
