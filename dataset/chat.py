"""Conversations, and the templates that write them as tokens.

`Conversation`   messages of text and pictures, as people write them; `Preference`: a prompt with two answers
`Document`       token ids, and for each whether it is learned: what the model reads; `Pair`: two documents.
                 dataset/processor.py makes documents from conversations
`Template`       the strings around each turn, as data. Other models' templates are in dataset/formats/templates.py
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dataset.images import Picture
from model.registry import TEMPLATES

ROLES = ("system", "user", "assistant")


class Prefill(str):
    """A part of an assistant's turn that the model reads and does not learn to write: prefill."""


@dataclass(frozen=True)
class Message:
    """One turn: a role (system, user or assistant) and its parts, texts (some are `Prefill`) and pictures in reading order."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """Messages in order. `id` says where they come from ("file:row"); `answer` is the gold answer for a reward, if any."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Picture))


@dataclass(frozen=True)
class Document:
    """A rendered conversation. `learn[t]`: token t is learned; `pictures`: all tiles, in the order of their placeholders."""

    id: str
    input_ids: list[int]
    learn: list[bool]
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


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
        """A hash of everything that the model reads of the pair: equal keys have equal log-probabilities."""
        seen = (self.chosen.input_ids, self.rejected.input_ids, [picture.key for picture in self.chosen.pictures])
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Template:
    """The strings around each turn.

    control          control tokens: where one stands in the strings below, it is a single id
    user, ...        (before, after): the strings around the content of a turn
    stop             ends an assistant's turn. It is learned: a model that never learns to stop never stops
    begin            begins a document
    picture          stands before each picture; {n} is its index in the conversation, from 1
    drop_user_text   for captions: the user's words are dropped, the pictures stay
    """

    control: tuple[str, ...]
    stop: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str]
    begin: str = ""
    picture: str = ""
    drop_user_text: bool = False


@TEMPLATES.register("pupil")
def pupil() -> Template:
    """<s><|system|>TEXT<|user|>TEXT<|assistant|>ANSWER<|end|>, the default."""
    return Template(
        control=("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        begin="<s>",
        picture="{n}",  # one token; without it a model cannot tell which picture "the second" is
        system=("<|system|>", ""),
        user=("<|user|>", ""),
        assistant=("<|assistant|>", ""),
        stop="<|end|>",
    )


@TEMPLATES.register("pretrain")
def pretrain() -> Template:
    """<s>PICTURES CAPTION<|end|>: without roles and questions; also for plain text."""
    return Template(
        control=("<s>", "<|end|>"),
        begin="<s>",
        system=("", ""),
        user=("", ""),
        assistant=("", ""),
        stop="<|end|>",
        drop_user_text=True,
    )
