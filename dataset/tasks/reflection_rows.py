"""Does a model look again, on problems of one's own? `--bench reflection:path=rows.jsonl`, in any form of row that is read.

markers    the plain question: accuracy, and how often the answer says that it looks again
recovery   the answer begins with a wrong step: how often is it right in the end?
swap       the answer begins with the right steps about the row's picture, but another row's picture is shown

    a row's worked solution      "3 cubes left, 2 right. 3+2=5. So 5."
    recovery begins with         "<think>3 cubes left, 4 right."                  the first half, its last number changed
    swap begins with             "<think>3 cubes left, 2 right."                  the first half as it is
    a row with an answer alone   "<think>At first sight the answer is 7."         recovery: a wrong answer; swap: the right one

The idea is MM-EUREKA's (arXiv 2503.07365): a model that reasons with the picture notices that the words do not fit it.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Message, Prefill
from dataset.evaluation import with_pictures
from dataset.mixture import load_file
from dataset.own_rows import as_example, final_answer, matches
from dataset.tasks import Example, normal
from model.registry import UserError

STEP_END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")
NUMBER = re.compile(r"\d+(?![\d.]*\d)")


@dataclass(frozen=True)
class Problem:
    """A row: its question with the gold answer, and the steps of its worked solution, if it has one."""

    example: Example
    steps: tuple[str, ...]


def with_prefill(conversation: Conversation, words: str) -> Conversation:
    """The same question with the start of its answer prefilled."""
    return replace(conversation, messages=(*conversation.messages, Message("assistant", (Prefill(words),))))


def steps_of(row: Conversation) -> tuple[str, ...]:
    """The steps of a row's last turn before its final answer; () where it states the answer alone."""
    text = row.messages[-1].text if row.messages[-1].role == "assistant" else ""
    inside = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    steps = [step.strip() for step in STEP_END.split(inside[1] if inside else text) if step.strip()]
    return tuple(steps if inside else steps[:-1] if len(steps) > 1 else [])


