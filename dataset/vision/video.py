"""Videos and animations as a few pictures, each behind its time: what a model of pictures can see of them.

In:  a file as a `Picture` names it, how many frames, and how to choose them.  Out: [(seconds, Picture)].

    --video clip.mp4                            four frames, uniform in time, with the first and the last
    --video clip.mp4:frames=8,by=scene          eight: the first, and those that differ most from the frame before them

gif, webp and apng are read with Pillow; mp4, mov, webm, mkv and avi with PyAV: `pip install av`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.images import Picture, from_file
from dataset.vision.video_files import REMEDY, Source, decoded, moves, reader, video

FRAMES, MOST_FRAMES = 4, 64  # by default, and at most
OPTIONS = re.compile(r"(.*?)(?::((?:frames=\d{1,4}|by=\w+)(?:,(?:frames=\d{1,4}|by=\w+))*))?", re.DOTALL)


def timed(frames: Sequence[tuple[float, Picture]]) -> list[str | Picture]:
    """The parts of a message that show a video: before each frame its time, "0.5 s: "."""
    return [part for seconds, picture in frames for part in (f"{seconds:.1f} s: ", picture)]


def parts(path: str | Path) -> list[str | Picture]:
    """The parts of a message for a file with options, "clip.mp4:frames=8"; BadRow now where a frame does not open."""
    name, options = with_options(str(path))
    shown = timed(frames(from_file(Path(name).expanduser()), **options))
    for part in shown:
        if isinstance(part, Picture):
            part.load()
    return shown


def of_any(path: str) -> list[str | Picture]:
    """The parts of a message for a file of any kind: a still picture, or the frames of an animation or a video."""
    file = from_file(path)
    return timed(frames(file)) if moves(Path(path)) else [file]


def with_options(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of "clip.mp4:frames=8,by=scene": ("clip.mp4", {"count": 8, "by": "scene"})."""
    name, options = OPTIONS.fullmatch(text).groups("")  # type: ignore[union-attr]  # any text matches
    given = dict(option.split("=") for option in options.split(",") if option)
    return name, {key: int(value) if key == "count" else value
                  for key, value in (("count", given.get("frames")), ("by", given.get("by"))) if value}  # fmt: skip


@functools.lru_cache(maxsize=64)
def frames(file: Picture, count: int = FRAMES, by: str = "time") -> list[tuple[float, Picture]]:
    """Up to `count` frames with their times in seconds, each decoded whenever it is opened.

    by   time   uniform, with the first and the last
         scene  the first, and those that differ most from the frame before: all are decoded once, and of a video of more than
                MAX_DECODED pixels the key frames alone, which encoders put where a scene begins
    """
    if not 1 <= count <= MOST_FRAMES or by not in ("time", "scene"):
        raise BadRow(f"{count} frames by {by}", f"choose 1 to {MOST_FRAMES} frames, by=time or by=scene")
    if not file.read:
        raise BadRow("a drawing is not a video", "name a file")
    times = (changes if by == "scene" else uniform)(file.read(), count)
    if not times:
        raise BadRow("the video has no frame", REMEDY)
    return [(time, Picture(f"{file.key}@{time:.3f}", functools.partial(frame_at, file.read, time))) for time in times]


def uniform(source: Source, count: int) -> list[float]:
    """The times of `count` frames, from the first to the last."""
    if reader(source):
        with video(source) as found:
            last, number = found.last, found.number
        return [float(time) for time in np.linspace(0, last, min(count, number))]
    times = [time for time, _ in decoded(source)]
    goals = np.linspace(0, times[-1], min(count, len(times)))
    return sorted({min(times, key=lambda time: abs(time - goal)) for goal in goals})


def changes(source: Source, count: int) -> list[float]:
    """The times of the first frame, and of those that differ most from the one before."""
    times, differences, before = [], [], None
    for time, image in decoded(source, thin=True):
        small = np.asarray(image().convert("L").resize((32, 32), Image.Resampling.BOX), np.float32)
        times.append(time)
        differences.append(np.inf if before is None else np.abs(small - before).mean())
        before = small
    return sorted(times[k] for k in np.argsort(differences, kind="stable")[::-1][:count])


def frame_at(read: Callable[[], Source], seconds: float) -> Image.Image:
    """The first frame from this time on, else the last, as RGB; BadRow where there is none."""
    found = None
    for time, found in decoded(read(), seconds):  # noqa: B007
        if time > seconds - 0.005:
            break
    if not found:
        raise BadRow(f"the video has no frame at {seconds:.1f} s", REMEDY)
    return found()
