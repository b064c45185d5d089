"""Conversations to tokens: which ids the model reads, and which of them it learns to write.

In:  a `Conversation` (messages of text and pictures), a `Template`, a tokenizer.
Out: a `Document`: ids, a learn flag for each, and the pictures whose tokens stand among them.

A conversation is rendered piece by piece into (ids, learn?), so labels are known by construction and never searched
for. What people wrote is encoded apart from the template's control tokens: a user who types "<|assistant|>" gets
ordinary letters, not a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dataset.images import BadRow, Picture
from model.registry import TEMPLATES

ROLES = ("system", "user", "assistant")


class Given(str):
    """A part of an assistant's turn that is put into its mouth: read, not learned."""


@dataclass(frozen=True)
class Message:
    """One turn: a role (system, user or assistant) and its parts, texts (some `Given`) and pictures in reading order."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Conversation:
    """Messages in order; `id` says where they came from ("file:row"), `answer` is a gold answer for a reward, if any."""

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(part for message in self.messages for part in message.parts if isinstance(part, Picture))


@dataclass(frozen=True)
class Document:
    """A rendered conversation: `learn[t]` says whether token t is learned; `pictures`: all views in the order of their tokens."""

    id: str
    input_ids: list[int]
    learn: list[bool]
    pictures: tuple[Picture, ...]

    def __len__(self) -> int:
        return len(self.input_ids)


# ---------------------------------------------------------------- templates: plain data


@dataclass(frozen=True)
class Template:
    """What stands around each turn, as data.

    `control` lists the pieces that are single control tokens wherever they occur in the other strings.
    A turn is (before, after) around its content; the assistant's content is followed by `stop`, which is learned:
    a model that never learns to stop never stops. A caption template drops the user's words and keeps the pictures.
    """

    control: tuple[str, ...]
    stop: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str]
    begin: str = ""
    picture: str = ""  # before each picture; {n} is its number in the conversation
    drop_user_text: bool = False


@TEMPLATES.register("pupil")
def pupil() -> Template:
    """<s><|system|>TEXT<|user|>TEXT<|assistant|>ANSWER<|end|>, the default."""
    return Template(
        control=("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        begin="<s>",
        picture="{n}",  # one token; without it pictures look alike, and "the second" points nowhere
        system=("<|system|>", ""),
        user=("<|user|>", ""),
        assistant=("<|assistant|>", ""),
        stop="<|end|>",
    )


@TEMPLATES.register("pretrain")
def pretrain() -> Template:
    """<s>PICTURES CAPTION<|end|>: no roles, no question; also plain text."""
    return Template(
        control=("<s>", "<|end|>"),
        begin="<s>",
        system=("", ""),
        user=("", ""),
        assistant=("", ""),
        stop="<|end|>",
        drop_user_text=True,
    )


@TEMPLATES.register("chatml")
def chatml() -> Template:
    """<|im_start|>ROLE ... <|im_end|>: Qwen, SmolLM2, MiniMind 2."""
    return Template(
        control=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "\n"),
        stop="<|im_end|>",
    )


@TEMPLATES.register("llama")
def llama() -> Template:
    """<|start_header_id|>ROLE<|end_header_id|> ... <|eot_id|>: Llama 3."""
    return Template(
        control=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        begin="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", ""),
        stop="<|eot_id|>",
    )


@TEMPLATES.register("zephyr")
def zephyr() -> Template:
    """<|user|> ... </s>: TinyLlama. Only </s> is a control token: who types <|user|> writes what the model reads as a turn."""
    return Template(
        control=("</s>",),
        system=("<|system|>\n", "</s>\n"),
        user=("<|user|>\n", "</s>\n"),
        assistant=("<|assistant|>\n", "\n"),
        stop="</s>",
    )


@TEMPLATES.register("minimind")
def minimind() -> Template:
    """<s>ROLE ... </s>: MiniMind v1 and MiniMind-V v1."""
    return Template(
        control=("<s>", "</s>"),
        system=("<s>system\n", "</s>\n"),
        user=("<s>user\n", "</s>\n"),
        assistant=("<s>assistant\n", "\n"),
        stop="</s>",
    )


# ---------------------------------------------------------------- rendering


Views = Callable[[Picture], tuple[Picture, ...]]  # what the model sees of a picture: itself, or its thumbnail and tiles


def alone(picture: Picture) -> tuple[Picture, ...]:
    """Every picture seen once, whatever its size."""
    return (picture,)


class Piece(NamedTuple):
    """Ids that belong together; those of a picture, all its views, are never cut apart."""

    ids: list[int]
    learn: bool
    views: tuple[Picture, ...] = ()


@functools.lru_cache(maxsize=256)  # a template has a handful of strings, and a conversation asks for each at every turn
def markup(text: str, template: Template, tokenizer) -> list[int]:
    """A template's own string: its control tokens as single ids, the rest as text. The list is shared: not to be changed."""
    pattern = "|".join(re.escape(token) for token in template.control) or "(?!)"  # (?!) never matches
    ids = []
    for piece in re.split(f"({pattern})", text):
        if piece:
            ids += [tokenizer.id(piece)] if piece in template.control else tokenizer.encode(piece)
    return ids


