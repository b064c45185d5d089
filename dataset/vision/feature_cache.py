"""Features of a frozen encoder, computed once per picture and kept on disk.

In:  pictures, and `encode(pictures) -> (n, P, D)`.  Out: `get(pictures) -> (N, P, D)` in fp32, read through memory maps.

On disk: FOLDER/FINGERPRINT/ has one folder for each encoder (its weights' fingerprint), so that another encoder never
finds these. Inside, a shard is NAME.npy, fp16 (n, P, D), and NAME.json, the keys of its n pictures, written last:
a shard is there when its list is. Bytes: 2 P D a picture, 77 kB for ViT-B/32, 46 GB for 595,000 of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from dataset.bad_rows import BadRow
from dataset.images import Picture

SHARD = 2048  # pictures a shard, and so the most that a crash can lose
BATCH = 64  # pictures encoded together


class FeatureCache:
    """What a frozen encoder makes of pictures, by their keys.

    folder, fingerprint   where, and the encoder's fingerprint: other weights, other folder
    tokens, dim           P and D of one picture's features
    """

    def __init__(self, folder: str | Path, fingerprint: str, tokens: int, dim: int):
        self.folder, self.shape = Path(folder) / fingerprint, (tokens, dim)
        self.refresh()

    def refresh(self) -> None:
        """Look again for shards, those of other ranks too; one that is cut short is dropped, so that `fill` redoes it."""
        self.place: dict[str, tuple[np.ndarray, int]] = {}  # key -> (shard, row)
        for listing in sorted(self.folder.glob("*.json")):
            keys = json.loads(listing.read_text(encoding="utf-8"))
            try:
                shard = np.load(listing.with_suffix(".npy"), mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                print(f"dropping the feature shard {listing.stem}, to be computed again: {error}")
                listing.unlink(missing_ok=True)
                continue
            if shard.shape != (len(keys), *self.shape):
                raise ValueError(f"{listing.stem} is {shard.shape}, not {(len(keys), *self.shape)}: delete {self.folder}")
            self.place.update({key: (shard, row) for row, key in enumerate(keys)})

    def bytes_for(self, number_of_pictures: int) -> int:
        """Bytes on disk for so many pictures."""
        return 2 * number_of_pictures * self.shape[0] * self.shape[1]

    def fill(
        self, pictures: Iterable[Picture], encode: Callable[[list[Picture]], torch.Tensor], rank: int, world: int,
        total: int | None = None,
    ) -> None:
        """Compute this rank's share of the pictures that are missing, of which there are `total`; then wait and `refresh`.

        They are walked through once, and no more than a shard of them is held. A picture that cannot be opened is left out:
        `get` says why.
        """
        share = itertools.islice(self.missing(pictures), rank, None, world)
        with tqdm(total=total and -(-total // world), desc="features", unit="image", delay=1e-9,
                  disable=rank > 0 or total == 0) as bar:
            while part := list(itertools.islice(share, SHARD)):
                self.write(part, encode, bar)
        self.refresh()

    def missing(self, pictures: Iterable[Picture]) -> Iterator[Picture]:
        """Those that are not there, each once."""
        seen = set()
        for picture in pictures:
            if picture.key not in self.place and picture.key not in seen:
                seen.add(picture.key)
                yield picture

    def write(self, pictures: list[Picture], encode: Callable, bar: tqdm) -> None:
        """Encode pictures into one shard."""
        keys, features = [], []
        for start in range(0, len(pictures), BATCH):
            part = pictures[start : start + BATCH]
            for opened, encoded in encoded_where_possible(part, encode):
                keys += [picture.key for picture in opened]
                features.append(encoded.detach().cpu().half().numpy())
            bar.update(len(part))
        if not keys:
            return
        shard = np.concatenate(features)  # (n, P, D)
        if shard.shape != (len(keys), *self.shape) or not np.isfinite(shard).all():
            raise ValueError(f"features are {shard.shape}, expected {(len(keys), *self.shape)}, all finite in fp16")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:32]  # no two ranks have the same pictures
        with replacing(self.folder / f"{name}.npy") as file:
            np.save(file, shard)
        with replacing(self.folder / f"{name}.json") as file:
            file.write(json.dumps(keys).encode())

    def get(self, pictures: tuple[Picture, ...]) -> torch.Tensor:
        """(N, P, D) in fp32; BadRow for a picture that does not open, KeyError for one that `fill` never saw."""
        for picture in pictures:
            if picture.key not in self.place:
                picture.load()  # a broken one says so here
                raise KeyError(f"no features of {picture.key} in {self.folder}: call fill first")
        rows = [shard[row] for shard, row in (self.place[picture.key] for picture in pictures)]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


def encoded_where_possible(pictures: list[Picture], encode: Callable) -> Iterator[tuple[list[Picture], torch.Tensor]]:
    """(pictures, their features); a batch with a broken picture goes through one by one, without that picture."""
    try:
        features = encode(pictures)
    except BadRow:
        if len(pictures) > 1:
            for picture in pictures:
                yield from encoded_where_possible([picture], encode)
    else:
        yield pictures, features


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when it is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
