"""The rows of tables: parquet, csv and tsv. They are read on access, so that a large file never has to fit into memory.

In:  a path.  Out: `len(rows)`, `rows[i]`, an object by column; of parquet also `blocks()` and `head(n)`.
"""

from __future__ import annotations

import codecs
import csv
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dataset.bad_rows import BadRow
from dataset.formats.fields import is_row
from dataset.formats.json_rows import NoRows, require_data
from model.registry import UserError

MAX_GROUP_BYTES = 1_000_000_000  # of parquet row groups in memory; a single group must fit
MAX_CELL = 100_000_000  # characters of a cell: a picture in base64
csv.field_size_limit(MAX_CELL)


class ParquetRows:
    """The rows of a parquet file. A few row groups are in memory at a time, never the full file."""

    def __init__(self, path: Path):
        from pyarrow import ArrowException, parquet

        require_data(path)
        self.path, self.errors = path, (ArrowException, OSError)
        try:
            self.file = parquet.ParquetFile(path)
        except self.errors as error:
            raise self.damaged(error) from error
        groups = [self.file.metadata.row_group(g) for g in range(self.file.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise UserError(
                f"{path} has a row group of {largest:,} bytes (at most {MAX_GROUP_BYTES:,} are read at once); "
                f"rewrite it once: python -m dataset.formats.files {path} small.parquet"
            )
        self.ends = list(accumulate(group.num_rows for group in groups))
        self.tables: OrderedDict[int, Any] = OrderedDict()  # row group -> its table, least recently used first

    def damaged(self, error: Exception) -> UserError:
        """What to say of a file that pyarrow cannot read."""
        return UserError(f"{self.path} is not a whole parquet file ({error}). It is damaged or incomplete: download it again")

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> dict:
        g = bisect_right(self.ends, i)
        if g not in self.tables:
            try:
                self.tables[g] = self.file.read_row_group(g)
            except self.errors as error:
                raise self.damaged(error) from error
        self.tables.move_to_end(g)
        while len(self.tables) > 1 and sum(table.nbytes for table in self.tables.values()) > MAX_GROUP_BYTES:
            self.tables.popitem(last=False)
        return row_of(self.tables[g], i - (self.ends[g - 1] if g else 0))

    def head(self, n: int) -> list:
        """The first n rows, at most those of a row group, without keeping the group in memory; a broken one as None."""
        try:
            batch = next(self.file.iter_batches(batch_size=n), None)
        except self.errors as error:
            raise self.damaged(error) from error
        rows: list = []
        for i in range(batch.num_rows if batch else 0):
            with suppress(BadRow):
                rows.append(row_of(batch, i))
            rows += [None] * (i + 1 - len(rows))
        return rows

    def blocks(self) -> np.ndarray:
        """(rows,): the row group of each row. Rows of one group are cheap to read together."""
        return np.searchsorted(self.ends, np.arange(len(self)), side="right")


def row_of(table: Any, i: int) -> dict:
    """Row i of an Arrow table; BadRow where a cell is no text in UTF-8, or a date that Python cannot hold."""
    try:
        return {name: column[i].as_py() for name, column in zip(table.schema.names, table.columns)}
    except (ValueError, OverflowError) as error:
        raise BadRow(f"a cell cannot be read: {error}", "repair or remove the row") from error


class CsvRows:
    """The rows of a csv or tsv file whose first line names the columns, by their byte offsets. An empty cell is missing."""

    def __init__(self, path: Path):
        head = require_data(path)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(f"{path} is UTF-16: save it as UTF-8")
        header = head.split(b"\n", 1)[0]
        self.path, self.starts = path, array("q")
        self.delimiter = "\t" if path.suffix == ".tsv" else max(",;\t", key=lambda mark: header.count(mark.encode()))
        with path.open("rb") as file:
            places = self.records(file)
            header_cells = next(places, (0, []))[1]
            if isinstance(header_cells, csv.Error):
                raise UserError(f"{path} is not {path.suffix[1:]}: {header_cells}. Its lines must end with \\n or \\r\\n")
            self.columns = [name.strip() for name in header_cells]
            if not is_row(dict.fromkeys(self.columns, "")):
                raise NoRows(f"{path}: the first line names no column that is known ({', '.join(self.columns)[:80]}); write, "
                             f"for example, image{self.delimiter}question{self.delimiter}answer")
            self.starts.extend(start for start, cells in places if is_filled(cells))

    def records(self, file: BinaryIO) -> Iterator[tuple[int, list[str] | csv.Error]]:
        """(where it starts, its cells or why it has none) of each record from where the file is; a cell in quotes may go over
        several lines.
        """
        begin = file.tell()
        lines = (line.removeprefix(codecs.BOM_UTF8).decode(errors="replace") for line in iter(file.readline, b""))
        while True:
            reader = csv.reader(lines, delimiter=self.delimiter)  # a new one after an error
            try:
                for cells in reader:
                    yield begin, cells
                    begin = file.tell()
                return
            except csv.Error as error:
                yield begin, error
                begin = file.tell()

    def in_order(self) -> Iterator[Callable[[], dict]]:
        """Every row, as a function that reads it."""
        with self.path.open("rb") as file:
            records = self.records(file)
            next(records)  # the columns
            for _, cells in records:
                if is_filled(cells):
                    yield partial(self.row, cells)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return self.row(next(self.records(file))[1])

    def row(self, cells: list[str] | csv.Error) -> dict:
        """The cells of a record by column; BadRow where they do not fit."""
        if isinstance(cells, csv.Error):
            raise BadRow(f"not {self.path.suffix[1:]}: {cells}", "repair or remove the row")
        if len(cells) != len(self.columns):
            raise BadRow(f"{len(cells)} cells under {len(self.columns)} columns", "quote cells that hold the separator")
        if any("\N{REPLACEMENT CHARACTER}" in cell for cell in cells):
            raise BadRow("the line is not UTF-8", "save the file as UTF-8")
        return {column: cell or None for column, cell in zip(self.columns, cells) if column}


def is_filled(cells: list[str] | csv.Error) -> bool:
    """Whether a record is a row: a broken one is, an empty line is not."""
    return isinstance(cells, csv.Error) or any(cells)
