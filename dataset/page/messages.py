"""Messages of the page and messages of the model.

In:  the history of gradio's Chatbot: entries of one part each, with a role.  Out: `Message`s; entries of an answer.
"""

from __future__ import annotations

import html
import itertools
import mimetypes
from typing import NamedTuple

from dataset.bad_rows import BadRow
from dataset.chat import ROLES, Message
from dataset.images import Picture
from dataset.vision.video import of_any

REASONING, ANSWER = "Reasoning", "answer"  # the title of an entry that is folded away, and the id of the one behind it


class Folded(NamedTuple):
    """An answer, or its beginning: its thoughts, whether they have ended, what follows, and whether that stood in <answer>."""

    thoughts: str | None
    ended: bool
    rest: str
    tagged: bool


def folded(answer: str) -> Folded:
    """The parts of an answer without their tags."""
    thoughts, closed, rest = None, "", answer
    if answer.startswith("<think>"):
        thoughts, closed, rest = answer.removeprefix("<think>").partition("</think>")
    tagged = rest.startswith("<answer>")
    return Folded(thoughts, bool(closed), rest.removeprefix("<answer>").removesuffix("</answer>") if tagged else rest, tagged)


def entry(role: str, item: dict, **metadata: str) -> dict:
    """A part of a message, for the page."""
    return {"role": role, "content": [item], "metadata": metadata or None}


def escaped(text: str) -> dict:
    """A text for the page, escaped, because the page would take <think> or <b> for HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def answer_entries(text: str) -> list[dict]:
    """An answer for the page: its reasoning, folded away as soon as it ends, and the rest, each without its tags."""
    answer, entries = folded(text), []
    if answer.thoughts is not None:
        status = {"status": "done"} if answer.ended else {}
        entries.append(entry("assistant", escaped(answer.thoughts), title=REASONING, **status))
    if answer.rest or not entries:
        entries.append(entry("assistant", escaped(answer.rest), **{"id": ANSWER} if answer.tagged else {}))
    return entries


def sent(message: dict) -> list[dict]:
    """What stands in the box as entries: its pictures, then its text."""
    content = [{"type": "file", "file": {"path": path, "mime_type": mimetypes.guess_type(path)[0] or "image/*"}}
               for path in message["files"]]  # fmt: skip
    if message["text"].strip():
        content.append(escaped(message["text"]))
    return [entry("user", item) for item in content]


def parts_of(item: dict, metadata: dict) -> list[str | Picture]:
    """A text, a picture or the frames of a video from an item of the page; a text with the tags that were taken off."""
    if item["type"] == "file":
        return of_any(item["file"]["path"])
    text = html.unescape(item["text"])
    if metadata.get("title") == REASONING:
        return [f"<think>{text}</think>"]
    return [f"<answer>{text}</answer>" if metadata.get("id") == ANSWER else text]


def turns(history: list[dict]) -> list[list[dict]]:
    """The entries of the page's conversation, grouped by speaker.

    Each picture and each text of a message is an entry of its own, because gradio's edit button replaces a full entry.
    """
    return [list(entries) for _, entries in itertools.groupby(history, key=lambda entry: entry["role"])]


def messages(history: list[dict]) -> list[Message]:
    """The conversation on the page; BadRow where it is not one that the page sends."""
    result = []
    for turn in turns(history):
        kinds = {item["type"] for entry in turn for item in entry["content"]}
        if turn[0]["role"] not in ROLES or kinds - {"text", "file"} or not kinds and turn[0]["role"] == "user":
            raise BadRow("a message has texts and pictures, and the role user, assistant or system", "send such messages")
        parts = [part for entry in turn for item in entry["content"] for part in parts_of(item, entry.get("metadata") or {})]
        if turn[0]["role"] == "assistant":
            parts = ["".join(str(text) for text in parts)]
        result.append(Message(turn[0]["role"], tuple(parts)))
    return result


def up_to_question(history: list[dict]) -> list[dict]:
    """The conversation without the last answer."""
    *before, last = turns(history) or [[]]
    return history[:len(history) - len(last)] if last and last[0]["role"] == "assistant" else history


def last_answer(history: list[dict]) -> str:
    """The answer at the end of the conversation; "" where it ends with a question."""
    *_, last = messages(history) or [Message("user", ())]
    return last.text if last.role == "assistant" else ""
