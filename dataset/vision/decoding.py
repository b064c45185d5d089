"""Image files to RGB: every mode and format, upright; a broken or too large file is refused before it is unpacked.

In:  a path or bytes, or a PIL image of any mode.  Out: an RGB image, or its size; `BadRow` for a file that cannot be used.

Every picture of a user goes through `opened`: from rows, zip files, the network, the chat and the web page. What strangers made
is bounded there in pixels, bytes, reads and scans, so that it costs at most some hundred megabytes and a few seconds.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.bad_rows import BadRow

MAX_PIXELS = 51_000_000  # a phone's 50 megapixels, 4 bytes each in memory; a small file that claims more is a decompression bomb
# At most, of what takes many seconds to unpack (Python: the decoders of PIL that are written in it), or several times the memory.
MOST_PIXELS = {"JPEG2000": 8_000_000, "WEBP": 25_000_000, "ICO": 1_000_000, "Python": 1_000_000}
MAX_SCANS = 1_000_000_000  # pixels times scans of a progressive JPEG: each scan goes over all pixels
MAX_BYTES = 100_000_000  # of a file
MAX_READS = 200_000  # of a file's parts: headers may hold millions of empty parts, or a comment that is read byte by byte
LARGE_PIXELS = 8_000_000  # above, one picture at a time is unpacked, however many threads there are
ONE_LARGE = threading.Lock()


# The formats that are read. PIL knows more, by content: for an EPS it would start Ghostscript, and files come from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000",
           *(["AVIF"] if importlib.util.find_spec("PIL.AvifImagePlugin") else []))


PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a PNG may state its orientation in one of these chunks


BITS = (8, 10, 12, 14, 16, 24, 32)  # of a grey value, in cameras, scanners and files


class BoundedFile:
    """A file for PIL, which allows MAX_READS reads."""

    def __init__(self, file: BinaryIO):
        self.file, self.reads = file, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise OSError(f"its header has more than {MAX_READS:,} parts")
        return self.file.read(size)


def open_rgb(source: Path | bytes, side: int = 0) -> Image.Image:
    """The RGB image of a file; BadRow as in `opened`.

    side   > 0: a JPEG may come at a half, a quarter or an eighth, both sides at least this; it is unpacked several times as fast
    """
    with opened(source) as image:
        if side:
            image.draft(None, (side, side))
        with ONE_LARGE if image.width * image.height > LARGE_PIXELS else nullcontext():
            image.load()  # the first frame, where there are several
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image file, given as path or bytes, with only its header read; BadRow for a broken file, no image, or a bomb.

    PIL's readers raise what a broken file leads them into, from KeyError to MemoryError, so every error is taken for the file's.
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            if (size := file.seek(0, io.SEEK_END)) > MAX_BYTES:
                raise ValueError(f"{size:,} bytes, at most {MAX_BYTES:,}")
            file.seek(0)
            for width, height in icon_sizes(file):  # PIL unpacks an icon when it opens it
                if width * height > MOST_PIXELS["ICO"]:
                    raise ValueError(f"an icon of {width} x {height} pixels")
            with Image.open(BoundedFile(file), formats=FORMATS) as image:  # type: ignore[arg-type]
                require_small(image, file)
                yield image
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise BadRow(f"image cannot be opened: {name} ({reason})", "replace the image, or remove the row") from error


def require_small(image: Image.Image, file: BinaryIO) -> None:
    """ValueError, by the header alone, for an image that would take too much memory or time to unpack."""
    width, height = image.size
    pixels = width * height
    tiles = getattr(image, "tile", ())  # (decoder, ...): who unpacks it
    kind = "Python" if any(tile[0] in Image.DECODERS for tile in tiles) else image.format
    plain = image.mode in ("1", "L", "RGB") and not image.has_transparency_data  # others are copied to become RGB
    most = MOST_PIXELS.get(kind or "", MAX_PIXELS if plain else MAX_PIXELS // 2)
    if pixels > most:
        raise ValueError(f"{width} x {height} pixels, at most {most:,}")
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        file.seek(0)
        scans = file.read().count(b"\xff\xda")  # the marker that begins one
        if pixels * scans > MAX_SCANS:
            raise ValueError(f"{width} x {height} pixels in {scans} scans")


def icon_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(width, height) of each picture in an icon file, as it states it itself: the icon's directory knows 256 pixels at most."""
    head = file.read(6)
    for k in range(int.from_bytes(head[4:], "little") if head[:4] == b"\0\0\1\0" else 0):
        file.seek(6 + 16 * k + 12)
        file.seek(int.from_bytes(file.read(4), "little"))
        start = file.read(24)
        yield struct.unpack(">II", start[16:24]) if start.startswith(b"\x89PNG") else struct.unpack("<II", start[4:12])


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB, with transparent parts over white."""
    if image.mode == "F" or image.mode.startswith("I"):  # PIL's own conversion would clip everything above 255 to white
        return Image.fromarray(eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8, scaled by the range of their kind: the fewest bits that hold the brightest.

    A camera's 12 bits in a file of 16 would be nearly black as 16. Fractions are taken for 0..1 if none is larger.
    """
    parts = np.array_split(values.ravel(), 1 + values.size // 1_000_000)  # in double precision, which takes 8 bytes a value
    brightest = max(np.nan_to_num(part.astype(np.float64)).max(initial=0) for part in parts)
    tops = [1 if values.dtype.kind == "f" else 255, *(2**bits - 1 for bits in BITS)]
    top = next((top for top in tops if brightest <= top), brightest)
    scaled = (np.nan_to_num(part.astype(np.float64)).clip(0) * (255 / top) for part in parts)
    return np.concatenate([np.round(part).astype(np.uint8) for part in scaled]).reshape(values.shape)


def upright_size(source: Path | bytes) -> tuple[int, int]:
    """(width, height) of what `open_rgb` returns, from the header alone, unless EXIF may rotate the image.

    Formats differ in when they rotate, so such an image is decoded. PIL decodes a PNG to read its EXIF, which may come last, so
    a PNG without an EXIF chunk is not asked for it.
    """
    with opened(source) as image:
        size, plain = image.size, image.format == "PNG" and not any(mark in file_bytes(source) for mark in PNG_EXIF)
        turned = not plain and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return open_rgb(source).size if turned else size


def file_bytes(source: Path | bytes) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()
