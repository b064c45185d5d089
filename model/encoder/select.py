"""An encoder's features from an earlier block, and with or without its class token.

In:  pixels (N, 3, size, size).    Out: (N, P, D) of the encoder's block `layer`; cls=false leaves the class token out.

    select:open_clip:ViT-L-14-336/openai,layer=-2,cls=false        as LLaVA-1.5 sees (arXiv 2310.03744)
    select:(clip_random:size=96,patch=16,width=64,layers=4,heads=2),layer=-2        options of its own stand in parentheses
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from model.encoder import Encoder
from model.registry import ENCODERS, UserError


class Selected(Encoder):
    """The encoder less its last blocks, which are removed: they cost neither time nor memory."""

    def __init__(self, encoder: Encoder, layer: int, cls: bool):
        super().__init__()
        if not isinstance(encoder.blocks, nn.ModuleList | nn.Sequential):
            raise UserError("fused has the blocks of two towers: select inside it, "
                             "fused:first=(select:NAME,layer=-2),second=NAME")
        if not -len(encoder.blocks) <= layer <= -1:
            raise UserError(f"select:layer={layer}: this encoder has {len(encoder.blocks)} blocks. -1 is behind the last of "
                             f"them, -2 before it, {-len(encoder.blocks)} behind the first")
        del encoder.blocks[len(encoder.blocks) + 1 + layer:]
        self.encoder, self.size, self.mean, self.std = encoder, encoder.size, encoder.mean, encoder.std
        self.has_cls, self.skip = encoder.has_cls and cls, int(encoder.has_cls and not cls)
        with torch.no_grad():  # of a tower in stages, an earlier stage has other patches and channels
            self.tokens, self.dim = self(torch.zeros(1, 3, self.size, self.size)).shape[1:]

    @property
    def blocks(self) -> Any:
        return self.encoder.blocks

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, size, size) -> (N, P, D)."""
        return self.encoder(pixels)[:, self.skip:]

    def fingerprint(self) -> str:
        """A hash of the encoder that is left, and of what is taken from it."""
        return hashlib.sha256(f"select {self.encoder.fingerprint()} {len(self.blocks)} {self.skip}".encode()).hexdigest()[:16]


@ENCODERS.register("select")
def select(encoder: str, layer: int = -1, cls: bool = True) -> Selected:
    """Another encoder's features before its last blocks (layer=-2: as LLaVA), without its class token (cls=false)."""
    return Selected(ENCODERS.make(encoder), layer, cls)
