"""No connector: the encoder's tokens enter the language model as they are, for an encoder trained together with it.

In:  features (N, P, D).    Out: the same, (N, P, C) with C = D.
"""

from torch import Tensor

from model.connector import Connector
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


@CONNECTORS.register("identity")
class Identity(Connector):
    """Every encoder token as it is; the encoder must have the language model's channels."""

    def __init__(self, encoder: Encoder, channels: int):
        super().__init__()
        if encoder.dim != channels:
            raise UserError(f"identity needs an encoder of the language model's {channels} channels, this one has "
                             f"{encoder.dim}: use --connector linear, or another encoder")
        self.tokens = encoder.tokens

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, D), whichever image of its conversation it is."""
        return features
