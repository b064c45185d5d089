"""Perception and reasoning: answers recomputed from the picture's content, splits, balance, and what is held out."""

import functools
import random
import re
from collections import Counter

import pytest

from dataset.tasks import perception
from dataset.tasks.perception import Perception, holds_out
from dataset.world.openmoji import LANGUAGES, categories, plural
from dataset.world.scenes import chance, held_out_pair

TASK = Perception()
TEXT = Perception(text=True)
problem = functools.cache(TASK.problem)  # several tests look at the same ones


def objects_of(question: str) -> list[str]:
    """'Top left: red circle. Right: large bus. How many ...' -> ['red circle', 'large bus']"""
    return [part.split(": ", 1)[1] for part in question.split(". ") if ": " in part]


def answer(kind: str, question: str) -> str:
    """From the English words alone."""
    objects, last = objects_of(question), question.split(". ")[-1]
    if kind == "highest":
        return str(max(map(int, re.findall(r"\d+", question))))
    if kind == "largest":
        (large,) = [obj for obj in objects if obj.startswith("large ")]
        return large.split()[1] if "colour" in last else large.removeprefix("large ")

    def number(name: str) -> int:
        if name.endswith(" shapes"):
            return sum(obj.split()[0] == name.split()[0] for obj in objects)
        return sum(plural(obj) == name or obj.split()[-1] + "s" == name for obj in objects)

    if kind == "count":
        return str(number(re.fullmatch(r"How many (.+) are there\?", last)[1]))
    if kind == "compare":
        first, second = re.fullmatch(r"Are there more (.+) or more (.+)\?", last).groups()
        numbers = number(first), number(second)
        return "equal" if numbers[0] == numbers[1] else (first, second)[numbers[1] > numbers[0]]
    first, second = re.fullmatch(r"How many (.+) and (.+) are there together\?", last).groups()
    return str(number(first) + number(second))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_are_right_by_the_words_alone(split):
    for one in (TEXT.problem(split, i) for i in range(500)):
        if one.language == "en":
            assert one.answer == answer(one.kind, one.question), one


def test_the_counting_names_everything_in_order_with_how_many_of_its_kind_there_were():
    counted = 0
    for one in (TEXT.problem("val", i) for i in range(400)):
        if one.kind in ("count", "compare", "together", "shapes_together") and one.language == "en":
            *objects, last = one.question.split(". ")
            names = [part.split(": ")[1] for part in objects]
            by_colour = last.endswith("shapes are there?")
            kinds = names if one.thoughts.startswith("Things: ") else [name.split()[0 if by_colour else 1] for name in names]
            steps, counts, *_ = one.thoughts.rstrip(".").split(". ")
            by, _, steps = steps.partition(": ")
            assert by == ("Colours" if by_colour else "Shapes" if names != kinds else "Things")
            assert steps.split(", ") == [f"{name} {kinds[:k + 1].count(kinds[k])}" for k, name in enumerate(names)]
            counted += len(counts.split(", "))
            for entry in counts.split(", "):
                many, number = entry.rsplit(" ", 1)
                kind = many.split()[0] if many.endswith(" shapes") else next((k for k in kinds if plural(k) == many), None)
                assert int(number) == kinds.count(kind)
    assert counted > 150


def test_the_chinese_says_the_same_as_the_english():
    for kind, make in perception.SCENES.items():
        for seed in range(40):
            (one, _, glance, thoughts, english), (other, _, blick, gedanken, chinese) = (
                make(random.Random(f"{kind}/{seed}"), language) for language in LANGUAGES)  # fmt: skip
            assert one.state == other.state and one.cells == other.cells
            assert re.findall(r"\d+", thoughts) == re.findall(r"\d+", gedanken)
            assert glance.count(",") == blick.count("，") and not re.search(r"\d", glance + blick)
            assert english == chinese or (not english.isdigit() and not chinese.isascii())


def test_splits_share_no_content():
    states = {split: {problem(split, i).state for i in range(1500)} for split in ("train", "val", "test")}
    assert not states["train"] & states["val"] and not states["train"] & states["test"] and not states["val"] & states["test"]


def test_the_held_out_kind_is_never_trained_and_always_tested():
    assert {problem("train", i).kind for i in range(1000)} == set(TASK.kinds)
    assert "shapes_together" in {problem("test", i).kind for i in range(100)}
    assert len(TASK.train("sft")) == 1000


def test_no_picture_holds_a_combination_that_the_world_holds_out():
    for kind in ("count", "largest", "together"):
        for i in range(300):
            one = problem("train", i)
            if one.kind == kind:
                named = [c for c in categories() if c.en in one.state]
                assert not any(held_out_pair(a, b) for a in named for b in named if a is not b)
    category, n = next((c, n) for c in categories() for n in (2, 3) if chance("count", c.en, n) < 0.1)
    assert holds_out(perception.Content([category] * n, range(n))) and not holds_out(perception.Content([category], [0]))


def test_answers_are_balanced():
    examples = TASK.examples("test", 600)
    counts = Counter(example.answer for example in examples if example.kind == "count")
    assert set(counts) == set("0123456") and max(counts.values()) < 0.25 * counts.total()
    assert TASK.guess(examples) < 0.35
    assert TASK.guess([example for example in examples if example.kind == "compare"]) < 0.45


def test_a_drawn_problem_shows_its_content():
    content = perception.Content([("red", "circle"), ("blue", "triangle")], [0, 8], largest=1)
    regions = content.draw(random.Random(0)).regions
    assert [region.en for region in regions] == ["small red circle", "large blue triangle"]
    assert content.in_words("en") == "Top left: small red circle. Bottom right: large blue triangle."
    assert content.in_words("zh") == "左上：小红色圆形。右下：大蓝色三角形。"
    pixel = content.draw(random.Random(0)).image.getpixel((16, 16))
    assert pixel[0] > 200 > 100 > pixel[1]


def test_random_bytes_are_wrong_and_crash_nothing():
    rng = random.Random(0)
    for example in TASK.examples("test", 40):
        assert TASK.score(example, f"<answer>{example.answer}</answer>") == 1
        assert TASK.score(example, rng.randbytes(60).decode("latin-1")) == 0
