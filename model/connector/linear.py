"""The plainest connector (small, base): one matrix from the encoder's channels to the language model's, every token kept.

In:  features (N, P, D).    Out: (N, P, C).    Source: LLaVA (arXiv 2304.08485), section 4.1.
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
        """(N, P, D) -> (N, P, C), whichever image of its conversation it is."""
        return self.proj(features)
