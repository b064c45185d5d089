"""A conversation with a model that goes on: each answer is given in view of all that was said and shown before it.

In:  a message, texts and pictures.  Out: the answer while it is written, as text that grows.

    dialogue = Dialogue(stream, eyes, template=..., tokenizer=..., image_tokens=50, max_length=1920)
    for text in dialogue.say([picture, "What is this?"]):
        print(text)
    for text in dialogue.say(["And where is it?"]):     # the model still sees the picture
        print(text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dataset.chat import Conversation, Document, Message, Template, Views, alone, render_prompt
from dataset.collate import Look, collate
from dataset.images import BadRow, Picture


class Dialogue:
    """A conversation as it goes on.

    stream      batch -> the tokens of an answer, one by one: model.generate.stream with its options
    look        views of pictures -> pixels or features
    views       what is seen of a picture: itself, or its thumbnail and tiles
    max_length  tokens that a prompt may have: the model's context less the longest answer
    messages    everything that was said; a first message may be the system's
    forgotten   how many of the oldest exchanges the last answer was given without, because they no longer fit
    """

    def __init__(self, stream: Callable[[dict], Iterator[int]], look: Look, *, template: Template, tokenizer,
                 image_tokens: int, max_length: int, views: Views = alone, messages: Sequence[Message] = ()):  # fmt: skip
        self.stream, self.look, self.views = stream, look, views
        self.template, self.tokenizer, self.image_tokens = template, tokenizer, image_tokens
        self.max_length = max_length
        self.messages, self.forgotten = list(messages), 0

    def reset(self) -> None:
        """Begin again; what the system said stays."""
        self.messages, self.forgotten = [message for message in self.messages if message.role == "system"], 0

    def say(self, parts: Sequence[str | Picture]) -> Iterator[str]:
        """The answer to a message, again and again as it grows; at least once.

        What was said stays said, however it ends: closing the iterator stops the model and keeps the answer so far.
        Raises BadRow, and changes nothing, when a picture cannot be opened or the message alone is too long.
        """
        question = Message("user", tuple(parts))
        document, self.forgotten = self.prompt([*self.messages, question])
        batch = collate([document], self.look)
        tokens, text = [], ""
        try:
            for token in self.stream(batch):
                tokens.append(token)
                longer = whole_characters(self.tokenizer.decode(tokens))
                if longer != text:
                    text = longer
                    yield text
            if not text:
                yield text  # the model ended at once, and whoever waits should know
        finally:
            self.messages += [question, Message("assistant", (text,))]

    def prompt(self, messages: list[Message]) -> tuple[Document, int]:
        """As much of the conversation as fits, and how many exchanges were left out: whole ones, the oldest first."""
        system, exchanges = split(messages)
        for forgotten in range(len(exchanges)):
            kept = [*system, *(message for exchange in exchanges[forgotten:] for message in exchange)]
            document = render_prompt(
                Conversation("this message", tuple(kept)), self.template, self.tokenizer, self.image_tokens, views=self.views
            )
            if len(document) <= self.max_length:
                return document, forgotten
        raise BadRow(
            f"the message is {len(document)} tokens long ({len(document.pictures) * self.image_tokens} of them for "
            f"images), and the model reads {self.max_length}",
            "shorten it, or send fewer images",
        )


def split(messages: list[Message]) -> tuple[list[Message], list[list[Message]]]:
    """What the system said, and the exchanges: a message of the user's with what was answered to it."""
    system, exchanges = [], []
    for message in messages:
        if message.role == "system":
            system.append(message)
        elif message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return system, exchanges


def whole_characters(text: str) -> str:
    """The text without a last character of which only some bytes have come: a rare one takes up to four tokens."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
