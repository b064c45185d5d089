"""Data files, read row by row: the one reader of rows, for every stage.

In:  a file (folders.py: json, jsonl, parquet, csv, tsv, or a folder of pictures with texts).
Out: `FileSource`: `len(source)` and `source[i]`, a conversation (conversations.py). What a file holds is told when it is opened.
Run: python -m dataset.formats.files FILE                     prints what a file holds and its first row
     python -m dataset.formats.files IN.parquet OUT.parquet   writes the same rows in small row groups
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dataset.bad_rows import BadRow
from dataset.batches import blocks
from dataset.formats.conversations import conversation
from dataset.formats.fields import Fields
from dataset.formats.folders import READERS, open_rows
from dataset.formats.row_pictures import Find, plain_names
from dataset.formats.survey import SURVEY_ROWS, survey, tell, unread
from dataset.images import Picture
from dataset.protocols import Source
from dataset.uncollected import uncollected
from dataset.vision.loading import PictureFinder
from dataset.writing import write_text

GROUP_ROWS = 256  # rows in a row group that we write


class FileSource:
    """The conversations of one file, each row parsed on access; BadRow names the row, counted from 1.

    rows   as the file has them
    """

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        self.path, self.need_answer = path, need_answer
        with uncollected():
            self.rows = open_rows(path)
        self.find: Find = PictureFinder(image_folder, allow_urls)
        self.told: set[str] = set()  # fields that are not read
        self.names: list[tuple[str, ...] | None] = []  # of the pictures of each row, once `walk` has gone over them

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.made(i, lambda: self.rows[i])

    def made(self, i: int, read: Callable[[], Any]) -> Any:
        """What is made of row i, as `read` finds it in the file; BadRow names the row."""
        where = f"{self.path}:{i + 1}"  # from 1, as editors count lines
        try:
            fields = Fields(read())
            item = self.parse(fields, where, self.find)
        except RecursionError as error:
            raise BadRow("the row is nested too deeply", "repair or remove the row", where) from error
        except BadRow as bad:
            bad.where = where
            raise
        if new := [name for name in fields.unread() if name not in self.told]:
            self.told.update(new)
            tell(f"{where}: {unread(new)}")
        return item

    def walk(self) -> Iterator[Any]:
        """Every row once, in the order of the file: the names of its pictures where the row is of a plain form, which most are;
        else what is made of it, or its BadRow. The names are kept, so that `pictures` reads no row again.
        """
        known: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal names are kept once
        self.names = []
        for i, read in enumerate(in_order(self.rows)):
            try:
                raw = read()
                names = plain_names(raw)
                self.names.append(known.setdefault(names, names) if names else None)
                yield names or self.made(i, partial(as_read, raw))
            except BadRow as bad:
                self.names += [None] * (i + 1 - len(self.names))
                bad.where = f"{self.path}:{i + 1}"
                yield bad

    def pictures(self, i: int) -> Sequence[Picture]:
        """The pictures of a row; BadRow where the row cannot be used."""
        names = self.names[i] if self.names else None
        return [self.find(name) for name in names] if names else self[i].pictures

    def parse(self, fields: Fields, where: str, find: Find) -> Any:
        return conversation(fields, where, find, self.need_answer)

    def tell(self) -> FileSource:
        """The source itself, after a line about what the file holds."""
        line, self.told = survey(self.path, len(self), self.head(SURVEY_ROWS), lambda fields, find: self.parse(fields, "", find))
        tell(line)
        return self

    def head(self, n: int) -> list:
        """The first n rows as the file has them; a broken one as None."""
        if hasattr(self.rows, "head"):
            return self.rows.head(n)
        return [self.row(i) for i in range(min(n, len(self)))]

    def row(self, i: int) -> Any:
        """A row as the file has it, None where it is broken."""
        try:
            return self.rows[i]
        except BadRow:
            return None

    def blocks(self) -> np.ndarray:
        return blocks(self.rows)


def as_read(raw: Any) -> Any:
    return raw


def in_order(rows: Source) -> Iterator[Callable[[], Any]]:
    """Every row of a file, as functions that read one and may raise BadRow. Files of lines are read as a stream."""
    return rows.in_order() if hasattr(rows, "in_order") else (partial(rows.__getitem__, i) for i in range(len(rows)))


def rewrite(path: Path, out: Path, rows: int = GROUP_ROWS) -> None:
    """Copy a parquet file, with `rows` rows per row group, as a stream."""
    from pyarrow import parquet

    source = parquet.ParquetFile(path)
    with parquet.ParquetWriter(out, source.schema_arrow) as writer:
        for batch in source.iter_batches(batch_size=rows):
            writer.write_batch(batch, row_group_size=rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="inspect a data file, or rewrite a parquet file in small row groups")
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    args = parser.parse_args()
    if args.out:
        rewrite(args.path, args.out)
    else:
        if args.path.suffix not in READERS:
            parser.error(f"{args.path}: a file of {', '.join(READERS)} is expected")
        source = FileSource(args.path, args.path.parent, allow_urls=False, need_answer=True).tell()
        print(f"{len(source):,} rows; the first: {source[0]}")


def complete_lines(file: Path) -> list[str]:
    """The lines of a file that grows by appending. A last one that an interrupted run left incomplete is removed from it."""
    data = file.read_bytes() if file.is_file() else b""  # which may end within a character
    text = data[: data.rfind(b"\n") + 1].decode()
    if data and not data.endswith(b"\n"):
        write_text(file, text)
    return text.split("\n")[:-1]  # not splitlines: an answer may hold U+2028
