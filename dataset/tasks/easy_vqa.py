"""easy-VQA: 5,000 small pictures of one shape each and 48,248 questions, with the official split (package `easy-vqa`, MIT).

74 % of the answers are yes or no, so the other questions have a score of their own (`open`).
"""
from __future__ import annotations

import functools
import random
import re
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
from dataset.world.openmoji import LANGUAGES, plural, with_article
from dataset.world.wordings import word
from model.registry import TASKS


@functools.cache
def rows(split: str) -> dict[int, list[tuple[str, str]]]:
    """Image id -> its (question, answer) pairs, from the official split `train` or `test`."""
    import easy_vqa

    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    pairs = defaultdict(list)
    for question, answer, image_id in zip(*read()):
        pairs[image_id].append((question, answer))
    return dict(pairs)


def held_out(image_id: int) -> bool:
    """Whether a picture of the official training split is used for validation, as a tenth are."""
    return image_id % 10 == 9


@functools.cache
def picture_paths(split: str) -> dict[int, str]:
    import easy_vqa

    return {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()


@functools.cache
def known_shapes() -> dict[int, tuple[str, str]]:
    """Image id -> (colour, shape) of the training pictures whose questions reveal both."""
    shapes = {}
    for image_id, pairs in rows("train").items():
        answers = {answer for _, answer in pairs}
        colour, shape = answers & set(COLOURS), answers & set(SHAPES)
        if colour and shape:
            shapes[image_id] = colour.pop(), shape.pop()
    return shapes


def shape_drawing(row: tuple[int, tuple[str, str]], rng: random.Random) -> Drawing:
    """A training picture at 96 x 96 with its one region: the box of the pixels that differ from the background."""
    image_id, (colour, shape) = row
    image = Image.open(picture_paths("train")[image_id]).convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    ys, xs = np.nonzero(np.abs(pixels - background).sum(-1) > 60)
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    chinese = COLOURS[colour][0] + SHAPES[shape]
    return Drawing(image, f"A {colour} {shape}.", f"一个{chinese}。", (Region(box, f"{colour} {shape}", chinese),))


def picture(split: str, image_id: int) -> Picture:
    path = picture_paths(split)[image_id]
    return Picture(f"easy_vqa:{split}:{image_id}", lambda: open_rgb(Path(path)), lambda: upright_size(Path(path)))


def kind_and_names(question: str) -> tuple[str, dict[str, str]]:
    """An official question as a kind of dataset/world/phrases.py and what it asks about: ("exists", {"name": "circle", ...})."""
    words = re.findall("[a-z]+", question)
    thing = " ".join(word for word in words if word in COLOURS or word in SHAPES)
    name = thing if thing in SHAPES else f"{thing} shape".strip()
    names = {"name": name, "one": with_article(name), "many": plural(name), "it": f"the {name}", "its": f"the {name}'s"}
    if "color" in words:
        return "colour", names
    if words[0] == "what":
        return ("coloured_shape", names) if thing else ("shape", {})
    return ("missing" if {"no", "not"} & set(words) else "exists"), names


def reworded(question: str, split: str, rng: random.Random) -> str:
    """An official question in other words: trained ones for "train", else words that are held out."""
    kind, names = kind_and_names(question)
    return word(kind, "en", names, split, rng).text


REWORDED = 0.6  # share of the questions of stage 2 that are asked in other words than the official ones
YES_NO = 2  # yes/no questions in a row, of about seven of a picture: inventories teach the same


@TASKS.register("easy_vqa")
class EasyVQA(Task):
    """Pictures of one shape each: which shape, which colour, is it there; the official split of the package easy-vqa.

    times   how often stages 1 and 2 see each picture; stage 1 learns captions made from the answers ("a blue circle")
    """

    size = 1000  # pictures of the test set

    def __init__(self, times: int = 1):
        self.times = times

    def train(self, stage: str) -> Generated | None:
        make = {"pretrain": self.caption, "sft": self.row}[stage]
        source = known_shapes() if stage == "pretrain" else rows("train")
        image_ids = [image_id for image_id in sorted(source) if not held_out(image_id)]
        return Generated(self.times * len(image_ids), lambda i: make(image_ids[i % len(image_ids)], i))

    def caption(self, image_id: int, i: int) -> Conversation:
        """The caption of a picture, "a blue circle", made from its answers."""
        rng, (colour, shape) = random.Random(f"easy_vqa/caption/{i}"), known_shapes()[image_id]
        language = rng.choice(LANGUAGES)
        text = with_article(f"{colour} {shape}") if language == "en" else f"一个{COLOURS[colour][0]}{SHAPES[shape]}"
        question = word("caption", language, {}, "train", rng).text
        return dialogue(f"easy_vqa/pretrain/{image_id}", [picture("train", image_id)], [(question, text)])

    def row(self, image_id: int, i: int) -> Conversation:
        """Some yes/no questions about a picture, then all open ones; for half of the known pictures an inventory.

        Open questions come last, because their answers would give away the yes/no answers.
        """
        rng, id, pictures = random.Random(f"easy_vqa/{i}"), f"easy_vqa/train/{image_id}", [picture("train", image_id)]
        if (shape := known_shapes().get(image_id)) and rng.random() < 0.5:
            words = rng.sample([*COLOURS, *SHAPES], len(COLOURS) + len(SHAPES))
            lines = [(", " * (k > 0) + with_article(word), " yes" if word in shape else " no") for k, word in enumerate(words)]
            return inventories.conversation(id, pictures, inventories.ASK["en"]["exists"], lines)
        turns = list(rows("train")[image_id])
        rng.shuffle(turns)
        turns = [(reworded(asked, "train", rng) if rng.random() < REWORDED else asked, answer) for asked, answer in turns]
        yes_no = [turn for turn in turns if turn[1] in ("yes", "no")]
        open_turns = [turn for turn in turns if turn[1] not in ("yes", "no")]
        return dialogue(id, pictures, yes_no[:YES_NO] + open_turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """The questions about n pictures of the official test split, or for `val` of the held-out training pictures."""
        official = "test" if split == "test" else "train"
        image_ids = [image_id for image_id in sorted(rows(official))
                     if official == "test" or held_out(image_id) == (split == "val")]
        examples = []
        for image_id in image_ids[:n]:
            for k, (question, answer) in enumerate(rows(official)[image_id]):
                id = f"easy_vqa/{split}/{image_id}/{k}"
                asked = self.asked(question, split, random.Random(f"wording/{id}"))
                prompt = dialogue(id, [picture(official, image_id)], [(asked, "")])
                kind = "yes_no" if answer in ("yes", "no") else "open"
                examples.append(Example(prompt, answer, kind, plain=question))
        return examples

    def asked(self, question: str, split: str, rng: random.Random) -> str:
        """The words that the benchmark asks an official question in: its own."""
        return question

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"accuracy": sum(scores) / len(scores), **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The score of the most common validation answer to each question."""
        return guessing(examples, self.examples("val", 500))


@TASKS.register("easy_vqa_words")
class EasyVQAWords(EasyVQA):
    """The same questions in wordings that no stage of training has (dataset/world/wordings.py)."""

    def asked(self, question: str, split: str, rng: random.Random) -> str:
        return reworded(question, split, rng)
