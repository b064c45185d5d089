"""How pictures become what the model takes: pixels for an encoder that is trained, cached features for a frozen one.

In:  pictures.  Out: `eyes(pictures)`: pixels (N, 3, S, S) or features (N, P, D), what `collate` puts into a batch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from dataset.features import FeatureCache
from dataset.images import BadRow, Picture, pixels
from dataset.tiles import Tiles


class Eyes:
    """Looks at pictures as one encoder does.

    encoder   states `size, mean, std, tokens, dim`, and maps pixels (N, 3, S, S) to features (N, P, D)
    fit       how a picture is fitted into the square: square, pad or naive
    tiles     the most tiles of a large picture; what it becomes is `views(picture)` (dataset/tiles.py), for those who render
    cache     where features are kept, or None for pixels (the encoder is trained, or there is no room)
    wait      called once every process has written its share of the features
    """

    def __init__(self, encoder: torch.nn.Module, fit: str, tiles: int, device: torch.device, cache: Path | None,
                 rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None):
        self.encoder, self.fit, self.device, self.rank, self.world, self.wait = encoder, fit, device, rank, world, wait
        self.views = Tiles(encoder.size, encoder.mean, fit, tiles)
        self.features = FeatureCache(cache, encoder.fingerprint() + "-" + fit, encoder.tokens, encoder.dim) if cache else None

    def __call__(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Of views: pixels, or the features that `prepare` computed."""
        return self.features.get(tuple(pictures)) if self.features else self.pixels(pictures)

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S), normalised as this encoder wants it."""
        seen = self.encoder
        return torch.stack([pixels(picture, seen.size, seen.mean, seen.std, self.fit) for picture in pictures])

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, P, D), computed now."""
        return self.encoder(self.pixels(pictures).to(self.device))

    def all_views(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The views of all pictures; one that does not open is left for whoever renders its row to name."""
        for picture in pictures:
            try:
                yield from self.views(picture)
            except BadRow:
                continue

    def prepare(self, pictures: Iterable[Picture], gigabytes: float = math.inf, say: Callable[[str], None] = print) -> None:
        """Compute the features that are missing, every process its share; above a bound on disk go on with pixels, and say so."""
        if self.features is None:
            return
        shown = {view.key: view for view in self.all_views({picture.key: picture for picture in pictures}.values())}
        if self.features.bytes_for(len(shown)) > gigabytes * 1e9:
            say(f"the features of {len(shown):,} pictures and tiles would take more than {gigabytes} GB: "
                f"the encoder runs at every step (--feature_cache_gb)")
            self.features = None
            return
        self.wait()  # until every process knows what is missing: one that looks after another has written divides it otherwise
        self.features.fill(list(shown.values()), self.encode, self.rank, self.world)
        self.wait()
        self.features.refresh()
