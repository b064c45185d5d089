"""log.jsonl: a line for every step that was logged.

In:  metrics by name.  Out: the lines, also those of a run that was killed in the middle of one.
"""

import json
import math
from pathlib import Path

from model import durable


def read(file: Path) -> tuple[list[dict], int]:
    """(the rows of a log, the number of lines that are none: what a crash left of a line)."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    rows = [row for line in lines if (row := parsed(line)) is not None]
    return rows, len(lines) - len(rows)


def parsed(line: str) -> dict | None:
    """A row of a log, or None."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def write(file: Path, rows: list[dict]) -> None:
    """Replace a log by these rows."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    durable.write(file, lambda path: path.write_text(text, encoding="utf-8"))


def append(file: Path, row: dict) -> None:
    """Add a row to a log."""
    with durable.naming(file), file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(row) + "\n")


def as_row(step: int, seconds: float, metrics: dict[str, float]) -> dict:
    """A row with six digits of each metric, without those that are not finite: json has no such numbers."""
    return {"step": step, "seconds": round(seconds, 2),
            **{name: float(f"{value:.6g}") for name, value in metrics.items() if math.isfinite(value)}}
