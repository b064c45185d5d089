"""Data files, read row by row, so that a large one never has to fit into memory.

In:  a json, jsonl or parquet file.  Out: `FileSource`: `len(source)` and `source[i]`, a conversation (formats/conversations.py).
Run: python -m dataset.formats.files FILE                     prints the number of rows and the first row
     python -m dataset.formats.files IN.parquet OUT.parquet   writes the same rows in small row groups
"""

from __future__ import annotations

import argparse
import json
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dataset.bad_rows import BadRow
from dataset.batches import blocks
from dataset.formats.conversations import conversation, decode
from dataset.protocols import Source
from dataset.vision.loading import from_name
from model.registry import UserError

MAX_GROUP_BYTES = 1_000_000_000  # of parquet row groups in memory; a single group must fit
GROUP_ROWS = 256  # rows in a row group that we write


class JsonRows:
    """The rows of a json array. Its rows have no known offsets, so the file is parsed in full: use jsonl for large files."""

    def __init__(self, path: Path):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise UserError(f"{path} holds one {type(rows).__name__}, not an array of rows; with an object per line it is .jsonl")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


class JsonlRows:
    """The rows of a file with one JSON value per line, by their byte offsets: 8 bytes of memory per row."""

    def __init__(self, path: Path):
        self.path, self.starts = path, array("q")
        with path.open("rb") as file:
            start = 0
            for line in file:
                if line.strip():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return decode(file.readline(), "the line")


class ParquetRows:
    """The rows of a parquet file. A few row groups are in memory at a time, never the full file."""

    def __init__(self, path: Path):
        from pyarrow import parquet

        self.file = parquet.ParquetFile(path)
        groups = [self.file.metadata.row_group(g) for g in range(self.file.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > MAX_GROUP_BYTES:
            raise UserError(
                f"{path} has a row group of {largest:,} bytes (at most {MAX_GROUP_BYTES:,} are read at once); "
                f"rewrite it once: python -m dataset.formats.files {path} small.parquet"
            )
        self.ends = list(accumulate(group.num_rows for group in groups))
        self.tables: OrderedDict[int, Any] = OrderedDict()  # row group -> its table, least recently used first

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> dict:
        g = bisect_right(self.ends, i)
        if g not in self.tables:
            self.tables[g] = self.file.read_row_group(g)
        self.tables.move_to_end(g)
        while len(self.tables) > 1 and sum(table.nbytes for table in self.tables.values()) > MAX_GROUP_BYTES:
            self.tables.popitem(last=False)
        return self.tables[g].slice(i - (self.ends[g - 1] if g else 0), 1).to_pylist()[0]

    def blocks(self) -> np.ndarray:
        """(rows,): the row group of each row. Rows of one group are cheap to read together."""
        return np.searchsorted(self.ends, np.arange(len(self)), side="right")


READERS: dict[str, Callable[[Path], Source]] = {".json": JsonRows, ".jsonl": JsonlRows, ".parquet": ParquetRows}


class FileSource:
    """The conversations of one file, each row parsed on access; BadRow names the row, counted from 1."""

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        self.path, self.need_answer = path, need_answer
        self.rows = READERS[path.suffix](path)
        self.find = lambda name: from_name(name, image_folder, allow_urls)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        where = f"{self.path}:{i + 1}"  # from 1, as editors count lines
        try:
            return self.parse(self.rows[i], where)
        except BadRow as bad:
            bad.where = where
            raise

    def parse(self, row: Any, where: str) -> Any:
        return conversation(row, where, self.find, self.need_answer)

    def blocks(self) -> np.ndarray:
        return blocks(self.rows)


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
        source = FileSource(args.path, args.path.parent, allow_urls=False, need_answer=True)
        print(f"{len(source):,} rows; the first: {source[0]}")
