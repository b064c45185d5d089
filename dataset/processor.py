"""The processor: everything between a conversation and a batch, as one object.

    conversation -> segments -> document -> batch
    messages        ids that      ids and      tensors on one axis, pixels or features of the pictures
    and pictures    belong        labels       (dataset/collate.py)
                    together

Labels are known by construction and never searched for: a conversation is rendered turn by turn into (ids, learn?) segments.
What people wrote is encoded apart from the template's control tokens: a user who types "<|assistant|>" gets ordinary letters,
not a turn.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Document, Message, Pair, Preference, Prefill, Template
from dataset.collate import collate, pad
from dataset.images import Picture
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import ImageProcessor, Ranks
from model.config import VLMConfig
from model.registry import TEMPLATES

Result = TypeVar("Result")


class Model(Protocol):
    """What a processor needs of a model (model/vlm.py)."""

    encoder: Any
    config: VLMConfig

    @property
    def image_tokens(self) -> int: ...


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


class Processor:
    """Chat template, tokenizer, image tokens and image processor of one model.

    image_tokens     placeholders that one picture, or one tile of it, takes in the text
    context_length   tokens that the model can read
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, image_tokens: int, images: ImageProcessor, context_length: int):
        self.template, self.tokenizer, self.images = template, tokenizer, images
        self.image_tokens, self.context_length = image_tokens, context_length

    @classmethod
    def of(cls, model: Model, tokenizer: Tokenizer, ranks: Ranks, cache: Path | None = None) -> Processor:
        """The processor of a model. `cache`: where features of the frozen encoder are kept; None: it sees pixels."""
        images = ImageProcessor(model.encoder, model.config.fit, model.config.tiles, cache, ranks)
        template = TEMPLATES.make(model.config.template)
        return cls(template, tokenizer, model.image_tokens, images, model.config.llm.max_position_embeddings)

    # ------------------------------------------------------------ conversation -> document

    def document(self, conversation: Conversation, max_length: int) -> Document:
        """A conversation to learn from. Only the assistant's words and its end of turn are learned.

        <s>   <|user|>  image image image  What is it?  <|assistant|>  A bus .  <|end|>
         .       .        .     .     .     .   .  .         .         x  x  x     x       x learned, . only read

        A conversation longer than `max_length` tokens loses its end. Raises BadRow when nothing is left to learn.
        """
        segments = self.segments(conversation.id, conversation.messages)
        document = joined(conversation.id, truncated(segments, min(max_length, self.context_length)))
        if document.input_ids:
            return document
        if not any(segment.learn for segment in segments):
            raise BadRow("nothing to learn: no answer", "give the row an assistant's turn", conversation.id)
        length, tiles = sum(len(segment.ids) for segment in segments), sum(len(segment.tiles) for segment in segments)
        raise BadRow(
            f"nothing left to learn: {length} tokens ({tiles} images and tiles of {self.image_tokens}) cut to {max_length}",
            "raise --max_length, or use fewer images, fewer --tiles or a connector with fewer tokens",
            conversation.id,
        )

    def prompt(self, conversation: Conversation, prefill: str = "") -> Document:
        """The same ids up to where the assistant's next words begin; a last turn of the assistant's is left out.

        The model goes on from here: prompt + answer + stop are exactly the ids of `document`.
        prefill   the start of an answer that is given to the model; so is a last turn of `Prefill` parts alone
        """
        messages = conversation.messages
        if messages and messages[-1].role == "assistant":
            if all(isinstance(part, Prefill) for part in messages[-1].parts):
                prefill = messages[-1].text + prefill
            messages = messages[:-1]
        segments = self.segments(conversation.id, messages)
        segments.append(Segment(self.markup(self.template.assistant[0]), False))
        if prefill:
            segments.append(Segment(self.tokenizer.encode(prefill), False))
        return joined(conversation.id, segments)

    def answered(self, conversation: Conversation, answer: str, max_length: int) -> Document:
        """A prompt and one answer to it. Only this answer and its end of turn are learned, of earlier turns nothing."""
        before = [segment._replace(learn=False) for segment in self.segments(conversation.id, conversation.messages)]
        _, *own = self.segments(conversation.id, [Message("assistant", (answer,))])  # the document begins once
        return joined(conversation.id, truncated(before + own, min(max_length, self.context_length)))

    def pair(self, preference: Preference, max_length: int) -> Pair:
        """Both answers after the one prompt, of which only the answers and their ends of turn are learned.

        <s>  <|user|>  image image  What is it?  <|assistant|>  A bus .  <|end|>       chosen
        <s>  <|user|>  image image  What is it?  <|assistant|>  A cat .  <|end|>       rejected
         .      .        .     .     .   .  .         .         x  x  x     x          x learned, . only read

        Both are cut at the same token. Raises BadRow when that leaves nothing to learn, or nothing to tell them apart.
        """
        pair = Pair(*(self.answered(preference.prompt, answer, max_length) for answer in (preference.chosen, preference.rejected)))
        if not (pair.chosen.input_ids and pair.rejected.input_ids):
            raise BadRow(f"nothing left to learn: the prompt alone takes the {max_length} tokens that there may be",
                         "raise --max_length, or use fewer images", preference.id)
        if pair.chosen.input_ids == pair.rejected.input_ids:
            raise BadRow(f"the first {max_length} tokens of chosen and rejected are the same", "raise --max_length", preference.id)
        return pair

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

    # ------------------------------------------------------------ documents -> batch

    def batch(self, documents: Sequence[Document]) -> dict:
        """Documents end to end on one axis, for training (dataset/collate.py)."""
        return collate(documents, self.images)

    def pair_batch(self, pairs: Sequence[Pair]) -> dict:
        """A batch of documents chosen, rejected, chosen, rejected, ... on one axis, and the pairs' `keys`."""
        documents = [document for pair in pairs for document in (pair.chosen, pair.rejected)]
        return {**self.batch(documents), "keys": [pair.key for pair in pairs]}

    def padded(self, documents: Sequence[Document]) -> dict:
        """One document a row, padded on the right, for generation."""
        return pad(documents, self.images, self.tokenizer.pad)

    def map(self, documents: Sequence[Document], function: Callable[[dict], Sequence[Result]], batch_size: int,
            progress: bool = False) -> list[Result]:
        """`function` of padded batches, one result a document, in their order. Documents of about equal length share a batch."""
        self.images.prepare(picture for document in documents for picture in document.pictures)
        order = sorted(range(len(documents)), key=lambda k: len(documents[k]))
        results: dict[int, Result] = {}
        for start in tqdm(range(0, len(order), batch_size), unit="batch", disable=not progress, leave=False):
            chosen = order[start:start + batch_size]
            results.update(zip(chosen, function(self.padded([documents[k] for k in chosen])), strict=True))
        return [results[k] for k in range(len(documents))]

    def marked(self, item: Document | Pair) -> str:
        """An item as text, what is learned in 【brackets】, each picture as one [image]: for --check_data."""
        if isinstance(item, Pair):
            return f"{item.id}\nchosen: {self.marked(item.chosen)}\nrejected: {self.marked(item.rejected)}"
        text, was_learned = "", False
        run: list[int] = []
        for number, learned in [*zip(item.input_ids, item.learn), (-1, not item.learn[-1])]:
            if learned != was_learned:
                part = self.tokenizer.decode_all(run) if run else ""
                text, run, was_learned = text + (f"【{part}】" if was_learned and run else part), [], learned
            run.append(number)
        return re.sub(r"(<image>)+", "[image]", text)

    # ------------------------------------------------------------ answers

    @property
    def stop_ids(self) -> set[int]:
        """The token that ends an answer."""
        return {self.tokenizer.id(self.template.stop)}

    @property
    def sampling(self) -> dict[str, Any]:
        """What generation must know of this model's tokens (model/generate.py)."""
        return {"stop_ids": self.stop_ids, "banned": self.banned}

    @property
    def banned(self) -> tuple[int, int, int]:
        """Tokens that an answer never holds: the image placeholder, padding, and the beginning of a document."""
        return self.tokenizer.image, self.tokenizer.pad, self.tokenizer.bos

    def require_room(self, conversation: Conversation, max_prompt_tokens: int) -> None:
        """BadRow for a conversation of more tokens, or with a picture that does not open: it cannot be answered."""
        try:
            for picture in conversation.pictures:
                picture.load()
            length = len(self.prompt(conversation))
            if length > max_prompt_tokens:
                raise BadRow(f"{length} tokens, where the model reads {max_prompt_tokens} before an answer",
                             "shorten it, or lower --max_new_tokens")
        except BadRow as bad:
            bad.where = bad.where or conversation.id
            raise

    def on_one_rank(self) -> Processor:
        """The same for one rank that works alone, as in evaluation: its image processor does not wait for the others."""
        other = Processor(self.template, self.tokenizer, self.image_tokens, self.images.on_one_rank(), self.context_length)
        return other
