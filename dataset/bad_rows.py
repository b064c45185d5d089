"""Bad rows: data that cannot be used is skipped, counted and named, and too many such rows stop the run.

In:  `BadRow`, raised while a row is read, rendered or opened.  Out: lines on stderr and in OUT/bad_rows.jsonl.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from dataset.writing import append
from model.registry import UserError

LONGEST = 1000  # characters of a reason, which may quote a row


class BadRow(ValueError):
    """One row of data that cannot be used: the reason, the remedy, and where the row is ("file:row").

    The only exception that skips a row. A bug in this code raises something else and stops the run.
    """

    def __init__(self, reason: str, remedy: str, where: str = ""):
        super().__init__(reason, remedy, where)
        self.reason, self.remedy, self.where = printable(reason[:LONGEST]), printable(remedy[:LONGEST]), where

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.reason}; {self.remedy}" if self.where else f"{self.reason}; {self.remedy}")


class TooManyBadRows(UserError, RuntimeError):
    """More bad rows than --max_bad allows."""


def printable(text: str) -> str:
    """The text with half characters written out, so that it can be printed and stored."""
    return text.encode(errors="backslashreplace").decode()


def require_unicode(text: str) -> None:
    """BadRow for a text that cannot be encoded: it holds half a character, that is, half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"text is not Unicode: {error}", "repair the row: it holds half of a surrogate pair") from error


class BadRows:
    """The skipped rows. Each is printed once, and written to `path` unless that is None; too many stop the run.

    total     rows of the source
    max_bad   the largest share of bad rows among those seen; before 1,000 are seen, among 1,000 (or among all, if fewer).
              A single one never stops a run, unless max_bad is 0
    report    False on ranks that see the same rows as the first one, which reports them
    check     only count: `require_few` tells at the end
    """

    def __init__(self, path: Path | None, total: int, max_bad: float, report: bool = True, check: bool = False):
        self.path, self.total, self.max_bad, self.report, self.check = path, total, max_bad, report, check
        self.seen = 0
        self.names: set[str] = set()
        self.reasons: Counter[str] = Counter()

    def add(self, bad: BadRow) -> None:
        """Count a row. TooManyBadRows when there are too many."""
        if bad.where in self.names:
            return
        self.names.add(bad.where)
        self.reasons[kind(bad.reason)] += 1
        if self.report:
            tqdm.write(f"{'bad row:' if self.check else 'skipped'} {bad}", file=sys.stdout if self.check else sys.stderr)
        if self.report and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = {"row": printable(bad.where), "reason": bad.reason, "remedy": bad.remedy}
            append(self.path, json.dumps(line, ensure_ascii=False) + "\n")
        if not self.check:
            self.require_few(f"the last: {bad}")

    def require_few(self, more: str = "") -> None:
        """TooManyBadRows if there are."""
        limit = self.max_bad * max(self.seen, min(self.total, 1000))
        if len(self.names) > max(limit, 1 if self.max_bad else 0):
            listed = f". All are listed in {self.path}" if self.path else ""
            raise TooManyBadRows(f"{len(self.names)} bad rows among {self.seen} seen, more than --max_bad {self.max_bad} allows"
                                 f"{more and f'; {more}'}{listed}")


def kind(reason: str) -> str:
    """A reason without what differs between rows: names, and numbers. "image file missing: a.png" -> "image file missing"."""
    return re.sub(r"\d+", "N", reason.partition(": ")[0].partition(" in a row of")[0])
