"""What a file holds, in one line: rows, pictures, answers, and which fields are not read. It is printed once a file.

In:  the first rows of a file, and the function that reads one.  Out: a line such as

    data.jsonl: 40 rows, 38 with pictures, 40 with answers; not read: `score`, `source` (in 12)
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from dataset.bad_rows import BadRow, printable
from dataset.chat import Conversation
from dataset.formats.fields import Fields
from dataset.images import Picture

SURVEY_ROWS = 1000  # rows that are looked at when a file is opened

TOLD: set[str] = set()
BLANK = Image.new("RGB", (1, 1))


def tell(text: str) -> None:
    """Print a line once in a process, on the first rank alone."""
    if text not in TOLD and os.environ.get("RANK", "0") == "0":
        TOLD.add(text)
        print(printable(text), flush=True)


def unread(names: Sequence[str]) -> str:
    """The list of names for a line."""
    return "not read: " + ", ".join(f"`{name.partition(chr(0))[0]}`{name.partition(chr(0))[2]}" for name in names)


def named(name: str) -> Picture:
    """In the place of the picture of this name: a survey opens no file."""
    return Picture(name, BLANK.copy)


def survey(path: Any, total: int, rows: Sequence[Any], read: Callable[[Fields, Callable], Any]) -> tuple[str, set[str]]:
    """(the line, the names of fields that are not read) of a file.

    total   rows of the file
    rows    the first of them, as the file has them
    read    fields, a function that finds pictures -> what is made of the row, or BadRow
    """
    seen, pictures, answers, bad = 0, 0, 0, 0
    names: Counter[str] = Counter()
    for row in rows:
        seen += 1
        try:
            fields = Fields(row)
            item = read(fields, named)
        except BadRow:
            bad += 1
            continue
        names.update(fields.unread())
        pictures += bool(item.pictures)
        answers += not isinstance(item, Conversation) or bool(item.answer or any(m.role == "assistant" for m in item.messages))
    good = seen - bad
    counts = [f"{pictures:,} with pictures", f"{answers:,} with answers", *([f"{bad:,} bad"] if bad else [])]
    line = f"{path}: {total:,} rows" + (", " if seen == total else f"; of the first {seen:,}: ") + ", ".join(counts)
    if names:
        line += "; " + unread([name if count == good else f"{name}\0 (in {count:,})" for name, count in names.items()])
    return line, set(names)
