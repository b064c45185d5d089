"""The official files of a benchmark: its folder, its rows, and the picture of a row.

In:  a path from a task's option.  Out: rows or pictures; an error of one line for a missing or a wrong file, with its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset.images import Picture, from_file
from dataset.vision.loading import from_base64
from model.registry import UserError

BENCHMARKS = Path("benchmarks")  # a folder for each benchmark, in the place of path=


def existing(path: str | Path, option: str, source: str) -> Path:
    """The file or folder that an option names; FileNotFoundError states the option, and where the file comes from."""
    if not str(path):
        raise FileNotFoundError(f"the option {option}= is not set: it wants {source}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{option}={path} does not exist: it wants {source}")
    return Path(path)


@dataclass(frozen=True)
class Folder:
    """The folder of a benchmark's official files.

    task     the name of the task, for messages
    path     its option path=; "": benchmarks/TASK
    source   the project that the files come from
    images   its option images=: a folder of pictures elsewhere; "": they lie in the folder itself
    """

    task: str
    path: str
    source: str
    images: str = ""

    @property
    def root(self) -> Path:
        return Path(self.path) if self.path else BENCHMARKS / self.task

    def find(self, *names: str) -> Path | None:
        """The first of these files or folders that exists; None if none does."""
        return next((self.root / name for name in names if (self.root / name).exists()), None)

    def file(self, *names: str) -> Path:
        """The first of these files or folders that exists; FileNotFoundError says what is missing, whose it is, and its place."""
        if (found := self.find(*names)) is None:
            others = f" (or {' or '.join(names[1:])})" if names[1:] else ""
            raise FileNotFoundError(f"{self.task}: {names[0]}{others} of {self.source} is missing: put it into {self.root}, "
                                    f"or name its folder with {self.task}:path=FOLDER")  # fmt: skip
        return found

    def picture(self, names: Sequence[str], folders: Sequence[str], source: str) -> Picture:
        """The picture with one of these names in images=, or else in one of these folders below the root."""
        roots = [Path(self.images)] if self.images else [self.root / folder for folder in folders]
        return first_picture([root / name for root in roots for name in names],
                             f"{self.task}: no picture {' or '.join(names)} in {' or '.join(map(str, roots))}: it is one of "
                             f"{source}; another folder is {self.task}:images=FOLDER")  # fmt: skip


def text(file: Path) -> str:
    """The text of a file, without a byte order mark; UserError for one that is not UTF-8, such as a picture or an archive."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 ({error}): download the file again") from error


def content(file: Path, hook: Callable[[dict], Any] | None = None) -> Any:
    """The value in a json file; `hook` replaces every object, the inner ones first. UserError for a file that is not json."""
    try:
        return json.loads(text(file), object_hook=hook)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not json ({error}): download the file again") from error


def rows(file: Path) -> list[dict]:
    """The objects of a json list or of json lines, whatever the file's name is; UserError names the bad line."""
    whole = text(file)
    if whole.lstrip().startswith("["):
        return content(file)
    parsed = []
    for number, line in enumerate(whole.split("\n"), 1):  # not splitlines: some answers contain U+2028
        if line.strip():
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number} is not json ({error}): download the file again") from error
    return parsed


def fits(value: Any, form: Any) -> bool:
    """Whether a value of json has a form: a type; [form], a list of such; {key: form}, an object; (form, ...), one of these."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(one, form[0]) for one in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], one) for key, one in form.items())
    return isinstance(value, form)


def checked(rows: Any, fields: dict[str, Any], file: Path, source: str) -> list[dict]:
    """The rows, each with all of these fields in their forms (`fits`). UserError names the first row that has not, and the file
    that is wanted.
    """
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file} holds no list of rows: it is not {source}")
    for number, row in enumerate(rows, 1):
        if not fits(row, fields):
            missing = [field for field in fields if not isinstance(row, dict) or field not in row]
            wrong = missing or [f"{field} in the right form ({row[field]!r:.60})" for field in fields
                                if not fits(row[field], fields[field])]  # fmt: skip
            raise UserError(f"{file}: row {number} has no {', '.join(wrong)}: it is not {source}")
    return rows


def under(key: str, file: Path, fields: dict[str, Any], source: str, hook: Callable[[dict], Any] | None = None) -> list[dict]:
    """The rows of a json file {key: [row, ...], ...}; UserError as `checked` raises it, `hook` as `content` takes it."""
    value = content(file, hook)
    return checked(value.get(key) if isinstance(value, dict) else None, fields, file, source)


def by_id(file: Path, fields: dict[str, Any], source: str) -> list[dict]:
    """The rows of a json file {id: row}, each with its key as `id`; UserError as `checked` raises it."""
    value = content(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no object of rows by their ids: it is not {source}")
    return checked([{**row, "id": key} if isinstance(row, dict) else row for key, row in value.items()], fields, file, source)


def of_first(rows: Iterable[dict], key: Callable[[dict], Hashable], n: int) -> list[dict]:
    """The rows of the first n pictures; `key` tells the picture of a row."""
    seen: dict[Hashable, int] = {}
    return [row for row in rows if seen.setdefault(key(row), len(seen)) < n]


unseen = ContextVar("unseen", default=False)  # whether pictures may be missing


@contextmanager
def without_pictures() -> Iterator[None]:
    """Inside, a missing picture is no error before it is opened: answers are only scored again."""
    token = unseen.set(True)
    try:
        yield
    finally:
        unseen.reset(token)


def first_picture(files: Iterable[Path], missing: str) -> Picture:
    """The picture in the first of these files that exists; FileNotFoundError(missing) where none does and one is needed."""
    for file in files:
        if file.is_file():
            return from_file(file)

    def load() -> Any:
        raise FileNotFoundError(missing)

    if not unseen.get():
        load()
    return Picture(missing, load)


def picture(row: dict, names: Sequence[str], folder: str, source: str) -> Picture:
    """The picture of a row: its `image` as base64, or the first of these names that exists in the folder of images."""
    if len(row.get("image") or "") > 200:  # base64; a file's name is shorter
        return from_base64(row["image"])
    where = Path(folder) if unseen.get() else existing(folder, "images", source)
    return first_picture([where / name for name in names], f"images={folder} holds no {' or '.join(names)}: it wants {source}")
