"""Geometry: third angles, areas, perimeters and hypotenuses of labelled figures, in pictures or in words.

The reasoning reads the labels that it needs, then takes one step of arithmetic at a time. For areas and perimeters it first
names the rectangle around the figure. The perimeter of an L is held out: its question is trained (for rectangles) and its
figure is trained (for areas), but not the two together.
"""
from __future__ import annotations

import random
from collections.abc import Callable

from dataset.images import Picture
from dataset.tasks.reasoning import ReasoningProblem, ReasoningTask, drawn, split_of
from dataset.world import figures
from dataset.world.openmoji import LANGUAGES
from model.registry import TASKS

TRIPLES = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29))  # legs and hypotenuse, times any factor
ASK = {
    "en": {"angle": "What is the third angle?", "area": "What is the area?", "perimeter": "What is the perimeter?",
           "hypotenuse": "What is the hypotenuse?"},
    "zh": {"angle": "第三个角是多少？", "area": "面积是多少？", "perimeter": "周长是多少？", "hypotenuse": "斜边是多少？"},
}
WORDS = {
    "en": {"angle": "A triangle has the angles {} and {}.", "rectangle": "A rectangle has the sides {} and {}.",
           "l": "An L shape has the sides top {}, left {}, right {}, bottom {}.",
           "hypotenuse": "A right triangle has the legs {} and {}."},
    "zh": {"angle": "三角形的两个角是{}和{}。", "rectangle": "长方形的边长是{}和{}。",
           "l": "L形的边长：上{}，左{}，右{}，下{}。", "hypotenuse": "直角三角形的直角边是{}和{}。"},
}  # fmt: skip
AROUND = {"en": "Around it: {}, {}. ", "zh": "外框：{}，{}。"}
CUT = {"en": " Cut out: ", "zh": "缺角："}

# ---------------------------------------------------------------- numbers, steps and answers, by kind


def angles(rng: random.Random) -> list[int]:
    """Two angles of 10 to 90 degrees in steps of 5, which leave a third; steps of 10 would give few enough pairs to memorise."""
    return [5 * rng.randint(2, 18), 5 * rng.randint(2, 17)][:: rng.choice((1, -1))]


def sides(rng: random.Random) -> list[int]:
    return [rng.randint(1, 9), rng.randint(1, 9)]


def l_sides(rng: random.Random) -> list[int]:
    """Top, left, right and bottom of an L: the top is shorter than the bottom, the right than the left."""
    bottom, left = rng.randint(2, 9), rng.randint(2, 9)
    return [rng.randint(1, bottom - 1), left, rng.randint(1, left - 1), bottom]


