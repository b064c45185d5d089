"""Messages of the page and messages of the model.

In:  the history of gradio's Chatbot: entries of one part each, with a role.  Out: `Message`s; entries of an answer.
"""

from __future__ import annotations

import html
import itertools
import mimetypes
import re

from dataset.bad_rows import BadRow
from dataset.chat import ROLES, Message
from dataset.images import Picture
from dataset.vision.video import of_any

REASONING, ANSWER = "Reasoning", "answer"  # the title of an entry that is folded away, and the id of the one behind it


# The parts of an answer without their tags, also of one that still grows.
FORM = re.compile("(?:<think>(?P<thoughts>.*?)(?:(?P<ended></think>)|$))?"
                  "(?P<tag><answer>)?(?P<rest>.*?)(?(tag)(?:</answer>)?)", re.DOTALL)  # fmt: skip
WORD = re.compile(r"(?:(?![\u2e80-\U0010ffff])\w)+|\w|[^\w\s]+")  # a Chinese character is a word, and so are signs side by side


def folded(answer: str) -> re.Match[str]:
    """An answer, or its beginning: its thoughts, whether they have ended, what follows, and whether that stood in <answer>."""
    found = FORM.fullmatch(answer)
    assert found  # any text is of this form
    return found


def entry(role: str, item: dict, **metadata: str) -> dict:
    """A part of a message, for the page."""
    return {"role": role, "content": [item], "metadata": metadata or None}


def escaped(text: str) -> dict:
    """A text for the page, escaped, because the page would take <think> or <b> for HTML."""
    return {"type": "text", "text": html.escape(text, quote=False)}


def clickable(part: str, answer: str, place: int) -> dict:
    """A part of an answer, for the page, escaped: each word can be clicked, or reached by Tab, and its id says where it stands.

    place   the entry of the conversation at which the answer begins
    The id is word-PLACE-CHARACTER, counted from the beginning of the answer, tags included.
    """
    text, first = folded(answer)[part], folded(answer).start(part)
    shown, done = "", 0
    for word in WORD.finditer(text):
        begin, done_before, done = word.start(), done, word.end()
        shown += html.escape(text[done_before:begin], quote=False)
        shown += (f'<span class="word" role="button" tabindex="0" id="word-{place}-{first + begin}">'
                  f"{html.escape(word[0], quote=False)}</span>")  # fmt: skip
    return {"type": "text", "text": shown + html.escape(text[done:], quote=False)}


def answer_entries(answer: str, place: int) -> list[dict]:
    """An answer for the page: its reasoning, folded away as soon as it ends, and the rest, each without its tags."""
    parts, entries = folded(answer), []
    if parts["thoughts"] is not None:
        status = {"status": "done"} if parts["ended"] else {}
        entries.append(entry("assistant", clickable("thoughts", answer, place), title=REASONING, **status))
    if parts["rest"] or not entries:
        entries.append(entry("assistant", clickable("rest", answer, place), **{"id": ANSWER} if parts["tag"] else {}))
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
    text = html.unescape(re.sub("</?span[^>]*>", "", item["text"]))  # the words that can be clicked
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


def clicked(history: list[dict], word: str) -> tuple[list[Message], str, int] | None:
    """(what was said before an answer, the answer, a character of it) for the id of a word; None for the id of something else."""
    numbers = re.fullmatch(r"word-(\d+)-(\d+)", word)
    if not numbers:
        return None
    place, character = map(int, numbers.groups())
    before, after = messages(history[:place]), turns(history[place:])
    if not before or not after or after[0][0]["role"] != "assistant":
        return None
    return before, messages(after[0])[0].text, character
