"""Features of a frozen encoder, computed once per picture and stored on disk.

In:  pictures, `load(pictures)`, which opens them, and `encode(what load returns) -> (n, P, D)`.
Out: `get(pictures) -> (N, P, D)` in fp32, read through memory maps.

On disk, FOLDER/FINGERPRINT/ belongs to one encoder (the fingerprint of its weights), so no other encoder finds these features.
A shard is NAME.npy, fp16 (n, P, D), and NAME.json, the keys of its n pictures. The list is written last: a shard exists when
its list does. Size: 2 P D bytes per picture, 77 kB for ViT-B/32, 46 GB for 595,000 pictures.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dataset.ahead import ahead
from dataset.bad_rows import BadRow
from dataset.images import Picture
from dataset.writing import replacing
from model.registry import UserError

SHARD = 2048  # pictures per shard, and the most that a crash can lose
BATCH = 64  # pictures encoded together
Load = Callable[[list[Picture]], Any]
Encode = Callable[[Any], torch.Tensor]


class FeatureCache:
    """The features of pictures by a frozen encoder, by the pictures' keys.

    folder, fingerprint   the features are in folder/fingerprint: other weights, other folder
    tokens, dim           P and D of one picture's features
    """

    def __init__(self, folder: str | Path, fingerprint: str, tokens: int, dim: int):
        self.folder, self.shape = Path(folder) / fingerprint, (tokens, dim)
        self.place: dict[str, tuple[np.ndarray, int]] = {}  # key -> (shard, row)
        self.listed: set[Path] = set()  # lists of shards that `place` holds
        self.refresh()

    def refresh(self) -> None:
        """Read the lists of new shards, also those of other ranks. A truncated shard is dropped: `fill` makes it again."""
        for listing in sorted(set(self.folder.glob("*.json")) - self.listed):
            try:
                keys = json.loads(listing.read_text(encoding="utf-8"))
                shard = np.load(listing.with_suffix(".npy"), mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                print(f"dropping the feature shard {listing.stem}, to be computed again: {error}")
                listing.unlink(missing_ok=True)
                continue
            if shard.shape != (len(keys), *self.shape):
                raise UserError(f"{listing.stem} is {shard.shape}, not {(len(keys), *self.shape)}: delete {self.folder}")
            self.place.update({key: (shard, row) for row, key in enumerate(keys)})
            self.listed.add(listing)

    def bytes_for(self, count: int) -> int:
        """Bytes on disk for `count` pictures."""
        return 2 * count * self.shape[0] * self.shape[1]

    def fill(
        self, pictures: Iterable[Picture], load: Load, encode: Encode, rank: int, world: int, total: int | None = None,
    ) -> None:
        """Compute this rank's share of the `total` missing pictures, then `refresh`; a thread opens pictures ahead.

        The pictures are read once, and at most a shard of them is in memory. A picture that does not open is left out: `get`
        raises its error.
        """
        share = itertools.islice(self.missing(pictures), rank, None, world)
        with tqdm(total=total and -(-total // world), desc="features", unit="image", delay=1e-9,
                  disable=rank > 0 or total == 0) as bar:
            while part := list(itertools.islice(share, SHARD)):
                self.write(part, load, encode, bar)
        self.refresh()

    def missing(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """The pictures without features, each once."""
        seen = set()
        for picture in pictures:
            if picture.key not in self.place and picture.key not in seen:
                seen.add(picture.key)
                yield picture

    def write(self, pictures: list[Picture], load: Load, encode: Encode, bar: tqdm) -> None:
        """Encode pictures and write them as one shard."""
        keys, features = [], []
        parts = [pictures[start : start + BATCH] for start in range(0, len(pictures), BATCH)]
        for part, loaded in ahead(lambda part: list(loaded_where_possible(part, load)), parts):
            for opened, pixels in loaded:
                keys += [picture.key for picture in opened]
                features.append(encode(pixels).detach().cpu().half().numpy())
            bar.update(len(part))
        if not keys:
            return
        shard = np.concatenate(features)  # (n, P, D)
        if shard.shape != (len(keys), *self.shape) or not np.isfinite(shard).all():
            raise ValueError(f"features are {shard.shape}, expected {(len(keys), *self.shape)}, all finite in fp16")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]  # unique, because ranks have different pictures
        with replacing(self.folder / f"{name}.npy") as file:
            np.save(file, shard)
        with replacing(self.folder / f"{name}.json") as file:
            file.write(json.dumps(keys).encode())

    def get(self, pictures: tuple[Picture, ...]) -> torch.Tensor:
        """(N, P, D) in fp32; BadRow for a picture that does not open, KeyError for one that `fill` did not see."""
        for picture in pictures:
            if picture.key not in self.place:
                picture.load()  # raises BadRow for a broken picture
                raise KeyError(f"no features of {picture.key} in {self.folder}: call fill first")
        rows = np.stack([shard[row] for shard, row in (self.place[picture.key] for picture in pictures)]).astype(np.float32)
        if not np.isfinite(rows).all():
            broken = pictures[int(np.isfinite(rows).all(axis=(1, 2)).argmin())]
            raise UserError(f"{self.folder} is damaged: the features of a picture ({broken.key}) are not finite. Delete the "
                            f"folder, and they are computed again")
        return torch.from_numpy(rows)


def loaded_where_possible(pictures: list[Picture], load: Load) -> Iterator[tuple[list[Picture], Any]]:
    """(pictures, what `load` returns) of a batch; a batch with a broken picture is loaded one by one, without that picture."""
    try:
        loaded = load(pictures)
    except BadRow:
        if len(pictures) > 1:
            for picture in pictures:
                yield from loaded_where_possible([picture], load)
    else:
        yield pictures, loaded
