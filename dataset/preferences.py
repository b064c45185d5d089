"""Preference pairs: one prompt, a chosen and a rejected answer, from every published format.

In:  RLAIF-V parquet, RLHF-V parquet, TRL's messages (parquet, jsonl), or the jsonl that the feedback pipeline writes.
Out: a source: `len(source)` and `source[i]`, a `Preference` (dataset/chat.py); dataset/processor.py makes pairs of documents.

    RLAIF-V      image {bytes, path}, question, chosen, rejected
    RLHF-V       image {bytes, path}, text: a JSON string {question, chosen, rejected}
    TRL          images, prompt, chosen, rejected: lists of messages (or plain strings)
    pipeline     image_path, or image (a path, base64, or data:), question, chosen, rejected
Other columns are ignored, also stored log-probabilities, because they belong to another model.
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

BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")  # JPEG, PNG, GIF and WebP; no file name begins with these


def preference(row: Any, id: str, find: Find) -> Preference:
    """The preference of a row in any known format; BadRow for a row that has none."""
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object", 'write {"question", "chosen", "rejected"}')
    if "chosen" not in row and "text" in row:  # RLHF-V
        text = decode(row["text"], "text") if isinstance(row["text"], str) else row["text"]
        row = {**row, **text} if isinstance(text, dict) else row
    question = row["question"] if row.get("question") is not None else row.get("prompt")
    fields = {"question": question, "chosen": row.get("chosen"), "rejected": row.get("rejected")}
    if missing := [name for name, value in fields.items() if value is None]:
        raise BadRow(f"missing {', '.join(missing)}", "a row has a question (or a prompt), chosen and rejected")
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    images = image_values(row)
    prompt = conversation({"messages": messages, **({"images": images} if images else {})}, id, find, need_answer=False)
    if prompt.messages[-1].role != "user":
        raise BadRow("the prompt does not end with the user's turn", "leave both answers out of the prompt")
    chosen, rejected = answer(fields["chosen"], "chosen"), answer(fields["rejected"], "rejected")
    if chosen.strip() == rejected.strip():
        raise BadRow("chosen and rejected are the same answer", "remove the row: it states no preference")
    return Preference(id, prompt, chosen, rejected)


def image_values(row: dict) -> list:
    """The images of a row as written: `images`, `image`, or `image_path` where the row does not hold the picture itself."""
    value: Any = next((row[field] for field in ("images", "image", "image_path") if row.get(field)), [])
    return value if isinstance(value, list) else [value]


def answer(value: Any, field: str) -> str:
    """The text of an answer: a string, or TRL's list with one message of the assistant."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise BadRow(f"{field} is not one message of the assistant", "put earlier turns into the prompt")
        content = value[0].get("content")
        parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise BadRow(f"{field} holds more than text", "an answer is text alone")
        value = "".join(part["text"] for part in parts)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"empty {field}" if isinstance(value, str) else f"{field} is a {type(value).__name__}", "write the answer")
    return value


class PreferenceFile(FileSource):
    """The preferences of one file, each row parsed on access."""

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        super().__init__(path, image_folder, allow_urls, need_answer)
        by_name = self.find
        self.find = lambda name: from_base64(name) if name.startswith(BASE64_STARTS) else by_name(name)

    def parse(self, row: Any, where: str) -> Preference:
        return preference(row, where, self.find)


load_preferences = partial(load, kind=PreferenceFile)  # the preferences of a file, or of every data file in a folder


class FileFlags(Protocol):
    """Where pictures are stored (model/cli.py)."""

    image_folder: Path | None
    allow_urls: bool


def preference_mixture(specs: Sequence[str], flags: FileFlags) -> Mixture:
    """Files and folders of preferences, mixed by weight: "pairs.jsonl", "rlaif-v:0.5"."""
    parts = [name_and_weight(spec) for spec in specs]
    return Mixture([(load_preferences(name, flags.image_folder, flags.allow_urls), weight) for name, weight in parts])
