"""Picture arithmetic: add up the digits or dice in a picture by a running sum; some problems are in words.

The split is by a hash of the numbers: a tested sum was never trained, neither in a picture nor in words. A single addition does
not count: '4+5=9' may be the first step of a longer trained sum, though '4, 5' is tested.
With `recheck` a share of the picture rows reads the picture twice, half of them because the first reading is wrong. That wrong
reading is prefilled, so the model learns to look again and not to misread.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.tasks import Example, Generated, dialogue, means, reasoning
from dataset.tasks.reasoning import ReasoningProblem, ReasoningTask
from dataset.tasks.world import THINK
from dataset.world import drawings
from dataset.world.openmoji import LANGUAGES
from dataset.world.wordings import word
from model.registry import TASKS

NAMES = {"en": ({"many": "digits"}, {"many": "dice"}), "zh": ({"name": "数字"}, {"name": "骰子"})}  # digits, dice


def split_of(values: Sequence[int]) -> str:
    """train, val or test, by the multiset of the numbers."""
    return reasoning.split_of("arithmetic", *sorted(values))


def sample_numbers(split: str, rng: random.Random, dice: bool, fewest: int = 2, most: int = 4) -> list[int]:
    """`fewest` to `most` random numbers that belong to the split; digits or dice."""
    while True:
        values = [rng.randint(1, 6) if dice else rng.randint(0, 9) for _ in range(rng.randint(fewest, most))]
        if split_of(values) == split:
            return values


def listed(values: Sequence[int]) -> str:
    """'3, 5, 1.': the numbers as they are read, before any addition."""
    return f"{', '.join(map(str, values))}."


def running_sum(values: Sequence[int]) -> str:
    """'3, 5, 1. 3+5=8, 8+1=9.': first the numbers, then one addition at a time."""
    steps, total = [], values[0]
    for value in values[1:]:
        steps.append(f"{total}+{value}={total + value}")
        total += value
    return f"{listed(values)} {', '.join(steps)}."


def misread(values: Sequence[int], rng: random.Random, dice: bool) -> list[int]:
    """The same numbers with one replaced by another that a die or a digit can show."""
    wrong, k = list(values), rng.randrange(len(values))
    wrong[k] = rng.choice([value for value in (range(1, 7) if dice else range(10)) if value != values[k]])
    return wrong


def drawn(dice: bool, values: list[int], seed: float) -> Picture:
    """A picture of the numbers, drawn when it is needed."""
    draw = drawings.dice if dice else drawings.digits
    return reasoning.drawn(f"arithmetic:{draw.__name__}:{values}", lambda rng: draw(values, rng), seed)


def is_direct_row(i: int, direct: float, dice: bool) -> bool:
    """Whether row i gives its sum without steps: a share `direct` of the picture rows, dice before digits."""
    return reasoning.is_direct(i, min(1.0, 2 * direct) if dice else max(0.0, 2 * direct - 1))


READ = {"en": ("Which digits are there?", "What do the dice show?"), "zh": ("有哪些数字？", "骰子各是几点？")}
ADD = {"en": "Add.", "zh": "计算。"}
LOOK_AGAIN = {"en": " Wait, look again: ", "zh": "等等，再看："}


@dataclass(frozen=True)
class Sum(ReasoningProblem):
    """Numbers to add, as `dice` or digits in a picture (kind "image"), or in words (kind "text")."""

    numbers: list[int]
    dice: bool


@TASKS.register("arithmetic")
class Arithmetic(ReasoningTask):
    """Sums of 2 to 4 drawn digits or dice, or of numbers in words; answers come with their reasoning.

    rows      sums to learn from in stage 2; RL begins after them
    text      true: all sums in words; false: none; default: every third
    first     index of the first sum of `train`, for stage 2 and RL
    read      more rows: pictures of four to nine numbers that are only read, since a sum needs every number read right
    direct    share of the picture rows that give the sum without steps, as people do; RL finds out whether that habit pays.
              Dice come before digits (0.45: nine of ten dice): after a random choice, greedy decoding would take the likelier
              habit for every sum
    lists     more rows: three lists of three to five numbers in words, prefilled as if read from a picture, with their running
              sums; the next number and the sum are learned, because a step can get either wrong
    plain     more rows: the same sums without a request to think; the answer is the running sum alone
    recheck   share of the picture rows that read the picture twice (dataset/tasks/reflection.py measures the effect)
    new_words true: sums in pictures are asked for in wordings that no stage trains (dataset/world/wordings.py)
    """

    name = "arithmetic"

    def __init__(self, rows: int = 2_600, text: bool | None = None, recheck: float = 0.0, read: int = 0, direct: float = 0.0,
                 lists: int = 0, plain: int = 0, first: int = 0, new_words: bool = False):
        super().__init__(rows, text, first, direct, new_words)
        self.recheck, self.read, self.lists, self.plain = recheck, read, lists, plain

    def problem(self, split: str, i: int) -> Sum:
        """Problem i of a split, in a picture or in words."""
        rng = random.Random(f"arithmetic/{split}/{i}")
        dice = rng.random() < 0.5
        values = sample_numbers(split, rng, dice)
        language = rng.choice(LANGUAGES)
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = "+".join(map(str, values)) + ("=?" if language == "en" else "等于多少？")
        else:
            pictures, wordings = (drawn(dice, values, rng.random()),), split if self.new_words else "train"
            question = word("sum", language, NAMES[language][dice], wordings, rng).text
        return Sum("image" if pictures else "text", language, pictures, question, running_sum(values), str(sum(values)),
                   tuple(sorted(values)), listed(values), values, dice)

    def asked(self, problem: ReasoningProblem, id: str, split: str) -> str:
        """The question with the request to think: it was put in words with its problem."""
        return problem.question + THINK[problem.language]

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows + self.read + self.lists + self.plain, self.row) if stage == "sft" else None

    def reading(self, i: int) -> Conversation:
        """A picture of four to nine digits or dice that are only read: twice the numbers of a sum, with fewer words."""
        rng = random.Random(f"arithmetic/reading/{i}")
        dice, language = rng.random() < 0.5, rng.choice(LANGUAGES)
        values = sample_numbers("train", rng, dice, 4, 9)
        return dialogue(f"arithmetic/reading/{i}", [drawn(dice, values, rng.random())], [(READ[language][dice], listed(values))])

    def adding(self, i: int) -> Conversation:
        """Running sums of three lists of digits; the bracketed parts are learned: '3, 5, 1. 3+[5]=[8,] 8+[1]=[9.]'."""
        rng = random.Random(f"arithmetic/adding/{i}")
        parts: list[str] = []
        for _ in range(3):
            values = sample_numbers("train", rng, dice=False, fewest=3, most=5)
            parts.append(Prefill(f"{' ' * bool(parts)}{listed(values)}"))
            total = values[0]
            for position, value in enumerate(values[1:], 2):
                end = "." if position == len(values) else ","
                parts += [Prefill(f" {total}+"), str(value), Prefill("="), f"{total + value}{end}"]
                total += value
        question = ADD[rng.choice(LANGUAGES)]
        return Conversation(f"arithmetic/adding/{i}", (Message("user", (question,)), Message("assistant", tuple(parts))))

    def unasked(self, i: int) -> Conversation:
        """A sum without a request to think: "3, 5. 3+5=8."."""
        problem = self.problem("train", reasoning.problem_index("train", i % self.rows, self.first))
        return dialogue(f"arithmetic/unasked/{i}", problem.pictures, [(problem.question, problem.thoughts)])

    def row(self, i: int) -> Conversation:
        """The sum of row i with its reasoning; after `rows` sums come those that only read, that only add, and the plain ones."""
        if i >= self.rows + self.read + self.lists:
            return self.unasked(i)
        if i >= self.rows + self.read:
            return self.adding(i - self.rows - self.read)
        if i >= self.rows:
            return self.reading(i - self.rows)
        i = reasoning.problem_index("train", i, self.first)
        problem = self.problem("train", i)
        values, language = problem.numbers, problem.language
        prompt = dialogue(f"arithmetic/train/{i}", problem.pictures, [(problem.question + THINK[language], "")])
        is_direct = problem.pictures and is_direct_row(i, self.direct, problem.dice)
        thoughts = problem.direct_thoughts if is_direct else problem.thoughts
        conclusion = f"{thoughts}</think><answer>{problem.answer}</answer>"
        parts: tuple[str, ...] = (f"<think>{conclusion}",)
        rng = random.Random(f"recheck/{i}")
        if problem.pictures and rng.random() < self.recheck:
            wrong = misread(values, rng, problem.dice)
            reading = Prefill(f"<think>{listed(wrong)}") if rng.random() < 0.5 else f"<think>{listed(values)}"
            parts = (reading, LOOK_AGAIN[language] + conclusion)
        return Conversation(prompt.id, (*prompt.messages, Message("assistant", parts)))

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"accuracy": sum(scores) / len(scores), **means(examples, scores, lambda example: [example.kind])}
