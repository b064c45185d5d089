"""Rows to conversations: every published format.

In:  a row of LLaVA, TinyLLaVA, MiniMind-V, OpenAI-style messages, MM-EUREKA, LMM-R1, or {"text"}.
Out: a `Conversation`, or `BadRow` with the reason and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Message
from dataset.images import Picture, from_bytes

PLACEHOLDER = "<image>"
ROLE_NAMES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
TURN_FIELDS = ("conversations", "messages", "message")
IMAGE_FIELDS = ("image", "images", "image_urls", "image_bytes")

Find = Callable[[str], Picture]  # the name of an image in a row -> its picture
Turn = tuple[str, list]  # a role, and its parts: text, Picture, or None as the slot for the row's next image


def decode(text: str | bytes, name: str):
    """The value of a JSON text in a row; BadRow where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or bytes that are not UTF-8
        raise BadRow(f"{name} is not JSON: {error}", "repair or remove the row") from error


def conversation(row: Any, id: str, find: Find, need_answer: bool) -> Conversation:
    """The conversation of a row in any known format; raises BadRow.

    need_answer   the last turn must be the assistant's, unless the row has a gold "answer" (RL data)
    """
    if not isinstance(row, dict):
        raise BadRow(f"the row is a {type(row).__name__}, not an object", 'write {"conversations": [...]}')
    gold = row.get("answer")
    # In a row without images "<image>" is ordinary text.
    marked = any(field in row for field in IMAGE_FIELDS)
    if "text" in row and not any(field in row for field in TURN_FIELDS):
        turns = [turn({"role": "assistant", "content": row["text"]}, find, marked)]  # every token is learned
    else:
        turns = [turn(raw, find, marked) for raw in raw_turns(row)]
        check_order([role for role, _ in turns], need_answer and gold is None)
    fill(turns, [picture(value, find) for value in image_values(row)])
    messages = tuple(Message(role, tuple(parts)) for role, parts in turns)
    try:
        "".join(message.text for message in messages).encode()
    except UnicodeEncodeError as error:
        raise BadRow(f"text is not Unicode: {error}", "repair the row: it holds half of a surrogate pair") from error
    if any(message.role == "assistant" and not message.text.strip() for message in messages):
        raise BadRow("empty answer", "write the answer, or remove the row")
    return Conversation(id, messages, None if gold is None else str(gold))


def raw_turns(row: dict) -> list:
    """The turns as the row has them: a list, or a JSON string of one."""
    field = next((name for name in TURN_FIELDS if name in row), None)
    if field is None:
        raise BadRow("missing conversations", 'a row has "conversations", "messages", "message" or "text"')
    turns = decode(row[field], field) if isinstance(row[field], str) else row[field]
    if not isinstance(turns, list):
        raise BadRow(f"{field} is a {type(turns).__name__}, not a list", "write a list of turns")
    if not turns:
        raise BadRow(f"empty {field}", "remove the row")
    return turns


def turn(raw: Any, find: Find, marked: bool) -> Turn:
    """One turn in LLaVA's form ("from", "value") or OpenAI's ("role", "content")."""
    if not isinstance(raw, dict):
        raise BadRow(f"a turn is a {type(raw).__name__}, not an object", 'write {"from": ..., "value": ...}')
    name, content = raw.get("from", raw.get("role")), raw.get("value", raw.get("content"))
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadRow(f"unknown role {name!r}", f"known roles: {', '.join(ROLE_NAMES)}")
    role = ROLE_NAMES[name]
    if isinstance(content, str):
        return role, split(content) if marked and role == "user" else [content]
    if isinstance(content, list):
        return role, [part for raw_part in content for part in content_part(raw_part, find, marked and role == "user")]
    raise BadRow(f"the {name} value is a {type(content).__name__}, not a string", "write the turn as text")


def split(text: str) -> list[str | None]:
    """Text split at its placeholders: "<image>\\nWhat?" -> [None, "What?"]. A line break beside one is layout, not text."""
    before, *others = text.split(PLACEHOLDER)
    if not others:
        return [text]
    parts: list[str | None] = [before]
    for other in others:
        parts += [None, other]
    stripped = [part if part is None else part.strip("\n") for part in parts]
    return [part for part in stripped if part != ""]


def content_part(raw: Any, find: Find, marked: bool) -> list:
    """The parts of one element of an OpenAI-style content list. An image without an address takes the row's next image."""
    kind = raw.get("type") if isinstance(raw, dict) else None
    if kind == "text" and isinstance(raw.get("text"), str):
        return split(raw["text"]) if marked else [raw["text"]]
    if kind in ("image", "image_url"):
        address = next((raw[key] for key in ("image_url", "image", "url", "path") if key in raw), None)
        if isinstance(address, dict) and "url" in address:
            address = address["url"]
        return [None if address is None else picture(address, find)]
    raise BadRow(f"unknown content part {str(raw)[:80]}", 'parts have "type": "text", "image" or "image_url"')


def image_values(row: dict) -> list:
    """The images beside a row's turns, as written: names, bytes, or {"bytes", "path"}; [] where the field is null."""
    value: Any = next((row[field] for field in IMAGE_FIELDS if row.get(field)), [])
    if isinstance(value, str) and ":" not in value:  # "a.jpg, b.jpg"; a URL may contain commas
        return [name.strip() for name in value.split(",")]
    return value if isinstance(value, list) else [value]


def picture(value: Any, find: Find) -> Picture:
    """An image as a row has it: a name, the bytes of a file, or {"bytes", "path"} as on the Hugging Face hub."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return from_bytes(value)
    if isinstance(value, str):
        return find(value)
    raise BadRow(f"an image is a {type(value).__name__}", "write a file name, a list of them, or the file's bytes")


def fill(turns: list[Turn], pictures: list[Picture]) -> None:
    """Put the row's pictures into its slots, in place; without placeholders, before the user's first words."""
    slots = sum(part is None for _, parts in turns for part in parts)
    inline = any(isinstance(part, Picture) for _, parts in turns for part in parts)
    if slots == 0 and not inline:
        first = next((parts for role, parts in turns if role == "user"), turns[0][1])
        first[:0] = pictures
    elif slots != len(pictures):
        raise BadRow(
            f"{slots} {PLACEHOLDER} placeholders but {len(pictures)} images",
            f"write {PLACEHOLDER} once for every image, or leave it out to put images first; an image may not be null",
        )
    else:
        remaining = iter(pictures)
        for _, parts in turns:
            parts[:] = [next(remaining) if part is None else part for part in parts]


def check_order(roles: list[str], need_answer: bool) -> None:
    """BadRow unless the roles are [system] user assistant user assistant ..."""
    turns = roles[1:] if roles[0] == "system" else roles
    for i, role in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise BadRow(f"roles out of order: turn {i + 1} is the {role}'s, not the {expected}'s", "repair the row")
    if not turns:
        raise BadRow("no turn but the system's", "add a question and its answer")
    if need_answer and turns[-1] != "assistant":
        raise BadRow("the last turn is not the assistant's", "add the answer, or remove the turn")
