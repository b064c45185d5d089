"""Select the problems that teach: rows whose measured pass rate is neither near 0 nor near 1.

In:  a source of rows that may state how often a model solves them.  Out: the same source without too easy and too hard rows.

RL learns nothing from a prompt that is always or never solved: its group has no variance. MM-EUREKA (arXiv 2503.07365) drops such
prompts before training; the online filter of RL drops them during training, as the policy changes.

    python 4-eval_chat.py --data rows.jsonl --samples 8 --temperature 1 --save rated.jsonl     measures and writes `pass_rate`
    python -m dataset.formats.pass_rates rated.jsonl --low 0.1 --high 0.9        counts the rows of each pass rate
    python 3-rl_vlm.py --data rated.jsonl --pass_rates 0.1 0.9           learns from the rows between
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dataset.bad_rows import BadRow
from dataset.formats.files import FileSource
from dataset.formats.survey import tell
from dataset.held_out import Selected
from dataset.mixture import Mixture, load
from dataset.protocols import Source
from model.registry import UserError

FIELDS = ("pass_rate", "accuracy", "solve_rate")  # a share in 0..1, under any of the names in use


def pass_rate(row: Any) -> float | None:
    """The share of answers that solved the row, None where the row does not state it. BadRow where it is not a share."""
    if not isinstance(row, dict):
        return None
    value = next((row[field] for field in FIELDS if row.get(field) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadRow(f"pass rate {value!r} is not a share of 1", f"write {FIELDS[0]} as a number from 0 to 1")
    return float(value)


def by_pass_rate(source: Source, low: float, high: float) -> Selected | Mixture:
    """The rows with a pass rate from `low` to `high`, bounds included, and the rows without one.

    A broken row, and one whose rate is not a share, stays in: reading it raises the error.
    """
    if not 0 <= low <= high <= 1:
        raise UserError(f"pass rates: 0 <= low <= high <= 1, not {low} and {high}")
    if isinstance(source, Mixture):
        return Mixture([(by_pass_rate(part, low, high), 1) for part in source.sources])
    file, candidates = (source.source, source.rows) if isinstance(source, Selected) else (source, range(len(source)))
    if not isinstance(file, FileSource):
        raise TypeError(f"{type(source).__name__} has no rows with pass rates")
    rows, bad = [], {}
    for i in candidates:
        try:
            rate = pass_rate(file.row(i))
        except BadRow as error:
            error.where = f"{file.path}:{i + 1}"
            rate, bad[i] = None, error
        if rate is None or low <= rate <= high:
            rows.append(i)
    tell(f"{file.path}: {len(rows):,} of {len(source):,} rows have a pass rate from {low} to {high}, or none")
    return Selected(file, rows, bad)


@dataclass
class Config:
    path: tyro.conf.Positional[Path]  # a file of rows
    low: float = 0.1  # rows solved less often are too hard
    high: float = 0.9  # rows solved more often are too easy


def main(config: Config) -> None:
    source = load(config.path, need_answer=False)
    if not isinstance(source, FileSource):
        raise UserError(f"{config.path} is a folder: name one of its files")
    rates: Counter[str] = Counter()
    for i in range(len(source)):
        try:
            rate = pass_rate(source.row(i))
        except BadRow:
            rates["broken"] += 1
            continue
        rates["unknown" if rate is None else f"{rate:.1f}"] += 1
    for name, count in sorted(rates.items()):
        print(f"{name:>8} {count:>8,}")
    print(f"{len(by_pass_rate(source, config.low, config.high)):,} of {len(source):,} rows from {config.low} to {config.high}, "
          f"or unknown")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))
