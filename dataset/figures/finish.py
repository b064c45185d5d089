"""The figures of a training run that has ended. matplotlib is imported only then.

In:  the run, and `Inspector` (model/inspection.py).  Out: OUT/figures and a section of the report.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset.protocols import Run


def finish_figures(run: Run, inspect: Callable[[Path], Any]) -> None:
    """Draw them on the first rank; a line for each that is left out."""
    if run.is_main:
        from dataset.figures.draw import figures_section

        for line in figures_section(run.out, run.name, inspect):
            run.print0(line)
    run.barrier()
