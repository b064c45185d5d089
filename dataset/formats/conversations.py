"""Data files to conversations: every format that the field publishes, by row, without ever holding a file in memory.

In:  json, jsonl or parquet of LLaVA, TinyLLaVA, MiniMind-V, OpenAI-style messages, MM-EUREKA, LMM-R1, or {"text"}.
Out: a source: `len(source)` and `source[i]`, a `Conversation`; `Mixture` of several; `BadRows`, what was skipped and why.
Run: python -m dataset.formats.conversations FILE                 says what a file holds, and its first row
     python -m dataset.formats.conversations IN.parquet OUT.parquet   the same rows in small row groups
"""

from __future__ import annotations

import argparse
import json
import sys
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np

from dataset.chat import Conversation, Message
from dataset.images import BadRow, Picture, from_bytes, from_name

PLACEHOLDER = "<image>"
ROLE_NAMES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
TURN_FIELDS = ("conversations", "messages", "message")
IMAGE_FIELDS = ("image", "images", "image_urls", "image_bytes")
KEPT_BYTES = 1_000_000_000  # of parquet row groups in memory; one group alone must fit
GROUP_ROWS = 256  # in a row group that we write

# ---------------------------------------------------------------- files: row number -> row


class JsonRows:
    """The rows of a json array. The format has no rows to seek to, so the file is parsed whole: use jsonl for big ones."""

    def __init__(self, path: Path):
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise TypeError(f"{path} holds one {type(rows).__name__}, not an array of rows; one object a line is .jsonl")
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        return self.rows[i]


class JsonlRows:
    """The rows of a file with one JSON value a line, found by byte offset: 8 bytes of memory a row."""

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

    def __getitem__(self, i: int):
        with self.path.open("rb") as file:
            file.seek(self.starts[i])
            return decode(file.readline(), "the line")


class ParquetRows:
    """The rows of a parquet file, a row group at a time, a few of them kept: never the whole file."""

    def __init__(self, path: Path):
        from pyarrow import parquet

        self.file = parquet.ParquetFile(path)
        groups = [self.file.metadata.row_group(g) for g in range(self.file.num_row_groups)]
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > KEPT_BYTES:
            raise ValueError(
                f"{path} has a row group of {largest:,} bytes (at most {KEPT_BYTES:,} are read at once); "
                f"rewrite it once: python -m dataset.formats.conversations {path} small.parquet"
            )
        self.ends = list(accumulate(group.num_rows for group in groups))
        self.kept: OrderedDict[int, object] = OrderedDict()  # row group -> its table, least recently used first

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> dict:
        g = bisect_right(self.ends, i)
        if g not in self.kept:
            self.kept[g] = self.file.read_row_group(g)
        self.kept.move_to_end(g)
        while len(self.kept) > 1 and sum(table.nbytes for table in self.kept.values()) > KEPT_BYTES:
            self.kept.popitem(last=False)
        return self.kept[g].slice(i - (self.ends[g - 1] if g else 0), 1).to_pylist()[0]

    def blocks(self) -> np.ndarray:
        """The row group of each row: rows of one group are cheap to read together."""
        return np.searchsorted(self.ends, np.arange(len(self)), side="right")


def rewrite(path: Path, out: Path, rows: int = GROUP_ROWS) -> None:
    """Stream a parquet file into one with `rows` rows a group."""
    from pyarrow import parquet

    source = parquet.ParquetFile(path)
    with parquet.ParquetWriter(out, source.schema_arrow) as writer:
        for batch in source.iter_batches(batch_size=rows):
            writer.write_batch(batch, row_group_size=rows)


READERS = {".json": JsonRows, ".jsonl": JsonlRows, ".parquet": ParquetRows}


def decode(text: str | bytes, name: str):
    """Parse JSON that a row holds."""
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or bytes that are not UTF-8
        raise BadRow(f"{name} is not JSON: {error}", "repair or remove the row") from error


# ---------------------------------------------------------------- rows -> conversations

Find = Callable[[str], Picture]  # the picture behind a name that a row gives
Turn = tuple[str, list]  # a role, and its parts: text, Picture, or None where the row's next image belongs


