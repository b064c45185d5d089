"""The image processor: pictures to the model's input, pixels for an encoder in training, cached features for a frozen one.

In:  pictures.  Out: `images(pictures)`: pixels (N, 3, S, S) or features (N, P, D), which `collate` puts into a batch.
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
from dataset.uncollected import uncollected
from dataset.vision.feature_cache import FeatureCache
from dataset.vision.tiles import Tiles

MAX_BYTES_IN_MEMORY = 1_000_000_000  # of pictures


@dataclass(frozen=True)
class OneRank:
    """A process that works alone."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    world_size: int = 1

    def barrier(self) -> None:
        """There is no other rank to wait for."""

    def all_gather(self, entries: dict, /) -> dict:
        return entries


class ImageProcessor:
    """Prepares pictures for one encoder.

    fit         how a picture is fitted into the square: square, pad or stretch
    max_tiles   the most tiles of a large picture; 0: none
    cache       the folder of the features; None: pixels (the encoder is trained, or the features would not fit)
    features    where its list was read already
    """

    def __init__(self, encoder: Encoder, fit: str, max_tiles: int, cache: Path | None, ranks: Ranks,
                 features: FeatureCache | None = None):
        self.encoder, self.fit, self.max_tiles, self.cache, self.ranks = encoder, fit, max_tiles, cache, ranks
        self.tiles = Tiles(encoder.size, encoder.mean, fit, max_tiles)
        self.features = features
        if cache and features is None:
            self.features = FeatureCache(cache, encoder.fingerprint() + "-" + fit, encoder.tokens, encoder.dim)

    def on_one_rank(self) -> ImageProcessor:
        """The same processor for a rank that works alone."""
        return ImageProcessor(self.encoder, self.fit, self.max_tiles, self.cache, OneRank(self.ranks.device), self.features)

    def __call__(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Pixels of pictures or tiles, or the features that `prepare` computed."""
        return self.features.get(tuple(pictures)) if self.features else self.pixels(pictures)

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S), normalised for this encoder."""
        encoder = self.encoder
        return torch.stack([pixels(picture, encoder.size, encoder.mean, encoder.std, self.fit) for picture in pictures])

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, S, S) -> (N, P, D), computed without the cache."""
        return self.encoder(pixels.to(self.ranks.device))

    def all_tiles(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The tiles of all pictures. A picture that does not open is skipped here; rendering its row reports it."""
        for picture in pictures:
            try:
                yield from self.tiles(picture)
            except BadRow:
                continue

    def prepare(self, pictures: Iterable[Picture] | Callable[[], Iterable[Picture]], gigabytes: float = math.inf,
                print0: Callable[[str], None] = print) -> None:
        """Compute the missing features, each rank its share. If they need more than `gigabytes` on disk, print so and use pixels.

        pictures   an iterable, or a function that returns one. A function is called a second time where the pictures are bytes
                   inside their rows (parquet files) and too many to stay in memory
        """
        if self.features is None:
            return
        again = pictures if callable(pictures) else list(pictures).copy
        most = gigabytes * 1e9 / self.features.bytes_for(1)
        with uncollected():
            tiles_by_key, in_memory = self.look_through(again(), most)
        if len(tiles_by_key) > most:
            print0(f"the features of {len(tiles_by_key):,} or more pictures and tiles need more than {gigabytes} GB: "
                   f"the encoder runs at every step (--feature_cache_gb)")
            self.features = None
            return
        missing = sum(key not in self.features.place for key in tiles_by_key)
        tiles: Iterable[Picture] = [tile for tile in tiles_by_key.values() if tile]
        if in_memory >= MAX_BYTES_IN_MEMORY:
            tiles_by_key, tiles = {}, self.all_tiles(once(again()))
        self.ranks.barrier()  # before the first rank writes, every rank must know what is missing, or their shares would overlap
        self.features.fill(tiles, self.pixels, self.encode, self.ranks.rank, self.ranks.world_size, missing)
        self.ranks.barrier()
        self.features.refresh()

    def look_through(self, pictures: Iterable[Picture], most: float) -> tuple[dict[str, Picture | None], int]:
        """(key -> picture or tile, bytes that these hold in memory), until there are more than `most`.

        Above MAX_BYTES_IN_MEMORY a key has None in place of a picture.
        """
        found: dict[str, Picture | None] = {}
        in_memory = 0
        for tile in self.all_tiles(once(pictures)):
            if tile.key not in found:
                in_memory += tile.memory_bytes
                found[tile.key] = tile if in_memory < MAX_BYTES_IN_MEMORY else None
                if len(found) > most:
                    break
        return found, in_memory


def once(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Each picture once; only the keys stay in memory."""
    seen = set()
    for picture in pictures:
        if picture.key not in seen:
            seen.add(picture.key)
            yield picture
