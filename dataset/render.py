"""Conversations to segments: ids that belong together, and whether they are learned.

In:  messages of text and pictures.  Out: `Segment`s, which dataset/processor.py joins into documents.

Labels are known by construction and never searched for: a conversation is rendered turn by turn into (ids, learn?) segments.
What people wrote is encoded apart from the template's control tokens: a user who types "<|assistant|>" gets ordinary letters,
not a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dataset.bad_rows import BadRow
from dataset.chat import Document, Message, Prefill, Template
from dataset.images import Picture
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import ImageProcessor


class Segment(NamedTuple):
    """Ids that belong together. Those of a picture, all its tiles, are never cut apart."""

    ids: list[int]
    learn: bool
    tiles: tuple[Picture, ...] = ()


@functools.lru_cache(maxsize=256)  # a template has a handful of strings, and a conversation asks for each at every turn
def markup(text: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """A template's own string: its control tokens as single ids, the rest as text. The list is shared: not to be changed."""
    pattern = "|".join(re.escape(token) for token in template.control) or "(?!)"  # (?!) never matches
    ids = []
    for part in re.split(f"({pattern})", text):
        if part:
            ids += [tokenizer.id(part)] if part in template.control else tokenizer.encode(part)
    return ids


def joined(name: str, segments: Sequence[Segment]) -> Document:
    """Segments end to end as one document."""
    return Document(
        name,
        [number for segment in segments for number in segment.ids],
        [segment.learn for segment in segments for _ in segment.ids],
        tuple(tile for segment in segments for tile in segment.tiles),
    )


def truncated(segments: Sequence[Segment], max_length: int) -> list[Segment]:
    """At most `max_length` ids, never half a picture, and nothing after the last learned one, which would teach nothing."""
    result: list[Segment] = []
    room = max_length
    for segment in segments:
        if len(segment.ids) > room and segment.tiles:
            break
        result.append(segment._replace(ids=segment.ids[:room]))
        room -= len(result[-1].ids)
        if len(result[-1].ids) < len(segment.ids):
            break
    while result and not (result[-1].learn and result[-1].ids):
        result.pop()
    return result


class Renderer:
    """Writes conversations as one model reads them.

    image_tokens   placeholders that one picture, or one tile of it, takes in the text
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, image_tokens: int, images: ImageProcessor):
        self.template, self.tokenizer, self.image_tokens, self.images = template, tokenizer, image_tokens, images

    def segments(self, name: str, messages: Sequence[Message]) -> list[Segment]:
        """Whole turns, after the one beginning of the document. A picture that does not open is a bad row of this name."""
        try:
            return list(self.turns(messages))
        except BadRow as bad:
            bad.where = bad.where or name
            raise

    def turns(self, messages: Sequence[Message]) -> Iterator[Segment]:
        """The segments of messages one after another."""
        yield Segment(self.markup(self.template.begin), False)
        pictures = 0
        for message in messages:
            before, after = getattr(self.template, message.role)
            answers = message.role == "assistant"
            yield Segment(self.markup(before), False)
            for part in message.parts:
                if isinstance(part, Picture):
                    pictures += 1
                    number = self.tokenizer.encode(self.template.picture.format(n=pictures))
                    tiles = self.images.tiles(part)  # the picture alone, or its thumbnail and tiles
                    yield Segment([*number, *[self.tokenizer.image] * self.image_tokens * len(tiles)], False, tiles)
                elif answers or not self.template.drop_user_text:
                    yield Segment(self.tokenizer.encode(part), answers and not isinstance(part, Prefill))
            if answers:
                yield Segment(self.markup(self.template.stop), True)
            yield Segment(self.markup(after), False)

    def markup(self, text: str) -> list[int]:
        return markup(text, self.template, self.tokenizer)
