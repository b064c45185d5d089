"""Held-out rows: rows of one's own files that no stage trains on, so that own data get a number.

In:  the files of --data.  Out: which of their rows are held out (`places`, `threshold`), and these rows as the model reads them.

Every row has a place between 0 and 1: a hash of its first picture, or, where it has none, of its question, which is all turns
before the last answer. A row is held out where its place lies below --val_share; a small file gives up its first 16 rows by
place, at most half. So the order of the rows, the stage, the rank and the number of threads do not matter. All questions about a
picture land on the same side, and so do equal questions without one. Two rows that share a later picture alone, and a picture
under two names, may be divided.

    place    0 ---- 0.02 ------------------------------------------- 1
             held out |                      trained
"""
from __future__ import annotations

import functools
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.bad_rows import BadRow, BadRows
from dataset.batches import blocks
from dataset.chat import Conversation, Preference
from dataset.formats.files import FileSource
from dataset.images import Picture
from dataset.processor import Processor
from model.registry import UserError

MIN_ROWS = 16  # held out of a small file, or half of it
MAX_ROWS = 1000  # that a check reads: their loss has a small error, and a check stays short
BAD_ROW = -1.0  # the place of a row that cannot be read: it stays among the trained ones, which are counted and named

HeldOutRow = tuple[FileSource, int]  # a file, and the index of a row


def picture_name(picture: Picture, folder: str) -> str:
    """What a place knows of a picture: its name in the row, inside `folder` where it is a file; of bytes the key, a hash."""
    return file_name(picture.origin, folder) if isinstance(picture.origin, str) and picture.origin else picture.key


def file_name(name: str, folder: str) -> str:
    """A picture's name in the one way to write it: ./a.png, /pictures/a.png in the folder /pictures, and a.png are the same."""
    return posixpath.normpath(name.removeprefix("file://")).removeprefix(f"{folder}/")


def place(row: Conversation | Preference, folder: str) -> float:
    """The place of a row in 0..1. `folder`: the folder of its pictures. Without a picture, a row is placed by its question, and
    a text or caption that asks nothing by itself.
    """
    if row.pictures:
        return place_of(picture_name(row.pictures[0], folder))
    messages = row.prompt.messages if isinstance(row, Preference) else row.messages
    if len(messages) > 1 and messages[-1].role == "assistant":
        messages = messages[:-1]
    return place_of(repr([(message.role, message.text.strip()) for message in messages]))


def place_of(text: str) -> float:
    """A hash of a text as a number in 0..1."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="backslashreplace")).digest()[:8], "big") / 2**64


def places(file: FileSource, image_folder: Path | None) -> np.ndarray:
    """(rows,): the place of every row of a file, BAD_ROW for those that cannot be read."""
    folder = (image_folder or file.path.parent).absolute().as_posix()
    found = np.full(len(file), BAD_ROW)
    of_name = functools.cache(lambda name: place_of(file_name(name, folder)))
    rows = tqdm(file.walk(), total=len(file), desc=f"held-out rows of {file.path.name}", unit="row", delay=3, leave=False)
    for i, row in enumerate(rows):
        if not isinstance(row, BadRow):
            found[i] = of_name(row[0]) if isinstance(row, tuple) else place(row, folder)
    return found


def threshold(found: np.ndarray, share: float) -> float:
    """Rows with a place from 0 to below this are held out: a share of them, at least MIN_ROWS, at most half."""
    if not 0 <= share <= 0.5:
        raise UserError(f"--val_share is a share of the rows, 0 to 0.5, not {share}")
    ordered = np.sort(found[found >= 0])
    most = len(ordered) // 2
    if share == 0 or most == 0:
        return 0.0
    fewest = min(MIN_ROWS, most)
    below = max(share, np.nextafter(ordered[fewest - 1], 1))
    return float(min(below, ordered[most]))  # rows of one picture, and equal questions, are never divided: that may be fewer


def indices(file: FileSource, share: float, image_folder: Path | None) -> list[int]:
    """The rows of one file that training with `--val_share share` holds out; all rows for 0."""
    if not share:
        return list(range(len(file)))
    found = places(file, image_folder)
    return np.flatnonzero((found >= 0) & (found < threshold(found, share))).tolist()


class Selected:
    """Selected rows of a source: `len(source)`, `source[i]`; `rows` holds their indices, `bad` the errors of bad ones."""

    def __init__(self, source: FileSource, rows: list[int], bad: Mapping[int, BadRow] | None = None):
        self.source, self.rows, self.bad = source, rows, bad or {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.rows[i] in self.bad:
            raise self.bad[self.rows[i]]
        return self.source[self.rows[i]]

    def pictures(self, i: int) -> Sequence[Picture]:
        """The pictures of a row."""
        return self.source.pictures(self.rows[i])

    def blocks(self) -> np.ndarray:
        return blocks(self.source)[self.rows]


@dataclass(frozen=True)
class Rows:
    """Held-out rows as a source: `len(source)`, `source[i]`."""

    rows: Sequence[HeldOutRow]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        file, row = self.rows[i]
        return file[row]


class HeldOut:
    """Held-out rows as the model reads them: `batches()` gives micro-batches of them, for a rank that works alone.

    rows      (file, index), in the order of their places; at most MAX_ROWS are read, and stay in memory
    chooses   whether all data are files: then these rows choose the checkpoint
    render    row -> document, or pair of documents
    """

    def __init__(self, rows: Sequence[HeldOutRow], chooses: bool, processor: Processor, render: Callable[[Any], Any],
                 batch_size: int, bad_rows: BadRows):
        self.rows, self.chooses = rows, chooses and bool(rows)
        self.render, self.batch_size, self.bad_rows, self.all_ranks = render, batch_size, bad_rows, processor

    def __bool__(self) -> bool:
        return bool(self.rows)

    @cached_property
    def processor(self) -> Processor:
        return self.all_ranks.on_one_rank()

    @cached_property
    def read(self) -> list[tuple[Any, Any]]:
        """(row, rendered row) of every good row, rows of one file behind each other."""
        found = []
        for file, i in sorted(self.rows[:MAX_ROWS], key=lambda row: (str(row[0].path), row[1])):
            try:
                row = file[i]
                found.append((row, self.render(row)))
            except BadRow as bad:
                self.bad_rows.add(bad)
        self.processor.images.prepare(picture for row, _ in found for picture in row.pictures)
        return found

    def batches(self) -> Iterator[dict]:
        """Micro-batches of all good rows."""
        items = [item for _, item in self.read]
        join = self.processor.pair_batch if items and hasattr(items[0], "chosen") else self.processor.batch
        for start in range(0, len(items), self.batch_size):
            part = items[start:start + self.batch_size]
            while part:
                try:
                    yield join(part)
                    break
                except BadRow as bad:  # a picture that does not open
                    self.bad_rows.add(bad)
                    part = [item for item in part if item.id != bad.where]
