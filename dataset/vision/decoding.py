"""Image files to RGB: every mode and format, upright; a broken or too large file is refused.

In:  a path or bytes, or a PIL image of any mode.  Out: an RGB image, or its size; `BadRow` for a file that cannot be used.
"""

from __future__ import annotations

import importlib.util
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from dataset.bad_rows import BadRow

MAX_PIXELS = 64_000_000  # 8000 x 8000; a small file that claims more is a decompression bomb, or useless to a small model


# The formats that are read. PIL knows more, by content: for an EPS it would start Ghostscript, and files come from strangers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000",
           *(["AVIF"] if importlib.util.find_spec("PIL.AvifImagePlugin") else []))


PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a PNG may state its orientation in one of these chunks


BITS = (8, 10, 12, 14, 16, 24, 32)  # of a grey value, in cameras, scanners and files


# The errors of PIL for a broken file. They are caught around the decoding alone: anywhere else they are bugs.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def open_rgb(source: Path | bytes) -> Image.Image:
    """The RGB image of a file; BadRow as in `opened`."""
    with opened(source) as image:
        image.load()  # the first frame, where there are several
        return to_rgb(image)


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image file, given as path or bytes, with only its header read; BadRow for a broken file, no image, or a bomb."""
    name, file = (f"{len(source)} bytes", io.BytesIO(source)) if isinstance(source, bytes) else (source, source)
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # known from the header, before anything is decompressed
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS}")
            yield image
    except DECODE_ERRORS as error:
        raise BadRow(f"image cannot be opened: {name} ({error})", "replace the image, or remove the row") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as RGB, turned upright by its EXIF data, with transparent parts over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL's own conversion would clip everything above 255 to white
        image = Image.fromarray(eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits as uint8, scaled by the range of their kind: the fewest bits that hold the brightest.

    A camera's 12 bits in a file of 16 would be nearly black as 16. Fractions are taken for 0..1 if none is larger.
    """
    fractions = values.dtype.kind == "f"
    values = np.nan_to_num(values.astype(np.float64)).clip(0)
    brightest = values.max(initial=0)
    tops = [1 if fractions else 255, *(2**bits - 1 for bits in BITS)]
    top = next((top for top in tops if brightest <= top), brightest)
    return np.round(values * (255 / top)).astype(np.uint8)


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
