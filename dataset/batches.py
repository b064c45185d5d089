"""The stream of micro-batches, in an order that can be resumed exactly.

In:  a source of rows, a function that renders one, a function that joins several.  Out: `batch(m)`, micro-batch m of the stream.

The stream is endless; an epoch is a shuffle of the rows, cut into micro-batches. So micro-batch m is a pure function of
(seed, m): the position in the data is one number, and rank r of w takes the micro-batches r, r + w, r + 2w, ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, count, pairwise
from typing import Any

import numpy as np
import torch

from dataset.bad_rows import BadRow, BadRows
from dataset.images import Picture
from dataset.protocols import DataRanks, Source
from dataset.workers import made_by_processes
from model.registry import UserError


def blocks(source: Source) -> np.ndarray:
    """(len(source),): the index of the block that each row is read with, -1 for rows that are read alone."""
    return source.blocks() if hasattr(source, "blocks") else np.full(len(source), -1)


def pictures_of(source: Source, i: int) -> Sequence[Picture]:
    """The pictures of a row, without reading the rest of it where the source can; BadRow where it cannot be used."""
    return source.pictures(i) if hasattr(source, "pictures") else source[i].pictures


def epoch_order(block: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A shuffle of the rows, (n,): free rows (block -1) go anywhere, rows of a block stay near each other.

    A parquet file is read by blocks of rows (row groups), so a full shuffle would read a block for every row.
    """
    block_count = block.max(initial=-1) + 1
    place = generator.random(len(block))
    if block_count:
        start = generator.random(block_count)
        place = np.where(block < 0, place, start[block] + 2 / block_count * place)
    return np.argsort(place, kind="stable")


class Batches:
    """The micro-batches of an endless stream, by index: `batch(m)` depends on the seed and m alone.

    render    row -> item: a document, or a pair of documents; an item has a length and an `id`
    join      items -> batch
    workers   processes that make them (dataset/workers.py); 0: a thread
    `len` is the number of micro-batches in an epoch, over all ranks.
    """

    def __init__(self, source: Source, render: Callable[[Any], Any], join: Callable[[list], dict], *, batch_size: int, seed: int,
                 bad_rows: BadRows, workers: int = 0):
        if not len(source):
            raise UserError("the data holds no row")
        self.source, self.render, self.join, self.bad_rows = source, render, join, bad_rows
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.block = blocks(source)
        self.last_order: tuple[int, np.ndarray] | None = None  # the last epoch that was read, and its order

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def batch(self, index: int) -> dict:
        """Micro-batch `index` of the stream. Where all its rows are bad: the nearest earlier one of the epoch, or a later one."""
        epoch, place = divmod(index, len(self))
        for k in (place, *reversed(range(place)), *range(place + 1, len(self))):
            items = self.items(epoch, k)
            while items:
                try:
                    return self.join(items)
                except BadRow as bad:
                    self.bad_rows.add(bad)
                    items = [item for item in items if item.id != bad.where]
        raise UserError(f"no good row among {len(self.source)}; see {self.bad_rows.path}")

    def items(self, epoch: int, place: int) -> list:
        """The rendered rows of a micro-batch, without the bad ones, which are reported."""
        rows = self.order(epoch)[place * self.batch_size:][:self.batch_size]
        rows = rows[np.argsort(self.block[rows], kind="stable")]  # reads each block once
        self.bad_rows.seen += len(rows)
        items = []
        for row in rows:
            try:
                items.append(self.render(self.source[int(row)]))
            except BadRow as bad:
                self.bad_rows.add(bad)
        return sorted(items, key=len)

    def order(self, epoch: int) -> np.ndarray:
        """(rows,): the order of an epoch."""
        if self.last_order is None or self.last_order[0] != epoch:
            self.last_order = epoch, epoch_order(self.block, np.random.default_rng((self.seed, epoch)))
        return self.last_order[1]

    def stream(self, position: int, ranks: DataRanks) -> Stream:
        """The micro-batches of this rank, from a stored position."""
        return Stream(self, position, ranks.rank, ranks.world_size)

    def pictures(self, micro_batches: int) -> Iterator[Picture]:
        """Every picture in the first `micro_batches` of the stream. Bad rows are skipped here; the stream reports them."""
        rows = self.order(0) if micro_batches >= len(self) else self.order(0)[:micro_batches * self.batch_size]
        for row in rows:
            try:
                yield from pictures_of(self.source, int(row))
            except BadRow:
                continue


class Stream:
    """This rank's endless micro-batches, from a stored position. The next ones are made while the model computes.

    position   micro-batches that all ranks together have consumed: equal on every rank, saved for --resume
    """

    def __init__(self, batches: Batches, position: int, rank: int, world_size: int):
        self.position, self.world_size = position, world_size
        make = made_by_a_thread if batches.workers == 0 else partial(made_by_processes, workers=batches.workers)
        self.made = make(batches, first=position + rank, step=world_size)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict:
        batch = next(self.made)
        self.position += self.world_size
        return batch


def made_by_a_thread(batches: Batches, first: int, step: int) -> Iterator[dict]:
    """The micro-batches first, first + step, ...; a thread makes the next one, the first at once.

    It has one OpenMP thread: every core has one already, and a second team of threads would slow the first.
    """
    worker = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
    ahead = (worker.submit(batches.batch, number) for number in count(first, step))
    waiting = next(ahead)
    return (done.result() for done, _ in pairwise(chain([waiting], ahead)))
