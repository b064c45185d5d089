"""The image processor: pictures to what the model takes, pixels for an encoder that is trained, cached features for a frozen one.

In:  pictures.  Out: `images(pictures)`: pixels (N, 3, S, S) or features (N, P, D), what `collate` puts into a batch.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.bad_rows import BadRow
from dataset.images import Picture, pixels
from dataset.protocols import Encoder, Ranks
from dataset.vision.feature_cache import FeatureCache
from dataset.vision.tiles import Tiles

MAX_HELD_BYTES = 1_000_000_000  # of pictures in memory


@dataclass(frozen=True)
class OneRank:
    """A process that works alone."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def all_gather(self, found: dict) -> dict:
        return found


class ImageProcessor:
    """Sees pictures as one encoder does.

    fit         how a picture is fitted into the square: square, pad or stretch
    max_tiles   the most tiles of a large picture; 0: none
    cache       the folder where features are kept; None: pixels (the encoder is trained, or there is no room)
    """

    def __init__(self, encoder: Encoder, fit: str, max_tiles: int, cache: Path | None, ranks: Ranks):
        self.encoder, self.fit, self.max_tiles, self.cache, self.ranks = encoder, fit, max_tiles, cache, ranks
        self.tiles = Tiles(encoder.size, encoder.mean, fit, max_tiles)
        self.features = FeatureCache(cache, encoder.fingerprint() + "-" + fit, encoder.tokens, encoder.dim) if cache else None

    def on_one_rank(self) -> ImageProcessor:
        """The same for a rank that works alone."""
        return ImageProcessor(self.encoder, self.fit, self.max_tiles, self.cache, OneRank(self.ranks.device))

    def __call__(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Of tiles: pixels, or the features that `prepare` computed."""
        return self.features.get(tuple(pictures)) if self.features else self.pixels(pictures)

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S), normalised as this encoder wants it."""
        encoder = self.encoder
        return torch.stack([pixels(picture, encoder.size, encoder.mean, encoder.std, self.fit) for picture in pictures])

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, P, D), computed now."""
        return self.encoder(self.pixels(pictures).to(self.ranks.device))

    def all_tiles(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The tiles of all pictures; one that does not open is left for whoever renders its row to name."""
        for picture in pictures:
            try:
                yield from self.tiles(picture)
            except BadRow:
                continue

    def prepare(self, pictures: Iterable[Picture] | Callable[[], Iterable[Picture]], gigabytes: float = math.inf,
                print0: Callable[[str], None] = print) -> None:
        """Compute the features that are missing, every rank its share. Above `gigabytes` on disk go on with pixels, and say so.

        pictures   as they are, or a function that gives them: it is called twice where they come as bytes inside their rows (as
                   those of parquet files) and are too many to be held
        """
        if self.features is None:
            return
        again = pictures if callable(pictures) else list(pictures).copy
        wanted: dict[str, Picture | None] = {}
        held = 0
        for tile in self.all_tiles(once(again())):
            if tile.key not in wanted:
                held += tile.held
                wanted[tile.key] = tile if held < MAX_HELD_BYTES else None
                if self.features.bytes_for(len(wanted)) > gigabytes * 1e9:
                    print0(f"the features of {len(wanted):,} or more pictures and tiles would take more than {gigabytes} GB: "
                           f"the encoder runs at every step (--feature_cache_gb)")
                    self.features = None
                    return
        missing = sum(key not in self.features.place for key in wanted)
        tiles: Iterable[Picture] = [tile for tile in wanted.values() if tile]
        if held >= MAX_HELD_BYTES:
            wanted, tiles = {}, self.all_tiles(once(again()))
        self.ranks.barrier()  # every rank must know what is missing before the first one writes, or they divide it differently
        self.features.fill(tiles, self.encode, self.ranks.rank, self.ranks.world_size, missing)
        self.ranks.barrier()
        self.features.refresh()


def once(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Each picture once, while no more than their keys are held."""
    seen = set()
    for picture in pictures:
        if picture.key not in seen:
            seen.add(picture.key)
            yield picture
