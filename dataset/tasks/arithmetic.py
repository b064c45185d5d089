"""Picture arithmetic: add up the digits or dice in a picture, reasoning in a running sum; each with its twin in words.

The split is by a hash of the numbers themselves: a sum that is tested, in any picture or in words, was never trained.
A single addition is no such sum: '4+5=9' may be the first step of a longer one that is trained, though '4, 5' is tested.
With `recheck` a share of the rows about pictures looks twice, half of them because what was read first is wrong. The wrong
reading is put into the model's mouth and not learned: it learns to look again, not to misread.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, exact, means, reasoning
from dataset.tasks.world import THINK
from dataset.world import drawings
from dataset.world.openmoji import LANGUAGES
from model.registry import TASKS

ASK = {"en": ("What is the sum of the digits?", "What is the sum of the dice?"), "zh": ("数字的和是多少？", "骰子的和是多少？")}


def split_of(values: Sequence[int]) -> str:
    """train, val or test, by the multiset of the numbers."""
    return reasoning.split_of("arithmetic", *sorted(values))


def numbers(split: str, rng: random.Random, dice: bool, fewest: int = 2, most: int = 4) -> list[int]:
    """So many numbers of the split; two to four make a sum."""
    while True:
        values = [rng.randint(1, 6) if dice else rng.randint(0, 9) for _ in range(rng.randint(fewest, most))]
        if split_of(values) == split:
            return values


def seen(values: Sequence[int]) -> str:
    """'3, 5, 1.': what is read, before anything is added."""
    return f"{', '.join(map(str, values))}."


def running_sum(values: Sequence[int]) -> str:
    """'3, 5, 1. 3+5=8, 8+1=9.': first what is seen, then one addition at a time."""
    steps, total = [], values[0]
    for value in values[1:]:
        steps.append(f"{total}+{value}={total + value}")
        total += value
    return f"{seen(values)} {', '.join(steps)}."


def misread(values: Sequence[int], rng: random.Random, dice: bool) -> list[int]:
    """The same numbers with one of them wrong, but one that a die or a digit can show."""
    wrong, k = list(values), rng.randrange(len(values))
    wrong[k] = rng.choice([value for value in (range(1, 7) if dice else range(10)) if value != values[k]])
    return wrong


def drawn(dice: bool, values: list[int], seed: float) -> Picture:
    """The numbers in a picture that is drawn when it is needed."""
    draw = drawings.dice if dice else drawings.digits
    return reasoning.drawn(f"arithmetic:{draw.__name__}:{values}", lambda rng: draw(values, rng), seed)


def is_direct_row(i: int, direct: float, dice: bool) -> bool:
    """Whether row i says its sum at once: a share `direct` of all rows about pictures, those about dice first."""
    return reasoning.is_direct(i, min(1.0, 2 * direct) if dice else max(0.0, 2 * direct - 1))


READ = {"en": ("Which digits are there?", "What do the dice show?"), "zh": ("有哪些数字？", "骰子各是几点？")}
ADD = {"en": "Add.", "zh": "计算。"}
LOOK_AGAIN = {"en": " Wait, look again: ", "zh": "等等，再看："}


@TASKS.register("arithmetic")
class Arithmetic(Task):
    """Sums of 2 to 4 drawn digits or dice, with the same sums in words; answers come with their reasoning.

    text      true: all in words; false: none; left out: every third
    first     the number of the first sum of `train`: numbers from here on are tuned on, or asked by RL (behind `rows` of them)
    read      rows more, about pictures of four to nine numbers which are only read: a sum is right where all of it is
    direct    share of the rows about pictures that say the sum at once, as people do, of dice before digits (0.45: nine of ten
              dice): what is imitated is a habit, good or bad, and RL finds out which one pays. Drawn by lot, 0.43 of all rows,
              it made one seed say 66 % of 600 validation sums at once and another 4 %: greedily the likelier way is taken
    lists     rows more, in words, of three lists of three to five numbers, given as if they had been read in a picture, and their
              running sums, of which the next number and the sum are learned: the two that a step can have wrong. With lone
              additions instead ("17+5=" given, "22" learned) two of three seeds went wrong by taking another number of the
              list, and RL did not mend it
    recheck   share of the rows that look at the picture twice (dataset/tasks/reflection.py measures what comes of it)
    """

    size = 500  # pictures' worth of questions that make the test set

    def __init__(self, rows: int = 2_600, text: bool | None = None, recheck: float = 0.0, read: int = 0, direct: float = 0.0,
                 lists: int = 0, first: int = 0):
        self.rows, self.text, self.recheck, self.read, self.direct, self.lists = rows, text, recheck, read, direct, lists
        self.first = reasoning.checked("arithmetic", first)

    def problem(self, split: str, i: int) -> tuple[list[Picture], str, list[int], str]:
        """(pictures, question, numbers, language) number i of a split, in a picture or in words."""
        rng = random.Random(f"arithmetic/{split}/{i}")
        dice = rng.random() < 0.5
        values = numbers(split, rng, dice)
        language = rng.choice(LANGUAGES)
        if reasoning.in_words(self.text, i):
            return [], "+".join(map(str, values)) + ("=?" if language == "en" else "等于多少？"), values, language
        return [drawn(dice, values, rng.random())], ASK[language][dice], values, language

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows + self.read + self.lists, self.row) if stage == "sft" else None

    def reading(self, i: int) -> Conversation:
        """Four to nine digits or dice that are only read: twice as many as a sum has, for fewer words."""
        rng = random.Random(f"arithmetic/reading/{i}")
        dice, language = rng.random() < 0.5, rng.choice(LANGUAGES)
        values = numbers("train", rng, dice, 4, 9)
        return dialogue(f"arithmetic/reading/{i}", [drawn(dice, values, rng.random())], [(READ[language][dice], seen(values))])

    def adding(self, i: int) -> Conversation:
        """Running sums of three lists of digits, what is learned in brackets: '3, 5, 1. 3+[5]=[8,] 8+[1]=[9.]'."""
        rng = random.Random(f"arithmetic/adding/{i}")
        parts: list[str] = []
        for _ in range(3):
            values = numbers("train", rng, dice=False, fewest=3, most=5)
            parts.append(Prefill(f"{' ' * bool(parts)}{seen(values)}"))
            total = values[0]
            for place, value in enumerate(values[1:], 2):
                end = "." if place == len(values) else ","
                parts += [Prefill(f" {total}+"), str(value), Prefill("="), f"{total + value}{end}"]
                total += value
        question = ADD[rng.choice(LANGUAGES)]
        return Conversation(f"arithmetic/adding/{i}", (Message("user", (question,)), Message("assistant", tuple(parts))))

    def row(self, i: int) -> Conversation:
        """The sum of row i with its reasoning; behind the sums come the rows that are only read, and those that only add."""
        if i >= self.rows + self.read:
            return self.adding(i - self.rows - self.read)
        if i >= self.rows:
            return self.reading(i - self.rows)
        i = reasoning.number("train", i, self.first)
        pictures, question, values, language = self.problem("train", i)
        asked = dialogue(f"arithmetic/train/{i}", pictures, [(question + THINK[language], "")])
        rest = f"{running_sum(values)}</think><answer>{sum(values)}</answer>"
        dice = question == ASK[language][True]
        if pictures and is_direct_row(i, self.direct, dice):
            rest = f"{seen(values)}</think><answer>{sum(values)}</answer>"
        parts: tuple[str, ...] = (f"<think>{rest}",)
        rng = random.Random(f"recheck/{i}")
        if pictures and rng.random() < self.recheck:
            wrong = misread(values, rng, dice)
            begun = Prefill(f"<think>{seen(wrong)}") if rng.random() < 0.5 else f"<think>{seen(values)}"
            parts = (begun, LOOK_AGAIN[language] + rest)
        return Conversation(asked.id, (*asked.messages, Message("assistant", parts)))

    def examples(self, split: str, n: int) -> list[Example]:
        found = []
        for i in (reasoning.number(split, k, self.first) for k in range(n)):
            pictures, question, values, language = self.problem(split, i)
            prompt = dialogue(f"arithmetic/{split}/{i}", pictures, [(question + THINK[language], "")])
            found.append(Example(prompt, str(sum(values)), "image" if pictures else "text", (language,)))
        return found

    def score(self, example: Example, answer: str) -> float:
        """The number between the answer tags; a missing tag is a wrong answer."""
        thoughts, opened, rest = answer.partition("<answer>")
        body, closed, _ = rest.partition("</answer>")
        return exact(example, body) if opened and closed else 0.0

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"accuracy": sum(scores) / len(scores), **means(examples, scores, lambda example: [example.kind])}
