"""The plainest connector (small, base): one matrix from the encoder's channels to the language model's, for every token.

Why is that enough? CLIP has already put patches near the words for what they show (model/encoder/clip.py). What is left is a
change of coordinates, into the space of the language model's own token embeddings; its attention does the rest.

In:  features (N, P, D).    Out: (N, P, C).    Source: LLaVA (arXiv 2304.08485), section 4.1.
Legend: N images, P tokens per image, D channels of the encoder, C channels of the LLM.
"""

from torch import Tensor, nn

from model.connector import Connector
from model.connector.shared_space import begin_in_shared_space
from model.encoder import Encoder
from model.registry import CONNECTORS


@CONNECTORS.register("linear")
class Linear(Connector):
    """One bias-free projection of every encoder token (LLaVA)."""

    def __init__(self, encoder: Encoder, channels: int):
        super().__init__()
        self.tokens = encoder.tokens
        self.proj = nn.Linear(encoder.dim, channels, bias=False)
        begin_in_shared_space(self.proj, encoder)

    def forward(self, features: Tensor, image_index: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, C); image_index is not used."""
        return self.proj(features)
