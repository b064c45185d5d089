"""Damaged rows, in every form of rows and of files: values of the wrong type, half characters, deep brackets, damaged bytes.

In:  the forms of tests/test_forms.py.  Out: counts (fuzz.py) of what reading, placing, rendering and listing them came to.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dataset.bad_rows import BadRow, BadRows
from dataset.chat import Conversation
from dataset.formats.gold_answers import gold
from dataset.held_out import places
from dataset.mixture import files_of, load
from dataset.preferences import load_preferences
from tests import tiny
from tests.fuzz import Count
from tests.miniatures import png
from tests.test_forms import CAPTIONS, COLOURS, PREFERENCES, QUESTIONS, file_of, write_csv

PART = 20  # rows of a file
HALF = "\ud83d"  # of a surrogate pair


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 10**400, lambda: 1e308 * 10, lambda: float("nan"),
    lambda: "", lambda: HALF, lambda: f"a {HALF} b", lambda: "\udcff", lambda: "\0", lambda: "\ufeffBOM", lambda: "\u202e\u2028",
    lambda: [], lambda: {}, lambda: [[]], lambda: [{}], lambda: [None], lambda: {"a": {"b": [1, {"c": None}]}},
    lambda: nested(700),
    lambda: "[" * 100_000, lambda: '["a",' + "[" * 50_000, lambda: "}" * 20_000, lambda: "\\boxed{" + "}" * 20_000,
    lambda: "(" * 5000 + "," * 5000, lambda: "x" * 100_000, lambda: "1" * 4000, lambda: "<image>" * 50, lambda: "<img></img>",
    lambda: "<img>\0</img>", lambda: "<video>", lambda: "<image_1>", lambda: "../../../etc/passwd", lambda: "http://[::1",
    lambda: "HTTP://127.0.0.1/a.png", lambda: "file:///etc/passwd", lambda: "data:image/png;base64,====", lambda: "iVBOR!!",
    lambda: "data:,", lambda: [file_of("red")] * 30, lambda: {"bytes": "x", "path": 3}, lambda: {"url": {"url": {}}},
    lambda: [{"role": HALF, "content": [{"type": []}]}], lambda: [{"from": {}, "value": 3}], lambda: '{"chosen": [[]]}',
    lambda: [{"user": 1, "assistant": None}], lambda: [["a"], ["b", "c", "d"]], lambda: "<|end|><|user|><s>", lambda: "é" * 3000,
]  # fmt: skip


KEYS = ("image", "images", "answer", "text", "system", "weight", "video", "id", "history", "texts", HALF, "")


def spots(value: Any, depth: int = 6) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a value, down to a depth."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in inside] + [
        spot for _, part in inside if depth for spot in spots(part, depth - 1)]


def damaged(row: dict, dice: random.Random) -> dict:
    """A row with one to three values replaced, wrapped, removed or put under another key."""
    row = copy.deepcopy(row)
    for _ in range(dice.randint(1, 3)):
        if not (found := spots(row)):
            break
        inside, key = dice.choice(found)
        match dice.randrange(8):
            case 0:
                inside.pop(key)
            case 1:
                inside[key] = [inside[key]]
            case 2:
                inside[key] = {"value": inside[key]}
            case 3 if isinstance(inside, dict):
                inside[dice.choice(KEYS)] = inside.pop(key)
            case 4:
                inside[key] = json.dumps(inside[key])
            case _:
                inside[key] = dice.choice(VALUES)()
    return row


# ---------------------------------------------------------------- files


def write_jsonl(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # half a character is written as \ud83d


def write_json(file: Path, rows: list[dict]) -> None:
    file.write_text(json.dumps(rows))


def write_table(file: Path, rows: list[dict]) -> None:
    """csv or tsv: what is no text as JSON; half a character as bytes that are not UTF-8."""
    keys = {key for row in rows for key in row if key} or {"question"}
    texts = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items() if key} for row in rows]
    whole = io.StringIO()
    with contextlib.suppress(UnicodeEncodeError):
        write_csv(file, [{key: row.get(key, "") for key in keys} for row in texts])
        return
    whole.write(",".join(keys) + "\n" + "\n".join(",".join(row.get(key, "") for key in keys) for row in texts))
    file.write_bytes(whole.getvalue().encode(errors="surrogatepass"))


def write_parquet(file: Path, rows: list[dict]) -> None:
    """Columns of one type each, as far as there is one; else of JSON, or of bytes that call themselves text."""
    columns = {}
    for key in {key for row in rows for key in row}:
        values = [row.get(key) for row in rows]
        try:
            column = pa.array(values)
            parquet.write_table(pa.table({"": column}), io.BytesIO())  # parquet has no dictionaries without keys, deep inside
            columns[key.encode(errors="replace").decode()] = column
        except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
            texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
            raw = pa.array([text.encode(errors="surrogatepass") for text in texts], pa.binary())
            columns[key.encode(errors="replace").decode()] = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    parquet.write_table(pa.table(columns), file, row_group_size=7)


def write_folder(folder: Path, rows: list[dict]) -> None:
    """Pictures with texts beside them."""
    folder.mkdir()
    for i, row in enumerate(rows):
        text = json.dumps(row)
        (folder / f"{i}.png").write_bytes(png("red") if i % 3 else text.encode())
        (folder / f"{i}.txt").write_bytes(text.encode() if i % 2 else bytes(range(256)))


WRITERS: dict[str, Callable[[Path, list[dict]], None]] = {
    "jsonl": write_jsonl, "json": write_json, "csv": write_table, "tsv": write_table, "parquet": write_parquet,
    "folder": write_folder}  # fmt: skip


HEADS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0" * 9, b"version https://git-lfs", b"<html>")
INSIDE = (b"\0", b"\xff", b'"', b"\r", b"\n", b"\xed\xa0\x80", b"[" * 100_000)


def damage_bytes(data: bytes, dice: random.Random) -> bytes:
    """A file cut short, with bytes changed, or with what does not belong there put in."""
    place = dice.randrange(len(data) + 1)
    match dice.randrange(6):
        case 0:
            return data[:place]
        case 1:
            changed = bytearray(data)
            for _ in range(dice.randint(1, 20)):
                changed[dice.randrange(len(data))] = dice.randrange(256)
            return bytes(changed)
        case 2:
            return dice.choice(HEADS) + data
        case 3:
            return data[:place] + dice.choice(INSIDE) + data[place:]
        case 4:
            return b"[" * 100_000 + b"\n" + data
        case _:
            return data[place:] + data[:place]


# ---------------------------------------------------------------- reading


def read(path: Path, folder: Path, preferences: bool, processor: Any, listed: Path) -> int:
    """Read, place and render every row of a file; the number of rows that were refused, each with a reason, and listed."""
    refused = BadRows(listed, 10**6, 1.0)
    for need_answer in (True, False):
        source = load_preferences(path, folder) if preferences else load(path, folder, need_answer=need_answer)
        for file in files_of(source) or [source]:
            places(file, folder)
        for i in range(len(source)):
            try:
                row = source[i]
                if isinstance(row, Conversation) and need_answer:
                    processor.document(row, 512)
                elif isinstance(row, Conversation):
                    with contextlib.suppress(ValueError):  # which becomes a bad row (dataset/problems.py)
                        gold(row.answer).matches("3")
                    processor.prompt(row)
                else:
                    processor.pair(row, 512)
            except BadRow as bad:
                bad.where = bad.where or row.id
                refused.add(bad)
        if preferences:
            break
    if refused.names:
        lines = listed.read_text(encoding="utf-8").split("\n")[:-1]  # not splitlines: a reason may quote U+2028
        assert len(list(map(json.loads, lines))) == len(refused.names)
    return len(refused.names)


def fuzz_rows(folder: Path, count: int, seed: int = 0) -> list[Count]:
    """Damage `count` rows, as many in each form of files; half of the files are then damaged themselves."""
    dice, processor = random.Random(seed), tiny.processor()
    (pictures := folder / "pictures").mkdir()
    for colour in COLOURS:
        (pictures / file_of(colour)).write_bytes(png(colour))
    with zipfile.ZipFile(pictures / "zipped.zip", "w") as archive:
        archive.writestr("zipped.png", png("red"))
    forms = [*QUESTIONS.values(), *CAPTIONS.values(), *PREFERENCES.values()]
    preferences = set(PREFERENCES.values())
    counts = {(name, whole): Count(f"{'rows in' if whole else 'a damaged file of'} {name}")
              for name in WRITERS for whole in (True, False)}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        for k in range(max(len(counts), count // PART)):
            (name, whole), form = list(counts)[k % len(counts)], dice.choice(forms)
            rows = [form(dice.choice(COLOURS), "What is it?", "A bus.") for _ in range(PART)]
            rows = [damaged(row, dice) if dice.random() < 0.7 else row for row in rows]
            path = folder / (f"{k}" if name == "folder" else f"{k}.{name}")
            WRITERS[name](path, rows)
            if not whole and path.is_file():
                path.write_bytes(damage_bytes(path.read_bytes(), dice))
            listed = folder / f"{k}.bad"
            work = partial(read, path, pictures if path.is_file() else path, form in preferences, processor, listed)
            counts[name, whole].add(work, PART)
            listed.unlink(missing_ok=True)
    return list(counts.values())