def conversation(row, id: str, find: Find, need_answer: bool) -> Conversation:
    """A row of any known format as a conversation; raises BadRow.

    With `need_answer` the last turn must be the assistant's, unless the row carries a gold "answer" (RL data).
    """
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object", 'write {"conversations": [...]}')
    gold = row.get("answer")
    # A row without images may talk about "<image>": its text stays text.
    marked = any(field in row for field in IMAGE_FIELDS)
    if "text" in row and not any(field in row for field in TURN_FIELDS):
        turns = [turn({"role": "assistant", "content": row["text"]}, find, marked)]  # all of it is learned
    else:
        turns = [turn(raw, find, marked) for raw in raw_turns(row)]
        check_order([role for role, _ in turns], need_answer and gold is None)
    fill(turns, [picture(value, find) for value in image_values(row)])
    messages = tuple(Message(role, tuple(parts)) for role, parts in turns)
    try:
        "".join(message.text for message in messages).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"text is no Unicode: {error}", "repair the row: half a character stands there") from error
    if any(message.role == "assistant" and not message.text.strip() for message in messages):
        raise BadRow("empty answer", "write the answer, or remove the row")
    return Conversation(id, messages, None if gold is None else str(gold))


def raw_turns(row: dict) -> list:
    """The turns as the row writes them: a list, or a JSON string of one."""
    field = next((name for name in TURN_FIELDS if name in row), None)
    if field is None:
        raise BadRow("missing conversations", 'a row has "conversations", "messages", "message" or "text"')
    turns = decode(row[field], field) if isinstance(row[field], str) else row[field]
    if not isinstance(turns, list):
        raise BadRow(f"{field} is a {type(turns).__name__}, not a list", "write a list of turns")
    if not turns:
        raise BadRow(f"empty {field}", "remove the row")
    return turns


def turn(raw, find: Find, marked: bool) -> Turn:
    """One turn of LLaVA's ("from", "value") or OpenAI's ("role", "content") kind."""
    if not isinstance(raw, dict):
        raise BadRow(f"a turn is a {type(raw).__name__}, not an object", 'write {"from": ..., "value": ...}')
    name, content = raw.get("from", raw.get("role")), raw.get("value", raw.get("content"))
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadRow(f"unknown role {name!r}", f"known roles: {', '.join(ROLE_NAMES)}")
    role = ROLE_NAMES[name]
    if isinstance(content, str):
        return role, split(content) if marked and role == "user" else [content]
    if isinstance(content, list):
        return role, [part for raw_part in content for part in content_part(raw_part, find, marked and role == "user")]
    raise BadRow(f"the {name} value is a {type(content).__name__}, not a string", "write the turn as text")


def split(text: str) -> list[str | None]:
    """Text at its placeholders: "<image>\\nWhat?" -> [None, "What?"]; a line break beside one is layout, not text."""
    before, *others = text.split(PLACEHOLDER)
    if not others:
        return [text]
    parts = [before]
    for other in others:
        parts += [None, other]
    stripped = [part if part is None else part.strip("\n") for part in parts]
    return [part for part in stripped if part != ""]


def content_part(raw, find: Find, marked: bool) -> list:
    """One element of an OpenAI-style content list; an image part without an address takes the row's next image."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "text" and isinstance(raw.get("text"), str):
        return split(raw["text"]) if marked else [raw["text"]]
    if kind in ("image", "image_url"):
        address = next((raw[key] for key in ("image_url", "image", "url", "path") if key in raw), None)
        if isinstance(address, dict) and "url" in address:
            address = address["url"]
        return [None if address is None else picture(address, find)]
    raise BadRow(f"unknown content part {str(raw)[:80]}", 'parts have "type": "text", "image" or "image_url"')


def image_values(row: dict) -> list:
    """The images beside a row's turns as written: names, bytes, or {"bytes", "path"}; none where the field is null."""
    value = next((row[field] for field in IMAGE_FIELDS if row.get(field)), [])
    if isinstance(value, str) and ":" not in value:  # "a.jpg, b.jpg"; an address may hold commas of its own
        return [name.strip() for name in value.split(",")]
    return value if isinstance(value, list) else [value]


