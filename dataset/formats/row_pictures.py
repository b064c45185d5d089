"""The pictures and videos of a row: as values beside or inside its turns, and the placeholders that say where they stand.

In:  values as rows have them: names, base64, bytes, {"bytes", "path"}; texts with <image> and <video>.
Out: pictures in their places, and videos as some of their frames (dataset/vision/video.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from dataset.bad_rows import BadRow
from dataset.formats.fields import PICTURE_SUFFIXES, VIDEO, Fields, decode, is_image_field
from dataset.images import Picture, from_bytes
from dataset.vision.decoding import opened
from dataset.vision.video import frames, timed, with_options

PLACEHOLDER = "<image>"
# Other models' placeholders: Qwen2-VL, InternLM-XComposer, Llama 3.2. Qwen-VL writes the picture's path between two tags.
VIDEO_PLACEHOLDER = "<video>"  # where it begins or ends a line; inside a line it is HTML
SLOT = re.compile(r"(?m:^<video>|<video>$)|<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image(?:_pad)?\|>|"
                  r"<ImageHere>|<img>(.*?)</img>", re.IGNORECASE | re.DOTALL)  # fmt: skip
NUMBERED = re.compile(r"<image[ _]?\d+>", re.IGNORECASE)
NO_SLOT = re.compile(r"^<audio>|<audio>$", re.IGNORECASE | re.MULTILINE)
BLANK_BYTES = 512  # a picture of more is not MiniMind-V's blank one

Find = Callable[[str], Picture]  # the name of an image in a row -> its picture
Turn = tuple[str, list]  # a role, and its parts: text, Picture, and slots for the row's next image or video
IMAGE_SLOT, VIDEO_SLOT = None, True  # parts of a turn until `fill` fills them


def image_values(value: Any) -> list:
    """The images of a field as written: names, bytes, or {"bytes", "path"}; [] where the field is missing."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith("["):  # a list in a cell of a table
        value = decode(value, "the list of images")
    if isinstance(value, str) and ":" not in value:  # "a.jpg, b.jpg"; a URL, and one name, may contain commas
        names = [name.strip() for name in value.split(",")]
        return names if all(name.lower().endswith(PICTURE_SUFFIXES) for name in names) else [value]
    return value if isinstance(value, list) else [value]


@functools.lru_cache(maxsize=1024)  # the rows of a file have the same few keys
def only_image_key(keys: tuple[str, ...]) -> str | None:
    """The key of a row's pictures, where one alone of its keys can be that."""
    found = [key for key in keys if is_image_field(key.lower())]
    return found[0] if len(found) == 1 and not found[0].lower().startswith("file") else None


def plain_names(row: Any) -> tuple[str, ...] | None:
    """The names of a row's pictures where they alone stand in one field, and all else is plain text; None for other rows.

    For these rows it is what `fill` would find, without reading the turns.
    """
    key = only_image_key(tuple(row)) if isinstance(row, dict) else None
    if key is None:
        return None
    for name, value in row.items():  # a loop, because large files are walked through before training begins
        if name != key and (not is_plain(value) or name.lower() in VIDEO):
            return None
    value = row[key]
    names = image_values(value) if isinstance(value, str) and value[:1] != "[" else value
    return tuple(names) if names and isinstance(names, list) and all(type(name) is str and name for name in names) else None


def is_plain(value: Any) -> bool:
    """Whether a value of a row is free of pictures: a number, a text, or turns of a role and a text each."""
    if isinstance(value, str):
        return is_plain_text(value) and value.lstrip()[:1] not in ("[", "{")  # JSON may hold anything
    if isinstance(value, list):
        for turn in value:
            if type(turn) is not dict or len(turn) != 2:
                return False
            for text in turn.values():
                if type(text) is not str or not is_plain_text(text):
                    return False
        return True
    return value is None or isinstance(value, int | float)


def is_plain_text(text: str) -> bool:
    """Whether a text names no picture between tags."""
    return "<" not in text or "<img" not in text.lower()


def picture(value: Any, find: Find) -> Picture:
    """An image as a row has it: a name, the bytes of a file, or {"bytes", "path"} as on the Hugging Face hub."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes):
        return from_bytes(value)
    if isinstance(value, str):
        return find(value)
    raise BadRow(f"an image is a {type(value).__name__}", "write a file name, a list of them, or the file's bytes")


def is_blank(value: Any) -> bool:
    """Whether an image is the 8 x 8 black one with which MiniMind-V fills rows of text alone."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or len(data) > BLANK_BYTES:
        return False
    try:
        with opened(data) as image:
            return image.size == (8, 8) and max(image.convert("L").tobytes()) <= 2  # JPEG may miss black by a little
    except BadRow:
        return False  # it is a bad row once it is opened as a picture


def split(text: str, find: Find) -> list:
    """Text split at its placeholders: "<image>\\nWhat?" -> [None, "What?"]. A line break beside one is layout, not text."""
    if "<" not in text:
        return [text]
    if bad := NUMBERED.search(text) or NO_SLOT.search(text):
        raise BadRow(f"{bad[0]} is a placeholder that is not read", f"write {PLACEHOLDER} once for every picture, in their order")
    parts: list = []
    end = 0
    for slot in SLOT.finditer(text):
        kind = VIDEO_SLOT if slot[0].lower() == VIDEO_PLACEHOLDER else IMAGE_SLOT
        parts += [text[end:slot.start()], kind if slot[1] is None else find(slot[1].strip())]
        end = slot.end()
    if not parts:
        return [text]
    stripped = [part.strip("\n") if isinstance(part, str) else part for part in [*parts, text[end:]]]
    return [part for part in stripped if part != ""]


def video(value: Any, find: Find) -> list[str | Picture]:
    """The frames of a video as a row has it, each behind its time; a name may have options, "clip.mp4:frames=8"."""
    options: dict[str, Any] = {}
    if isinstance(value, str):
        value, options = with_options(value)
    return timed(frames(picture(value, find), **options))


def fill(turns: list[Turn], fields: Fields, find: Find) -> None:
    """Put the row's pictures and videos into their slots, in place; without placeholders, before the user's first words."""
    images, videos = image_values(fields.images()), image_values(fields.videos())
    slots = [part for _, parts in turns for part in parts if part is IMAGE_SLOT]
    if not (not slots and images and all(map(is_blank, images))):
        place(turns, IMAGE_SLOT, [[picture(value, find)] for value in images], fields, "image")
    place(turns, VIDEO_SLOT, [video(value, find) for value in videos], fields, "video")


def place(turns: list[Turn], slot: bool | None, shown: list[list], fields: Fields, kind: str) -> None:
    """Put what is shown, one picture or the frames of one video at a time, into the slots of its kind."""
    slots = sum(part is slot for _, parts in turns for part in parts)
    inline = slot is IMAGE_SLOT and any(isinstance(part, Picture) for _, parts in turns for part in parts)
    if slots == 0 and not inline:
        first = next((parts for role, parts in turns if role == "user"), turns[0][1])
        first[:0] = [part for parts in shown for part in parts]
    elif slots != len(shown):
        raise BadRow(
            f"{slots} <{kind}> placeholders but {len(shown)} {kind}s in a row of {fields.named()}",
            f"write <{kind}> once for every {kind}, or leave it out to put {kind}s first; no {kind} may be null",
        )
    else:
        remaining = iter(shown)
        for _, parts in turns:
            parts[:] = [new for part in parts for new in (next(remaining) if part is slot else [part])]
