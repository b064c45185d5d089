"""Damaged pictures and videos, in every format that Pillow or PyAV opens, and pictures that were made to cost memory or time.

In:  small pictures in every mode that a format has.  Out: counts (fuzz.py) of measuring and opening them as the model does.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from dataset.images import Picture, from_bytes, from_file, pixels
from dataset.vision.decoding import FORMATS
from dataset.vision.loading import PictureFinder
from dataset.vision.video import frames
from tests.fuzz import Count
from tests.test_video import film

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F", "YCbCr", "LAB")
OPTIONS: dict[str, list[dict]] = {"JPEG": [{"progressive": True}], "TIFF": [{"compression": "tiff_lzw"}],
                                  "WEBP": [{"lossless": True}]}  # fmt: skip
SIDE = 40
HALVES = (0.5,) * 3


def whole_pictures() -> dict[str, list[bytes]]:
    """Small pictures in every format that this Pillow writes, in every mode that it takes."""
    Image.init()
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    found: dict[str, list[bytes]] = {}
    for format in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        for mode in MODES if format in FORMATS else ("L", "RGB"):  # the others are refused
            for options in ({}, *OPTIONS.get(format, [])):
                file = io.BytesIO()
                try:
                    image = Image.fromarray(noise)
                    image = image.convert("L").convert(mode) if mode in ("I", "I;16", "F", "1", "LA") else image.convert(mode)
                    image.save(file, format, **options)
                except (OSError, ValueError, KeyError, NotImplementedError):
                    continue  # not in this mode
                if file.getvalue() and file.getvalue() not in found.setdefault(format, []):
                    found[format].append(file.getvalue())
    return found


def damage(data: bytes, dice: random.Random) -> bytes:
    """A picture cut short, with bytes changed (more often in its header), or with a part repeated, removed or made huge."""
    changed, end = bytearray(data), len(data)
    place = dice.randrange(dice.choice([min(64, end), end]))
    match dice.randrange(5):
        case 0:
            return data[:place]
        case 1:
            changed[place : place + 4] = dice.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"])
        case 2:
            changed[place:place] = data[place : place + dice.randrange(200)] * dice.randrange(50)
        case 3:
            del changed[place : place + dice.randrange(100)]
        case _:
            for _ in range(dice.randint(1, 12)):
                changed[dice.randrange(end)] = dice.randrange(256)
    return bytes(changed)


# ---------------------------------------------------------------- pictures that were made to harm


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def flat_png(side: int, colours: int = 2) -> bytes:
    """A PNG of side x side black pixels, RGB (2) or RGBA (6), packed a row at a time."""
    packer = zlib.compressobj(1)
    row = bytes(1 + side * (3 if colours == 2 else 4))
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def icon(png: bytes) -> bytes:
    """An ICO with this PNG in it, which calls itself 256 pixels wide."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png


def flat(format: str, side: int, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, format, **options)
    return file.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes two thousand times."""
    data = flat("JPEG", 4000, progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:last] + data[last:-2] * 2000 + data[-2:]


def many_chunks() -> bytes:
    small = flat_png(8)
    return small[:33] + png_chunk(b"teST", b"") * 1_000_000 + small[33:]


def zip_bomb(size: int = 90_000_000, method: int = zipfile.ZIP_LZMA) -> Picture:
    """The picture of a small zip file that unpacks to this many bytes."""
    folder = TemporaryDirectory()
    with zipfile.ZipFile(Path(folder.name) / "a.zip", "w", method) as archive:
        archive.writestr("a.png", bytes(size))
    return PictureFinder(Path(folder.name), False)("a.png")


BOMBS: dict[str, Callable[[], bytes]] = {
    "PPM with a comment of 50 MB": lambda: b"P6 #" + b"x" * 50_000_000 + b"\n8 8 255\n" + bytes(192),
    "ICO with a PNG of 13,000 x 13,000": lambda: icon(flat_png(13_000)),
    "PNG of 8,000 x 8,000": lambda: flat_png(8000),
    "PNG of 7,000 x 7,000, RGBA": lambda: flat_png(7000, 6),
    "PNG with a million chunks": many_chunks,
    "JPEG of 7,000 x 7,000": lambda: flat("JPEG", 7000, progressive=True),
    "JPEG of 2,000 scans": many_scans,
    "JPEG 2000 of 4,000 x 4,000": lambda: flat("JPEG2000", 4000),
    "PPM in text, 3,000 x 3,000": lambda: b"P3 3000 3000 255\n" + b"1 2 3 " * 9_000_000,
    "TIFF of 7,000 x 7,000": lambda: flat("TIFF", 7000, compression="tiff_lzw"),
    "GIF with 20 MB of comments": lambda: flat("GIF", 8)[:-1] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * 80_000 + b"\0;",
    "WebP of 7,000 x 7,000": lambda: flat("WEBP", 7000, lossless=True, method=0),
}  # fmt: skip


def use(picture: Picture) -> None:
    """Everything that the product does with a picture."""
    assert min(picture.size) >= 1
    assert pixels(picture, 32, HALVES, HALVES).shape == (3, 32, 32)
    picture.load()


def whole_videos() -> dict[str, list[bytes]]:
    """A small animation or video of each kind of file."""
    with TemporaryDirectory() as folder:
        return {f"video {kind}": [film(Path(folder) / f"a.{kind}").read_bytes()] for kind in ("gif", "webp", "png", "mp4", "mkv")}


def watch(video: Picture) -> None:
    """Everything that the product does with a video."""
    for by in ("time", "scene"):
        for _, frame in frames(video, by=by):
            use(frame)


def fuzz_pictures(count: int, seed: int = 0, bombs: bool = True) -> list[Count]:
    """Damage `count` pictures and videos, as many in each format, and open the bombs."""
    dice, counts = random.Random(seed), []
    formats = {**whole_pictures(), **whole_videos()}
    for format, files in formats.items():
        counts.append(found := Count(f"damaged {format}"))
        work = watch if format.startswith("video") else use
        for _ in range(-(-count // len(formats))):
            data = damage(dice.choice(files), dice)
            found.add(lambda data=data, work=work: work(from_bytes(data)))
    if bombs:
        with TemporaryDirectory() as folder, get_context("fork").Pool(1, maxtasksperchild=1) as alone:  # each in a process
            for kind in BOMBS:
                alone.apply(write_bomb, (kind, Path(folder) / "bomb"))
                counts.append(alone.apply(open_bomb, (kind, Path(folder) / "bomb")))
        counts.append(found := Count("zip of LZMA, 90 MB"))
        bomb = zip_bomb()
        found.add(lambda: use(bomb))
    return counts


def write_bomb(kind: str, file: Path) -> None:
    file.write_bytes(BOMBS[kind]())


def open_bomb(kind: str, file: Path) -> Count:
    """What opening a bomb costs a process that did not make it."""
    count, picture = Count(kind), from_file(file)
    count.add(lambda: use(picture))
    return count
