"""Image encoders, one file each, found by name in ENCODERS. What each must offer stands in `Encoder`.

Importing a file of this folder must stay cheap: heavy libraries are imported inside the function that needs them.
"""

import hashlib
import json
from typing import Any

from torch import Tensor, nn


class Encoder(nn.Module):
    """What an encoder must offer: its own facts, so that nothing is guessed from names or paths.

    dim, tokens     D channels, and P tokens per image
    has_cls         whether the first token is not a patch but a summary of the image (CLS)
    size            S: it expects pixels (N, 3, S, S)
    mean, std       of the pixels' normalisation, for each colour
    shared_space    (D, output) or None: its map into a space shared with text; connectors begin with it
    """

    dim: int
    tokens: int
    has_cls: bool
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shared_space: Tensor | None = None

    @property
    def blocks(self) -> Any:
        """Its blocks, first to last, as nn.ModuleList or list."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, D)."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash that changes whenever the features would: cached features are stored under it."""
        raise NotImplementedError


def fingerprint(facts: dict, module: nn.Module) -> str:
    """A hash of facts and weights, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(module.state_dict().items()):
        digest.update(name.encode() + weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
