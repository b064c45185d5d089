"""The default connector: one matrix from the encoder's channels to the language model's, every token kept.

In:  features (N, P, D).    Out: (N, P, C).    Source: LLaVA (arXiv 2304.08485), section 4.1.
"""

from torch import Tensor, nn

from model.registry import CONNECTORS


@CONNECTORS.register("linear")
class Linear(nn.Module):
    """One bias-free projection of every encoder token (LLaVA)."""

    def __init__(self, encoder, channels: int):
        super().__init__()
        self.tokens = encoder.tokens
        self.proj = nn.Linear(encoder.dim, channels, bias=False)

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, C), whatever the picture's number."""
        return self.proj(features)
