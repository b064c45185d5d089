"""The frames of video files, by PyAV (mp4, mov, webm, mkv, avi), and of animations, by Pillow (gif, webp, apng).

In:  a path or bytes.  Out: frames in their order with their times; `BadRow` for a file that cannot be used.

What strangers made is bounded as in decoding.py: in pixels of a frame, in pixels on the way to a frame, and in what it may open.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageSequence

from dataset.bad_rows import BadRow
from dataset.vision.decoding import opened, to_rgb
from model.registry import UserError

ANIMATIONS = ("GIF", "WEBP", "PNG")
MAX_PIXELS = 9_000_000  # of a frame, 4K: a decoder keeps some twenty of them
MAX_DECODED = 2_500_000_000  # pixels on the way to one frame: 1,200 frames of full HD
# What begins a file -> FFmpeg's reader. Only these are tried: others open further files and addresses, and a stranger names them.
READERS = {rb"....(ftyp|moov|mdat|wide|free|skip)": "mov", rb"\x1a\x45\xdf\xa3": "matroska", rb"RIFF....AVI ": "avi"}
REMEDY = "replace the video, or remove the row"
Source = Path | bytes


def decoded(source: Source, start: float = 0.0, thin: bool = False) -> Iterator[tuple[float, Callable[[], Image.Image]]]:
    """(seconds, a function that returns the RGB image) of the frames in their order; BadRow for a file that cannot be read.

    start   a video begins at the last key frame before these seconds
    thin    of a long video the key frames alone
    """
    pixels = 0
    if not reader(source):
        with opened(source) as image:
            if image.format not in ANIMATIONS:
                raise ValueError("neither a video nor an animation")
            time = 0.0
            for frame in ImageSequence.Iterator(image):
                frame.load()  # a webp knows the duration then
                yield time, functools.partial(rgb, to_rgb, frame)
                time += frame.info.get("duration", 100) / 1000
                if (pixels := pixels + image.width * image.height) > MAX_DECODED:
                    raise ValueError(f"all frames have more than {MAX_DECODED:,} pixels")
        return
    with video(source) as found:
        if start:
            found.container.seek(int((found.start + start) / found.stream.time_base), stream=found.stream)
        if thin and found.number * found.pixels > MAX_DECODED:
            found.stream.codec_context.skip_frame = "NONKEY"
        for frame in found.container.decode(found.stream):
            if (pixels := pixels + frame.width * frame.height) > MAX_DECODED:
                raise ValueError(f"more than {MAX_DECODED:,} pixels before the frame at {start:.1f} s")
            yield float(frame.time or 0) - found.start, functools.partial(rgb, upright, frame)


def rgb(convert: Callable[[Any], Image.Image], frame: Any) -> Image.Image:
    """A frame as an image; BadRow where a broken file leads its reader into an error, whatever it is."""
    try:
        return convert(frame)
    except Exception as error:
        raise BadRow(f"a frame of the video cannot be read ({str(error) or type(error).__name__})", REMEDY) from error


def upright(frame: Any) -> Image.Image:
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def reader(source: Source) -> str:
    """FFmpeg's reader for a video, by the first bytes; "" for anything else."""
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        head = file.read(16)
    return next((name for start, name in READERS.items() if re.match(start, head, re.DOTALL)), "")


def moves(source: Source) -> bool:
    """Whether a file is a video or an animation; BadRow where it is no picture either."""
    if reader(source):
        return True
    with opened(source) as image:
        return image.format in ANIMATIONS and getattr(image, "is_animated", False)


class Video(NamedTuple):
    """An open video: its first time, the time of the last frame after it, the number of frames, the pixels of each."""

    container: Any
    stream: Any
    start: float
    last: float
    number: int
    pixels: int


@contextmanager
def video(source: Source) -> Iterator[Video]:
    """A video with only its header read; UserError without PyAV. FFmpeg raises many errors, so each is taken for the file's."""
    try:
        import av
    except ImportError as error:
        raise UserError("reading a video needs PyAV: pip install av") from error
    name = f"{len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            with av.open(file, "r", format=reader(source), metadata_errors="ignore") as container:
                if not container.streams.video:
                    raise ValueError("no picture in it")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1  # each thread would hold frames of its own
                stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                pixels = stream.codec_context.width * stream.codec_context.height
                tick = float(stream.time_base or 0)  # seconds
                seconds = stream.duration * tick if stream.duration else (container.duration or 0) / 1_000_000
                rate = float(stream.average_rate or stream.guessed_rate or 0)
                if pixels > MAX_PIXELS or seconds <= 0 or rate <= 0:
                    raise ValueError(f"{pixels:,} pixels, at most {MAX_PIXELS:,}" if pixels > MAX_PIXELS else "no length in it")
                number = stream.frames or max(1, round(seconds * rate))
                yield Video(container, stream, (stream.start_time or 0) * tick, max(0.0, seconds - 1 / rate), number, pixels)
    except Exception as error:
        raise BadRow(f"video cannot be read: {name} ({str(error) or type(error).__name__})", REMEDY) from error
