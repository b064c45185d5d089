"""Work for the CPU that is done ahead: a thread prepares the next item while the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def ahead(load: Callable[[Item], Loaded], items: Iterable[Item]) -> Iterator[tuple[Item, Loaded]]:
    """Each item with what `load` makes of it. A thread loads the next one while the caller works on this one."""
    # One OpenMP thread: every core has one already, and a second team of threads would slow the first.
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as worker:
        waiting = None
        for item in items:
            following = item, worker.submit(load, item)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting:
            yield waiting[0], waiting[1].result()
