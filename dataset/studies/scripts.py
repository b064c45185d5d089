"""The numbered scripts as processes of their own, and a Markdown table of what came of them.

In:  a script and its arguments.  Out: what it printed; `ScriptError` with its last line where it ended with an error.
Made for what compares runs: dataset/studies/recipes.py and dataset/studies/arms.py.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ScriptError(Exception):
    """A script that ended with an error: its last line."""


def start(script: str, *arguments, threads: int | None = None) -> str:
    """Run a script as `python SCRIPT ARGUMENTS`; returns what it printed. ScriptError where it ends with an error.

    threads   of the processor that it may use; None: as many as it finds
    """
    environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], text=True, capture_output=True,
                          env=environment)
    if done.returncode:
        raise ScriptError(done.stderr.strip().rpartition("\n")[2] or f"{script} ended with status {done.returncode}")
    return done.stdout


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
