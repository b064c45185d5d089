"""The fields of a row: which names mean what, and which of a row's keys were read.

In:  a row as a file has it, a dict.  Out: `Fields`: values by name, in any case, without nulls; `unread()`, the keys left over.

Every reader takes its values through `Fields`, so what no reader knows is told and never dropped in silence.
"""

from __future__ import annotations

import functools
import json
import math
import re
from typing import Any

from dataset.bad_rows import BadRow

TURNS = ("conversations", "messages", "message", "conversation")  # lists of turns
QUESTION = ("question", "prompt", "problem", "query", "instruction")
SOLUTION = ("solution", "response", "output", "completion")  # a full answer; beside it `answer` is the final one
ANSWER = ("answer", "answers", "gt_answer", "ground_truth", "multiple_choice_answer")
GOLD = ANSWER + SOLUTION  # what may be compared with
CAPTION = ("caption", "captions", "text", "description", "blip_caption")
CHOSEN = ("chosen", "chosen_response", "accepted")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
SYSTEM = ("system", "system_prompt")
SILENT = ("id",)  # not read for what it holds, and not worth a word
VIDEO = ("videos", "video")
NO_READER = ("audio", "audios")  # a kind of input that a vision-language model cannot take

# image, images, img, image_path, image_urls, imageFile, picture, photo, file_name, and a column of WebDataset's, jpg.
IMAGE = re.compile(r"(image|img|picture|photo|pic)s?(_?(path|url|uri|file|file_?name|name|byte|base64|b64|src|list)s?)?"
                   r"|file_?names?|jpe?g|png|webp")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
ROW_FIELDS = {*TURNS, *QUESTION, *SOLUTION, *ANSWER, *CAPTION, *CHOSEN, *REJECTED, "texts"}


@functools.lru_cache(maxsize=1024)  # the rows of a file have the same few keys
def is_image_field(name: str) -> bool:
    """Whether a key, in lower case, holds pictures or their names."""
    return IMAGE.fullmatch(name) is not None


def is_row(value: dict) -> bool:
    """Whether an object has a field that some reader knows."""
    names = {str(key).lower() for key in value}
    return bool(names & ROW_FIELDS) or any(map(is_image_field, names))


def decode(text: str | bytes, name: str) -> Any:
    """The value of a JSON text in a row; BadRow where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits, brackets in brackets
        raise BadRow(f"{name} is not JSON: {error}", "repair or remove the row") from error


class Fields:
    """The values of one row by lower-case name. A null counts as missing, and so does a NaN, unless it stands for an answer.

    read   the keys that were used, as the row writes them, and parts of values that were not: `unread()` tells the rest
    """

    def __init__(self, row: Any, example: str = '{"conversations": [...]}'):
        if not isinstance(row, dict):
            raise BadRow(f"the row is a {type(row).__name__}, not an object", f"write {example}")
        self.values: dict[str, tuple[str, Any]] = {}
        self.keys: list[str] = []
        self.read: set[str] = set()
        self.skipped: set[str] = set()
        self.update(row)

    def update(self, row: dict) -> None:
        """Add the values of an object inside the row."""
        for key, value in row.items():
            name = key.lower()
            if value is None or (isinstance(value, float) and math.isnan(value) and name not in ANSWER):
                continue
            self.values.setdefault(name, (key, value))
            self.keys.append(key)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether the row has one of these fields."""
        return not self.values.keys().isdisjoint(names)

    def take(self, names: tuple[str, ...]) -> Any:
        """The value of the first of these names that the row has, from now on read; None where it has none."""
        for name in names:
            if name in self.values:
                key, value = self.values[name]
                self.read.add(key)
                return value
        return None

    def images(self) -> Any:
        """The value of the first field of pictures that is not empty; `images` and `image` go before all others."""
        names = [name for name in ("images", "image") if name in self.values]
        for name in [*names, *(name for name in self.values if is_image_field(name))]:
            key, value = self.values[name]
            if name.startswith("file") and not str(value).lower().endswith(PICTURE_SUFFIXES):
                continue  # a text may come from a file, too
            self.read.add(key)
            if value and not (isinstance(value, dict) and not any(value.values())):
                return value
        return None

    def videos(self) -> Any:
        """The value of `videos` or `video`, whichever is not empty; None where neither is."""
        return self.take(tuple(name for name in VIDEO if self.values.get(name, ("", None))[1]))

    def skip(self, part: str) -> None:
        """Note a part of a value that is not read."""
        self.skipped.add(part)

    def unread(self) -> list[str]:
        """The keys, and parts of values, that nothing read."""
        return [*[key for key in self.keys if key not in self.read and key.lower() not in SILENT], *sorted(self.skipped)]

    def named(self) -> str:
        """The row's keys, for a message."""
        return ", ".join(f"`{key}`" for key in self.keys) or "no key"
