"""One file per task. The same object gives data to learn from, is a benchmark, and is a reward for RL.

A task is a subclass of `Task`, registered with `@TASKS.register("name")`; its options are what `name:key=value` sets.
The training split is drawn in 1-, 2- and 3-, the test split in 4-; nothing looks at another split than it was asked for.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation, Message
from dataset.images import Picture
from dataset.protocols import Source


@dataclass(frozen=True)
class Example:
    """One question with its right answer. `kind` groups questions of a task; `tags` are what else scores are split by."""

    prompt: Conversation
    answer: str
    kind: str
    tags: tuple[str, ...] = ()


class Truncated(str):
    """An answer that the limit on its length ended, not the model."""


class Task:
    """What every task offers; a subclass overrides what differs from these defaults.

    size   how many pictures' worth of questions make the test set
    rows   how many examples of "train" stage 2 has learned from: RL begins behind them
    """

    size = 500
    rows = 0

    def train(self, stage: str) -> Source | None:
        """A source of conversations for "pretrain" or "sft"; None: a benchmark alone."""
        return None

    def examples(self, split: str, n: int) -> list[Example]:
        """Questions with known answers from "val" or "test", at most n pictures' worth of them; for RL also from "train"."""
        raise NotImplementedError

    def score(self, example: Example, answer: str) -> float:
        """0..1, how right an answer is. For RL it reads the final answer in <answer>...</answer>."""
        return exact(example, answer)

    def reward(self, example: Example, answer: str) -> float:
        """What RL pays for an answer in the right form, where that is not its score."""
        return self.score(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """{"metric": value in 0..1}, written to scores.json as "task/metric"."""
        return {"accuracy": sum(scores) / len(scores)}

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """A score in 0..1 for each answer, None where nobody could judge it, and the metrics of all.

        Overridden where a metric is not a mean over answers, or where a judge decides.
        """
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        return scores, self.summary(examples, scores)

    def guess(self, examples: Sequence[Example]) -> float | None:
        """The score of a model that never looks; None where nobody knows."""
        return None


@dataclass(frozen=True)
class Generated:
    """A source whose row i is made by a function of i alone: `len(source)`, `source[i]`."""

    size: int
    row: Callable[[int], Conversation]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Conversation:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.row(i)


def dialogue(id: str, pictures: Sequence[Picture], turns: Sequence[tuple[str, str]]) -> Conversation:
    """A conversation whose pictures stand before the first question; an answer of "" is left for the model to give."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append(Message("user", (*pictures, question) if i == 0 else (question,)))
        if answer:
            messages.append(Message("assistant", (answer,)))
    return Conversation(id, tuple(messages))


def normal(text: str) -> str:
    """An answer as it is compared: no case, no outer blanks, no final stop."""
    return text.strip().rstrip(".。").strip().lower()


def exact(example: Example, answer: str) -> float:
    """1 where the answer is the right one, word for word."""
    return float(normal(answer) == normal(example.answer))


def means(examples: Sequence[Example], scores: Sequence[float], key: Callable[[Example], Sequence[str]]) -> dict[str, float]:
    """The mean score of every group that `key` puts examples into, groups in alphabetical order."""
    groups: dict[str, list[float]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        for group in key(example):
            groups[group].append(score)
    return {group: sum(values) / len(values) for group, values in sorted(groups.items())}


def guessing(asked: Sequence[Example], seen: Sequence[Example], enough: int = 10) -> float:
    """What a model that never looks can reach: the most common answer, among `seen`, to the same question.

    A question seen fewer than `enough` times gets the most common answer of its kind and first tag.
    """
    common: dict[tuple, Counter] = defaultdict(Counter)
    for example in seen:
        for key in ((example.prompt.messages[-1].text,), (example.kind, example.tags[:1])):
            common[key][normal(example.answer)] += 1
    right = 0
    for example in asked:
        answers = common[(example.prompt.messages[-1].text,)]
        if answers.total() < enough:
            answers = common[example.kind, example.tags[:1]]
        right += bool(answers) and normal(example.answer) == answers.most_common(1)[0][0]
    return right / len(asked)
