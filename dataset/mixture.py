"""`--data`: embedded tasks and files, mixed by weight, as one source of conversations.

In:  specs such as "world", "easy_vqa:0.5", "world:categories=all", "captions.jsonl", "my_folder:2".
Out: a source: `len(source)`, `source[i]`; row i is a pure function of i. `training_batches` makes micro-batches from it, without
     the held-out rows of files (dataset/held_out.py).
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataset import held_out, workers
from dataset.bad_rows import BadRows
from dataset.batches import Batches, blocks, pictures_of
from dataset.check_data import check_data
from dataset.formats.files import FileSource
from dataset.formats.folders import HUB, downloaded, sources
from dataset.held_out import HeldOut, HeldOutRow, Rows, Selected
from dataset.images import Picture
from dataset.processor import Processor
from dataset.protocols import Run, Source
from model.registry import TASKS, UserError

FEW_STEPS = 50  # below this a run that was not asked for so few says so


class TrainingFlags(Protocol):
    """The flags of a script that `training_batches` reads."""

    batch_size: int
    accumulate: int
    max_length: int
    epochs: float
    optim: Any


class Mixture:
    """Several sources as one. With weight 2 a source gives each row twice per epoch, with 0.5 a random half of its rows.

    Row i is a pure function of (seed, i), so the half is the same in every epoch.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]], seed: int = 0):
        self.sources, self.weights = [source for source, _ in parts], [weight for _, weight in parts]
        self.ends = list(accumulate(round(weight * len(source)) for source, weight in parts))
        self.orders = [np.random.default_rng((seed, k)).permutation(len(source)) for k, source in enumerate(self.sources)]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> Any:
        source, row = self.place(i)
        return source[row]

    def place(self, i: int) -> tuple[Source, int]:
        """The source of a row, and its index there."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect_right(self.ends, i)
        return self.sources[k], int(self.orders[k][(i - (self.ends[k - 1] if k else 0)) % len(self.sources[k])])

    def pictures(self, i: int) -> Sequence[Picture]:
        """The pictures of a row."""
        return pictures_of(*self.place(i))

    def blocks(self) -> np.ndarray:
        """(len,): the block of each row (batches.blocks), with indices that differ between sources."""
        parts, start, offset = [], 0, 0
        for source, order, end in zip(self.sources, self.orders, self.ends):
            block = blocks(source)[order[np.arange(end - start) % max(1, len(order))]]
            parts.append(np.where(block < 0, block, block + offset))
            start, offset = end, offset + max(0, block.max(initial=-1) + 1)
        return np.concatenate(parts)


def load(path: str | Path, image_folder: str | Path | None = None, allow_urls: bool = False, need_answer: bool = True,
         kind: type[FileSource] = FileSource) -> Source:
    """The rows of a file, or of every data file in a folder, or of a data set on the hub, hf:OWNER/NAME.

    image_folder   the folder of the images, which no row may leave; default: that of the file
    need_answer    False also accepts rows that end with a question, for inference
    kind           the class that reads rows: conversations, or preferences (dataset/preferences.py)
    Raises FileNotFoundError, UserError or TypeError when nothing can be read.
    """
    path = downloaded(str(path)) if str(path).startswith(HUB) else Path(path)
    if path.is_dir():
        made = sources(path, lambda file: load_file(file, image_folder, allow_urls, need_answer, kind))
        return Mixture([(source, 1) for source in made])
    return load_file(path, image_folder, allow_urls, need_answer, kind)


def load_file(path: Path, image_folder: str | Path | None = None, allow_urls: bool = False, need_answer: bool = True,
              kind: type[FileSource] = FileSource) -> FileSource:
    """The rows of one file, after a line about what it holds; the rest as in `load`."""
    folder = Path(image_folder or (path if path.is_dir() else path.parent))
    return kind(path, folder, allow_urls, need_answer).tell()


def name_and_weight(spec: str) -> tuple[str, float]:
    """"data.jsonl:0.5" -> ("data.jsonl", 0.5); without a number the weight is 1."""
    name, _, weight = spec.rpartition(":")
    try:
        return (name, float(weight)) if name else (spec, 1.0)
    except ValueError:
        return spec, 1.0


def mixture(specs: Sequence[str], stage: str, image_folder: Path | None, allow_urls: bool) -> Mixture:
    """All data of a stage ("pretrain" or "sft"). UserError where a task has none for that stage."""
    parts: list[tuple[Source, float]] = []
    for spec in specs:
        name, weight = name_and_weight(spec)
        if name.partition(":")[0] in TASKS.names():
            source = TASKS.make(name).train(stage)
            if source is None:
                raise UserError(f"the task {name!r} has no data for {stage}: leave it out of --data")
        else:
            source = load(name, image_folder, allow_urls)
        if not 0 <= weight < math.inf:
            raise UserError(f"--data {spec}: a weight is a number from 0 on, not {weight}")
        parts.append((source, weight))
    if not parts or not len(Mixture(parts)):
        raise UserError(f"--data {' '.join(specs)} holds no row: name tasks, files or folders with rows, with weights above 0")
    return Mixture(parts)


class HeldOutFlags(Protocol):
    """The flags that say which rows are held out (model/cli.py)."""

    val_share: float
    val_data: tuple[str, ...]
    image_folder: Path | None
    allow_urls: bool


def files_of(source: Source) -> list[FileSource]:
    """The files of a source, in their order; a task has none."""
    if isinstance(source, Mixture):
        return [file for part in source.sources for file in files_of(part)]
    return [source] if isinstance(source, FileSource) else []


def without(source: Source, rows: set[HeldOutRow]) -> Source:
    """The same source without these rows of its files."""
    if isinstance(source, Mixture):
        return Mixture([(without(part, rows), weight) for part, weight in zip(source.sources, source.weights)])
    if isinstance(source, FileSource) and any(file is source for file, _ in rows):
        return Selected(source, sorted(set(range(len(source))).difference(i for file, i in rows if file is source)))
    return source


def split(source: Source, flags: HeldOutFlags, print0: Callable[[str], None]) -> tuple[Source, list[HeldOutRow]]:
    """(the mixture without held-out rows, the held-out rows in the order of their places). Prints how many there are.

    A picture, or a question without one, that is held out of one file, or that --val_data holds, is trained from no other. A
    source that is not a mixture holds no files of the user.
    """
    if not isinstance(source, Mixture):
        if flags.val_data:
            raise UserError("--val_data holds out rows beside those of --data: name files there, too")
        return source, []
    files = files_of(source)
    asked = [file for name in flags.val_data for file in files_of(
        load(name, flags.image_folder, flags.allow_urls, need_answer=False, kind=type(files[0]) if files else FileSource))]
    places = {file: held_out.places(file, flags.image_folder) for file in (*files, *asked)}
    held: set[float] = set()
    for entry in [asked] if asked else [files_of(part) for part in source.sources]:  # a file, or those of a folder
        found = np.concatenate([places[file] for file in entry]) if entry else np.empty(0)
        limit = math.inf if asked else held_out.threshold(found, flags.val_share)
        held.update(found[(found >= 0) & (found < limit)])
    untrained = {(file, int(i)) for file in files for i in np.flatnonzero(np.isin(places[file], list(held)))}
    rows = [(file, i) for file in asked for i in range(len(file))] if asked else list(untrained)
    total = sum(map(len, files))
    if asked:
        print0(f"held out: {len(rows):,} rows of --val_data"
               + (f"; {len(untrained):,} rows of --data show or ask the same and are not trained" if untrained else ""))
    elif files and flags.val_share:
        print0(f"held out: {len(rows):,} of {total:,} rows of files, not trained (--val_share {flags.val_share:g})" if rows else
               f"no row is held out: the {total:,} rows of files are too few, or show or ask the same")
    return without(source, untrained), sorted(rows, key=lambda row: (places[row[0]][row[1]], str(row[0].path), row[1]))


def training_batches(source: Source, processor: Processor, config: TrainingFlags, run: Run, *,
                     pairs: bool = False) -> tuple[Batches, int, HeldOut]:
    """(micro-batches, optimizer steps, held-out rows) of a run. Prints rows and steps; with --check_data every row is checked.

    pairs   the rows are preferences, and a batch holds two documents of each
    The features of a frozen encoder are computed here, unless the run stops before training.
    """
    render = partial(processor.pair if pairs else processor.document, max_length=config.max_length)
    all_files = isinstance(source, Mixture) and all(files_of(part) for part in source.sources)
    source, rows = split(source, run.config, run.print0)
    bad_rows = BadRows(None if run.preview_only else run.out / "bad_rows.jsonl", len(source) + len(rows), run.config.max_bad)
    batches = Batches(source, render, processor.pair_batch if pairs else processor.batch, batch_size=config.batch_size,
                      seed=run.config.seed, bad_rows=bad_rows)
    per_step = config.accumulate * run.data_ranks.world_size  # micro-batches
    steps = config.optim.max_steps or max(1, round(config.epochs * len(batches) / per_step))
    run.print0(f"{len(source):,} {'pairs' if pairs else 'rows'}, {steps} steps of {config.batch_size * per_step} "
               f"on {run.world_size} x {run.device}")
    if all_files and steps < FEW_STEPS and not (config.optim.max_steps or run.config.check_data):
        run.print0(f"{steps} steps are few to learn from, and a pass over these rows takes {math.ceil(len(batches) / per_step)}: "
                   f"raise --epochs")
    if run.config.check_data and run.is_main:
        check_data(source, processor, render, run, Rows(rows) if rows else None)
    if not run.preview_only:
        processor.images.prepare(partial(batches.pictures, steps * per_step), run.config.feature_cache_gb, run.print0)
        batches.workers = workers.useful(run.config.workers, run.device, processor.images.features is not None)
    return batches, steps, HeldOut(rows, all_files, processor, render, config.batch_size, bad_rows)
