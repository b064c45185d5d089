"""Turns of a conversation as rows write them, and the roles and texts in them.

In:  {"from", "value"} of LLaVA, {"role", "content"} of OpenAI, with text or a list of parts.  Out: a role and its parts.
"""

from __future__ import annotations

from typing import Any

from dataset.bad_rows import BadRow
from dataset.chat import Prefill
from dataset.formats.fields import Fields, is_image_field
from dataset.formats.row_pictures import IMAGE_SLOT, VIDEO_SLOT, Find, Turn, image_values, picture, split, video

ROLE_NAMES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
ROLE, CONTENT = ("from", "role"), ("value", "content")
REASONING = ("reasoning_content", "reasoning", "thinking")  # of the assistant, before its answer
WEIGHT = ("weight", "loss", "train")  # 0 or false: this turn is read and not learned
ADDRESS = ("image_url", "image", "video_url", "video", "url", "path", "bytes")
PART_TYPES = {"text": "text", "input_text": "text", "image": "image", "image_url": "image", "input_image": "image",
              "video": "video", "video_url": "video", "input_video": "video"}  # fmt: skip


def first(raw: Any, keys: tuple[str, ...]) -> Any:
    """The first value of these keys that is not null; None where `raw` is no object."""
    for key in keys if isinstance(raw, dict) else ():
        if (value := raw.get(key)) is not None:
            return value
    return None


def turn(raw: Any, find: Find, fields: Fields, learn: bool) -> Turn:
    """The role and parts of one turn. A turn of the assistant that is not to be learned is `Prefill`.

    fields   of the row: takes note of what is not read
    learn    False where nothing is learned from the row, in RL and inference
    """
    if not isinstance(raw, dict):
        raise BadRow(f"a turn is a {type(raw).__name__}, not an object", 'write {"from": ..., "value": ...}')
    name, content = first(raw, ROLE), first(raw, CONTENT)
    role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"unknown role {name!r}", f"known roles: {', '.join(ROLE_NAMES)}")
    if isinstance(content, str):
        parts = [content] if role == "assistant" else split(content, find)
    elif isinstance(content, list):
        parts = [part for raw_part in content for part in content_part(raw_part, find, fields, role != "assistant")]
    else:
        raise BadRow(f"the {name} value is a {type(content).__name__}, not a string", "write the turn as text")
    if len(raw) > 2:
        parts = with_extras(raw, role, parts, find, fields, learn)
    return role, parts


def with_extras(raw: dict, role: str, parts: list, find: Find, fields: Fields, learn: bool) -> list:
    """The parts of a turn that has more than role and text: reasoning, a weight, pictures of its own."""
    known = {*ROLE, *CONTENT}
    if role == "assistant":
        known |= {*REASONING, *WEIGHT}
        if reasoning := first(raw, REASONING):
            if not isinstance(reasoning, str):
                raise BadRow(f"the reasoning is a {type(reasoning).__name__}, not a string", "write it as text")
            parts = [f"<think>{reasoning}</think>", *parts]
        weight = first(raw, WEIGHT)
        if weight not in (None, 0, 1):
            raise BadRow(f"the weight of a turn is {weight!r}", "write 0 or 1: a turn is learned or only read")
        if learn and weight == 0 and weight is not None:
            parts = [Prefill(part) if isinstance(part, str) else part for part in parts]
    for key in raw.keys() - known:
        if is_image_field(key.lower()) and None not in parts:
            parts = [*(picture(value, find) for value in image_values(raw[key])), *parts]
        elif raw[key]:
            fields.skip(f"turn.{key}")
    return parts


def content_part(raw: Any, find: Find, fields: Fields, marked: bool) -> list:
    """The parts of one element of a content list. An image or a video without an address takes the row's next one.

    marked   a text may hold placeholders
    """
    if not isinstance(raw, dict):
        raise BadRow(f"unknown content part {str(raw)[:80]}", 'parts have "type": "text", "image", "image_url" or "video"')
    kind = raw.get("type") or (kind_without_type(raw))
    for key in raw.keys() - {"type", "text", *ADDRESS}:
        if raw[key]:
            fields.skip(f"content.{key}")
    part = PART_TYPES.get(kind) if isinstance(kind, str) else None
    if part == "text" and isinstance(raw.get("text"), str):
        return split(raw["text"], find) if marked else [raw["text"]]
    if part in ("image", "video"):
        address = first(raw, ADDRESS)
        if isinstance(address, dict) and "url" in address:
            address = address["url"]
        if address is None:
            return [IMAGE_SLOT if part == "image" else VIDEO_SLOT]
        return [picture(address, find)] if part == "image" else video(address, find)
    raise BadRow(f"unknown content part {str(raw)[:80]}", 'parts have "type": "text", "image", "image_url" or "video"')


def kind_without_type(raw: dict) -> str | None:
    """The kind of an element of a content list that does not say it."""
    if isinstance(raw.get("text"), str):
        return "text"
    return "video" if first(raw, ("video", "video_url")) else "image" if first(raw, ADDRESS) else None


def check_order(roles: list[str]) -> None:
    """BadRow unless the roles are [system] user assistant user assistant ..."""
    turns = roles[1:] if roles[:1] == ["system"] else roles
    for i, role in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise BadRow(f"roles out of order: turn {i + 1} is the {role}'s, not the {expected}'s", "repair the row")
    if not turns:
        raise BadRow("no turn but the system's" if roles else "no turns", "add a question and its answer")
