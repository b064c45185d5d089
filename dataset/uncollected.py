"""Large tables without Python's garbage collector, which would look through them again and again for cycles that are not there.

It takes as long as reading the rows. What is made inside the block and stays is not looked through later, either.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection inside the block."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
