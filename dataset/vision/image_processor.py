"""How pictures become what the model takes: pixels for an encoder that is trained, cached features for a frozen one.

In:  pictures.  Out: `eyes(pictures)`: pixels (N, 3, S, S) or features (N, P, D), what `collate` puts into a batch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from dataset.images import BadRow, Picture, pixels
from dataset.vision.feature_cache import FeatureCache
from dataset.vision.tiles import Tiles

MOST_HELD = 1_000_000_000  # bytes of pictures


class Eyes:
    """Looks at pictures as one encoder does.

    encoder   states `size, mean, std, tokens, dim`, and maps pixels (N, 3, S, S) to features (N, P, D)
    fit       how a picture is fitted into the square: square, pad or naive
    tiles     the most tiles of a large picture; what it becomes is `views(picture)` (dataset/vision/tiles.py)
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

    def prepare(self, pictures: Iterable[Picture] | Callable[[], Iterable[Picture]], gigabytes: float = math.inf,
                say: Callable[[str], None] = print) -> None:
        """Compute the features that are missing, every process its share; above a bound on disk go on with pixels, and say so.

        pictures   as they are, or a function that gives them: it is asked twice where they come as bytes inside their rows (as
                   those of parquet files) and are too many to be held
        """
        if self.features is None:
            return
        again = pictures if callable(pictures) else list(pictures).copy
        shown: dict[str, Picture | None] = {}
        held = 0
        for view in self.all_views(once(again())):
            if view.key not in shown:
                held += view.held
                shown[view.key] = view if held < MOST_HELD else None
                if self.features.bytes_for(len(shown)) > gigabytes * 1e9:
                    say(f"the features of {len(shown):,} or more pictures and tiles would take more than {gigabytes} GB: "
                        f"the encoder runs at every step (--feature_cache_gb)")
                    self.features = None
                    return
        missing = sum(key not in self.features.place for key in shown)
        views = shown.values()
        if held >= MOST_HELD:
            shown, views = {}, self.all_views(once(again()))
        self.wait()  # until every process knows what is missing: one that looks after another has written divides it otherwise
        self.features.fill(views, self.encode, self.rank, self.world, missing)
        self.wait()
        self.features.refresh()


def once(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Each picture once, while no more than their keys are held."""
    seen = set()
    for picture in pictures:
        if picture.key not in seen:
            seen.add(picture.key)
            yield picture
