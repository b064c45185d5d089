"""Best of N at inference: of several sampled answers, the one with the highest reward that preference learning implies.

In:  prompts, and two models as functions: the aligned one, and the reference that its training started from.
Out: each prompt's answers with their rewards, the best first.

    r(y) = beta / |y| * (log pi_aligned(y) - log pi_reference(y))

A model trained by DPO is also a reward model (arXiv 2305.18290, equation 5). Its reward is a sum over tokens, so without the
division by |y| the choice would follow the length; RLAIF-V divides, too (arXiv 2405.17220).
"""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation, Document
from dataset.evaluation import Answerer
from dataset.processor import Processor

AnswerLogps = Callable[[list[tuple[Conversation, str]]], list[list[float]]]  # (prompt, answer) -> nats per token, end included


@dataclass(frozen=True)
class RewardedAnswer:
    """An answer with its reward: beta times nats per token."""

    answer: str
    reward: float


def implied_reward(aligned: Sequence[float], reference: Sequence[float], beta: float) -> float:
    """The reward of one answer, from the log-probabilities of its tokens. ValueError where the two models differ in tokens."""
    if len(aligned) != len(reference) or not aligned:
        raise ValueError(f"the aligned model scored {len(aligned)} tokens of an answer, the reference {len(reference)}: both "
                         f"need the same tokenizer and template, and an answer has at least its end-of-turn token")
    return beta / len(aligned) * (sum(aligned) - sum(reference))


def best_of(prompts: Sequence[Conversation], samples: Sequence[Sequence[str]], aligned: AnswerLogps, reference: AnswerLogps,
            beta: float) -> list[list[RewardedAnswer]]:
    """For each prompt its distinct answers with their rewards, the best first; equal rewards keep the order of sampling."""
    distinct = [list(dict.fromkeys(texts)) for texts in samples]
    pairs = [(prompt, text) for prompt, texts in zip(prompts, distinct, strict=True) for text in texts]
    rewards = iter([RewardedAnswer(text, implied_reward(a, b, beta))
                    for (_, text), a, b in zip(pairs, aligned(pairs), reference(pairs), strict=True)])
    return [sorted((next(rewards) for _ in texts), key=lambda answer: -answer.reward) for texts in distinct]


@dataclass(frozen=True)
class AnswerScorer:
    """The `AnswerLogps` of one model. `logps`: padded batch -> log-probabilities of the learned tokens of each document."""

    processor: Processor
    logps: Callable[[dict], list[list[float]]]
    batch_size: int = 256

    def __call__(self, pairs: Sequence[tuple[Conversation, str]]) -> list[list[float]]:
        return self.processor.map([self.document(prompt, text) for prompt, text in pairs], self.logps, self.batch_size)

    def document(self, prompt: Conversation, text: str) -> Document:
        """Prompt and answer as the model reads them. An answer that the row already has is left out, as in generation."""
        messages = prompt.messages[:-1] if prompt.messages[-1].role == "assistant" else prompt.messages
        return self.processor.with_answer(Conversation(prompt.id, messages), text, sys.maxsize)


@dataclass(frozen=True)
class BestOf:
    """Like `Answerer`: conversations -> answers, each the best of `group_size` samples. All its processors are on one rank."""

    answerer: Answerer
    aligned: AnswerLogps
    reference: AnswerLogps
    group_size: int

    def load(self, conversations: Sequence[Conversation]) -> Sequence[Conversation]:
        """The conversations: their batches depend on what is sampled."""
        return conversations

    def answers(self, loaded: Sequence[Conversation]) -> list[str]:
        """The best answer to each."""
        return self(loaded)

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        samples = self.answerer.sampled(conversations, self.group_size)
        beta = 1.0  # its value in training does not matter: it scales every reward and changes no order
        return [rewarded[0].answer for rewarded in best_of(conversations, samples, self.aligned, self.reference, beta)]
