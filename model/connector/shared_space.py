"""Where a projection begins: in the space that CLIP shares with text.

In:  a projection with random weights, and an encoder that states its `shared_space`.  Out: the same projection, begun there.

CLIP ends with a map into a space where a picture lies near its caption, and a patch near the name of its object. A projection
that begins with this map, turned at random into the language model's channels, finds names sooner: to plain random weights a name
is one direction of the features among many. With any other encoder the projection stays random, as LLaVA's.
"""

import torch
from torch import nn

from model.encoder import Encoder


def begin_in_shared_space(proj: nn.Linear, encoder: Encoder) -> None:
    """Set the weights (C, patches * D) in place; of several patches side by side, to the mean of their maps."""
    shared = getattr(encoder, "shared_space", None)
    if shared is None:
        return
    patches = proj.in_features // encoder.dim
    with torch.no_grad():
        turned = (shared @ torch.randn(shared.shape[1], proj.out_features)).T  # (C, D)
        scale = proj.weight.norm(dim=1).mean() / turned.norm(dim=1).mean() / patches**0.5
        proj.weight.copy_(scale * turned.repeat(1, patches))
