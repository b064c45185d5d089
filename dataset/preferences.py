"""Preference pairs: one prompt, an answer that was chosen and one that was rejected, from every format that is published.

In:  RLAIF-V parquet, RLHF-V parquet, TRL's messages (parquet, jsonl), or the jsonl that the feedback pipeline writes.
Out: a source: `len(source)` and `source[i]`, a `Preference` (dataset/chat.py); dataset/processor.py makes pairs of documents.

    RLAIF-V      image {bytes, path}, question, chosen, rejected
    RLHF-V       image {bytes, path}, text: a JSON string {question, chosen, rejected}
    TRL          images, prompt, chosen, rejected: lists of messages (or plain strings)
    pipeline     image_path, or image (a path, base64, or data:), question, chosen, rejected
Other columns are ignored, also stored log-probabilities: they are another model's.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dataset.bad_rows import BadRow
from dataset.chat import Preference
from dataset.formats.conversations import Find, conversation, decode
from dataset.formats.files import FileSource
from dataset.mixture import Mixture, load, name_and_weight
from dataset.vision.loading import from_base64

BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")  # JPEG, PNG, GIF and WebP: a name begins with none of them


def preference(row: Any, id: str, find: Find) -> Preference:
    """A row of any known format; raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object", 'write {"question", "chosen", "rejected"}')
    if "chosen" not in row and "text" in row:  # RLHF-V
        text = decode(row["text"], "text") if isinstance(row["text"], str) else row["text"]
        row = {**row, **text} if isinstance(text, dict) else row
    asked = row["question"] if row.get("question") is not None else row.get("prompt")
    given = {"question": asked, "chosen": row.get("chosen"), "rejected": row.get("rejected")}
    if missing := [name for name, value in given.items() if value is None]:
        raise BadRow(f"missing {', '.join(missing)}", "a row has a question (or a prompt), chosen and rejected")
    messages = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    images = image_values(row)
    prompt = conversation({"messages": messages, **({"images": images} if images else {})}, id, find, need_answer=False)
    if prompt.messages[-1].role != "user":
        raise BadRow("the prompt does not end with the user's turn", "leave both answers out of the prompt")
    chosen, rejected = answer(given["chosen"], "chosen"), answer(given["rejected"], "rejected")
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen and rejected are the same answer", "remove the row: it prefers nothing")
    return Preference(id, prompt, chosen, rejected)


def image_values(row: dict) -> list:
    """The images of a row as written: `images`, `image`, or `image_path` where the picture itself is not in the row."""
    value: Any = next((row[field] for field in ("images", "image", "image_path") if row.get(field)), [])
    return value if isinstance(value, list) else [value]


def answer(value: Any, field: str) -> str:
    """An answer: a text, or TRL's list with the assistant's one message."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise BadRow(f"{field} is not one message of the assistant's", "put earlier turns into the prompt")
        content = value[0].get("content")
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise BadRow(f"{field} holds something else than text", "an answer is text alone")
        value = "".join(part["text"] for part in parts)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"empty {field}" if isinstance(value, str) else f"{field} is a {type(value).__name__}", "write the answer")
    return value


class PreferenceFile(FileSource):
    """The preferences of one file, each row parsed when it is asked for."""

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        super().__init__(path, image_folder, allow_urls, need_answer)
        by_name = self.find
        self.find = lambda name: from_base64(name) if name.startswith(BASE64_STARTS) else by_name(name)

    def parse(self, row: Any, where: str) -> Preference:
        return preference(row, where, self.find)


load_preferences = partial(load, kind=PreferenceFile)  # the preferences of a file, or of every data file in a folder


class FileFlags(Protocol):
    """Where pictures are (model/cli.py)."""

    image_folder: Path | None
    allow_urls: bool


def preference_mixture(specs: Sequence[str], flags: FileFlags) -> Mixture:
    """Files and folders of preferences, by weight: "pairs.jsonl", "rlaif-v:0.5"."""
    parts = [name_and_weight(spec) for spec in specs]
    return Mixture([(load_preferences(name, flags.image_folder, flags.allow_urls), weight) for name, weight in parts])
