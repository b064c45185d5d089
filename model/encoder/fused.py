"""Two encoders read the same picture, and their patches are joined on channels.

In:  pixels (N, 3, S, S) of the larger size, normalised for the first encoder; they are resized and renormalised for the second.
Out: (N, P, D1 + D2): each patch of the first encoder with the second's patch at the same place. CLS tokens are left out.
Source: Prismatic VLMs (arXiv 2402.07865, section 4.2) with DINOv2 and SigLIP; MoF (arXiv 2401.06209) mixes them in a similar way.
Legend: N images, P patches of the first encoder, D1 and D2 channels of the two encoders, S pixels a side.

    fused:first=timm:vit_large_patch14_dinov2.lvd142m,second=open_clip:ViT-L-16-SigLIP-256/webli
"""

import hashlib
import math
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoder import Encoder
from model.registry import ENCODERS, UserError


class Fused(Encoder):
    """Two encoders, joined on channels; the second's grid of patches is interpolated to the first's."""

    has_cls = False

    def __init__(self, first: Encoder, second: Encoder):
        super().__init__()
        self.towers = nn.ModuleList([first, second])
        for tower in (first, second):
            if math.isqrt(tower.tokens - tower.has_cls) ** 2 != tower.tokens - tower.has_cls:
                raise UserError(f"fused needs patches that form a square, not {tower.tokens - tower.has_cls}")
        self.tokens, self.dim = first.tokens - first.has_cls, first.dim + second.dim
        self.size, self.mean, self.std = max(first.size, second.size), first.mean, first.std

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of both, aligned at their ends, so that partial:2 trains the last of each."""
        towers: list[Any] = [*self.towers]
        pairs = zip_longest(*(reversed(list(tower.blocks)) for tower in towers))
        return [block for pair in pairs for block in pair if block is not None][::-1]

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D1 + D2)."""
        image = pixels * channels(self.std, pixels) + channels(self.mean, pixels)  # 0..1
        towers: list[Any] = [*self.towers]
        return torch.cat([patches(tower, image, math.isqrt(self.tokens)) for tower in towers], dim=2)

    def fingerprint(self) -> str:
        """A hash of both fingerprints."""
        towers: list[Any] = [*self.towers]
        return hashlib.sha256(" ".join(["fused", *(tower.fingerprint() for tower in towers)]).encode()).hexdigest()[:16]


def channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    """One value per colour -> (3, 1, 1)."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def patches(tower: Encoder, image: Tensor, edge: int) -> Tensor:
    """A tower's features of image (N, 3, S, S) in 0..1, on a grid of edge x edge patches: (N, edge * edge, D)."""
    image = resized(image, tower.size, "bicubic").clamp(0, 1)
    features = tower((image - channels(tower.mean, image)) / channels(tower.std, image))[:, int(tower.has_cls):]
    own_edge = math.isqrt(features.shape[1])
    return resized(features.mT.unflatten(2, (own_edge, own_edge)), edge, "bilinear").flatten(2).mT  # (N, edge * edge, D)


def resized(grid: Tensor, edge: int, mode: str) -> Tensor:
    """(N, channels, height, width) -> (N, channels, edge, edge), as PIL resizes."""
    if grid.shape[-1] == edge:
        return grid
    return F.interpolate(grid, size=(edge, edge), mode=mode, antialias=True, align_corners=False)


@ENCODERS.register("fused")
def fused(first: str, second: str) -> Fused:
    """Two encoders joined on channels: fused:first=NAME,second=NAME (DINOv2 and SigLIP, for example)."""
    return Fused(ENCODERS.make(first), ENCODERS.make(second))