def turns(messages: tuple[Message, ...], template: Template, tokenizer, image_tokens: int,
          views: Views = alone) -> Iterator[Piece]:
    """The pieces of whole turns, after the one beginning of the document; BadRow where `views` cannot open a picture.

    <s>   <|user|>  image image image  What is it?  <|assistant|>  A bus .  <|end|>
     .       .        .     .     .     .   .  .         .         x  x  x     x       x learned, . only read
    """
    yield Piece(markup(template.begin, template, tokenizer), False)
    pictures = 0
    for message in messages:
        before, after = getattr(template, message.role)
        answers = message.role == "assistant"
        yield Piece(markup(before, template, tokenizer), False)
        for part in message.parts:
            if isinstance(part, Picture):
                pictures += 1
                number = tokenizer.encode(template.picture.format(n=pictures))
                seen = views(part)
                yield Piece([*number, *[tokenizer.image] * image_tokens * len(seen)], False, seen)
            elif answers or not template.drop_user_text:
                yield Piece(tokenizer.encode(part), answers and not isinstance(part, Given))
        if answers:
            yield Piece(markup(template.stop, template, tokenizer), True)
        yield Piece(markup(after, template, tokenizer), False)


def rendered(name: str, messages: Sequence[Message], template: Template, tokenizer, image_tokens: int,
             views: Views) -> list[Piece]:
    """All of `turns`; a picture that does not open is a bad row of this name."""
    try:
        return list(turns(tuple(messages), template, tokenizer, image_tokens, views))
    except BadRow as bad:
        bad.where = bad.where or name
        raise


def as_document(name: str, pieces: list[Piece]) -> Document:
    """Pieces joined into one document."""
    return Document(
        name,
        [number for piece in pieces for number in piece.ids],
        [piece.learn for piece in pieces for _ in piece.ids],
        tuple(view for piece in pieces for view in piece.views),
    )


def truncated(pieces: list[Piece], max_length: int) -> list[Piece]:
    """At most `max_length` ids, never half a picture, and nothing after the last learned one, which teaches nothing."""
    kept, room = [], max_length
    for piece in pieces:
        if len(piece.ids) > room and piece.views:
            break
        kept.append(piece._replace(ids=piece.ids[:room]))
        room -= len(kept[-1].ids)
        if len(kept[-1].ids) < len(piece.ids):
            break
    while kept and not (kept[-1].learn and kept[-1].ids):
        kept.pop()
    return kept


def render(conversation: Conversation, template: Template, tokenizer, image_tokens: int, max_length: int,
           views: Views = alone) -> Document:
    """A conversation as a training document; each view of a picture becomes `image_tokens` placeholder ids.

    Only the assistant's words and its end of turn are learned. A conversation longer than `max_length` tokens loses
    its end. Raises BadRow when nothing is left to learn.
    """
    pieces = rendered(conversation.id, conversation.messages, template, tokenizer, image_tokens, views)
    document = as_document(conversation.id, truncated(pieces, max_length))
    if not document.input_ids:
        if not any(piece.learn for piece in pieces):
            raise BadRow("nothing to learn: no answer", "give the row an assistant's turn", conversation.id)
        length, seen = sum(len(piece.ids) for piece in pieces), sum(len(piece.views) for piece in pieces)
        raise BadRow(
            f"nothing left to learn: {length} tokens ({seen} images and tiles of {image_tokens}) cut to {max_length}",
            "raise --max_length, or use fewer images, fewer --tiles or a connector with fewer tokens",
            conversation.id,
        )
    return document


def render_prompt(
    conversation: Conversation, template: Template, tokenizer, image_tokens: int, answer: str = "", views: Views = alone
) -> Document:
    """The same ids up to where the assistant's next words begin; a last turn of the assistant's is left out.

    The model goes on from here: prompt + answer + stop are exactly the ids of `render`, with one beginning.
    `answer` is the start of an answer that is put into the model's mouth; so is a last turn of `Given` words alone.
    """
    messages = conversation.messages
    if messages and messages[-1].role == "assistant":
        if all(isinstance(part, Given) for part in messages[-1].parts):
            answer = messages[-1].text + answer
        messages = messages[:-1]
    pieces = rendered(conversation.id, messages, template, tokenizer, image_tokens, views)
    pieces.append(Piece(markup(template.assistant[0], template, tokenizer), False))
    if answer:
        pieces.append(Piece(tokenizer.encode(answer), False))
    document = as_document(conversation.id, pieces)
    return Document(document.id, document.input_ids, [False] * len(document), document.pictures)
