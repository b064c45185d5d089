"""Tasks. One object gives conversations to learn from, is a benchmark, and is a reward for RL.

To add a task, put one file into this folder (model/README.md, "Adding a part", has a complete one):

    @TASKS.register("brightness")                     # its name in --data and --bench
    class Brightness(Task):
        def __init__(self, rows: int = 2000):         # options with types and defaults: --data brightness:rows=500
            self.rows = rows
        def train(self, stage): ...                   # conversations to learn from; without it the task is a benchmark only
        def examples(self, split, n): ...             # questions with known answers: the one method that every task needs
        def score(self, example, answer): ...         # how right an answer is, 0..1; without it: exact match

    python 2-sft_vlm.py --data brightness --bench brightness       learns its conversations and scores its "val" questions
    python 3-rl_vlm.py --data brightness                           rewards answers to its "train" questions by their score
    python 4-eval_chat.py --model out/sft --bench brightness       scores its "test" questions

Keep the splits apart: train on nothing that "val" or "test" asks. For RL, a `score` of your own must read the final answer in
<answer>...</answer>, as exact match does; `reasoning.ReasoningTask` has what tasks with reasoning share.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dataset.chat import Conversation, Message
from dataset.images import Picture
from dataset.protocols import Source


@dataclass(frozen=True)
class Example:
    """One question with its right answer.

    prompt   a conversation that ends before the answer
    kind     the sort of question; script 1 checks "caption" alone
    tags     other groups that it belongs to, or facts that `measure` needs
    plain    the question in its plainest words, where the prompt has others
    """

    prompt: Conversation
    answer: str
    kind: str
    tags: tuple[str, ...] = ()
    plain: str = ""

    @property
    def question(self) -> str:
        """What is asked, whatever its wording."""
        return self.plain or self.prompt.messages[-1].text


class Truncated(str):
    """An answer that was cut off at the token limit before the model ended it."""


class Task:
    """The base class of all tasks; a subclass overrides what differs from these defaults.

    size   pictures of the test set; a picture may have several questions
    rows   examples of "train" that stage 2 learns from: set it in __init__, and RL begins after them
    judge  the model that rates answers where no rule can (dataset/judge.py)
    """

    size = 500
    rows = 0
    judge: Any = None

    def train(self, stage: str) -> Source | None:
        """The conversations to learn from in stage "pretrain" (script 1) or "sft" (script 2); None where the task has none."""
        return None

    def examples(self, split: str, n: int) -> list[Example]:
        """The questions about the first n pictures of "val" or "test", with their answers; for RL also of "train"."""
        raise NotImplementedError

    def score(self, example: Example, answer: str) -> float:
        """How right an answer is, 0..1: whether what stands between its answer tags, or all of it without them, is exact."""
        inside = body(answer)
        return exact(example, answer if inside is None else inside)

    def reward(self, example: Example, answer: str) -> float:
        """The reward in RL of an answer with the right tags; override it where that is not the score."""
        return self.score(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """{"metric": value in 0..1}; scores.json has them as "task/metric"."""
        return {"accuracy": sum(scores) / len(scores)}

    def controls(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """Controls beside the blank and the shuffled picture: name -> the same questions with less to see."""
        return {}

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """(the score of each answer in 0..1, None where no judge could rate it; the metrics of all answers).

        Override it where a metric is not a mean over answers, or where a judge decides.
        """
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        return scores, self.summary(examples, scores)

    def mark(self, example: Example, answer: str) -> str:
        """✓ where the answer is right, else ✗: what stands before it in the report."""
        return "✓" if self.score(example, answer) == 1 else "✗"

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """File name -> its json content, for an evaluation elsewhere, from rows as 4-eval_chat.py saves them; {}: none."""
        return {}

    def guess(self, examples: Sequence[Example]) -> float | None:
        """The score of a model that never looks at the picture; None if unknown."""
        return None


@dataclass(frozen=True)
class Generated:
    """A source whose row i is a function of i alone: `len(source)` is `size`, `source[i]` is `row(i)`.

    shown   where it is much less work than the row: the pictures of row i
    """

    size: int
    row: Callable[[int], Conversation]
    shown: Callable[[int], Sequence[Picture]] | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Conversation:
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.row(i)

    def pictures(self, i: int) -> Sequence[Picture]:
        """The pictures of a row."""
        return self.shown(i) if self.shown else self[i].pictures


def dialogue(id: str, pictures: Sequence[str | Picture], turns: Sequence[tuple[str, str]]) -> Conversation:
    """A conversation of (question, answer) turns, the pictures, or timed frames, before the first question.

    An answer of "" is left for the model.
    """
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append(Message("user", (*pictures, question) if i == 0 else (question,)))
        if answer:
            messages.append(Message("assistant", (answer,)))
    return Conversation(id, tuple(messages))


def normal(text: str) -> str:
    """An answer as `exact` compares it: in lower case, without outer blanks and a final stop."""
    return text.strip().rstrip(".。").strip().lower()


def body(answer: str) -> str | None:
    """The text between the answer tags; None where a tag is missing."""
    _, opened, rest = answer.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside if opened and closed else None


def exact(example: Example, answer: str) -> float:
    """1 where the answer equals the right one, else 0; case, outer blanks and a final stop do not count."""
    return float(normal(answer) == normal(example.answer))


def means(examples: Sequence[Example], scores: Sequence[float], key: Callable[[Example], Sequence[str]]) -> dict[str, float]:
    """Group -> its mean score, in alphabetical order; `key` lists the groups of an example."""
    groups: dict[str, list[float]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        for group in key(example):
            groups[group].append(score)
    return {group: sum(values) / len(values) for group, values in sorted(groups.items())}


def guessing(questions: Sequence[Example], known: Sequence[Example], enough: int = 10) -> float:
    """The score of a model that never looks: it gives the most common answer to the same question among the `known` examples.

    A question with fewer than `enough` known answers gets the most common answer of its kind and first tag.
    """
    common: dict[tuple, Counter] = defaultdict(Counter)
    for example in known:
        for key in ((example.question,), (example.kind, example.tags[:1])):
            common[key][normal(example.answer)] += 1
    correct = 0
    for example in questions:
        answers = common[(example.question,)]
        if answers.total() < enough:
            answers = common[example.kind, example.tags[:1]]
        correct += bool(answers) and normal(example.answer) == answers.most_common(1)[0][0]
    return correct / len(questions)
