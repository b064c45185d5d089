"""Reasoning tasks: what they share, from the split to the score.

In:  a task's `problem(split, i)`.  Out: rows for stage 2, questions of a benchmark, prompts for RL; in pictures or in words.

An answer is `<think>what the picture shows, then one step at a time</think><answer>...</answer>`. A hash of a problem's latent
state (what is drawn, not how) decides its split: no problem is both trained and tested, in a picture or in words. Kinds in
`held_out` occur in `val` and `test` alone and have their own score: does the model compose what it learned?
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, body, dialogue, exact, guessing, means
from dataset.tasks.world import THINK
from dataset.world.drawings import Drawing
from dataset.world.wordings import opened
from model.registry import UserError

STATES = {"test": 0.15, "val": 0.3, "train": 1.0}  # a state is in the first split whose bound is above its hash


@dataclass(frozen=True)
class ReasoningProblem:
    """A question about pictures, or in words alone, with the reasoning that leads to its one right answer.

    thoughts          what the picture shows, then one step at a time
    state             the latent state that decides the split: what is drawn, in an order that does not depend on the drawing
    direct_thoughts   the thoughts of an answer without steps; never empty
    """

    kind: str
    language: str
    pictures: tuple[Picture, ...]
    question: str
    thoughts: str
    answer: str
    state: tuple
    direct_thoughts: str


def split_of(*state) -> str:
    """train, val or test, by a hash of the latent state.

    `scenes.chance` would not do: its checksum is linear, and would put none of the 45 rectangles with sides up to 9 into `val`.
    """
    digest = hashlib.sha256("|".join(map(str, state)).encode()).digest()
    position = int.from_bytes(digest[:4], "big") / 2**32
    return next(split for split, bound in STATES.items() if position < bound)


def drawn(key: str, draw: Callable[[random.Random], Drawing], seed: float) -> Picture:
    """A picture that is drawn when it is needed; it depends on the key and the seed alone."""
    return Picture(f"{key}:{seed}", lambda: draw(random.Random(seed)).image)


def in_words(text: bool | None, i: int) -> bool:
    """Whether problem i is in words alone: every third, or with `text` all, or with `text=false` none."""
    return i % 3 == 2 if text is None else text


def problem_index(split: str, i: int, first: int) -> int:
    """The index of the problem of row i: those of `train` begin at `first`, for stage 2 and RL."""
    return first + i if split == "train" else i


def is_direct(i: int, direct: float) -> bool:
    """Whether the demonstration of problem i gives the answer without steps, as a share `direct` of them does."""
    return random.Random(f"brief/{i}").random() < direct


def check_first(name: str, first: int) -> int:
    """`first` itself; UserError where it is negative."""
    if first < 0:
        raise UserError(f"{name}: first is the index of a problem, 0 or more, not {first}")
    return first


class ReasoningTask(Task):
    """A task made of problems: a subclass defines `problem(split, i)`.

    rows    problems to learn from in stage 2; RL begins after them
    text    true: all problems in words; false: none; default: every third
    first   index of the first problem of `train`, for stage 2 and RL
    direct  share of the picture rows that give the answer without steps, as people do; RL finds out whether that habit pays
    new_words  true: questions about pictures are opened in words that no stage trains (dataset/world/wordings.py)
    """

    name = ""
    size = 500  # problems of the test set
    kinds: Sequence[str] = ()  # trained and tested
    held_out: Sequence[str] = ()  # tested only

    def __init__(self, rows: int, text: bool | None, first: int, direct: float, new_words: bool = False):
        self.rows, self.text, self.first, self.direct = rows, text, check_first(self.name, first), direct
        self.new_words = new_words

    def problem(self, split: str, i: int) -> ReasoningProblem:
        """Problem i of a split."""
        raise NotImplementedError

    def asked(self, problem: ReasoningProblem, id: str, split: str) -> str:
        """The question as somebody types it, with the request to think; a problem in words keeps its own."""
        question, rng = problem.question, random.Random(f"opening/{id}")
        if problem.pictures:
            question = opened(question, problem.language, split if self.new_words else "train", rng).rstrip()
        return question + THINK[problem.language]

    def words_only(self, i: int) -> bool:
        return in_words(self.text, i)

    def kind(self, split: str, rng: random.Random) -> str:
        """A random kind of problem among those of the split."""
        return rng.choice(self.kinds if split == "train" else (*self.kinds, *self.held_out))

    # ------------------------------------------------------------ to learn from

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        """The problem of row i with its reasoning: a demonstration."""
        i = problem_index("train", i, self.first)
        problem = self.problem("train", i)
        thoughts = problem.direct_thoughts if problem.pictures and is_direct(i, self.direct) else problem.thoughts
        id, answer = f"{self.name}/train/{i}", f"<think>{thoughts}</think><answer>{problem.answer}</answer>"
        return dialogue(id, problem.pictures, [(self.asked(problem, id, "train"), answer)])

    # ------------------------------------------------------------ to be scored by

    def examples(self, split: str, n: int) -> list[Example]:
        """n problems of a split; those of `train` are prompts for RL."""
        examples = []
        for i in (problem_index(split, k, self.first) for k in range(n)):
            id, problem = f"{self.name}/{split}/{i}", self.problem(split, i)
            prompt = dialogue(id, problem.pictures, [(self.asked(problem, id, split), "")])
            tags = (problem.language, "image" if problem.pictures else "text")
            examples.append(Example(prompt, problem.answer, problem.kind, tags, problem.question))
        return examples

    def score(self, example: Example, answer: str) -> float:
        """1 if the right answer stands between the answer tags; a missing tag is a wrong answer."""
        inside = body(answer)
        return 0.0 if inside is None else exact(example, inside)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """accuracy of the trained kinds, held_out of the others, and the score of each kind, language and form."""
        def group(example: Example) -> list[str]:
            return ["held_out"] if example.kind in self.held_out else ["accuracy", *example.tags]

        return {**means(examples, scores, group), **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The score of the most common validation answer to each question."""
        return guessing(examples, self.examples("val", 1000))
