"""Pictures: from a file, bytes or memory to the tensor that an encoder takes.

In:  a path, bytes, an address or a PIL image of any kind.  Out: a `Picture`, opened only when it is needed, and
`pixels(picture, ...)`, a normalised (3, S, S) tensor. Whatever cannot be used raises `BadRow`, and only that.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import importlib.util
import io
import struct
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

MAX_PIXELS = 64_000_000  # 8000 x 8000; a small file that claims more is a decompression bomb or no use to a small model
# What is read. PIL knows more, told by content: of an EPS it would start Ghostscript, and files are written by strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000",
           *(["AVIF"] if importlib.util.find_spec("PIL.AvifImagePlugin") else []))
MAX_DOWNLOAD = 50_000_000  # bytes
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # the places where a PNG may say that it lies on its side

# What PIL raises for a broken file. Caught only around the decoding itself: anywhere else these are bugs.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class BadRow(ValueError):
    """One row of data that cannot be used: why, what to do about it, and where it is ("file:row").

    The only exception that skips a row. A bug in this code raises something else and stops the run.
    """

    def __init__(self, reason: str, remedy: str, where: str = ""):
        super().__init__(reason, remedy, where)
        self.reason, self.remedy, self.where = reason, remedy, where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; {self.remedy}" if self.where else f"{self.reason}; {self.remedy}"


@dataclass(frozen=True)
class Picture:
    """An image that is opened when needed; `key` names its content for ever, `load()` returns it as RGB.

    measure   () -> (width, height) of what `load` returns, where that can be known for less
    held      bytes that it keeps in memory: those of its file, where it came inside a row
    """

    key: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    measure: Callable[[], tuple[int, int]] | None = field(default=None, compare=False, repr=False)
    held: int = field(default=0, compare=False, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height); BadRow where it does not open."""
        return self.measure() if self.measure else self.load().size


def from_file(path: str | Path) -> Picture:
    """A picture in a file; its key holds size and time, so that an edited file is a new picture to a cache."""
    path = Path(path)
    if not path.is_file():
        raise BadRow(f"image file missing: {path}", "check --image_folder, or remove the row")
    facts = path.stat()
    return Picture(f"{path}:{facts.st_size}:{facts.st_mtime_ns}", lambda: open_rgb(path), lambda: upright_size(path))


def from_bytes(data: bytes) -> Picture:
    """A picture from the bytes of an image file."""
    return Picture(f"sha256:{hashlib.sha256(data).hexdigest()}", lambda: open_rgb(data), lambda: upright_size(data), len(data))


def from_image(image: Image.Image) -> Picture:
    """A picture from a PIL image in memory."""
    image = to_rgb(image)
    return Picture(f"rgb:{image.size}:{hashlib.sha256(image.tobytes()).hexdigest()}", lambda: image, lambda: image.size,
                   3 * image.width * image.height)


def from_base64(text: str) -> Picture:
    """A picture from base64, with or without the `data:image/...;base64,` before it."""
    try:
        return from_bytes(base64.b64decode(text.rpartition(",")[2], validate=True))
    except ValueError as error:  # binascii.Error is one, and what stands for letters that are no ASCII another
        raise BadRow(f"bad base64 in an image: {error}", "encode the image file again") from error


def from_url(url: str) -> Picture:
    """A picture on the web, fetched when it is opened."""
    return Picture(url, lambda: open_rgb(download(url)))


def from_name(name: str, folder: Path, allow_urls: bool) -> Picture:
    """The picture that a row of data names: a path inside `folder`, file://, data: or, where allowed, http(s)://."""
    scheme, _, rest = name.partition(":")
    if scheme == "data":
        return from_base64(rest)
    if scheme in ("http", "https"):
        if not allow_urls:
            raise BadRow(f"image is a URL: {name}", "download the images, or pass --allow_urls")
        return from_url(name)
    try:
        path = (folder / (unquote(rest.removeprefix("//")) if scheme == "file" else name)).resolve()
        path.is_file()  # a name of a thousand letters, or with a zero byte, cannot even be asked for
    except (OSError, ValueError) as error:
        raise BadRow(f"image name is no path: {name[:80]!r} ({error})", "write a path inside --image_folder") from error
    # Rows are written by strangers: with `..`, an absolute path or a link they could name any file of this machine.
    if not path.is_relative_to(folder.resolve()):
        raise BadRow(f"image path leaves the image folder: {name}", f"it must lie in --image_folder (now {folder})")
    return from_file(path)


