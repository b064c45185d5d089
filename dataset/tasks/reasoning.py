"""Problems that are reasoned about: what the reasoning tasks share, from the split to the score.

In:  a task's `problem(split, i)`.  Out: rows to tune on, questions to be judged by, prompts for RL, all with their text twins.

A problem is `<think>what is seen, then one step at a time</think><answer>...</answer>`. A hash of its latent state (what is
drawn, not how) decides whether it is trained or tested: the same problem is never on both sides, in a picture or in words.
The kinds in `held_out` occur in `val` and `test` alone and are scored apart: does the model compose what it learned?
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, exact, guessing, means
from dataset.tasks.world import THINK
from dataset.world.drawings import Drawing
from model.registry import UserError

STATES = {"test": 0.15, "val": 0.3, "train": 1.0}  # a state's hash below the first of these is in that split


@dataclass(frozen=True)
class ReasoningProblem:
    """A question about pictures, or in words alone, with the reasoning that leads to its one right answer.

    thoughts   what is seen, then one step at a time
    glance     what is thought by who answers at once, never empty
    state      what the split is decided by: all that matters of the picture, in an order that does not depend on the drawing
    """

    kind: str
    language: str
    pictures: tuple[Picture, ...]
    question: str
    thoughts: str
    answer: str
    state: tuple
    glance: str


def split_of(*state) -> str:
    """train, val or test, by a hash of the latent state.

    Not by `world.chance`: a checksum is linear, and of the 45 rectangles with sides up to 9 it puts none into `val`.
    """
    digest = hashlib.sha256("|".join(map(str, state)).encode()).digest()
    place = int.from_bytes(digest[:4], "big") / 2**32
    return next(split for split, below in STATES.items() if place < below)


def drawn(key: str, draw: Callable[[random.Random], Drawing], seed: float) -> Picture:
    """A picture that is drawn when it is needed; the key and the seed are all that it depends on."""
    return Picture(f"{key}:{seed}", lambda: draw(random.Random(seed)).image)


def body(answer: str) -> str | None:
    """What stands between the answer tags, None where one is missing."""
    _, opened, rest = answer.partition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside if opened and closed else None


def in_words(text: bool | None, i: int) -> bool:
    """Whether problem i is told in words alone: every third, or all (`text`), or none (`text=false`)."""
    return i % 3 == 2 if text is None else text


def number(split: str, i: int, first: int) -> int:
    """The number of problem i of a split: those of `train` begin at `first`, to tune on and for RL alike."""
    return first + i if split == "train" else i


def is_direct(i: int, direct: float) -> bool:
    """Whether the demonstration of problem i says the answer without a step, as a share `direct` of them does."""
    return random.Random(f"brief/{i}").random() < direct


def checked(name: str, first: int) -> int:
    """`first` where problems can begin; UserError where they cannot."""
    if first < 0:
        raise UserError(f"{name}: first is the number of a problem, 0 or more, not {first}")
    return first


class ReasoningTask(Task):
    """A task made of problems: a subclass says what problem number i of a split is.

    rows    rows to tune on
    text    true: all in words; false: none; left out: every third
    first   the number of the first problem of `train`: numbers from here on are tuned on, or asked by RL (behind `rows` of them)
    direct  share of the rows about pictures that say the answer at once, as people do: what is imitated is a habit, good or bad,
            and RL finds out which one pays
    """

    name = ""
    size = 500  # problems that make the test set
    kinds: Sequence[str] = ()  # trained and tested
    held_out: Sequence[str] = ()  # tested only

    def __init__(self, rows: int, text: bool | None, first: int, direct: float):
        self.rows, self.text, self.first, self.direct = rows, text, checked(self.name, first), direct

    def problem(self, split: str, i: int) -> ReasoningProblem:
        raise NotImplementedError

    def words_only(self, i: int) -> bool:
        return in_words(self.text, i)

    def kind(self, split: str, rng: random.Random) -> str:
        """A kind of problem that the split may hold."""
        return rng.choice(self.kinds if split == "train" else (*self.kinds, *self.held_out))

    # ------------------------------------------------------------ to learn from

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        """The problem of row i with its reasoning: a demonstration."""
        i = number("train", i, self.first)
        one = self.problem("train", i)
        thoughts = one.glance if one.pictures and is_direct(i, self.direct) else one.thoughts
        answer = f"<think>{thoughts}</think><answer>{one.answer}</answer>"
        return dialogue(f"{self.name}/train/{i}", one.pictures, [(one.question + THINK[one.language], answer)])

    # ------------------------------------------------------------ to be judged by

    def examples(self, split: str, n: int) -> list[Example]:
        """n problems of a split; those of `train` are the prompts of RL."""
        found = []
        for i in (number(split, k, self.first) for k in range(n)):
            one = self.problem(split, i)
            prompt = dialogue(f"{self.name}/{split}/{i}", one.pictures, [(one.question + THINK[one.language], "")])
            found.append(Example(prompt, one.answer, one.kind, (one.language, "image" if one.pictures else "text")))
        return found

    def score(self, example: Example, answer: str) -> float:
        """1 where the right answer stands between the tags; a missing tag is a wrong answer."""
        inside = body(answer)
        return 0.0 if inside is None else exact(example, inside)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """accuracy: of the kinds that are trained; held_out: of those that are not; and of each kind, language and form."""
        def group(example: Example) -> list[str]:
            return ["held_out"] if example.kind in self.held_out else ["accuracy", *example.tags]

        return {**means(examples, scores, group), **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The level of guessing: the most common answer to the same question among validation problems."""
        return guessing(examples, self.examples("val", 1000))
