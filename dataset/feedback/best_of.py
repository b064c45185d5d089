"""Best of N at inference: of several answers of a model, the one that preference learning raised most.

In:  prompts, and two models as functions: the aligned one, and the reference that it started from.
Out: each prompt's answers with their rewards, the best first.

    r(y) = beta / |y| * (log pi_aligned(y) - log pi_reference(y))

A model trained by DPO is a reward model at the same time (arXiv 2305.18290, equation 5). Without the length a sum over more
tokens is larger in size, and the choice is one of length; RLAIF-V divides by it (arXiv 2405.17220).
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation, Document, Template
from dataset.collate import pad
from dataset.evaluation import Ask, several
from dataset.preferences import answered
from dataset.vision.image_processor import Eyes

Logps = Callable[[list[tuple[Conversation, str]]], list[list[float]]]  # (prompt, answer) -> nats of each token, its end included


@dataclass(frozen=True)
class Rewarded:
    """An answer with its reward in nats a token, times beta."""

    answer: str
    reward: float


def reward(aligned: Sequence[float], reference: Sequence[float], beta: float) -> float:
    """The reward of one answer from the log-probabilities of its tokens; ValueError unless both models scored the same tokens."""
    if len(aligned) != len(reference) or not aligned:
        raise ValueError(f"the aligned model scored {len(aligned)} tokens of an answer, the reference {len(reference)}: both "
                         f"need the same tokenizer and template, and an answer has at least its end")
    return beta / len(aligned) * (sum(aligned) - sum(reference))


def best_of(prompts: Sequence[Conversation], ask: Callable[[Sequence[Conversation]], list[str]], aligned: Logps, reference: Logps,
            *, answers: int, beta: float) -> list[list[Rewarded]]:
    """`ask` samples an answer to each prompt; of N, the different ones, the best first (of equals, the one said first)."""
    said = [list(dict.fromkeys(texts)) for texts in several(ask, prompts, answers)]
    asked = [(prompt, text) for prompt, texts in zip(prompts, said, strict=True) for text in texts]
    scored = (Rewarded(text, reward(a, b, beta)) for (_, text), a, b in zip(asked, aligned(asked), reference(asked), strict=True))
    return [sorted((next(scored) for _ in texts), key=lambda one: -one.reward) for texts in said]


@dataclass(frozen=True)
class Scorer:
    """The `Logps` of one model; `logps` gives those of every learned token, row by row, of a padded batch of documents."""

    template: Template
    tokenizer: object
    image_tokens: int
    eyes: Eyes
    logps: Callable[[dict], list[list[float]]]
    batch_size: int = 256

    def __call__(self, asked: Sequence[tuple[Conversation, str]]) -> list[list[float]]:
        self.eyes.prepare(picture for prompt, _ in asked for picture in prompt.pictures)
        documents = [self.document(prompt, text) for prompt, text in asked]
        order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
        found = [[]] * len(documents)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start:start + self.batch_size]
            batch = pad([documents[i] for i in chosen], self.eyes, self.tokenizer.pad)
            for i, row in zip(chosen, self.logps(batch), strict=True):
                found[i] = row
        return found

    def document(self, prompt: Conversation, text: str) -> Document:
        """Prompt and answer as the model reads them; the answer of a row that has one is left out, as it is when it is asked."""
        messages = prompt.messages[:-1] if prompt.messages[-1].role == "assistant" else prompt.messages
        return answered(prompt.id, messages, text, self.template, self.tokenizer, self.image_tokens, sys.maxsize, self.eyes.views)


@dataclass(frozen=True)
class BestOf:
    """As `Ask`: conversations -> answers, each the best of several that `ask` samples."""

    ask: Ask
    aligned: Logps
    reference: Logps
    answers: int

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        beta = 1.0  # whatever it was in training: it scales every reward and changes no order
        found = best_of(conversations, self.ask, self.aligned, self.reference, answers=self.answers, beta=beta)
        return [rewarded[0].answer for rewarded in found]