def download(url: str) -> bytes:
    """The bytes behind a URL; BadRow when it does not answer or is too large."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            data = answer.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise BadRow(f"image URL does not answer: {url} ({error})", "download the images first") from error
    if len(data) > MAX_DOWNLOAD:
        raise BadRow(f"image URL is larger than {MAX_DOWNLOAD} bytes: {url}", "shrink the image")
    return data


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image file, given as path or bytes, of which only the header is read; BadRow when it is broken, no image, or a bomb."""
    name, file = (f"{len(source)} bytes", io.BytesIO(source)) if isinstance(source, bytes) else (source, source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before anything is unpacked
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}")
            yield image
    except DECODE_ERRORS as error:
        raise BadRow(f"image cannot be opened: {name} ({error})", "replace the image, or remove the row") from error


def open_rgb(source: Path | bytes) -> Image.Image:
    """Decode an image file to RGB; BadRow as `opened`."""
    with opened(source) as image:
        image.load()  # the first frame, where there are several
        return to_rgb(image)


def upright_size(source: Path | bytes) -> tuple[int, int]:
    """(width, height) of what `open_rgb` returns, by the header alone unless the image lies on its side.

    Formats differ in when such a one is turned, so it is decoded. PIL decodes a PNG to see how it lies, as EXIF may stand last:
    one that has none is not asked.
    """
    with opened(source) as image:
        size, plain = image.size, image.format == "PNG" and not any(mark in file_bytes(source) for mark in PNG_EXIF)
        turned = not plain and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return open_rgb(source).size if turned else size


def file_bytes(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image to RGB, turned upright as its EXIF says, what is transparent over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel; PIL's own conversion would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def pixels(picture: Picture, size: int, mean: tuple, std: tuple, fit: str = "square") -> torch.Tensor:
    """A picture as the encoder wants it: (3, S, S), normalised by the encoder's own mean and std.

    fit   square  the middle square, as CLIP was trained (and exactly torchvision's Resize and CenterCrop)
          pad     all of it, with bands in the mean colour, which are 0 after normalisation
          naive   all of it, squeezed
    """
    image = resized(picture.load(), size, mean, fit)
    array = torch.from_numpy(np.array(image, np.float32) / 255).permute(2, 0, 1)  # (3, S, S), 0..1
    return (array - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def resized(image: Image.Image, size: int, mean: tuple, fit: str) -> Image.Image:
    """An RGB image as a square of `size` pixels."""
    width, height = image.size
    if fit == "naive":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "square":
        return image.resize((size, size), Image.Resampling.BICUBIC, box=middle_square(width, height, size))
    if fit == "pad":
        return padded(image, (size, size), mean)
    raise ValueError(f"fit: square, pad or naive, not {fit!r}")


def padded(image: Image.Image, canvas: tuple[int, int], mean: tuple) -> Image.Image:
    """All of an RGB image in the middle of a canvas (width, height), as large as it fits, on the mean colour."""
    scale = min(canvas[0] / image.width, canvas[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    result = Image.new("RGB", canvas, tuple(round(255 * channel) for channel in mean))
    result.paste(image.resize(inner, Image.Resampling.BICUBIC), ((canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2))
    return result


def middle_square(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """The box of the source that `shorter side to size, then crop the middle` keeps.

    Resizing just that box gives the same pixels, and a strip of 1 x 60,000 never becomes 224 x 13,440,000.
    """
    short = min(width, height)
    box = []
    for side in (width, height):
        scaled = int(size * side / short)
        first = round((scaled - size) / 2)
        box.append((first * side / scaled, (first + size) * side / scaled))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def png(picture: Picture) -> bytes:
    """The picture as a PNG file; BadRow where it does not open."""
    file = io.BytesIO()
    picture.load().save(file, "PNG")
    return file.getvalue()
