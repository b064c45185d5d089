"""How pictures become what the model takes: pixels for an encoder that is trained, cached features for a frozen one.

In:  pictures.  Out: `eyes(pictures)`: pixels (N, 3, S, S) or features (N, P, D), what `collate` puts into a batch.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from dataset.features import FeatureCache
from dataset.images import Picture, pixels


class Eyes:
    """Looks at pictures as one encoder does.

    encoder   states `size, mean, std, tokens, dim`, and maps pixels (N, 3, S, S) to features (N, P, D)
    fit       how a picture is fitted into the square: square, pad or naive
    cache     where features are kept, or None for pixels (the encoder is trained, or there is no room)
    wait      called once every process has written its share of the features
    """

    def __init__(self, encoder: torch.nn.Module, fit: str, device: torch.device, cache: Path | None,
                 rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None):
        self.encoder, self.fit, self.device, self.rank, self.world, self.wait = encoder, fit, device, rank, world, wait
        self.features = FeatureCache(cache, encoder.fingerprint() + "-" + fit, encoder.tokens, encoder.dim) if cache else None

    def __call__(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Pixels, or the features that `prepare` computed."""
        return self.features.get(tuple(pictures)) if self.features else self.pixels(pictures)

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S), normalised as this encoder wants it."""
        seen = self.encoder
        return torch.stack([pixels(picture, seen.size, seen.mean, seen.std, self.fit) for picture in pictures])

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, P, D), computed now."""
        return self.encoder(self.pixels(pictures).to(self.device))

    def prepare(self, pictures: Iterable[Picture]) -> None:
        """Compute the features that are missing, every process its share; nothing where pixels are used."""
        if self.features:
            self.features.fill(list(pictures), self.encode, self.rank, self.world)
            self.wait()
            self.features.refresh()

    def fits(self, pictures: Iterable[Picture], gigabytes: float) -> bool:
        """Whether the features of these pictures stay within a bound on disk."""
        return self.features is not None and self.features.bytes_for(len({p.key for p in pictures})) <= gigabytes * 1e9
