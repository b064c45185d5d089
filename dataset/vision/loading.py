"""Pictures named in a row of data: a path inside the image folder or its zip files, base64, file:, data:, or http(s):.

In:  a name, as strangers write it.  Out: a `Picture`, or `BadRow`.
"""

from __future__ import annotations

import base64
import functools
import os
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from urllib.parse import unquote

from dataset.bad_rows import BadRow
from dataset.images import Picture, from_bytes, from_file, from_source
from dataset.vision.downloads import DOWNLOADS
from dataset.vision.zips import Zips

BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")  # JPEG, PNG, GIF and WebP; no file name begins with these
LONG_BASE64_STARTS = ("Qk", "SUkq", "TU0AKg", "AAAA")  # BMP, TIFF, AVIF and JPEG 2000; a name may begin so, but ends sooner
LONGEST_NAME = 200  # characters
KEPT = 10_000  # pictures whose files were found already: many rows are about the same few


class PictureFinder:
    """Pictures by their names in rows: a path inside the folder or its zip files, file://, base64, or, if allowed, http(s)://."""

    def __init__(self, folder: Path, allow_urls: bool):
        self.folder, self.allow_urls, self.zips = os.fspath(folder), allow_urls, Zips(folder)
        self.folders: dict[str, str] = {}  # resolved
        self.named = functools.lru_cache(maxsize=KEPT)(self.find)
        self.roots = [os.path.realpath(folder)]
        # In the hub's cache a file of a snapshot is a link to a blob beside it.
        snapshots = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
        self.roots += [os.path.realpath(parent.with_name("blobs")) for parent in snapshots]

    def __call__(self, name: str) -> Picture:
        """The picture of a name; BadRow where there is none."""
        return self.find(name) if len(name) > LONGEST_NAME else self.named(name)

    def find(self, name: str) -> Picture:
        """The picture of a name that was not asked for lately."""
        if is_base64(name):
            return from_base64(name)
        scheme, _, rest = name.partition(":")
        scheme = scheme.lower()
        if scheme == "data":
            return from_base64(rest)
        if scheme in ("http", "https"):
            if not self.allow_urls:
                raise BadRow(f"image is a URL: {name}", "download the images, or pass --allow_urls")
            return from_url(name)
        if scheme == "file":
            return self.in_folder(name, unquote(rest.removeprefix("//")))
        return self.in_folder(name, name)

    def in_folder(self, name: str, place: str) -> Picture:
        """The picture in a file of the folder, or of a zip file in it."""
        try:
            path, stat = self.resolved(os.path.join(self.folder, place))
        except ValueError as error:  # a zero byte, or half a character
            raise BadRow(f"image name is not a path: {place[:80]!r} ({error})", "write a path inside --image_folder") from error
        # Rows are written by strangers: with `..`, an absolute path or a link they could name any file of this machine.
        if not any(path == root or path.startswith(root + os.sep) for root in self.roots):
            raise BadRow(f"image path leaves the image folder: {name}", f"it must lie in --image_folder (now {self.folder})")
        if not (stat and S_ISREG(stat.st_mode)) and (zipped := self.zips.find(place)):
            return zipped
        return from_file(path, name, stat)

    def resolved(self, path: str) -> tuple[str, os.stat_result | None]:
        """(os.path.realpath of a path, what is there); realpath asks for every folder on its way, this once for a folder."""
        folder, base = os.path.split(path)
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        path = os.path.join(self.folders[folder], base)
        try:
            stat = os.lstat(path)
            if S_ISLNK(stat.st_mode) or base in ("", ".", ".."):
                path = os.path.realpath(path)
                stat = os.stat(path)
        except OSError:
            return os.path.realpath(path), None
        return path, stat


def from_name(name: str, folder: Path, allow_urls: bool) -> Picture:
    """The picture of one name, as `PictureFinder` finds it."""
    return PictureFinder(folder, allow_urls)(name)


def is_base64(name: str) -> bool:
    """Whether an image is in base64 and not a name, by the first letters of its format."""
    return name.startswith(BASE64_STARTS) or (len(name) > LONGEST_NAME and name.startswith(LONG_BASE64_STARTS))


def from_base64(text: str) -> Picture:
    """A picture from base64, with or without `data:image/...;base64,` before it and line breaks in it."""
    try:
        return from_bytes(base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True))
    except ValueError as error:  # binascii.Error, and the error for characters that are not ASCII
        raise BadRow(f"bad base64 in an image: {error}", "encode the image file again") from error


def from_url(url: str) -> Picture:
    """A picture on the web, downloaded once, when it is first opened."""
    return from_source(url, lambda: DOWNLOADS(url), url)