def picture(value, find: Find) -> Picture:
    """An image as a row writes it: a name, the file's bytes, or {"bytes", "path"} as the Hugging Face hub stores it."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return from_bytes(value)
    if isinstance(value, str):
        return find(value)
    raise BadRow(f"an image is a {type(value).__name__}", "write a file name, a list of them, or the file's bytes")


def fill(turns: list[Turn], pictures: list[Picture]) -> None:
    """Put the row's pictures where its placeholders stand; without placeholders, before the user's first words."""
    slots = sum(part is None for _, parts in turns for part in parts)
    inline = any(isinstance(part, Picture) for _, parts in turns for part in parts)
    if slots == 0 and not inline:
        first = next((parts for role, parts in turns if role == "user"), turns[0][1])
        first[:0] = pictures
    elif slots != len(pictures):
        raise BadRow(
            f"{slots} {PLACEHOLDER} placeholders but {len(pictures)} images",
            f"write {PLACEHOLDER} once for every image, or not at all to have them first; an image may not be null",
        )
    else:
        waiting = iter(pictures)
        for _, parts in turns:
            parts[:] = [next(waiting) if part is None else part for part in parts]


def check_order(roles: list[str], need_answer: bool) -> None:
    """[system] user assistant user assistant ...; raises BadRow."""
    turns = roles[1:] if roles[0] == "system" else roles
    for i, role in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise BadRow(f"roles out of order: turn {i + 1} is the {role}'s, not the {expected}'s", "repair the row")
    if not turns:
        raise BadRow("no turn but the system's", "add a question and its answer")
    if need_answer and turns[-1] != "assistant":
        raise BadRow("the last turn is not the assistant's", "add the answer, or remove the turn")


# ---------------------------------------------------------------- sources


class Source:
    """The conversations of one file: `len(source)` and `source[i]`, each row parsed when it is asked for."""

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        self.path, self.need_answer = path, need_answer
        self.rows = READERS[path.suffix](path)
        self.find = lambda name: from_name(name, image_folder, allow_urls)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Conversation:
        if not 0 <= i < len(self):
            raise IndexError(i)
        where = f"{self.path}:{i + 1}"  # rows count from 1, as editors count lines
        try:
            return self.parse(self.rows[i], where)
        except BadRow as bad:
            bad.where = where
            raise

    def parse(self, row, where: str) -> Conversation:
        return conversation(row, where, self.find, self.need_answer)

    def blocks(self) -> np.ndarray:
        return blocks(self.rows)


class Mixture:
    """Several sources as one: with weight 2 a source gives each row twice an epoch, with 0.5 a random half of them.

    Row i is a pure function of (seed, i), so the half is the same in every epoch.
    """

    def __init__(self, parts: list[tuple], seed: int = 0):
        self.sources = [source for source, _ in parts]
        self.ends = list(accumulate(round(weight * len(source)) for source, weight in parts))
        self.orders = [np.random.default_rng((seed, k)).permutation(len(s)) for k, s in enumerate(self.sources)]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect_right(self.ends, i)
        return self.sources[k][int(self.orders[k][(i - (self.ends[k - 1] if k else 0)) % len(self.sources[k])])]

    def blocks(self) -> np.ndarray:
        found, start, offset = [], 0, 0
        for source, order, end in zip(self.sources, self.orders, self.ends):
            own = blocks(source)[order[np.arange(end - start) % max(1, len(order))]]
            found.append(np.where(own < 0, own, own + offset))
            start, offset = end, offset + max(0, own.max(initial=-1) + 1)
        return np.concatenate(found)


def blocks(source) -> np.ndarray:
    """(len(source),): the block of each row that is read together with it, -1 where every row stands alone."""
    return source.blocks() if hasattr(source, "blocks") else np.full(len(source), -1)


def load(
    path: str | Path, image_folder: str | Path | None = None, allow_urls: bool = False, need_answer: bool = True,
    source: type[Source] = Source,
) -> Source | Mixture:
    """The conversations of a file, or of every data file in a folder.

    Images are looked for in `image_folder`, by default where the file is, and never outside. `need_answer=False`
    also takes rows that end with a question, for inference; `source` is what reads the rows. Raises FileNotFoundError,
    ValueError or TypeError when nothing can be read.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise FileNotFoundError(f"no {', '.join(READERS)} file in {path}")
        return Mixture([(load(file, image_folder, allow_urls, need_answer, source), 1) for file in files])
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}; give a file or folder of {', '.join(READERS)}")
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(READERS)}")
    return source(path, Path(image_folder or path.parent), allow_urls, need_answer)


def name_and_weight(spec: str) -> tuple[str, float]:
    """"data.jsonl:0.5" -> ("data.jsonl", 0.5); the weight is 1 where none is written."""
    name, _, weight = spec.rpartition(":")
    try:
        return (name, float(weight)) if name else (spec, 1.0)
    except ValueError:
        return spec, 1.0


class BadRows:
    """Rows that were skipped: each printed, and written to `path` unless it is None, once; too many stop the run.

    More than `max_bad` of the rows seen stop it, or of the first 1,000 (of all, in a smaller source) while few are seen.
    """

    def __init__(self, path: Path | None, total: int, max_bad: float):
        self.path, self.total, self.max_bad = path, total, max_bad
        self.seen, self.names = 0, set()

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="look at a data file, or rewrite a parquet file in small row groups")
    parser.add_argument("path", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    given = parser.parse_args()
    if given.out:
        rewrite(given.path, given.out)
    else:
        shown = load(given.path)
        print(f"{len(shown):,} rows; the first: {shown[0]}")
