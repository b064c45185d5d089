"""Pictures: from a file, bytes or memory to the tensor that an encoder takes.

In:  a path, bytes or a PIL image of any mode.  Out: a `Picture`, which is opened when it is needed, and `pixels(picture, ...)`,
     a normalised tensor (3, S, S). A picture that cannot be used raises `BadRow`, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from dataset.bad_rows import BadRow
from dataset.vision.decoding import open_rgb, to_rgb, upright_size
from model.registry import UserError

WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # with them torch resizes faster than PIL


@dataclass(frozen=True)
class Picture:
    """An image that is opened when it is needed. `key` identifies its content; `load()` returns it as RGB.

    measure        () -> (width, height) of what `load` returns, where that is cheaper than loading
    load_small     a side -> the RGB image, perhaps smaller, but both sides at least this; where that is cheaper than loading
    read           () -> its file, as a path or bytes; None for a drawing
    origin         what a row holds: a file's name, a URL, or the bytes of a file; "" for a drawing
    memory_bytes   bytes that this object keeps in memory: an image, or the file that came inside a row
    """

    key: str
    load: Callable[[], Image.Image] = field(compare=False, repr=False)
    measure: Callable[[], tuple[int, int]] | None = field(default=None, compare=False, repr=False)
    memory_bytes: int = field(default=0, compare=False, repr=False)
    origin: str | bytes = field(default="", compare=False, repr=False)
    load_small: Callable[[int], Image.Image] | None = field(default=None, compare=False, repr=False)
    read: Callable[[], Path | bytes] | None = field(default=None, compare=False, repr=False)

    def at_least(self, side: int) -> Image.Image:
        """The RGB image, perhaps smaller, but both sides at least this, or as large as the picture is."""
        return self.load_small(side) if self.load_small else self.load()

    @property
    def address(self) -> str:
        """What a row of JSON may hold to name this picture: a file's name, a URL, or data: with the file itself."""
        if isinstance(self.origin, str) and self.origin:
            return self.origin
        return "data:image/*;base64," + base64.b64encode(self.origin or png(self)).decode()  # type: ignore[arg-type]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels; BadRow where the picture does not open."""
        return self.measure() if self.measure else self.load().size


def from_source(key: str, read: Callable[[], Path | bytes], origin: str | bytes, memory_bytes: int = 0) -> Picture:
    """A picture in an image file. Every picture of a user is made here: `read` says where it is, or what is in it."""
    return Picture(key, lambda: open_rgb(read()), lambda: upright_size(read()), memory_bytes, origin,
                   lambda side: open_rgb(read(), side), read)


def from_file(path: str | Path, name: str = "", stat: os.stat_result | None = None) -> Picture:
    """A picture in a file, whose row calls it `name`. An edited file is a new picture to a cache: the key has size and time.

    stat   of the file, where it was asked for already: a data set has hundreds of thousands
    """
    try:
        stat = stat or os.stat(path)
    except (OSError, ValueError):
        stat = None
    if not stat or not S_ISREG(stat.st_mode):
        raise BadRow(f"image file missing: {path}", "check --image_folder, or remove the row")
    return from_source(f"{path}:{stat.st_size}:{stat.st_mtime_ns}", lambda: Path(path), name or str(path))


def from_bytes(data: bytes) -> Picture:
    """A picture from the bytes of an image file."""
    return from_source(f"sha256:{hashlib.sha256(data).hexdigest()}", lambda: data, data, len(data))


def from_image(image: Image.Image) -> Picture:
    """A picture from a PIL image in memory."""
    image = to_rgb(ImageOps.exif_transpose(image))
    return Picture(f"rgb:{image.size}:{hashlib.sha256(image.tobytes()).hexdigest()}", lambda: image, lambda: image.size,
                   3 * image.width * image.height)


def pixels(picture: Picture, size: int, mean: tuple, std: tuple, fit: str = "square") -> torch.Tensor:
    """A picture as the encoder takes it: (3, S, S), normalised by the encoder's own mean and std.

    fit   square   the middle square, as CLIP was trained (exactly torchvision's Resize and CenterCrop)
          pad      the full picture, with bands in the mean colour, which are 0 after normalisation
          stretch  the full picture, each side scaled separately
    """
    square = levels(picture.at_least(2 * size), size, mean, fit).to(torch.float32, memory_format=torch.contiguous_format)
    return square.div_(255).sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def levels(image: Image.Image, size: int, mean: tuple, fit: str) -> torch.Tensor:
    """An RGB image as a square of levels, uint8 (3, S, S). Both ways resize alike, to one level where rounding differs."""
    short, long = sorted(image.size)
    if fit == "square" and size < short and long <= 2 * short and WIDE_VECTORS:
        return shrunk_middle(image, size)
    return torch.from_numpy(np.array(resized(image, size, mean, fit))).permute(2, 0, 1)


def shrunk_middle(image: Image.Image, size: int) -> torch.Tensor:
    """The middle square of a picture that shrinks, uint8 (3, S, S): torch shrinks all of it in a third of PIL's time."""
    height, width = (int(size * side / min(image.size)) for side in (image.height, image.width))
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width)
    shrunk = F.interpolate(picture, (height, width), mode="bicubic", antialias=True)[0]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return shrunk[:, top:top + size, left:left + size]


def resized(image: Image.Image, size: int, mean: tuple, fit: str) -> Image.Image:
    """An RGB image as a square with sides of `size` pixels."""
    width, height = image.size
    if fit == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if fit == "square":
        return image.resize((size, size), Image.Resampling.BICUBIC, box=middle_square(width, height, size))
    if fit == "pad":
        return padded(image, (size, size), mean)
    raise UserError(f"fit: square, pad or stretch, not {fit!r}")


def middle_square(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the part that stays when the shorter side becomes `size` and the middle is cropped.

    Resizing only this box gives the same pixels, and a strip of 1 x 60,000 never becomes 224 x 13,440,000.
    """
    short = min(width, height)
    box = []
    for side in (width, height):
        scaled = int(size * side / short)
        first = round((scaled - size) / 2)
        box.append((first * side / scaled, (first + size) * side / scaled))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def padded(image: Image.Image, canvas: tuple[int, int], mean: tuple) -> Image.Image:
    """A full RGB image in the middle of a canvas (width, height) in the mean colour, scaled to the largest size that fits."""
    scale = min(canvas[0] / image.width, canvas[1] / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    result = Image.new("RGB", canvas, tuple(round(255 * channel) for channel in mean))
    result.paste(image.resize(inner, Image.Resampling.BICUBIC), ((canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2))
    return result


def png(picture: Picture) -> bytes:
    """The picture as a PNG file; BadRow where it does not open."""
    file = io.BytesIO()
    picture.load().save(file, "PNG")
    return file.getvalue()