def first_half(steps: Sequence[str]) -> str:
    return "<think>" + " ".join(steps[: (len(steps) + 1) // 2])


def states(answer: str, question: str) -> str:
    """The start of an answer that states one at once, in the question's language."""
    chinese = re.search(r"[一-鿿]", question)
    return f"<think>乍看答案是{answer}。" if chinese else f"<think>At first sight the answer is {answer}."


def changed(text: str, rng: random.Random) -> str:
    """The text with its last number changed by 1 to 3; the text itself where it has none."""
    numbers = list(NUMBER.finditer(text))
    if not numbers:
        return text
    last, value = numbers[-1], int(numbers[-1][0])
    wrong = value + rng.choice([step for step in (-3, -2, -1, 1, 2, 3) if value + step >= 0])
    return text[: last.start()] + str(wrong) + text[last.end() :]


def wrong_answer(answer: str, others: Sequence[str], rng: random.Random) -> str:
    """Another row's answer, of the same form where there is one: a letter of a choice, a number, words; else a changed number."""
    def form(text: str) -> str:
        return re.sub(r"\d+", "0", re.sub(r"\b[A-Z]\b", "A", text)) if len(text) < 20 else "words"

    different = sorted({other for other in others if normal(other) != normal(answer)})
    alike = [other for other in different if form(other) == form(answer)]
    other_number = changed(answer, rng)
    return rng.choice(alike or ([other_number] if other_number != answer else different) or [""])


class OwnProblems:
    """The three tests on the rows of a file. Rows without an answer are left out and counted; UserError where none is left."""

    def __init__(self, path: Path, images: str):
        if not path.exists():
            raise FileNotFoundError(f"reflection:path={path} does not exist: it wants rows with questions and answers")
        source = load_file(path, images or None)
        self.problems: list[Problem] = []
        bad: list[str] = []
        for k in range(len(source)):
            try:
                row = source[k]
                example = as_example(row)
                if not example.answer:
                    raise BadRow("no answer to compare with", "give the row an answer", row.id)
                self.problems.append(Problem(example, steps_of(row)))
            except BadRow as error:
                bad.append(str(error))
        print("".join(f"skipped {error}\n" for error in bad), end="")
        self.same: dict[str, list[int]] = defaultdict(list)  # question -> its rows
        for k, problem in enumerate(self.problems):
            self.same[problem.example.question].append(k)
        if not self.problems:
            raise UserError(f"reflection:path={path} holds no question with an answer")

    def examples(self, n: int) -> list[Example]:
        """The questions of the first n rows, one of each kind; `tags` are ("own", the answer that the first words lead to).

        A swap whose other row asks the same has that row's answer; with another question, only who repeats the old answer
        is known to be wrong, and the right answer is "".
        """
        examples = []
        for k, problem in enumerate(self.problems[:n]):
            rng, own = random.Random(f"reflection/{k}"), problem.example
            question, others = own.question, [other.example.answer for other in self.problems]
            misled, words = "", changed(first_half(problem.steps), rng)
            if words == first_half(problem.steps):  # no step, or no number in it
                misled = wrong_answer(own.answer, others, rng)
                words = states(misled, question)
            examples.append(replace(own, kind="markers", tags=("own", "")))
            if misled or problem.steps:
                examples.append(replace(own, kind="recovery", tags=("own", misled), prompt=with_prefill(own.prompt, words)))
            if other := self.another(k):
                same = other.question == own.question
                shown = with_pictures(own.prompt, other.prompt.pictures.__getitem__)
                start = first_half(problem.steps) if problem.steps else states(own.answer, question)
                examples.append(Example(with_prefill(shown, start), other.answer if same else "", "swap", ("own", own.answer)))
        return [replace(one, prompt=replace(one.prompt, id=f"{one.prompt.id}/{one.kind}")) for one in examples]

    def another(self, k: int) -> Example | None:
        """A row with as many pictures, all others, and another answer: the next that asks the same, or one of the next hundred
        rows. None: there is none."""
        own = self.problems[k].example
        same = self.same[own.question]
        after = [*same[same.index(k) + 1 :], *same[: same.index(k)], *((k + step) % len(self.problems) for step in range(1, 101))]
        for other in (self.problems[row].example for row in after if own.prompt.pictures):
            if (normal(other.answer) != normal(own.answer) and len(other.prompt.pictures) == len(own.prompt.pictures)
                    and not set(other.prompt.pictures) & set(own.prompt.pictures)):  # fmt: skip
                return other
        return None


def own_score(example: Example, answer: str) -> float:
    """1 for the right answer by the rule of RL; of a swap whose right answer nobody knows, for any answer but the old one."""
    if example.answer:
        return float(matches(example, answer))
    return float(normal(final_answer(answer)) != normal(example.tags[1]))


def own_metrics(examples: Sequence[Example], scores: Sequence[float], answers: Sequence[str],
                marked: Sequence[bool]) -> dict[str, float]:
    """Accuracy and share of marked answers by kind; recovered: of the rows that are right without the wrong step;
    recovery_misled and swap_old: the share that ends with the answer that its first words state."""
    rows = list(zip(examples, scores, answers, marked, strict=True))
    right = {example.prompt.id.rpartition("/")[0] for example, score, *_ in rows if example.kind == "markers" and score == 1}
    groups: dict[str, Sequence[float]] = {
        **{kind: [score for example, score, *_ in rows if example.kind == kind and example.answer]
           for kind in ("markers", "recovery", "swap")},
        **{f"{kind}_marked": [said for example, _, _, said in rows if example.kind == kind]
           for kind in ("markers", "recovery", "swap")},
        "recovered": [score for example, score, *_ in rows
                      if example.kind == "recovery" and example.prompt.id.rpartition("/")[0] in right],
        **{name: [matches(replace(example, answer=example.tags[1]), answer) for example, _, answer, _ in rows
                  if example.kind == kind and example.tags[1]]
           for kind, name in (("recovery", "recovery_misled"), ("swap", "swap_old"))},
    }  # fmt: skip
    return {name: sum(values) / len(values) for name, values in groups.items() if values}
