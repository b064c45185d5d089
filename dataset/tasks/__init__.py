"""One file per task. The same object gives data to learn from, is a benchmark, and is a reward for RL.

A task is a class registered with `@TASKS.register("name")`; its options are what `name:key=value` sets. It has

    train(stage)                  a source of conversations (`len(source)`, `source[i]`) for "pretrain" or "sft", or None
    size                          how many pictures' worth of questions make its test set
    examples(split, n)            questions with known answers from "val" or "test", at most n pictures' worth of them, and for RL
                                  from "train"
    score(example, answer)        0..1, how right an answer is
    summary(examples, scores)     {"metric": value in 0..1}, written to scores.json as "task/metric"
    measure(examples, answers)    in place of score and summary, where a number is no mean over answers, or a judge decides:
                                  (a score in 0..1 for each, None where nobody could judge it, and the metrics)

and where RL is to ask it, a score that reads the final answer in <answer>...</answer>, and if it wants

    rows                          how many examples of "train" stage 2 has learned from: RL begins behind them
    reward(example, answer)       what an answer is paid, where that is not its score

The training split is drawn in 1-, 2- and 3-, the test split in 4-; nothing here looks at another split than it was asked for.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation, Message
from dataset.images import Picture


@dataclass(frozen=True)
class Example:
    """One question with its right answer. `kind` groups questions of a task; `tags` are what else scores are split by."""

    prompt: Conversation
    answer: str
    kind: str
    tags: tuple[str, ...] = ()


class Cut(str):
    """An answer that the limit on its length ended, not the model."""


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