def legs(rng: random.Random) -> list[int]:
    """Two legs of a right triangle whose hypotenuse is an integer below 100."""
    triple = rng.choice(TRIPLES)
    factor = rng.randint(1, 99 // triple[2])
    return [factor * triple[0], factor * triple[1]][:: rng.choice((1, -1))]


def third_angle(language: str, a: int, b: int) -> tuple[str, int]:
    return f"{a}, {b}. {a}+{b}={a + b}, 180-{a + b}={180 - a - b}.", 180 - a - b


def area(language: str, a: int, b: int) -> tuple[str, int]:
    return f"{AROUND[language].format(a, b)}{a}*{b}={a * b}.", a * b


def perimeter(language: str, a: int, b: int) -> tuple[str, int]:
    return f"{AROUND[language].format(a, b)}{a}+{b}={a + b}, 2*{a + b}={2 * (a + b)}.", 2 * (a + b)


def l_area(language: str, top: int, left: int, right: int, bottom: int) -> tuple[str, int]:
    """The area of the rectangle around the L, minus the corner that is cut out."""
    outer_steps, outer = area(language, left, bottom)
    high, wide = left - right, bottom - top
    cut = high * wide
    steps = f"{left}-{right}={high}, {bottom}-{top}={wide}, {high}*{wide}={cut}, {outer}-{cut}={outer - cut}."
    return outer_steps + CUT[language] + steps, outer - cut


def l_perimeter(language: str, top: int, left: int, right: int, bottom: int) -> tuple[str, int]:
    """The perimeter of the rectangle around the L: a corner that is cut out does not shorten it."""
    return perimeter(language, left, bottom)


def hypotenuse(language: str, a: int, b: int) -> tuple[str, int]:
    """The hypotenuse, from the known triple of which both legs are the same multiple."""
    for triple in TRIPLES:
        for first, second in (triple[:2], triple[1::-1]):
            if a * second == b * first:
                factor = a // first
                longest = factor * triple[2]
                return f"{a}, {b}. {a}={factor}*{first}, {b}={factor}*{second}, {factor}*{triple[2]}={longest}.", longest
    raise ValueError(f"{a} and {b} are not the legs of a multiple of {TRIPLES}")


Numbers = Callable[[random.Random], list[int]]
KINDS: dict[str, tuple[Numbers, Callable[..., tuple[str, int]], str, str]] = {  # numbers, steps, question, words
    "angle": (angles, third_angle, "angle", "angle"),
    "area": (sides, area, "area", "rectangle"),
    "perimeter": (sides, perimeter, "perimeter", "rectangle"),
    "l_area": (l_sides, l_area, "area", "l"),
    "hypotenuse": (legs, hypotenuse, "hypotenuse", "hypotenuse"),
    "l_perimeter": (l_sides, l_perimeter, "perimeter", "l"),
}


def draw(kind: str, values: list[int], rng: random.Random) -> figures.Drawing:
    """The figure of a problem, labelled with its numbers in reading order."""
    if kind == "angle":
        labels = [f"{value}°" for value in values]
        labels.insert(rng.randrange(3), "?")
        return figures.triangle(labels, rng)
    draw_figure = {"rectangle": figures.rectangle, "l": figures.l_shape, "hypotenuse": figures.right_triangle}[KINDS[kind][3]]
    return draw_figure(values, rng)


def state_of(words: str, values: list[int]) -> tuple:
    """The latent state that decides the split: the numbers of a figure, equal for its mirror images."""
    return "geometry", words, *(min(values, values[::-1]) if words == "l" else sorted(values))


@TASKS.register("geometry")
class Geometry(ReasoningTask):
    """Angles, areas, perimeters and hypotenuses of labelled figures; the perimeter of an L is never trained.

    1,000 rows by default. The numbers of a figure decide its split, for all questions about it.
    """

    name = "geometry"
    kinds = ("angle", "area", "perimeter", "l_area", "hypotenuse")
    held_out = ("l_perimeter",)

    def __init__(self, rows: int = 1_000, text: bool | None = None, first: int = 0, direct: float = 0.0,
                 new_words: bool = False):
        super().__init__(rows, text, first, direct, new_words)

    def problem(self, split: str, i: int) -> ReasoningProblem:
        rng = random.Random(f"geometry/{split}/{i}")
        kind, language = self.kind(split, rng), rng.choice(LANGUAGES)
        sample_numbers, steps, topic, words = KINDS[kind]
        values = sample_numbers(rng)
        while split_of(*(state := state_of(words, values))) != split:
            values = sample_numbers(rng)
        thoughts, answer = steps(language, *values)
        question, seed = ASK[language][topic], rng.random()
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            labels = [f"{value}°" if kind == "angle" else str(value) for value in values]
            question = WORDS[language][words].format(*labels) + (" " if language == "en" else "") + question
        else:
            pictures = (drawn(f"geometry:{kind}:{values}", lambda drawing_rng: draw(kind, values, drawing_rng), seed),)
        direct_thoughts = f"{', '.join(map(str, values))}."
        return ReasoningProblem(kind, language, pictures, question, thoughts, str(answer), state, direct_thoughts)
