"""Geometry: answers computed here from the figure's numbers in another way, splits, balance, and the figures themselves."""

import random
import re
from collections import Counter
from math import isqrt

import pytest

from dataset.studies import probe
from dataset.tasks.geometry import Geometry, draw
from dataset.tasks.reasoning import body, split_of
from dataset.world import figures

TASK = Geometry()


def answer(kind: str, values: list[int]) -> int:
    """By counting squares of paper, by Pythagoras, by the sum of the angles."""
    if kind == "angle":
        return next(third for third in range(1, 180) if sum(values) + third == 180)
    if kind == "hypotenuse":
        squares = sum(value**2 for value in values)
        assert isqrt(squares) ** 2 == squares
        return isqrt(squares)
    if kind in ("area", "perimeter"):
        paper = {(x, y) for x in range(values[0]) for y in range(values[1])}
    else:
        top, left, right, bottom = values
        paper = {(x, y) for x in range(bottom) for y in range(left) if x < top or y < right}
    around = [(x + dx, y + dy) for x, y in paper for dx, dy in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    return len(paper) if kind.endswith("area") else sum(square not in paper for square in around)


def problems(split: str, n: int = 600, task: Geometry = TASK):
    return [task.problem(split, i) for i in range(n)]


def values_of(one) -> list[int]:
    return list(map(int, one.direct_thoughts.rstrip(".").split(", ")))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_answers_are_right_by_another_computation(split):
    for one in problems(split):
        assert int(one.answer) == answer(one.kind, values_of(one)) > 0, one


def test_every_step_of_the_reasoning_is_true_and_the_last_one_is_the_answer():
    for one in problems("val"):
        steps = re.findall(r"([\d+*-]+)=([\d+*-]+)", one.thoughts)
        for left, right in steps:
            numbers = [[int(factor) for factor in re.findall(r"\d+", side)] for side in (left, right)]
            made = [n[0] if len(n) == 1 else {"+": sum(n), "-": n[0] - n[-1], "*": n[0] * n[-1]}[re.search(r"[+*-]", side)[0]]
                    for n, side in zip(numbers, (left, right))]  # fmt: skip
            assert made[0] == made[1], one
        assert steps[-1][1] == one.answer


def test_an_area_and_a_perimeter_begin_with_the_sides_of_what_lies_around_the_figure():
    for one in problems("val"):
        around = re.match(r"(?:Around it: |外框：)(\d+)(?:, |，)(\d+)(?:\. |。)(\d+)([*+])(\d+)=", one.thoughts)
        assert (around is None) == (one.kind in ("angle", "hypotenuse"))
        if around:
            values = values_of(one)
            assert list(map(int, around.group(1, 2))) == (values if len(values) == 2 else [values[1], values[3]])
            assert around.group(1, 2) == around.group(3, 5) and (around[4] == "*") == one.kind.endswith("area")


def test_splits_share_no_figure_in_any_form():
    states = {split: {one.state for one in problems(split, 2000)} for split in ("train", "val", "test")}
    assert not states["train"] & states["val"] and not states["train"] & states["test"] and not states["val"] & states["test"]
    for split, own in states.items():
        assert all(split_of(*state) == split for state in own)
        assert set(Counter(state[1] for state in own)) == {"angle", "rectangle", "l", "hypotenuse"}
    mirrored = [one for one in problems("train", 2000, Geometry(text=True)) if one.state in states["test"]]
    assert not mirrored


def test_the_held_out_kind_is_never_trained_and_always_tested():
    assert {one.kind for one in problems("train", 2000)} == set(TASK.kinds)
    assert {one.kind for one in problems("test", 500)} == {*TASK.kinds, "l_perimeter"}
    rows = TASK.train("sft")
    assert len(rows) == 1000 and TASK.train("pretrain") is None
    assert not any("L shape" in rows[i].messages[0].text and "perimeter" in rows[i].messages[0].text for i in range(len(rows)))


def test_text_twins_hold_every_number_and_no_picture():
    for one in problems("test", 300, Geometry(text=True)):
        assert not one.pictures
        assert list(map(int, re.findall(r"\d+", one.question))) == values_of(one)
    forms = [bool(one.pictures) for one in problems("test", 30)]
    assert forms == [i % 3 != 2 for i in range(30)]


def test_both_languages_and_answers_that_cannot_be_guessed():
    examples = TASK.examples("test", 500)
    assert 0.4 < Counter(example.tags[0] for example in examples)["zh"] / 500 < 0.6
    assert TASK.guess(examples) < 0.15


def test_a_picture_is_a_function_of_its_key():
    for one in problems("train", 9):
        for picture in one.pictures:
            assert picture.load().tobytes() == picture.load().tobytes() and picture.load().size == (96, 96)
    keys = [picture.key for one in problems("train", 900) for picture in one.pictures]
    assert len(keys) == len(set(keys)) == 600


def test_every_label_has_a_cell_for_itself_and_stands_in_reading_order():
    rng = random.Random(0)
    for one in problems("train", 300):
        values = values_of(one)
        labels = probe.by_cell(draw(one.kind, values, rng))
        assert len({cell for cell, _ in labels}) == len(labels)
        numbers = [int(name.split()[-1]) for _, name in sorted(labels) if not name.endswith("?")]
        assert numbers == values
    assert all(0 <= edge <= 96 for kind in figures.RANDOM.values() for region in kind(rng).regions for edge in region.box)


def test_only_the_body_of_the_answer_counts():
    example = TASK.examples("test", 1)[0]
    right = example.answer
    scores = {f"<think>x</think><answer>{right}</answer>": 1, f"<answer> {right}. </answer>": 1, right: 0, f"<answer>{right}": 0,
              f"<answer>{right}0</answer>": 0, "": 0, "<answer></answer>": 0}  # fmt: skip
    assert {answer: TASK.score(example, answer) for answer in scores} == scores
    assert body("<answer>a</answer>b</answer>") == "a" and body("</answer><answer>") is None
    rng = random.Random(0)
    for _ in range(200):
        assert TASK.score(example, rng.randbytes(40).decode("utf-8", errors="replace")) == 0


def test_the_summary_keeps_the_held_out_kind_apart():
    examples = TASK.examples("test", 300)
    metrics = TASK.summary(examples, [float(example.kind == "l_perimeter") for example in examples])
    assert (metrics["accuracy"], metrics["held_out"], metrics["l_perimeter"], metrics["image"]) == (0, 1, 1, 0)
