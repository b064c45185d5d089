"""The plainest connector (small, base): one matrix from the encoder's channels to the language model's, every token kept.

In:  features (N, P, D).    Out: (N, P, C).    Source: LLaVA (arXiv 2304.08485), section 4.1.
"""

import torch
from torch import Tensor, nn

from model.registry import CONNECTORS


def projection(encoder, channels: int, patches: int = 1) -> nn.Linear:
    """A bias-free matrix (patches * D -> C) for `patches` tokens side by side.

    Of a CLIP it begins where CLIP ended: with the map into the space that pictures share with text, where a token lies near the
    name of its thing, turned at random into the language model's channels. The mean of the tokens, for several. To plain random
    weights a name is one direction of the features among many, and in most runs of the embedded world it was found later.
    """
    proj = nn.Linear(patches * encoder.dim, channels, bias=False)
    if (shared := getattr(encoder, "shared_space", None)) is not None:
        with torch.no_grad():
            turned = (shared @ torch.randn(shared.shape[1], channels)).T  # (C, D)
            scale = proj.weight.norm(dim=1).mean() / turned.norm(dim=1).mean() / patches**0.5
            proj.weight.copy_(scale * turned.repeat(1, patches))
    return proj


@CONNECTORS.register("linear")
class Linear(nn.Module):
    """One bias-free projection of every encoder token (LLaVA)."""

    def __init__(self, encoder, channels: int):
        super().__init__()
        self.tokens = encoder.tokens
        self.proj = projection(encoder, channels)

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        """(N, P, D) -> (N, P, C), whatever the picture's number."""
        return self.proj(features)
