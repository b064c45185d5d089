"""The rows of a JSON file, whatever its name: an array, an object per line, or an object around one list of rows.

In:  a path.  Out: `len(rows)` and `rows[i]`. The first bytes say which it is; a byte order mark is skipped.
"""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dataset.formats.fields import decode, is_row
from model.registry import UserError

POINTER = b"version https://git-lfs"
HEAD = 1 << 12  # bytes of a file that are looked at to see what it is
DECODER = json.JSONDecoder()
OPENED, NEXT = (re.compile(rf"[ \t\n\r]*({mark})[ \t\n\r]*") for mark in (r"\[", r"[,\]]"))  # around the elements of an array


class NoRows(UserError):
    """A file that holds no rows. A folder may have such files beside its data."""


def require_data(path: Path) -> bytes:
    """The first bytes of a file. UserError where they show that it is not the data but what was downloaded in its place."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(POINTER):
        raise UserError(f"{path} is a Git LFS pointer and not the data: run git lfs pull, or download the file itself")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page and not the data: download the file itself")
    return head


class ArrayRows:
    """The rows of an array: its text, and where each row begins in it. A row is parsed when it is asked for: parsed rows take
    several times the memory of their text.
    """

    def __init__(self, text: str, starts: array):
        self.text, self.starts = text, starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        return DECODER.raw_decode(self.text, self.starts[i])[0]


class JsonlRows:
    """The rows of a file with one JSON value per line, by their byte offsets: 8 bytes of memory per row."""

    def __init__(self, path: Path):
        self.path = path
        self.starts = array("q", (start for start, _ in self.lines()))

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(where it starts, the line) of every line that is not blank."""
        with self.path.open("rb") as file:
            start = 0
            for line in file:
                mark = len(codecs.BOM_UTF8) if start == 0 and line.startswith(codecs.BOM_UTF8) else 0
                if line[mark:].strip():
                    yield start + mark, line[mark:]
                start += len(line)

    def in_order(self) -> Iterator[Callable[[], Any]]:
        """Every row, as a function that reads it."""
        return (partial(decode, line, "the line") for _, line in self.lines())

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return decode(file.readline(), "the line")


def json_rows(path: Path) -> list | ArrayRows | JsonlRows:
    """The rows of a JSON file. UserError where it is damaged, NoRows where it holds something else."""
    head = require_data(path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return read_whole(path)
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    as_lines = path.suffix != ".json"
    if head.startswith(b"[") and (not as_lines or head[1:].lstrip().startswith((b"{", b"]"))):
        return read_whole(path)
    if not head:
        if as_lines:
            return JsonlRows(path)
        raise NoRows(f"{path} is empty")
    try:
        first, more = first_line(path)
        if more or (as_lines and (not isinstance(first, dict) or is_row(first))):
            return JsonlRows(path)
        return rows_of(first, path)
    except NoRows:
        if as_lines:
            return JsonlRows(path)  # one row that no reader knows
        raise
    except (ValueError, RecursionError) as error:
        if as_lines and head.split(b"\n", 1)[0].strip() != b"{":
            return JsonlRows(path)  # its first row is a bad one
        if isinstance(error, UserError):
            raise
    return read_whole(path)


def first_line(path: Path) -> tuple[Any, bool]:
    """(value of the first line with text, whether another one follows); ValueError where it is not JSON by itself."""
    with path.open("rb") as file:
        lines = (line for line in file if line.removeprefix(codecs.BOM_UTF8).strip())
        first = next(lines).removeprefix(codecs.BOM_UTF8)
        return json.loads(first), next(lines, None) is not None


def read_whole(path: Path) -> list | ArrayRows:
    """The rows of a file that holds one value; UserError where it is not JSON, NoRows where it holds something else."""
    try:
        data = path.read_bytes()
        text = data.decode(json.detect_encoding(data), "surrogatepass")  # UTF-8, 16 or 32, with or without a mark
        del data
        starts, any_row = array("q"), False
        for start, value in elements(text):
            starts.append(start)
            any_row = any_row or isinstance(value, dict)
        return ArrayRows(text, starts) if any_row else rows_of(json.loads(text), path)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error}. It is damaged or incomplete: download it again") from error


def elements(text: str) -> Iterator[tuple[int, Any]]:
    """(where it begins, the value) of each element of a JSON array; none of another value. ValueError where it is damaged."""
    mark = OPENED.match(text)
    if not mark:
        return
    place = mark.end()
    if text.startswith("]", place):
        mark = NEXT.match(text, place)
    while mark and mark[1] != "]":
        place = mark.end()
        value, end = DECODER.raw_decode(text, place)
        yield place, value
        mark = NEXT.match(text, place := end)
    if not mark:
        raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
    if mark.end() < len(text):
        raise json.JSONDecodeError("Extra data", text, mark.end())


def rows_of(value: Any, path: Path) -> list:
    """The rows in a value: a list, the one list of objects in an object, or the object itself, if it is a row."""
    if isinstance(value, list) and (not value or any(isinstance(one, dict) for one in value)):
        return value
    if isinstance(value, dict):
        if is_row(value):
            return [value]
        lists = [one for one in value.values() if isinstance(one, list) and all(isinstance(row, dict) for row in one)]
        full = [one for one in lists if one]
        if len(full) == 1 or len(lists) == 1:
            return (full or lists)[0]
    raise NoRows(f"{path} holds one {type(value).__name__} without a list of rows: write [{{...}}, {{...}}], or a row per line")
