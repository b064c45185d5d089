"""Pictures named in a row of data: a path inside the image folder, base64, file://, data: or, if allowed, http(s)://.

In:  a name, as strangers write it.  Out: a `Picture`, or `BadRow`.
"""

from __future__ import annotations

import base64
import http.client
import urllib.request
from pathlib import Path
from urllib.parse import unquote

from dataset.bad_rows import BadRow
from dataset.images import Picture, from_bytes, from_file
from dataset.vision.decoding import open_rgb

MAX_DOWNLOAD = 50_000_000  # bytes


def from_name(name: str, folder: Path, allow_urls: bool) -> Picture:
    """The picture of a name: a path inside `folder`, file://, data: or, if allowed, http(s)://."""
    scheme, _, rest = name.partition(":")
    if scheme == "data":
        return from_base64(rest)
    if scheme in ("http", "https"):
        if not allow_urls:
            raise BadRow(f"image is a URL: {name}", "download the images, or pass --allow_urls")
        return from_url(name)
    try:
        path = (folder / (unquote(rest.removeprefix("//")) if scheme == "file" else name)).resolve()
        path.is_file()  # raises for a name of a thousand letters, or with a zero byte
    except (OSError, ValueError) as error:
        raise BadRow(f"image name is not a path: {name[:80]!r} ({error})", "write a path inside --image_folder") from error
    # Rows are written by strangers: with `..`, an absolute path or a link they could name any file of this machine.
    if not path.is_relative_to(folder.resolve()):
        raise BadRow(f"image path leaves the image folder: {name}", f"it must lie in --image_folder (now {folder})")
    return from_file(path)


def from_base64(text: str) -> Picture:
    """A picture from base64, with or without `data:image/...;base64,` before it."""
    try:
        return from_bytes(base64.b64decode(text.rpartition(",")[2], validate=True))
    except ValueError as error:  # binascii.Error, and the error for characters that are not ASCII
        raise BadRow(f"bad base64 in an image: {error}", "encode the image file again") from error


def from_url(url: str) -> Picture:
    """A picture on the web, downloaded when it is opened."""
    return Picture(url, lambda: open_rgb(download(url)))


def download(url: str) -> bytes:
    """The bytes behind a URL; BadRow where it does not answer or is too large."""
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadRow(f"image URL does not answer: {url} ({error})", "download the images first") from error
    if len(data) > MAX_DOWNLOAD:
        raise BadRow(f"image URL is larger than {MAX_DOWNLOAD} bytes: {url}", "shrink the image")
    return data
