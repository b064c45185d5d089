"""easy-VQA: 5,000 small pictures of one shape each and 48,248 questions, with the official split (package `easy-vqa`, MIT).

74 % of the answers are yes or no, so the other questions are scored apart (`open`).
"""
from __future__ import annotations

import functools
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.chat import Conversation
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, exact, guessing, means
from dataset.vision.decoding import open_rgb, upright_size
from dataset.world import inventories
from dataset.world.drawings import COLOURS, SHAPES, Drawing, Region
from dataset.world.openmoji import LANGUAGES, with_article
from dataset.world.questions import ASK_CAPTION
from model.registry import TASKS


@functools.cache
def rows(split: str) -> dict[int, list[tuple[str, str]]]:
    """Picture number -> its (question, answer) pairs, of the official `train` or `test` split."""
    import easy_vqa

    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    found = defaultdict(list)
    for question, answer, number in zip(*read()):
        found[number].append((question, answer))
    return dict(found)


def held_out(number: int) -> bool:
    """A tenth of the official training pictures is kept for validation."""
    return number % 10 == 9


@functools.cache
def picture_paths(split: str) -> dict[int, str]:
    import easy_vqa

    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


@functools.cache
def known_shapes() -> dict[int, tuple[str, str]]:
    """Training picture -> (colour, shape), where its questions tell both."""
    found = {}
    for number, pairs in rows("train").items():
        answers = {answer for _, answer in pairs}
        colour, shape = answers & set(COLOURS), answers & set(SHAPES)
        if colour and shape:
            found[number] = colour.pop(), shape.pop()
    return found


def shape_drawing(row: tuple[int, tuple[str, str]], rng: random.Random) -> Drawing:
    """A training picture at 96 x 96 with its one region: where the pixels differ from the corner that is background."""
    number, (colour, shape) = row
    image = Image.open(picture_paths("train")[number]).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    ys, xs = np.nonzero(np.abs(pixels - background).sum(-1) > 60)
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    chinese = COLOURS[colour][0] + SHAPES[shape]
    return Drawing(image, f"A {colour} {shape}.", f"一个{chinese}。", (Region(box, f"{colour} {shape}", chinese),))


def picture(split: str, number: int) -> Picture:
    path = picture_paths(split)[number]
    return Picture(f"easy_vqa:{split}:{number}", lambda: open_rgb(Path(path)), lambda: upright_size(Path(path)))


YES_NO = 2  # questions of a row that are answered yes or no, of seven or so: inventories teach the same


@TASKS.register("easy_vqa")
class EasyVQA(Task):
    """One shape a picture: what shape, what colour, is there; the official split of the package easy-vqa.

    Its captions ("a blue circle", from the answers) teach the words in stage 1.
    """

    size = 1000  # pictures' worth of questions that make the test set

    def __init__(self, times: int = 1):
        self.times = times

    def train(self, stage: str) -> Generated | None:
        make = {"pretrain": self.caption, "sft": self.row}[stage]
        chosen = known_shapes() if stage == "pretrain" else rows("train")
        numbers = [number for number in sorted(chosen) if not held_out(number)]
        return Generated(self.times * len(numbers), lambda i: make(numbers[i % len(numbers)], i))

    def caption(self, number: int, i: int) -> Conversation:
        """What a picture shows, where its questions tell: "a blue circle"."""
        rng, (colour, shape) = random.Random(f"easy_vqa/caption/{i}"), known_shapes()[number]
        language = rng.choice(LANGUAGES)
        told = with_article(f"{colour} {shape}") if language == "en" else f"一个{COLOURS[colour][0]}{SHAPES[shape]}"
        return dialogue(f"easy_vqa/pretrain/{number}", [picture("train", number)], [(rng.choice(ASK_CAPTION[language]), told)])

    def row(self, number: int, i: int) -> Conversation:
        """Questions about a picture in one conversation: some that are answered yes or no, then all that tell what it is. After
        "What colour is it?" the others can be answered without looking. Of half of the known pictures an inventory instead."""
        rng, id, shown = random.Random(f"easy_vqa/{i}"), f"easy_vqa/train/{number}", [picture("train", number)]
        if (true := known_shapes().get(number)) and rng.random() < 0.5:
            words = rng.sample([*COLOURS, *SHAPES], len(COLOURS) + len(SHAPES))
            lines = [(", " * (k > 0) + with_article(word), " yes" if word in true else " no") for k, word in enumerate(words)]
            return inventories.conversation(id, shown, inventories.ASK["en"]["exists"], lines)
        turns = list(rows("train")[number])
        rng.shuffle(turns)
        closed, told = ([turn for turn in turns if (turn[1] in ("yes", "no")) == wanted] for wanted in (True, False))
        return dialogue(id, shown, closed[:YES_NO] + told)

    def examples(self, split: str, n: int) -> list[Example]:
        """The questions about n pictures of the official test split; `val`: of the training pictures that are held out."""
        official = "test" if split == "test" else "train"
        numbers = [number for number in sorted(rows(official)) if official == "test" or held_out(number) == (split == "val")]
        found = []
        for number in numbers[:n]:
            for k, (question, answer) in enumerate(rows(official)[number]):
                prompt = dialogue(f"easy_vqa/{split}/{number}/{k}", [picture(official, number)], [(question, "")])
                found.append(Example(prompt, answer, "yes_no" if answer in ("yes", "no") else "open"))
        return found

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"accuracy": sum(scores) / len(scores), **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The level of guessing: the most common answer of each group of questions in the training split."""
        return guessing(examples, self.examples("val", 500))
