"""Micro-batches made by other processes, so that a GPU that runs the encoder at every step does not wait for pictures.

In:  `Batches` and a place in the stream.  Out: the micro-batches of one rank in the same order, however many processes make them.

A micro-batch is a pure function of its number, so torch's DataLoader deals out numbers, and resuming stays exact. The processes
are forked: they share the rows with this one, and only batches travel, through shared memory.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dataset.bad_rows import BadRow
from model.registry import UserError


class Recorded:
    """What a process found in place of `BadRows`, which counts in the process that trains."""

    def __init__(self) -> None:
        self.seen, self.found, self.path = 0, list[BadRow](), None

    def add(self, bad: BadRow) -> None:
        self.found.append(bad)


class Numbered(Dataset):
    """number -> (the micro-batch of this number or why there is none, rows seen, bad rows)."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __getitem__(self, number: int) -> tuple[dict | UserError, int, list[BadRow]]:
        self.batches.bad_rows = record = Recorded()
        try:
            batch: dict | UserError = shared(self.batches.batch(number))
        except UserError as error:  # raised again where it can be told in a line
            batch = error
        return batch, record.seen, record.found


def shared(batch: dict) -> dict:
    """The micro-batch, its tensors in shared memory; UserError where that is full, for which torch would wait for ever."""
    try:
        return {name: value.share_memory_() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    except RuntimeError as error:
        raise UserError(f"no shared memory is left for batches (/dev/shm; docker has --shm-size): use --workers 0 ({error})"
                        ) from error


def made_by_processes(batches: Any, workers: int, first: int, step: int) -> Iterator[dict]:
    """The micro-batches first, first + step, ..., made ahead by `workers` processes; page-locked where there is a GPU."""
    made = iter(DataLoader(Numbered(batches), batch_size=None, sampler=count(first, step), num_workers=workers,
                           pin_memory=torch.cuda.is_available(), multiprocessing_context="fork"))
    return (told(batches.bad_rows, *one) for one in made)


def told(bad_rows: Any, batch: dict | UserError, seen: int, found: list[BadRow]) -> dict:
    """The micro-batch, once its rows are counted and the bad ones named; raises the error that stands in its place."""
    bad_rows.seen += seen
    for bad in found:
        bad_rows.add(bad)
    if isinstance(batch, UserError):
        raise batch
    return batch


def useful(most: int, device: torch.device, features_are_stored: bool) -> int:
    """How many processes are worth it, at most `most` and one a core; 0: a thread of this process makes the batches.

    A thread is enough where features are stored, and on a CPU, whose cores compute already. Windows cannot fork.
    """
    if device.type != "cuda" or features_are_stored or "fork" not in multiprocessing.get_all_start_methods():
        return 0
    return min(most, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
