"""What decides which row of the data comes when: flags, and the files that they name. Only with the same does a run go on.

In:  the flags of a script.  Out: {flag: value}, with a fingerprint of each file; UserError where a resumed run has others.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.registry import UserError

ROW_FOLDERS = ("data", "train")  # of a folder of data, which are read as well (dataset/formats/folders.py)
HASHED = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")  # files of rows, and texts beside pictures


def require_same_data(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError that names the flags and files of a run in `out` that are not those it was started with."""
    changed = [f"--{name} {then.get(name)!r}, now {now.get(name)!r}" for name in sorted({**then, **now})
               if then.get(name) != now.get(name)]
    if changed:
        raise UserError(f"{out} was started with {'; '.join(changed)}: --resume would go on with other rows. Give the same flags "
                        f"and the same files")


def data_settings(settings: Any) -> dict[str, Any]:
    """The flags that say which row comes when (fields with metadata data=True), and a fingerprint of each file they name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found.update(data_settings(value))
        elif field.metadata.get("data"):
            found[field.name] = json.loads(json.dumps(value, default=str))
            named = value if isinstance(value, tuple | list) else [value]
            files = {str(one): known for one in named if isinstance(one, str | Path) and field.name != "image_folder"
                     and (known := fingerprint(one))}
            if files:
                found[f"{field.name} files"] = files
    return found


def fingerprint(value: str | Path) -> str | None:
    """What identifies the data that a flag's value names: of files and folders a hash, of hf:OWNER/NAME the commit that was
    downloaded; None for what names no data.
    """
    path = named_file(value)
    return file_fingerprint(path) if path else hub_commit(str(value)) if str(value).startswith("hf:") else None


def hub_commit(value: str) -> str | None:
    """The commit of a data set of the Hugging Face hub, hf:OWNER/NAME or hf:OWNER/NAME/FILE, in the hub's own cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    owner, name = (value.removeprefix("hf:").split("/") + [""])[:2]
    file = Path(HF_HUB_CACHE) / f"datasets--{owner}--{name.partition(':')[0]}" / "refs" / "main"
    return file.read_text().strip() if file.is_file() else None


def named_file(value: Any) -> Path | None:
    """The file or folder that a flag's value names, with or without a :WEIGHT or :FUNCTION behind it."""
    for text in (str(value), str(value).rpartition(":")[0]):
        if text and len(text) < 1000 and Path(text).exists():
            return Path(text)
    return None


def file_fingerprint(path: Path, edge: int = 1_000_000) -> str:
    """Size, first and last megabyte of a file, or of the files in a folder that are read: other data, another fingerprint.

    Of a folder's pictures, which may be many, the name and the size alone.
    """
    digest = hashlib.sha256()
    places = [path, *(path / name for name in ROW_FOLDERS)]
    for file in sorted(file for place in places if place.is_dir() for file in place.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix() if path.is_dir() else ''} {size} ".encode(errors="backslashreplace"))
        if file.suffix in HASHED or not path.is_dir():
            with file.open("rb") as opened:
                digest.update(opened.read(edge))
                opened.seek(max(0, size - edge))
                digest.update(opened.read(edge))
    return digest.hexdigest()[:16]


def named_files(settings: Any) -> Iterator[tuple[str, Path]]:
    """(flag, path) of every file and folder that a run may read."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from named_files(value)
        elif field.name not in ("out", "feature_cache"):
            for one in value if isinstance(value, tuple | list) else [value]:
                path = one if isinstance(one, Path) else named_file(one) if isinstance(one, str) else None
                if path:
                    yield f"--{field.name}", path
