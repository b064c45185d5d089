"""Does a model look again? Three tests of "visual reflection" on picture arithmetic, with exact numbers.

markers    plain questions: how often the reasoning says that it looks again, and how often it is right with and without
recovery   a reasoning that begins with one number misread, put into the model's mouth: how often it still ends right
swap       the picture is exchanged after half of it was read, so that the first words are about another picture: does the answer
           follow what was read (old), what is shown (new), or each for its half (mixed)?

A tiny model does not invent looking again: it does so where its tuning had such rows (`arithmetic:recheck=0.08`), and RL then
changes how often, and how often it helps. Nothing here is trained on; the sums are those of the splits of `arithmetic`.
"""
from __future__ import annotations

import random
import re
from collections.abc import Sequence

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.arithmetic import ASK, Arithmetic, misread, seen
from dataset.tasks.world import THINK
from model.registry import TASKS

MARKER = re.compile(r"\b(look(ing)? again|wait|re-?check|check again|double-check)\b|再看|重新|再检查|等等", re.IGNORECASE)
KINDS = ("markers", "recovery", "swap")


def marked(answer: str) -> bool:
    """Whether an answer says that it looks again."""
    return MARKER.search(answer) is not None


def begun(conversation: Conversation, words: str) -> Conversation:
    """The same question with the start of its answer put into the model's mouth."""
    return Conversation(conversation.id, (*conversation.messages, Message("assistant", (Prefill(words),))))


def share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


@TASKS.register("reflection")
class Reflection(Task):
    """Re-check markers, recovery from a misread number, and a picture exchanged half-way; of picture arithmetic."""

    size = 300  # pictures' worth: one question of each kind

    def __init__(self):
        self.arithmetic = Arithmetic()

    def shown(self, split: str, rng: random.Random, like: tuple[int, str] | None = None) -> tuple[Picture, str, list[int], str]:
        """(picture, question, numbers, language) of some sum in a picture; `like`: of so many numbers and with this question."""
        while True:
            pictures, question, values, language = self.arithmetic.problem(split, rng.randrange(10**6))
            if pictures and (like is None or like == (len(values), question)):
                return pictures[0], question, values, language

    def examples(self, split: str, n: int) -> list[Example]:
        """One question of each kind for each of n pictures; `tags` end with the sums that a wrong way leads to."""
        found = []
        for i in range(n):
            rng = random.Random(f"reflection/{split}/{i}")
            picture, question, values, language = self.shown(split, rng)
            for kind in KINDS:
                prompt = dialogue(f"reflection/{split}/{i}/{kind}", [picture], [(question + THINK[language], "")])
                led: tuple[int, ...] = ()
                if kind == "recovery":
                    wrong = misread(values, rng, dice=question == ASK[language][True])
                    prompt, led = begun(prompt, f"<think>{seen(wrong)}"), (sum(wrong),)
                if kind == "swap":
                    other, half = self.shown(split, rng, (len(values), question))[2], (len(values) + 1) // 2
                    old, mixed = sum(other), sum(other[:half] + values[half:])
                    prompt = begun(prompt, f"<think>{', '.join(map(str, other[:half]))}")
                    led = (old, mixed)
                found.append(Example(prompt, str(sum(values)), kind, (language, *map(str, led))))
        return found

    def score(self, example: Example, answer: str) -> float:
        """1 where the answer is the sum of what the picture shows now."""
        return self.arithmetic.score(example, answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """Of each kind its accuracy and how often it is marked; right_marked and right_unmarked; where wrong ways led."""
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        rows = [(e, a, s, marked(a)) for e, a, s in zip(examples, answers, scores)]
        metrics = {}
        for kind in KINDS:
            if own := [row for row in rows if row[0].kind == kind]:
                metrics[kind] = share([row[2] == 1 for row in own])
                metrics[f"{kind}_marked"] = share([row[3] for row in own])
        for name, wanted in (("right_marked", True), ("right_unmarked", False)):
            if own := [row for row in rows if row[0].kind == "markers" and row[3] == wanted]:
                metrics[name] = share([row[2] == 1 for row in own])
        for kind, position, name in (("recovery", 1, "recovery_misled"), ("swap", 1, "swap_old"), ("swap", 2, "swap_mixed")):
            # a swap to a picture with the same sum says nothing
            own = [row for row in rows if row[0].kind == kind and row[0].tags[position] != row[0].answer]
            if own:
                metrics[name] = share([self.score(Example(e.prompt, e.tags[position], kind), a) == 1 for e, a, _, _ in own])
        return scores, metrics
