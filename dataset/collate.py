"""Documents to batches: all tokens on one axis, in an order that can be resumed exactly.

In:  a source of rows, how to render one, how to join several into a batch.
Out: batches, dicts of `input_ids, labels, position_ids, document_ids (B, T)`, `pixels (N, 3, S, S)` or `features (N, P, D)`, and
     `ids`, the documents' names.

An epoch is a shuffle of the rows, cut into micro-batches. So micro-batch m of a run is a pure function of (seed, m): the position
of the data is one number, and rank r of w takes the micro-batches r, r + w, r + 2w, ... of the one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dataset.bad_rows import BadRow, BadRows
from dataset.chat import Document
from dataset.images import Picture

IGNORE = -100  # the label of a token that is not learned, as in model/losses.py

Images = Callable[[Sequence[Picture]], Tensor]  # pictures -> pixels (N, 3, S, S) or features (N, P, D)


def collate(documents: Sequence[Document], images: Images) -> dict:
    """Documents end to end on one axis, B = 1, no padding; raises BadRow that names the document of a broken picture.

    input_ids      a1 a2 a3 b1 b2
    labels          .  . a3  . b2     . is -100; a label stands where its token stands
    position_ids    0  1  2  0  1
    document_ids    0  0  0  1  1
    """
    return {**token_tensors(documents), **image_tensors(documents, images), "ids": [document.id for document in documents]}


def token_tensors(documents: Sequence[Document]) -> dict[str, Tensor]:
    """The tokens of `collate`, each tensor (1, T)."""
    lengths = [len(document) for document in documents]
    input_ids = torch.tensor([number for document in documents for number in document.input_ids])
    learn = torch.tensor([flag for document in documents for flag in document.learn])
    batch = {
        "input_ids": input_ids,
        "labels": torch.where(learn, input_ids, IGNORE),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "document_ids": torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(lengths)),
    }
    return {name: values[None] for name, values in batch.items()}


def pad(documents: Sequence[Document], images: Images, pad_id: int) -> dict:
    """The same documents one a row, padded on the right to the longest: for generation."""
    shape = (len(documents), max(len(document) for document in documents))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "document_ids": torch.full(shape, -1),
    }
    for row, document in enumerate(documents):
        for name, values in token_tensors([document]).items():
            batch[name][row, : len(document)] = values[0]
        batch["document_ids"][row, : len(document)] = row
    return {**batch, **image_tensors(documents, images), "ids": [document.id for document in documents]}


def image_tensors(documents: Sequence[Document], images: Images) -> dict[str, Tensor]:
    """{"pixels": (N, 3, S, S)} or {"features": (N, P, D)} of all pictures in reading order; {} without any."""
    found = []
    for document in documents:
        if document.pictures:
            try:
                found.append(images(document.pictures))
            except BadRow as bad:
                bad.where = document.id
                raise
    if not found:
        return {}
    return {"pixels" if found[0].ndim == 4 else "features": torch.cat(found)}


class Ranks(Protocol):
    """Which of how many processes this one is."""

    rank: int
    world_size: int


# ---------------------------------------------------------------- the stream of micro-batches


class Source(Protocol):
    """Rows by number, each made or read when it is asked for. `blocks()`, where there is one, says what is read together."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


def blocks(source: Source) -> np.ndarray:
    """(len(source),): the block of each row that is read together with it, -1 where every row stands alone."""
    return source.blocks() if hasattr(source, "blocks") else np.full(len(source), -1)


def epoch_order(block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A shuffle of the rows, (n,): free rows (block -1) fall anywhere, rows of a block stay near each other.

    A parquet file can only be read by blocks of rows (row groups), so a full shuffle would read one for every row.
    """
    number_of_blocks = block.max(initial=-1) + 1
    place = generator.random(len(block))
    if number_of_blocks:
        start = generator.random(number_of_blocks)
        place = np.where(block < 0, place, start[block] + 2 / number_of_blocks * place)
    return np.argsort(place, kind="stable")


class Batches:
    """The micro-batches of an endless stream, by number: `batch(m)` depends on the seed and m alone.

    render    makes an item of a row: a document, or a pair of them; an item has a length and an `id`
    join      makes a batch of items
    `len` is the micro-batches of an epoch, over all ranks.
    """

    def __init__(self, source: Source, render: Callable[[Any], Any], join: Callable[[list], dict], *, batch_size: int, seed: int,
                 bad_rows: BadRows):
        if not len(source):
            raise ValueError("the data holds no row")
        self.source, self.render, self.join, self.bad_rows = source, render, join, bad_rows
        self.batch_size, self.seed = batch_size, seed
        self.block = blocks(source)
        self.last_order: tuple[int, np.ndarray] | None = None  # the last epoch asked for, and its order

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def batch(self, number: int) -> dict:
        """Micro-batch `number` of the stream; one whose every row is bad gives way to its neighbour, those before it first."""
        epoch, rest = divmod(number, len(self))
        for place in (rest, *reversed(range(rest)), *range(rest + 1, len(self))):
            items = self.items(epoch, place)
            while items:
                try:
                    return self.join(items)
                except BadRow as bad:
                    self.bad_rows.add(bad)
                    items = [item for item in items if item.id != bad.where]
        raise RuntimeError(f"no good row among {len(self.source)}; see {self.bad_rows.path}")

    def items(self, epoch: int, place: int) -> list:
        """The rendered rows of a micro-batch, less the bad ones, which are named."""
        rows = self.order(epoch)[place * self.batch_size:][:self.batch_size]
        rows = rows[np.argsort(self.block[rows], kind="stable")]  # so that a block is read once
        self.bad_rows.seen += len(rows)
        items = []
        for row in rows:
            try:
                items.append(self.render(self.source[int(row)]))
            except BadRow as bad:
                self.bad_rows.add(bad)
        return sorted(items, key=len)

    def order(self, epoch: int) -> np.ndarray:
        """(rows,): the shuffle of an epoch."""
        if self.last_order is None or self.last_order[0] != epoch:
            self.last_order = epoch, epoch_order(self.block, np.random.default_rng((self.seed, epoch)))
        return self.last_order[1]

    def stream(self, position: int, ranks: Ranks) -> Stream:
        """The micro-batches of this rank from a stored position on."""
        return Stream(self, position, ranks.rank, ranks.world_size)

    def pictures(self, micro_batches: int) -> Iterator[Picture]:
        """Every picture that the first `micro_batches` of the stream will show; a bad row is left for the stream to name."""
        rows = self.order(0) if micro_batches >= len(self) else self.order(0)[:micro_batches * self.batch_size]
        for row in rows:
            try:
                yield from self.source[int(row)].pictures
            except BadRow:
                continue


class Stream:
    """This rank's micro-batches, for ever, from a stored position on; the next one is made while the model computes.

    position   micro-batches that all ranks together have consumed: the same number on every rank, saved for --resume
    """

    def __init__(self, batches: Batches, position: int, rank: int, world_size: int):
        self.batches, self.position, self.rank, self.world_size = batches, position, rank, world_size
        # One thread a core in all: a second OpenMP team would slow the first by a third.
        self.worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.waiting = self.worker.submit(batches.batch, position + rank)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict:
        batch = self.waiting.result()
        self.position += self.world_size
        self.waiting = self.worker.submit(self.batches.batch, self.position + self.rank)
        return batch
