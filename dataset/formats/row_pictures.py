"""The pictures of a row: as values beside or inside its turns, and the placeholders that say where they stand.

In:  values as rows have them: names, base64, bytes, {"bytes", "path"}; texts with <image>.  Out: pictures in their places.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from dataset.bad_rows import BadRow
from dataset.formats.fields import PICTURE_SUFFIXES, Fields, decode, is_image_field
from dataset.images import Picture, from_bytes
from dataset.vision.decoding import opened

PLACEHOLDER = "<image>"
# Other models' placeholders: Qwen2-VL, InternLM-XComposer, Llama 3.2. Qwen-VL writes the picture's path between two tags.
SLOT = re.compile(r"<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image(?:_pad)?\|>|<ImageHere>|<img>(.*?)</img>",
                  re.IGNORECASE | re.DOTALL)  # fmt: skip
NUMBERED = re.compile(r"<image[ _]?\d+>", re.IGNORECASE)
NO_SLOT = re.compile(r"^<(?:video|audio)>|<(?:video|audio)>$", re.IGNORECASE | re.MULTILINE)  # alone; inside a line it is HTML
BLANK_BYTES = 512  # a picture of more is not MiniMind-V's blank one

Find = Callable[[str], Picture]  # the name of an image in a row -> its picture
Turn = tuple[str, list]  # a role, and its parts: text, Picture, or None as the slot for the row's next image


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
        if name != key and not is_plain(value):
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
        parts += [text[end:slot.start()], None if slot[1] is None else find(slot[1].strip())]
        end = slot.end()
    if not parts:
        return [text]
    stripped = [part.strip("\n") if isinstance(part, str) else part for part in [*parts, text[end:]]]
    return [part for part in stripped if part != ""]


def fill(turns: list[Turn], fields: Fields, find: Find) -> None:
    """Put the row's pictures into its slots, in place; without placeholders, before the user's first words."""
    values = image_values(fields.images())
    slots = sum(part is None for _, parts in turns for part in parts)
    inline = any(isinstance(part, Picture) for _, parts in turns for part in parts)
    if slots == 0 and values and all(map(is_blank, values)):
        return
    pictures = [picture(value, find) for value in values]
    if slots == 0 and not inline:
        first = next((parts for role, parts in turns if role == "user"), turns[0][1])
        first[:0] = pictures
    elif slots != len(pictures):
        raise BadRow(
            f"{slots} {PLACEHOLDER} placeholders but {len(pictures)} images in a row of {fields.named()}",
            f"write {PLACEHOLDER} once for every image, or leave it out to put images first; an image may not be null",
        )
    else:
        remaining = iter(pictures)
        for _, parts in turns:
            parts[:] = [next(remaining) if part is None else part for part in parts]
