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

from dataset.chat import Conversation, Document
from dataset.evaluation import Answerer
from dataset.processor import Processor

AnswerLogps = Callable[[list[tuple[Conversation, str]]], list[list[float]]]  # (prompt, answer) -> nats of each token and its end


@dataclass(frozen=True)
class RewardedAnswer:
    """An answer with its reward in nats a token, times beta."""

    answer: str
    reward: float


def implied_reward(aligned: Sequence[float], reference: Sequence[float], beta: float) -> float:
    """The reward of one answer from the log-probabilities of its tokens; ValueError unless both models scored the same tokens."""
    if len(aligned) != len(reference) or not aligned:
        raise ValueError(f"the aligned model scored {len(aligned)} tokens of an answer, the reference {len(reference)}: both "
                         f"need the same tokenizer and template, and an answer has at least its end")
    return beta / len(aligned) * (sum(aligned) - sum(reference))


def best_of(prompts: Sequence[Conversation], samples: Sequence[Sequence[str]], aligned: AnswerLogps, reference: AnswerLogps,
            beta: float) -> list[list[RewardedAnswer]]:
    """Of the sampled answers to each prompt the different ones, the best first (of equals, the one sampled first)."""
    different = [list(dict.fromkeys(texts)) for texts in samples]
    pairs = [(prompt, text) for prompt, texts in zip(prompts, different, strict=True) for text in texts]
    rewards = iter([RewardedAnswer(text, implied_reward(a, b, beta))
                    for (_, text), a, b in zip(pairs, aligned(pairs), reference(pairs), strict=True)])
    return [sorted((next(rewards) for _ in texts), key=lambda one: -one.reward) for texts in different]


@dataclass(frozen=True)
class AnswerScorer:
    """The `AnswerLogps` of one model; `logps` gives those of every learned token, document by document, of a padded batch."""

    processor: Processor
    logps: Callable[[dict], list[list[float]]]
    batch_size: int = 256

    def __call__(self, pairs: Sequence[tuple[Conversation, str]]) -> list[list[float]]:
        return self.processor.map([self.document(prompt, text) for prompt, text in pairs], self.logps, self.batch_size)

    def document(self, prompt: Conversation, text: str) -> Document:
        """Prompt and answer as the model reads them; the answer of a row that has one is left out, as it is when it is asked."""
        messages = prompt.messages[:-1] if prompt.messages[-1].role == "assistant" else prompt.messages
        return self.processor.answered(Conversation(prompt.id, messages), text, sys.maxsize)


@dataclass(frozen=True)
class BestOf:
    """As `Answerer`: conversations -> answers, each the best of `group_size` samples."""

    answerer: Answerer
    aligned: AnswerLogps
    reference: AnswerLogps
    group_size: int

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        samples = self.answerer.sampled(conversations, self.group_size)
        beta = 1.0  # whatever it was in training: it scales every reward and changes no order
        return [rewarded[0].answer for rewarded in best_of(conversations, samples, self.aligned, self.reference, beta)]
