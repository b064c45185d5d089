"""The processor: everything between a conversation and a batch, in one object.

    conversation -> segments -> document -> batch
    messages        ids that      ids and      tensors on one axis, pixels or features of the pictures
    and pictures    belong        labels       (dataset/collate.py)
                    together (dataset/render.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Document, Message, Pair, Preference, Prefill, Template
from dataset.collate import collate, pad
from dataset.protocols import Model, Ranks
from dataset.render import Renderer, Segment, joined, truncated
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import ImageProcessor
from model.registry import TEMPLATES, UserError

Result = TypeVar("Result")


class Processor(Renderer):
    """Chat template, tokenizer, image tokens and image processor of one model.

    image_tokens     placeholders of one picture, or of one tile of it
    context_length   the most tokens that the model reads
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, image_tokens: int, images: ImageProcessor, context_length: int):
        super().__init__(template, tokenizer, image_tokens, images)
        self.context_length = context_length

    @classmethod
    def of(cls, model: Model, tokenizer: Tokenizer, ranks: Ranks, cache: Path | None = None) -> Processor:
        """The processor of a model. `cache`: a folder for features of the frozen encoder; None: batches hold pixels."""
        images = ImageProcessor(model.encoder, model.config.fit, model.config.tiles, cache, ranks)
        template = TEMPLATES.make(model.config.template)
        return cls(template, tokenizer, model.image_tokens, images, model.config.llm.max_position_embeddings)

    # ------------------------------------------------------------ conversation -> document

    def document(self, conversation: Conversation, max_length: int) -> Document:
        """A conversation to train on. Only the assistant's words and its end of turn are learned.

        <s>   <|user|>  image image image  What is it?  <|assistant|>  A bus .  <|end|>
         .       .        .     .     .     .   .  .         .         x  x  x     x       x learned, . only read

        Beyond `max_length` tokens a conversation is truncated. BadRow where nothing is left to learn.
        """
        max_length = min(max_length, self.context_length)
        segments = self.segments(conversation.id, conversation.messages)
        document = joined(conversation.id, truncated(segments, max_length))
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
        """The same ids, up to the place where the assistant's next words begin. A last turn of the assistant is left out.

        The model continues from here: prompt + answer + stop are exactly the ids of `document`.
        prefill   a start of the answer that the model reads; a last turn of `Prefill` parts alone is one, too
        """
        messages = conversation.messages
        if messages and messages[-1].role == "assistant":
            if all(isinstance(part, Prefill) for part in messages[-1].parts):
                prefill = messages[-1].text + prefill
            messages = messages[:-1]
        segments = [segment._replace(learn=False) for segment in self.segments(conversation.id, messages)]
        segments.append(Segment(self.markup(self.template.assistant[0]), False))
        if prefill:
            segments.append(Segment(self.tokenizer.encode(prefill), False))
        return joined(conversation.id, segments)

    def with_answer(self, conversation: Conversation, answer: str, max_length: int) -> Document:
        """A prompt and one answer to it. Only this answer and its end of turn are learned, earlier turns are not."""
        before = [segment._replace(learn=False) for segment in self.segments(conversation.id, conversation.messages)]
        _, *after = self.segments(conversation.id, [Message("assistant", (answer,))])  # a document begins once
        return joined(conversation.id, truncated(before + after, min(max_length, self.context_length)))

    def pair(self, preference: Preference, max_length: int) -> Pair:
        """Both answers after the same prompt. Only the answers and their ends of turn are learned.

        <s>  <|user|>  image image  What is it?  <|assistant|>  A bus .  <|end|>       chosen
        <s>  <|user|>  image image  What is it?  <|assistant|>  A cat .  <|end|>       rejected
         .      .        .     .     .   .  .         .         x  x  x     x          x learned, . only read

        Both are cut at the same token. BadRow where nothing is left to learn, or where the cut makes them equal.
        """
        max_length = min(max_length, self.context_length)
        pair = Pair(self.with_answer(preference.prompt, preference.chosen, max_length),
                    self.with_answer(preference.prompt, preference.rejected, max_length))
        if not (pair.chosen.input_ids and pair.rejected.input_ids):
            raise BadRow(f"nothing left to learn: the prompt alone takes the {max_length} tokens that are allowed",
                         "raise --max_length, or use fewer images", preference.id)
        if pair.chosen.input_ids == pair.rejected.input_ids:
            raise BadRow(f"the first {max_length} tokens of chosen and rejected are the same", "raise --max_length",
                         preference.id)
        return pair

    # ------------------------------------------------------------ documents -> batch

    def batch(self, documents: Sequence[Document]) -> dict:
        """Documents end to end on one axis, for training (dataset/collate.py)."""
        return collate(documents, self.images)

    def pair_batch(self, pairs: Sequence[Pair]) -> dict:
        """A batch of documents chosen, rejected, chosen, rejected, ... on one axis, and the pairs' `keys`."""
        documents = [document for pair in pairs for document in (pair.chosen, pair.rejected)]
        return {**self.batch(documents), "keys": [pair.key for pair in pairs]}

    def padded(self, documents: Sequence[Document]) -> dict:
        """One document per row, padded on the right, for generation."""
        return pad(documents, self.images, self.tokenizer.pad)

    def map(self, documents: Sequence[Document], function: Callable[[dict], Sequence[Result]], batch_size: int) -> list[Result]:
        """Results of `function` for padded batches, one per document, in their order. A batch has documents of similar length."""
        self.images.prepare(picture for document in documents for picture in document.pictures)
        order = sorted(range(len(documents)), key=lambda k: len(documents[k]))
        results: dict[int, Result] = {}
        for start in range(0, len(order), batch_size):
            indices = order[start:start + batch_size]
            results.update(zip(indices, function(self.padded([documents[k] for k in indices])), strict=True))
        return [results[k] for k in range(len(documents))]

    def marked(self, item: Document | Pair) -> str:
        """A document or pair as text: what is learned in 【brackets】, each picture as one [image]; a typed <image> as it is."""
        if isinstance(item, Pair):
            return f"{item.id}\nchosen: {self.marked(item.chosen)}\nrejected: {self.marked(item.rejected)}"
        text = ""
        for (is_image, learned), group in groupby(zip(item.input_ids, item.learn),
                                                  lambda pair: (pair[0] == self.tokenizer.image, pair[1])):
            part = "[image]" if is_image else self.tokenizer.decode_all([token for token, _ in group])
            text += f"【{part}】" if learned else part
        return text

    # ------------------------------------------------------------ answers

    @property
    def stop_ids(self) -> set[int]:
        """The token that ends an answer."""
        return {self.tokenizer.id(self.template.stop)}

    @property
    def sampling(self) -> dict[str, Any]:
        """Options that generation takes from this model's tokens (model/generate.py)."""
        return {"stop_ids": self.stop_ids, "banned": self.banned}

    @property
    def banned(self) -> tuple[int, int, int]:
        """Tokens that an answer may not contain: the image placeholder, padding, and the beginning of a document."""
        return self.tokenizer.image, self.tokenizer.pad, self.tokenizer.bos

    def max_prompt_tokens(self, max_new_tokens: int) -> int:
        """The most tokens a prompt may have if the answer may have max_new_tokens; UserError for less than 1 of either."""
        if not 1 <= max_new_tokens < self.context_length:
            raise UserError(f"--max_new_tokens {max_new_tokens} leaves no room for prompt and answer: this model reads "
                            f"{self.context_length} tokens")
        return self.context_length - max_new_tokens

    def require_answerable(self, conversation: Conversation, max_prompt_tokens: int) -> None:
        """BadRow for a prompt that cannot be answered: it is longer than this, or a picture of it does not open."""
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
        """The same processor for one rank that works alone, as in evaluation: it does not wait for other ranks."""
        return Processor(self.template, self.tokenizer, self.image_tokens, self.images.on_one_rank(), self.context_length)
