"""Best of N at inference: of several answers of a model, the one that preference learning raised most.

In:  prompts, and two models as functions: the aligned one, and the reference that it started from.
Out: each prompt's answers with their rewards, the best first.

    r(y) = beta / |y| * (log pi_aligned(y) - log pi_reference(y))

A model trained by DPO is a reward model at the same time (arXiv 2305.18290, equation 5). Without the length a sum over more
tokens is larger in size, and the choice is one of length; RLAIF-V divides by it (arXiv 2405.17220).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation

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


def best_of(prompts: Sequence[Conversation], ask: Callable[..., list[list[str]]], aligned: Logps, reference: Logps, *,
            answers: int, temperature: float, beta: float) -> list[list[Rewarded]]:
    """`ask(prompts, answers=N, temperature=T)` samples; the different answers to each prompt, the best first (of equals, the
    one that was said first)."""
    said = [list(dict.fromkeys(texts)) for texts in ask(list(prompts), answers=answers, temperature=temperature)]
    asked = [(prompt, text) for prompt, texts in zip(prompts, said, strict=True) for text in texts]
    scored = (Rewarded(text, reward(a, b, beta)) for (_, text), a, b in zip(asked, aligned(asked), reference(asked), strict=True))
    return [sorted((next(scored) for _ in texts), key=lambda one: -one.reward) for texts in said]
