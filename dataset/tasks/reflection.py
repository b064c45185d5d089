"""Does a model look again? Three tests of "visual reflection" on picture arithmetic, with exact scores.

markers    plain questions: how often the reasoning says that it looks again, and the accuracy with and without such words
recovery   the answer is prefilled with a reading in which one number is wrong: how often is it still right at the end?
swap       the picture is replaced after half of it was read, so the prefilled first half is about another picture: does the
           answer follow the text (old), the picture (new), or each for its half (mixed)?

A tiny model looks again only where stage 2 had such rows (`arithmetic:recheck=0.08`); RL then changes how often, and how often
it helps. This task has no training rows; its problems are those of `arithmetic` in the same split, or one's own:

    python 4-eval_chat.py --bench reflection:path=rows.jsonl,images=FOLDER      (reflection_rows.py says what is asked)
"""
from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from dataset.tasks import Example, Task, dialogue
from dataset.tasks.arithmetic import Arithmetic, Sum, listed, misread
from dataset.tasks.reflection_rows import OwnProblems, own_metrics, own_score, with_prefill
from dataset.tasks.world import THINK
from model.registry import TASKS

MARKER = re.compile(r"\b(look(ing)? again|wait|re-?check|check again|double-check)\b|再看|重新|再检查|等等", re.IGNORECASE)
KINDS = ("markers", "recovery", "swap")


def marked(answer: str) -> bool:
    """Whether an answer says that it looks again."""
    return MARKER.search(answer) is not None


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


@TASKS.register("reflection")
class Reflection(Task):
    """Re-check markers, recovery from a misread number, and a picture replaced half-way, in picture arithmetic."""

    size = 300  # pictures of the test set, each with one question of each kind

    def __init__(self, path: str = "", images: str = ""):
        self.arithmetic = Arithmetic()
        self.own = OwnProblems(Path(path), images) if path else None
        self.size = len(self.own.problems) if self.own else Reflection.size

    def draw(self, split: str, rng: random.Random, like: Sum | None = None) -> Sum:
        """A random sum in a picture; `like`: one with as many numbers, and dice or digits too."""
        while True:
            problem = self.arithmetic.problem(split, rng.randrange(10**6))
            if problem.pictures and (like is None or (len(like.numbers), like.dice) == (len(problem.numbers), problem.dice)):
                return problem

    def examples(self, split: str, n: int) -> list[Example]:
        """One question of each kind for each of n pictures; `tags` end with the sums that a misled answer gives."""
        if self.own:
            return self.own.examples(n)
        examples = []
        for i in range(n):
            rng = random.Random(f"reflection/{split}/{i}")
            problem = self.draw(split, rng)
            values, language = problem.numbers, problem.language
            for kind in KINDS:
                question = problem.question + THINK[language]
                prompt = dialogue(f"reflection/{split}/{i}/{kind}", problem.pictures, [(question, "")])
                misled: tuple[int, ...] = ()
                if kind == "recovery":
                    wrong = misread(values, rng, problem.dice)
                    prompt, misled = with_prefill(prompt, f"<think>{listed(wrong)}"), (sum(wrong),)
                if kind == "swap":
                    other, half = self.draw(split, rng, problem).numbers, (len(values) + 1) // 2
                    old, mixed = sum(other), sum(other[:half] + values[half:])
                    prompt = with_prefill(prompt, f"<think>{', '.join(map(str, other[:half]))}")
                    misled = (old, mixed)
                examples.append(Example(prompt, str(sum(values)), kind, (language, *map(str, misled))))
        return examples

    def score(self, example: Example, answer: str) -> float:
        """1 if the answer is right about the picture shown."""
        return own_score(example, answer) if self.own else self.arithmetic.score(example, answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """Accuracy and share of marked answers by kind; right_marked, right_unmarked; shares that the prefill misled."""
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        if self.own:
            return scores, own_metrics(examples, scores, answers, list(map(marked, answers)))
        rows = [(e, a, s, marked(a)) for e, a, s in zip(examples, answers, scores)]
        metrics = {}
        for kind in KINDS:
            if subset := [row for row in rows if row[0].kind == kind]:
                metrics[kind] = share([row[2] == 1 for row in subset])
                metrics[f"{kind}_marked"] = share([row[3] for row in subset])
        for name, wanted in (("right_marked", True), ("right_unmarked", False)):
            if subset := [row for row in rows if row[0].kind == "markers" and row[3] == wanted]:
                metrics[name] = share([row[2] == 1 for row in subset])
        for kind, position, name in (("recovery", 1, "recovery_misled"), ("swap", 1, "swap_old"), ("swap", 2, "swap_mixed")):
            # two pictures with the same sum tell nothing
            subset = [row for row in rows if row[0].kind == kind and row[0].tags[position] != row[0].answer]
            if subset:
                metrics[name] = share([self.score(Example(e.prompt, e.tags[position], kind), a) == 1 for e, a, _, _ in subset])
        return scores, metrics
