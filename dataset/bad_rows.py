"""Bad rows: data that cannot be used is skipped, counted and named, and too many such rows stop the run.

In:  `BadRow`, raised while a row is read, rendered or opened.  Out: lines on stderr and in OUT/bad_rows.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from model.registry import UserError


class BadRow(ValueError):
    """One row of data that cannot be used: the reason, the remedy, and where the row is ("file:row").

    The only exception that skips a row. A bug in this code raises something else and stops the run.
    """

    def __init__(self, reason: str, remedy: str, where: str = ""):
        super().__init__(reason, remedy, where)
        self.reason, self.remedy, self.where = reason, remedy, where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.remedy}" if self.where else f"{self.reason}; {self.remedy}"


class BadRows:
    """The skipped rows. Each is printed once, and written to `path` unless that is None; too many stop the run.

    total     rows of the source
    max_bad   the largest share of bad rows among those seen; before 1,000 are seen, among 1,000 (or among all, if fewer)
    report    False on ranks that see the same rows as the first one, which reports them
    """

    def __init__(self, path: Path | None, total: int, max_bad: float, report: bool = True):
        self.path, self.total, self.max_bad, self.report = path, total, max_bad, report
        self.seen = 0
        self.names: set[str] = set()

    def add(self, bad: BadRow) -> None:
        """Count a row. UserError when there are too many."""
        if bad.where in self.names:
            return
        self.names.add(bad.where)
        if self.report:
            print(f"skipped {bad}", file=sys.stderr)
        if self.report and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                line = {"row": bad.where, "reason": bad.reason, "remedy": bad.remedy}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        limit = self.max_bad * max(self.seen, min(self.total, 1000))
        if len(self.names) > limit:
            raise UserError(
                f"{len(self.names)} bad rows among {self.seen} seen, more than --max_bad {self.max_bad} allows; the last: "
                f"{bad}.{f' All are listed in {self.path}' if self.path else ''}"
            )
