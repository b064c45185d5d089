"""Files that are whole or not there at all, whatever ends the process while they are written.

In:  a path, and a function that fills a file.  Out: the file, or UserError with its name and the remedy; what was there before
     stays. A file gets a temporary name, reaches the disk (fsync), and is renamed; then the folder reaches the disk, too.
"""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model.registry import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, or a limit on the size of a file


def write(file: Path, fill: Callable[[Path], Any]) -> None:
    """`fill` a temporary file, then rename it to `file`. Others may read it as far as the umask allows."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with naming(file):
            temporary.touch()
            mode = temporary.stat().st_mode
            fill(temporary)
            temporary.chmod(mode)  # safetensors writes files that only their owner may read
            flush(temporary)
            os.replace(temporary, file)
            flush(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows does so for neither by this call."""
    if os.name == "posix":
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """A failure to write inside the block is a UserError that names the file and says what to do."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        by_rust = re.search(r"os error (\d+)", str(error))  # safetensors says it in words, torch's zip writer does not say it
        code = error.errno if isinstance(error, OSError) else int(by_rust[1]) if by_rust else None
        if code in FULL or "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            raise UserError(f"{file} could not be written: the disk is full, or a quota is used up. What was saved before is "
                            f"whole: free some space, and go on with --resume") from error
        if code is None:
            raise
        if code == errno.ENOENT:
            raise UserError(f"{file} could not be written: {os.strerror(code)}. If its folder was moved or deleted during the "
                            f"run, put it back and go on with --resume; else name another --out") from error
        raise UserError(f"{file} could not be written: {os.strerror(code)}. What was saved before is whole: make the folder "
                        f"writable, or name another --out") from error


def require_space(folder: Path, needed: float, remedy: str) -> None:
    """UserError where the disk of a folder has fewer bytes left than a run will write."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{folder}: the disk has {free / 1e9:.2g} GB left, and this run saves up to {needed / 1e9:.2g} GB: free "
                        f"some space, or {remedy}")


def remove_temporary(folder: Path, older_than: float = 0.0) -> None:
    """Remove temporary files and folders directly in a folder that were left by a process that died.

    older_than   seconds since their last change, where other processes may write there now
    """
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime >= older_than:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
