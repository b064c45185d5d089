"""Files that are written whole or not at all, and errors of the system that name the file.

In:  a path, and what to write.  Out: the file, or OSError with its name: "a.json: No space left on device", which a program tells
     in one line (model/cli.py). Checkpoints are written by model/durable.py.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error inside the block the name of the file that it is about: writing to an open file tells none."""
    try:
        yield
    except OSError as error:
        if error.filename:
            raise
        code = error.errno or errno.ENOSPC  # numpy says only that fewer bytes were written than it has
        raise OSError(code, os.strerror(code), str(path)) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is complete."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace the text of a file, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


def append(path: Path, text: str) -> None:
    """Add a text to the end of a file, in UTF-8."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
