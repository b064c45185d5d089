"""Conversations to segments: token ids that belong together, and whether the model learns them.

In:  messages of text and pictures.  Out: `Segment`s, which dataset/processor.py joins into documents.

Why only the answer is learned: the question is given at inference, so the model has to predict the answer alone. A loss on the
    user's words would train it to write questions. Rendering marks each segment when it is made: no label is searched for later.
Why control tokens cannot be typed: the template's tokens become ids here, and what people write is encoded as ordinary text.
    A user who types "<|assistant|>" gets letters, not a turn, so nobody can forge the other side of a conversation.
Why placeholders: a picture has no words, but its features need positions. Each feature gets one <image> token, which fixes
    length and order of the sequence; model/vlm.py then replaces the embeddings of these tokens by the projected features.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dataset.bad_rows import BadRow, require_unicode
from dataset.chat import Document, Message, Prefill, Template
from dataset.images import Picture
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import ImageProcessor


class Segment(NamedTuple):
    """Token ids that belong together. A picture is one segment with all its tiles, so truncation never splits it."""

    ids: list[int]
    learn: bool
    tiles: tuple[Picture, ...] = ()


@functools.lru_cache(maxsize=256)  # a template has few strings, and every turn needs them again
def markup(text: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """A template's own string as ids: control tokens as single ids, the rest as text. The list is cached: do not change it."""
    pattern = "|".join(re.escape(token) for token in template.control) or "(?!)"  # (?!) never matches
    ids = []
    for part in re.split(f"({pattern})", text):
        if part:
            ids += [tokenizer.id(part)] if part in template.control else tokenizer.encode(part)
    return ids


def joined(name: str, segments: Sequence[Segment]) -> Document:
    """Segments end to end as one document."""
    return Document(name, [token for segment in segments for token in segment.ids],
                    [segment.learn for segment in segments for _ in segment.ids],
                    tuple(tile for segment in segments for tile in segment.tiles))


def truncated(segments: Sequence[Segment], max_length: int) -> list[Segment]:
    """The first `max_length` ids, without half a picture, and without a tail after the last learned token: it teaches nothing."""
    result: list[Segment] = []
    remaining = max_length
    for segment in segments:
        if segment.tiles and len(segment.ids) > remaining:
            break
        result.append(segment if len(segment.ids) <= remaining else segment._replace(ids=segment.ids[:remaining]))
        remaining -= len(result[-1].ids)
    while result and not (result[-1].learn and result[-1].ids):
        result.pop()
    return result


class Renderer:
    """Renders conversations for one model.

    image_tokens   placeholders of one picture, or of one tile of it
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, image_tokens: int, images: ImageProcessor):
        self.template, self.tokenizer, self.image_tokens, self.images = template, tokenizer, image_tokens, images

    def segments(self, name: str, messages: Sequence[Message]) -> list[Segment]:
        """The beginning of a document, then every turn in full. BadRow names this row where a picture does not open."""
        try:
            for message in messages:
                require_unicode(message.text)
            return list(self.turns(messages))
        except BadRow as bad:
            bad.where = bad.where or name
            raise

    def turns(self, messages: Sequence[Message]) -> Iterator[Segment]:
        """The segments of a list of messages, one by one."""
        yield Segment(self.markup(self.template.begin), False)
        pictures = 0
        for message in messages:
            before, after = getattr(self.template, message.role)
            is_answer = message.role == "assistant"
            yield Segment(self.markup(before), False)
            for part in message.parts:
                if isinstance(part, Picture):
                    pictures += 1
                    index = self.tokenizer.encode(self.template.picture.format(n=pictures))
                    tiles = self.images.tiles(part)  # the picture itself, or its thumbnail and tiles
                    yield Segment([*index, *[self.tokenizer.image] * self.image_tokens * len(tiles)], False, tiles)
                elif is_answer or not self.template.drop_user_text:
                    yield Segment(self.tokenizer.encode(part), is_answer and not isinstance(part, Prefill))
            if is_answer:
                only_read = bool(message.parts) and all(isinstance(part, Prefill) for part in message.parts)
                yield Segment(self.markup(self.template.stop), not only_read)
            yield Segment(self.markup(after), False)

    def markup(self, text: str) -> list[int]:
        return markup(text, self.template, self.tokenizer)
