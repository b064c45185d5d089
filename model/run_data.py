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
            files = {str(one): file_fingerprint(path) for one in named
                     if isinstance(one, str | Path) and field.name != "image_folder" and (path := named_file(one))}
            if files:
                found[f"{field.name} files"] = files
    return found


def named_file(value: Any) -> Path | None:
    """The file or folder that a flag's value names, with or without a :WEIGHT or :FUNCTION behind it."""
    for text in (str(value), str(value).rpartition(":")[0]):
        if text and len(text) < 1000 and Path(text).exists():
            return Path(text)
    return None


def file_fingerprint(path: Path, edge: int = 1_000_000) -> str:
    """Size, first and last megabyte of a file, or of the data files in a folder: other data, another fingerprint."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.json*")) + sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        size = file.stat().st_size
        with file.open("rb") as opened:
            digest.update(f"{file.name if path.is_dir() else ''} {size} ".encode() + opened.read(edge))
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
