"""What `--data` means: names of embedded tasks and paths of files, mixed by weight, as one source of conversations.

In:  specs such as "world", "easy_vqa:0.5", "world:categories=all", "captions.jsonl", "my_folder:2".
Out: a source: `len(source)`, `source[i]`; row i is a pure function of i.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dataset.collate import Batches
from dataset.formats.conversations import Mixture, load, name_and_weight
from dataset.images import BadRow, Picture
from model.registry import TASKS


def mixture(specs: Sequence[str], stage: str, image_folder: Path | None, allow_urls: bool) -> Mixture:
    """All data of a stage ("pretrain" or "sft"); ValueError where a task has nothing for that stage."""
    parts = []
    for spec in specs:
        name, weight = name_and_weight(spec)
        if name.partition(":")[0] in TASKS.names():
            source = TASKS.make(name).train(stage)
            if source is None:
                raise ValueError(f"the task {name!r} has no data for {stage}: leave it out of --data")
        else:
            source = load(name, image_folder, allow_urls)
        parts.append((source, weight))
    return Mixture(parts)


def look(source: Mixture, show: Callable[..., str], say: Callable[[str], None], rows: int = 3) -> None:
    """`say` what `show` makes of the first rows of each part of a mixture; of a bad row, what is bad."""
    for begin, end in zip((0, *source.ends), source.ends):
        for row in range(begin, min(begin + rows, end)):
            try:
                say(f"{show(source[row])}\n")
            except BadRow as bad:
                say(f"bad row: {bad}\n")


def pictures(batches: Batches, micro_batches: int) -> Iterator[Picture]:
    """Every picture that the first `micro_batches` of a stream will show; a bad row is left for the stream to name."""
    epochs, rest = divmod(micro_batches, len(batches))
    for epoch in range(epochs + bool(rest)):
        order = batches.order(epoch)
        windows = -(-rest // batches.window)  # a window is read whole
        rows = order if epoch < epochs else order[: windows * batches.window * batches.batch_size]
        for row in rows:
            try:
                yield from batches.source[int(row)].pictures
            except BadRow:
                continue
        if epoch < epochs:
            return  # a whole epoch shows every row
