"""The official files of a benchmark: rows, and the picture of a row.

In:  a path from a task's option.  Out: rows or pictures; an error of one line for a missing file, with its source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dataset.images import Picture, from_file
from dataset.vision.loading import from_base64
from model.registry import UserError


def existing(path: str | Path, option: str, source: str) -> Path:
    """The file or folder that an option names; FileNotFoundError states the option, and where the file comes from."""
    if not str(path):
        raise FileNotFoundError(f"the option {option}= is not set: it wants {source}")
    if not Path(path).exists():
        raise FileNotFoundError(f"{option}={path} does not exist: it wants {source}")
    return Path(path)


def rows(file: Path) -> list[dict]:
    """The objects of a json list or of json lines, whatever the file's name is; UserError names the bad line."""
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)
    parsed = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: some answers contain U+2028
        if line.strip():
            try:
                parsed.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{file}:{number} is not json ({error}): download the file again") from error
    return parsed


def picture(row: dict, names: Sequence[str], folder: str, source: str) -> Picture:
    """The picture of a row: its `image` as base64, or the first of these names that exists in the folder of images."""
    if len(row.get("image") or "") > 200:  # base64; a file's name is shorter
        return from_base64(row["image"])
    where = existing(folder, "images", source)
    for name in names:
        if (where / name).is_file():
            return from_file(where / name)
    raise FileNotFoundError(f"images={folder} holds no {' or '.join(names)}: it wants {source}")
