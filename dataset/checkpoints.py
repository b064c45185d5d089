"""Checkpoints side by side: a chat with any of them, and one question to several.

In:  their folders, `Inspector` and `stream` (model/inspection.py, model/generate.py).
Out: a `Dialogue` with one of them; the answers of several, while they grow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.chat import Message
from dataset.dialogue import Dialogue
from dataset.images import Picture
from dataset.processor import Processor
from dataset.tokenizer import load_tokenizer
from dataset.vision.image_processor import OneRank


@dataclass(frozen=True)
class Trained:
    """A checkpoint: the model as `Inspector` shows it, and its processor, whose batches hold pixels."""

    inspector: Any
    processor: Processor

    @classmethod
    def of(cls, inspector: Any) -> Trained:
        return cls(inspector, Processor.of(inspector.model, load_tokenizer(inspector.tokenizer_file), OneRank()))


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints in some folders. Each is opened when it is first asked, and stays open.

    folders   name -> folder, in the order in which they are shown
    inspect   the folder of a checkpoint -> Inspector
    stream    (model, batch, options of sampling) -> the tokens of an answer
    """

    folders: Mapping[str, Path]
    inspect: Callable[[Path], Any]
    stream: Callable[..., Iterator[int]]
    opened: dict[str, Trained] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def trained(self, name: str) -> Trained:
        """The checkpoint of this name; UserError where its folder is damaged."""
        with self.lock:  # several people may ask at once
            if name not in self.opened:
                self.opened[name] = Trained.of(self.inspect(self.folders[name]))
            return self.opened[name]

    def dialogue(self, name: str, messages: Sequence[Message] = (), *, max_new_tokens: int, **sampling: float) -> Dialogue:
        """A conversation with a checkpoint that continues these messages; `sampling` is temperature and top_p."""
        trained = self.trained(name)
        inspector, processor = trained.inspector, trained.processor
        longest_prompt = processor.max_prompt_tokens(max_new_tokens)

        def answer(batch: dict) -> Iterator[int]:
            return self.stream(inspector.model, inspector.on_device(batch), max_new_tokens=max_new_tokens, **sampling,
                               **processor.sampling)  # fmt: skip

        return Dialogue(answer, processor, longest_prompt, messages)


def together(dialogues: Mapping[str, Dialogue], parts: Sequence[str | Picture]) -> Iterator[dict[str, str]]:
    """Name -> the answer of its dialogue to one message, all of them growing together, a token of each in turn."""
    growing = {name: dialogue.say(parts) for name, dialogue in dialogues.items()}
    answers = dict.fromkeys(growing, "")
    while growing:
        for name, stream in list(growing.items()):
            if (text := next(stream, None)) is None:
                del growing[name]
            else:
                answers[name] = text
        yield dict(answers)
