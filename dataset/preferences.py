"""Preference pairs: one prompt, an answer that was chosen and one that was rejected, from every format that is published.

In:  RLAIF-V parquet, RLHF-V parquet, TRL's messages (parquet, jsonl), or the jsonl that a feedback pipeline writes.
Out: a source: `len(source)` and `source[i]`, a `Preference`; `render`, a `Pair` of documents; `join`, a batch of pairs;
     `stream`, where the batches of a step come from.

    RLAIF-V      image {bytes, path}, question, chosen, rejected
    RLHF-V       image {bytes, path}, text: a JSON string {question, chosen, rejected}
    TRL          images, prompt, chosen, rejected: lists of messages (or plain strings)
    pipeline     image_path, or image (a path, base64, or data:), question, chosen, rejected
Other columns are ignored, also stored log-probabilities: they are another model's.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dataset.chat import Conversation, Document, Message, Template, Views, alone, as_document, rendered, truncated, turns
from dataset.collate import Batches, Look, collate
from dataset.formats import conversations
from dataset.formats.conversations import Find, Mixture, Source, conversation, decode, name_and_weight
from dataset.images import BadRow, Picture, from_base64

BASE64_STARTS = ("/9j/", "iVBOR", "R0lGOD", "UklGR")  # JPEG, PNG, GIF and WebP: a name begins with none of them


@dataclass(frozen=True)
class Preference:
    """A prompt that ends with the user's turn, and two different answers to it."""

    id: str
    prompt: Conversation
    chosen: str
    rejected: str

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return self.prompt.pictures


# ---------------------------------------------------------------- rows -> preferences


def preference(row, id: str, find: Find) -> Preference:
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
    value = next((row[field] for field in ("images", "image", "image_path") if row.get(field)), [])
    return value if isinstance(value, list) else [value]


def answer(value, field: str) -> str:
    """An answer: a text, or TRL's list with the assistant's one message."""
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            raise BadRow(f"{field} is not one message of the assistant's", "put earlier turns into the prompt")
        content = value[0].get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            raise BadRow(f"{field} holds something else than text", "an answer is text alone")
        value = "".join(part["text"] for part in parts)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"empty {field}" if isinstance(value, str) else f"{field} is a {type(value).__name__}", "write the answer")
    return value


class PreferenceFile(Source):
    """The preferences of one file, each row parsed when it is asked for."""

    def __init__(self, path: Path, image_folder: Path, allow_urls: bool, need_answer: bool):
        super().__init__(path, image_folder, allow_urls, need_answer)
        by_name = self.find
        self.find = lambda name: from_base64(name) if name.startswith(BASE64_STARTS) else by_name(name)

    def parse(self, row, where: str) -> Preference:
        return preference(row, where, self.find)


load = partial(conversations.load, source=PreferenceFile)  # the preferences of a file, or of every data file in a folder


def mixture(specs: Sequence[str], image_folder: Path | None, allow_urls: bool) -> Mixture:
    """Files and folders of preferences, by weight: "pairs.jsonl", "rlaif-v:0.5"."""
    parts = [name_and_weight(spec) for spec in specs]
    return Mixture([(load(name, image_folder, allow_urls), weight) for name, weight in parts])


# ---------------------------------------------------------------- preferences -> batches


@dataclass(frozen=True)
class Pair:
    """A rendered preference: two documents with the same prompt and the same pictures."""

    chosen: Document
    rejected: Document

    @property
    def id(self) -> str:
        return self.chosen.id

    @property
    def key(self) -> str:
        """What the model sees of the pair, as a hash: equal keys, equal log-probabilities."""
        seen = (self.chosen.input_ids, self.rejected.input_ids, [picture.key for picture in self.chosen.pictures])
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


def answered(name: str, messages: Sequence[Message], text: str, template: Template, tokenizer, image_tokens: int,
             max_length: int, views: Views = alone) -> Document:
    """A prompt and one answer to it, of which alone the tokens and the end of turn are learned."""
    pieces = [piece._replace(learn=False) for piece in rendered(name, messages, template, tokenizer, image_tokens, views)]
    _, *own = turns((Message("assistant", (text,)),), template, tokenizer, image_tokens)  # the document begins once
    return as_document(name, truncated(pieces + own, max_length))


def render(preference: Preference, template: Template, tokenizer, image_tokens: int, max_length: int,
           views: Views = alone) -> Pair:
    """Both answers after the one prompt. Only the last answer and its end of turn are learned, of earlier turns nothing.

    <s>  <|user|>  image image  What is it?  <|assistant|>  A bus .  <|end|>       chosen
    <s>  <|user|>  image image  What is it?  <|assistant|>  A cat .  <|end|>       rejected
     .      .        .     .     .   .  .         .         x  x  x     x          x learned, . only read
    Both are cut at the same token. Raises BadRow when that leaves nothing to learn, or nothing to tell them apart.
    """
    pair = Pair(*(answered(preference.id, preference.prompt.messages, text, template, tokenizer, image_tokens, max_length, views)
                  for text in (preference.chosen, preference.rejected)))
    if not (pair.chosen.input_ids and pair.rejected.input_ids):
        raise BadRow(f"nothing left to learn: the prompt alone takes the {max_length} tokens that there may be",
                     "raise --max_length, or use fewer images", preference.id)  # fmt: skip
    if pair.chosen.input_ids == pair.rejected.input_ids:
        raise BadRow(f"the first {max_length} tokens of chosen and rejected are the same", "raise --max_length", preference.id)
    return pair


def join(pairs: list[Pair], look: Look) -> dict:
    """A batch of documents chosen, rejected, chosen, rejected, ... on one axis, and the pairs' `keys`."""
    batch = collate([document for pair in pairs for document in (pair.chosen, pair.rejected)], look)
    return {**batch, "keys": [pair.key for pair in pairs]}


def stream(batches: Batches, position: int, accumulate: int, compared: Callable[[dict], dict]) -> Iterator[tuple]:
    """For ever: (position to go on from, this rank's micro-batches of a step, how many pairs they hold, nothing for the log).

    compared   a batch -> the same with what the reference thinks of it
    """
    following = batches.start(position)
    while True:
        taken = [next(following) for _ in range(accumulate)]
        micro_batches = [compared(batch) for _, batch in taken]
        yield taken[-1][0], micro_batches, sum(len(batch["keys"]) for batch in micro_batches), {}
