"""Run the numbered scripts as processes, and make Markdown tables; for recipes.py and arms.py.

In:  a script and its arguments.  Out: what it printed; `ScriptError` with the last line of an error.
"""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ScriptError(Exception):
    """A script ended with an error; the message is its last line."""


def start(script: str, *arguments, threads: int | None = None) -> str:
    """Run `python SCRIPT ARGUMENTS` and return what it printed; ScriptError if it ends with an error.

    threads   CPU threads that it may use; None: no limit
    """
    environment = None if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], text=True, capture_output=True,
                          env=environment)
    if done.returncode:
        raise ScriptError(done.stderr.strip().rpartition("\n")[2] or f"{script} ended with status {done.returncode}")
    return done.stdout


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
