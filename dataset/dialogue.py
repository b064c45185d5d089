"""A conversation with a model over many turns. Each answer depends on all earlier messages and pictures.

In:  a message: texts and pictures.  Out: the answer while it is generated, as text that grows.

    dialogue = Dialogue(stream, processor, max_prompt_tokens=1920)
    for text in dialogue.say([picture, "What is this?"]):
        print(text)
    for text in dialogue.say(["And where is it?"]):     # the model still sees the picture
        print(text)

In Python, with a checkpoint:

    from dataset.dialogue import load
    chat = load("out/dpo")
    print(chat("picture.png", "What is this?"), chat("And where is it?"))     # chat.reset() begins anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL.Image import Image

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Document, Message
from dataset.images import Picture, from_file, from_image
from dataset.processor import Processor
from dataset.tokenizer import load_tokenizer


class Dialogue:
    """A conversation that is still open.

    stream              batch -> the tokens of an answer, one by one: model.generate.stream with its options
    max_prompt_tokens   the model's context minus the longest answer
    messages            all messages so far; the first may be the system's
    forgotten           how many of the oldest exchanges were left out of the last prompt, because they no longer fit
    """

    def __init__(self, stream: Callable[[dict], Iterator[int]], processor: Processor, max_prompt_tokens: int,
                 messages: Sequence[Message] = ()):
        self.stream, self.processor, self.max_prompt_tokens = stream, processor, max_prompt_tokens
        self.messages, self.forgotten = list(messages), 0

    def __call__(self, *message: str | Path | Image | Picture) -> str:
        """The whole answer to a message: pictures (files or images), and last its text. It raises as `say` does."""
        *pictures, text = message
        found = [from_image(one) if isinstance(one, Image) else one if isinstance(one, Picture) else from_file(one)
                 for one in pictures]  # fmt: skip
        *_, answer = self.say([*found, str(text)])
        return answer

    def reset(self) -> None:
        """Start a new conversation; the system's message stays."""
        self.messages, self.forgotten = [message for message in self.messages if message.role == "system"], 0

    def say(self, parts: Sequence[str | Picture]) -> Iterator[str]:
        """The answer to a message, yielded as it grows, at least once.

        Message and answer join the conversation however the stream ends; closing the iterator keeps the answer so far.
        Raises BadRow, and changes nothing, when a picture does not open or the message alone is too long.
        """
        question = Message("user", tuple(parts))
        document, self.forgotten = self.prompt([*self.messages, question])
        batch = self.processor.batch([document])
        tokens: list[int] = []
        text = ""
        try:
            for token in self.stream(batch):
                tokens.append(token)
                longer = complete_characters(self.processor.tokenizer.decode(tokens))
                if longer != text:
                    text = longer
                    yield text
            if not text:
                yield text  # the model stopped at once, and the caller expects a first text
        finally:
            self.messages += [question, Message("assistant", (text,))]

    def prompt(self, messages: list[Message]) -> tuple[Document, int]:
        """(prompt, exchanges left out): as much of the conversation as fits. The oldest exchanges are left out as a whole."""
        conversation, document, forgotten = self.recent(messages)
        return document, forgotten

    def recent(self, messages: Sequence[Message]) -> tuple[Conversation, Document, int]:
        """(the exchanges that fit, their prompt, the number of older ones)."""
        system, exchanges = split(messages)
        for forgotten in range(self.first_that_may_fit(exchanges), len(exchanges)):
            kept = [*system, *(message for exchange in exchanges[forgotten:] for message in exchange)]
            conversation = Conversation("this message", tuple(kept))
            document = self.processor.prompt(conversation)
            if len(document) <= self.max_prompt_tokens:
                return conversation, document, forgotten
        raise BadRow(
            f"the message is {len(document)} tokens long ({len(document.pictures) * self.processor.image_tokens} of them for "
            f"images), and the model reads {self.max_prompt_tokens}",
            "shorten it, or send fewer images",
        )

    def first_that_may_fit(self, exchanges: Sequence[Sequence[Message]]) -> int:
        """The exchange from which on all may fit, counted back from the last, so that a long history costs no more than a prompt.

        It is a lower bound: the numbers of the pictures may take a few tokens more than they do here.
        """
        tokens = 0
        for index in reversed(range(len(exchanges))):
            _, *segments = self.processor.segments("this message", exchanges[index])  # without the beginning of a document
            tokens += sum(len(segment.ids) for segment in segments)
            if tokens > self.max_prompt_tokens:
                return min(index + 1, len(exchanges) - 1)
        return 0


def load(folder: str | Path, *, device: str = "auto", dtype: str = "auto", max_new_tokens: int = 256, temperature: float = 0.0,
         seed: int = 0) -> Dialogue:
    """A dialogue with the model of a checkpoint; the options are the flags of 4-eval_chat.py. UserError where there is none."""
    from model import checkpoint  # here both packages meet, as in the scripts
    from model.generate import stream
    from model.runtime import Run

    folder = checkpoint.require(Path(folder))
    run = Run.inference(folder, device, dtype, seed)
    model = checkpoint.load(folder, run.device)
    processor = Processor.of(model, load_tokenizer(checkpoint.tokenizer_file(folder)), run)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, **processor.sampling}
    longest = processor.max_prompt_tokens(max_new_tokens)
    return Dialogue(lambda batch: stream(model, run.to_device(batch), **options), processor, longest)


def split(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(system messages, exchanges). An exchange is a user's message with the answers to it."""
    system: list[Message] = []
    exchanges: list[list[Message]] = []
    for message in messages:
        if message.role == "system":
            system.append(message)
        elif message.role == "user" or not exchanges:
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return system, exchanges


def complete_characters(text: str) -> str:
    """The text without a last character that is still incomplete: a rare one takes up to four tokens, a byte each."""
    return text.rstrip("\N{REPLACEMENT CHARACTER}")
