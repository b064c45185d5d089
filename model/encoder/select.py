"""An encoder's features from an earlier block, with or without its CLS token.

In:  pixels (N, 3, S, S).    Out: (N, P, D) after the encoder's block `layer`; cls=false leaves out the CLS token.
Legend: N images, P tokens per image, D channels of the encoder, S pixels a side.

    select:open_clip:ViT-L-14-336/openai,layer=-2,cls=false        the features that LLaVA-1.5 reads (arXiv 2310.03744)
    select:(clip_random:size=96,patch=16,width=64,layers=4,heads=2),layer=-2        the encoder's own options in parentheses
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from model.encoder import Encoder
from model.registry import ENCODERS, UserError


class Selected(Encoder):
    """The encoder without its last blocks, which are removed and so cost neither time nor memory."""

    def __init__(self, encoder: Encoder, layer: int, cls: bool):
        super().__init__()
        if not isinstance(encoder.blocks, nn.ModuleList | nn.Sequential):
            raise UserError("fused has the blocks of two towers: select inside it, "
                             "fused:first=(select:NAME,layer=-2),second=NAME")
        if not -len(encoder.blocks) <= layer <= -1:
            raise UserError(f"select:layer={layer}: this encoder has {len(encoder.blocks)} blocks. -1 is after the last, "
                             f"-2 before the last, {-len(encoder.blocks)} after the first")
        del encoder.blocks[len(encoder.blocks) + 1 + layer:]
        self.encoder, self.size, self.mean, self.std = encoder, encoder.size, encoder.mean, encoder.std
        self.has_cls, self.skip = encoder.has_cls and cls, int(encoder.has_cls and not cls)
        with torch.no_grad():  # measured: earlier stages of a ConvNeXt, say, have other patches and channels
            self.tokens, self.dim = self(torch.zeros(1, 3, self.size, self.size)).shape[1:]

    @property
    def blocks(self) -> Any:
        return self.encoder.blocks

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D)."""
        return self.encoder(pixels)[:, self.skip:]

    def fingerprint(self) -> str:
        """A hash of the shortened encoder and of the selection."""
        return hashlib.sha256(f"select {self.encoder.fingerprint()} {len(self.blocks)} {self.skip}".encode()).hexdigest()[:16]


@ENCODERS.register("select")
def select(encoder: str, layer: int = -1, cls: bool = True) -> Selected:
    """Another encoder's features before its last blocks (layer=-2, as LLaVA), or without its CLS token (cls=false)."""
    return Selected(ENCODERS.make(encoder), layer, cls)
