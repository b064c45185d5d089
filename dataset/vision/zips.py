"""Pictures in zip files, read through `zipfile` without unpacking.

In:  a folder with zip files in it, or one zip file.  Out: the picture of a name, wherever the archive puts its folder.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from dataset.bad_rows import BadRow
from dataset.images import Picture, from_source
from dataset.vision.decoding import MAX_BYTES
from model.registry import UserError

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack without a bound
# Of a damaged archive; RuntimeError: it wants a password, NotImplementedError: a method that Python does not know.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError)


class Zips:
    """The pictures in the zip files of a folder, and of the folders in it that a name goes through."""

    def __init__(self, folder: Path):
        self.folder, self.single = folder, folder.suffix == ".zip" and folder.is_file()
        self.found: dict[Path, list[tuple[str, zipfile.ZipFile]]] = {}  # folder -> (name without .zip, the file)

    def archives(self, folder: Path) -> list[tuple[str, zipfile.ZipFile]]:
        """The zip files in a folder, opened once."""
        if folder not in self.found:
            files = [self.folder] if self.single else sorted(folder.glob("*.zip"))
            self.found[folder] = [(file.stem, opened(file)) for file in files]
        return self.found[folder]

    def find(self, name: str) -> Picture | None:
        """The picture of a name such as `train2017/1.jpg`: in train2017.zip, with or without that folder inside, or another."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts:
            return None
        for depth in range(1 if self.single else len(parts)):
            folder = self.folder.joinpath(*parts[:depth])
            if not self.single and not os.path.isdir(folder):  # also where the name is too long for a path
                return None
            for stem, archive in self.archives(folder):
                for member in members("/".join(parts[depth:]), stem):
                    if member in archive.NameToInfo:
                        return picture(archive, archive.getinfo(member), name)
        return None


def members(name: str, stem: str) -> Iterator[str]:
    """How an archive may call a picture."""
    yield name
    yield f"{stem}/{name}"
    if name.startswith(f"{stem}/"):
        yield name.removeprefix(f"{stem}/")


def opened(file: Path) -> zipfile.ZipFile:
    """A zip file; UserError where it is damaged."""
    try:
        archive = zipfile.ZipFile(file)
        if hasattr(os, "register_at_fork"):  # processes that read one open file would move each other's place in it
            os.register_at_fork(after_in_child=lambda: setattr(archive, "fp", file.open("rb")))
        return archive
    except ZIP_ERRORS as error:
        raise UserError(f"{file} is not a whole zip file ({error}): download it again") from error


def picture(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Picture:
    """The picture of a member; BadRow, once it is opened, where it cannot be unpacked."""
    key = f"{archive.filename}:{info.filename}:{info.file_size}:{info.CRC}"
    return from_source(key, partial(unpacked, archive, info), name)


def unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a member."""
    if info.file_size > MAX_BYTES:
        raise BadRow(f"image is larger than {MAX_BYTES} bytes: {info.filename} in {archive.filename}", "shrink the image")
    try:
        if info.compress_type not in METHODS:
            raise NotImplementedError(f"compressed by method {info.compress_type}, where deflate is expected")
        return archive.read(info)
    except ZIP_ERRORS as error:
        where = f"{info.filename} in {archive.filename} ({error})"
        raise BadRow(f"image cannot be unpacked: {where}", "download the zip again") from error
