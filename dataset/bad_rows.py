"""Rows of data that cannot be used: they are skipped, counted and named, and too many of them stop the run.

In:  `BadRow`, raised by whoever reads, renders or looks at a row.  Out: lines on stderr and in OUT/bad_rows.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


class BadRow(ValueError):
    """One row of data that cannot be used: why, what to do about it, and where it is ("file:row").

    The only exception that skips a row. A bug in this code raises something else and stops the run.
    """

    def __init__(self, reason: str, remedy: str, where: str = ""):
        super().__init__(reason, remedy, where)
        self.reason, self.remedy, self.where = reason, remedy, where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.remedy}" if self.where else f"{self.reason}; {self.remedy}"


class BadRows:
    """Rows that were skipped: each is printed, and written to `path` unless it is None, once; too many stop the run.

    total     rows of the source
    max_bad   the share of the rows seen that stops the run; while few are seen, of the first 1,000 (of all, in a smaller source)
    """

    def __init__(self, path: Path | None, total: int, max_bad: float):
        self.path, self.total, self.max_bad = path, total, max_bad
        self.seen = 0
        self.names: set[str] = set()

    def add(self, bad: BadRow, report: bool = True) -> None:
        """Count a row; `report=False` on ranks where another one names it. RuntimeError when there are too many."""
        if bad.where in self.names:
            return
        self.names.add(bad.where)
        if report:
            print(f"skipped {bad}", file=sys.stderr)
        if report and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                line = {"row": bad.where, "reason": bad.reason, "remedy": bad.remedy}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        limit = self.max_bad * max(self.seen, min(self.total, 1000))
        if len(self.names) > limit:
            raise RuntimeError(
                f"{len(self.names)} bad rows among {self.seen} seen, more than --max_bad {self.max_bad} allows; the last: "
                f"{bad}.{f' All are listed in {self.path}' if self.path else ''}"
            )
