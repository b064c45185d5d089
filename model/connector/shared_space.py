"""Initialise a projection with CLIP's map into the space that it shares with text.

In:  a projection with random weights, and an encoder, perhaps with a `shared_space`.  Out: the same projection, initialised.
Legend: D channels of the encoder, C channels of the LLM.

CLIP ends with a map into a space where a picture lies near its caption, and a patch near the name of its object. The projection
begins with this map, followed by a random one into the language model's channels. So it separates objects by name from the first
step; to random weights a name is one direction of the features among many. Encoders without such a map keep random weights.
"""

import torch
from torch import nn

from model.encoder import Encoder


def begin_in_shared_space(proj: nn.Linear, encoder: Encoder) -> None:
    """Set the weights (C, patches * D) in place; each of several concatenated patches gets the same map."""
    shared = getattr(encoder, "shared_space", None)
    if shared is None:
        return
    patches = proj.in_features // encoder.dim
    with torch.no_grad():
        mapped = (shared @ torch.randn(shared.shape[1], proj.out_features)).T  # (C, D)
        scale = proj.weight.norm(dim=1).mean() / mapped.norm(dim=1).mean() / patches**0.5
        proj.weight.copy_(scale * mapped.repeat(1, patches))
