"""No connector: the encoder's tokens enter the language model unchanged, for an encoder that is trained together with it.

In:  features (N, P, D).    Out: the same, (N, P, C) with C = D.
Legend: N images, P tokens per image, D channels of the encoder, C channels of the LLM.
"""

from torch import Tensor

from model.connector import Connector
from model.encoder import Encoder
from model.registry import CONNECTORS, UserError


@CONNECTORS.register("identity")
class Identity(Connector):
    """Every encoder token unchanged; the encoder must have as many channels as the language model."""

    def __init__(self, encoder: Encoder, channels: int):
        super().__init__()
        if encoder.dim != channels:
            raise UserError(f"identity needs an encoder of the language model's {channels} channels, this one has "
                             f"{encoder.dim}: use --connector linear, or another encoder")
        self.tokens = encoder.tokens

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, D); image_index is not used."""
        return features
