"""Rows and pictures as strangers damage them: each is read, or refused with a reason, within seconds and a bounded memory.

    python -m tests.fuzz --rows 25000 --pictures 5000        prints a table; exit status 1 if anything was not caught

`fuzz_rows.py` and `fuzz_pictures.py` make them, all from one seed; tests/test_fuzz.py runs a short form. Seconds are of the
processor, so that a busy machine changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dataset.bad_rows import BadRow
from model.registry import UserError

REFUSALS = (BadRow, UserError, FileNotFoundError)  # with a reason that a user can act on
MAX_SECONDS, MAX_BYTES = 5, 1_000_000_000


@dataclass
class Count:
    """What became of the cases of one kind. peak: the most bytes that this process had held by then."""

    kind: str
    tried: int = 0
    refused: int = 0
    uncaught: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: float = 0.0

    def add(self, work: Callable[[], object], cases: int = 1) -> None:
        """Do the work of some cases, together in time, and count how it ends; `work` returns how many were refused."""
        began = time.process_time()
        try:
            refused = work()
            self.refused += refused if isinstance(refused, int) else 0
        except REFUSALS as error:
            assert str(error).strip(), "refused without a reason"
            self.refused += cases
        except Exception:
            self.uncaught.append(traceback.format_exc())
        self.tried += cases
        self.slowest = max(self.slowest, time.process_time() - began)
        self.peak = max(self.peak, memory())

    @property
    def failed(self) -> bool:
        return bool(self.uncaught) or self.slowest > MAX_SECONDS or self.peak > MAX_BYTES


def memory() -> float:
    """The most bytes that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(counts: Iterable[Count]) -> str:
    """The counts, a line a kind."""
    lines = [f"{'kind':34} {'tried':>7} {'refused':>8} {'uncaught':>9} {'slowest s':>10} {'peak MB':>8}"]
    for one in counts:
        lines.append(f"{one.kind:34} {one.tried:7,} {one.refused:8,} {len(one.uncaught):9,} {one.slowest:10.2f} "
                     f"{one.peak / 1e6:8.0f}")
    return "\n".join(lines)


def main(rows: int, pictures: int, seed: int) -> int:
    """Run both, print the table and the first error of each kind that was not caught; 1 if any kind failed."""
    from tests.fuzz_pictures import fuzz_pictures
    from tests.fuzz_rows import fuzz_rows

    with tempfile.TemporaryDirectory() as folder:
        counts = [*fuzz_rows(Path(folder), rows, seed), *fuzz_pictures(pictures, seed)]
    print(table(counts))
    for one in counts:
        if one.uncaught:
            print(f"\n{one.kind}:\n{one.uncaught[0]}")
    return int(any(one.failed for one in counts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="damaged rows and pictures")
    parser.add_argument("--rows", type=int, default=25_000)
    parser.add_argument("--pictures", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    sys.exit(main(**vars(parser.parse_args())))
