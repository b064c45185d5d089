"""Documents to batches: all tokens on one axis, in an order that can be resumed exactly.

In:  a source of conversations, how to render one, how to look at its pictures.
Out: batches, dicts of `input_ids, labels, position_ids, document_ids (B, T)`, `pixels` or `features`, and `ids`.

An epoch is a shuffle of the rows, cut into windows. A window is rendered, sorted by length and cut into micro-batches of
about equal lengths, which are shuffled. So micro-batch m of a run is a pure function of (seed, m): the position of the
data is one number, and rank r of w takes the micro-batches r, r + w, r + 2w, ... of the one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dataset.chat import Conversation, Document
from dataset.formats.conversations import BadRows, blocks
from dataset.images import BadRow, Picture

IGNORE = -100  # the label of a token that is not learned

Look = Callable[[tuple[Picture, ...]], torch.Tensor]  # pictures -> pixels (N, 3, S, S) or features (N, P, D)


def collate(documents: list[Document], look: Look) -> dict:
    """Documents end to end on one axis, B = 1, no padding; raises BadRow that names the document of a broken picture.

    input_ids      a1 a2 a3 b1 b2
    labels          .  . a3  . b2     . is -100; a label stands where its token stands
    position_ids    0  1  2  0  1
    document_ids    0  0  0  1  1
    """
    return {**flat(documents), **images(documents, look), "ids": [document.id for document in documents]}


def flat(documents: list[Document]) -> dict[str, torch.Tensor]:
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


def pad(documents: list[Document], look: Look, pad_id: int) -> dict:
    """The same documents one a row, padded on the right to the longest: what a flat batch must agree with."""
    shape = (len(documents), max(len(document) for document in documents))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "document_ids": torch.full(shape, -1),
    }
    for row, document in enumerate(documents):
        for name, values in flat([document]).items():
            batch[name][row, : len(document)] = values[0]
        batch["document_ids"][row, : len(document)] = row
    return {**batch, **images(documents, look), "ids": [document.id for document in documents]}


def images(documents: list[Document], look: Look) -> dict[str, torch.Tensor]:
    """{"pixels": (N, 3, S, S)} or {"features": (N, P, D)} of all pictures in reading order; {} without any."""
    seen = []
    for document in documents:
        if document.pictures:
            try:
                seen.append(look(document.pictures))
            except BadRow as bad:
                bad.where = document.id
                raise
    if not seen:
        return {}
    return {"pixels" if seen[0].ndim == 4 else "features": torch.cat(seen)}


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
    """The endless stream of micro-batches, by number: `batch(m)` depends on the seed and m alone.

    `render` makes a document of a conversation; `window` is how many micro-batches are sorted by length together. The scripts
    use 1: without padding, sorting saves little, and a batch of equal lengths is a batch of like scenes, a narrow gradient
    (after 150 steps on captions the loss was 1.42 with 16 and 1.08 with 1; test scores were no better, one seed). Padded forms
    want 8 to 50. `len` is the micro-batches of an epoch, over all ranks.
    """

    def __init__(
        self,
        source,
        render: Callable[[Conversation], Document],
        look: Look,
        *,
        batch_size: int,
        window: int,
        seed: int,
        bad_rows: BadRows,
        rank: int,
        world: int,
        join: Callable[[list, Look], dict] = collate,
    ):
        if not len(source):
            raise ValueError("the data holds no row")
        self.source, self.render, self.look, self.bad_rows = source, render, look, bad_rows
        self.batch_size, self.window, self.seed, self.rank, self.world = batch_size, window, seed, rank, world
        self.join = join  # what `render` makes -> a batch; of other items than documents, `len` and `id` are needed
        self.block = blocks(source)
        self.kept_order: tuple[int, np.ndarray] | None = None  # the last epoch asked for, and its order
        self.kept_window: tuple[tuple[int, int], list[list[Document]]] | None = None  # and the last window

    def __len__(self) -> int:
        return math.ceil(len(self.source) / self.batch_size)

    def start(self, position: int) -> Iterator[tuple[int, dict]]:
        """(position to store, this rank's batch), for ever, from a stored position on; the next one is made meanwhile.

        A position counts the micro-batches that all ranks have consumed, so it is the same number on every rank.
        """
        number = position + self.rank
        # Images are decoded while the model computes. One thread a core in all: a second OpenMP team slows the first by a third.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker:
            waiting = worker.submit(self.batch, number)
            while True:
                batch = waiting.result()
                number += self.world
                waiting = worker.submit(self.batch, number)
                yield number - self.rank, batch

    def batch(self, number: int) -> dict:
        """Micro-batch `number` of the stream; one whose every row is bad gives way to its neighbour, those before it first."""
        epoch, rest = divmod(number, len(self))
        for place in (rest, *reversed(range(rest)), *range(rest + 1, len(self))):
            documents = self.documents(epoch, place // self.window)[place % self.window]
            while documents:
                try:
                    return self.join(documents, self.look)
                except BadRow as bad:
                    self.bad_rows.add(bad)
                    documents = [document for document in documents if document.id != bad.where]
        raise RuntimeError(f"no good row among {len(self.source)}; see {self.bad_rows.path}")

    def documents(self, epoch: int, window: int) -> list[list[Document]]:
        """The micro-batches of one window. Bad rows leave them smaller but no fewer, so that positions stay put."""
        if self.kept_window is None or self.kept_window[0] != (epoch, window):
            rows = self.order(epoch)[window * self.window * self.batch_size :][: self.window * self.batch_size]
            rows = rows[np.argsort(self.block[rows], kind="stable")]  # so that a block is read once
            documents = sorted(self.rendered(rows), key=len)
            number_of_batches = math.ceil(len(rows) / self.batch_size)
            edges = [len(documents) * k // number_of_batches for k in range(number_of_batches + 1)]
            shuffled = np.random.default_rng((self.seed, epoch, window)).permutation(number_of_batches)
            self.kept_window = (epoch, window), [documents[edges[k] : edges[k + 1]] for k in shuffled]
        return self.kept_window[1]

    def rendered(self, rows: np.ndarray) -> Iterator[Document]:
        """The documents of these rows, less the bad ones, which are named."""
        self.bad_rows.seen += len(rows)
        for row in rows:
            try:
                yield self.render(self.source[int(row)])
            except BadRow as bad:
                self.bad_rows.add(bad)

    def order(self, epoch: int) -> np.ndarray:
        if self.kept_order is None or self.kept_order[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self.kept_order = epoch, epoch_order(self.block, generator)
        return self.kept_order[1]
