"""Perception and reasoning: count, compare and find the largest among shapes, dice and emoji drawings.

The reasoning says what it counts, names one thing after the other, each with how many of its kind there were, and only then turns
to what is asked; at a glance (`direct`) it only says what it looks for. How many circles and triangles there are together is held
out: shapes are counted and compared, emoji drawings are also added up.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from dataset.images import Picture
from dataset.tasks.reasoning import ReasoningProblem, ReasoningTask, drawn, split_of
from dataset.world import drawings, figures
from dataset.world.openmoji import LANGUAGES, Category, categories, plural
from dataset.world.questions import WORDS
from dataset.world.scenes import chance, held_out_pair
from dataset.world.words import PLACES
from model.registry import TASKS

Shape = tuple[str, str]  # colour and shape, in English
COLOURS, SHAPES = sorted(drawings.COLOURS), sorted(drawings.SHAPES)
COMMA, STOP = {"en": ", ", "zh": "，"}, {"en": ".", "zh": "。"}


class Content:
    """What lies in the cells of one picture: names, and the words for them.

    things   shapes or categories, in reading order
    cells    where each lies
    largest  the number of the thing that is large where the others are small, or None
    """

    def __init__(self, objects: Sequence, cells: Sequence[int], largest: int | None = None):
        self.objects, self.cells, self.largest = list(objects), list(cells), largest

    @property
    def state(self) -> tuple:
        """What is there, wherever it lies; and which of it is large."""
        names = [name(obj, "en") for obj in self.objects]
        return (*sorted(names), "" if self.largest is None else names[self.largest])

    def draw(self, rng: random.Random) -> drawings.Drawing:
        draw = figures.shapes if isinstance(self.objects[0], tuple) else figures.objects
        return draw(self.objects, self.cells, self.largest, rng)

    def told(self, language: str) -> str:
        """The picture in words: 'Top left: red circle. Right: blue triangle.'"""
        parts = []
        for k, (obj, cell) in enumerate(zip(self.objects, self.cells)):
            size = "" if self.largest is None else figures.SIZES[k == self.largest][language == "zh"]
            place = PLACES[language][cell]
            parts.append(f"{place.capitalize()}: {size} {name(obj, 'en')}.".replace(":  ", ": ") if language == "en"
                         else f"{place}：{size}{name(obj, 'zh')}。")
        return " ".join(parts) if language == "en" else "".join(parts)


def name(obj: Shape | Category, language: str) -> str:
    """'red circle', 'bus', '红色圆形'."""
    if isinstance(obj, Category):
        return obj.name(language)
    return " ".join(obj) if language == "en" else drawings.COLOURS[obj[0]][0] + drawings.SHAPES[obj[1]]


def many(what: str | Category, language: str) -> str:
    """What is counted, in the plural: 'circles', 'red shapes', 'buses', '圆形'."""
    if isinstance(what, Category):
        return plural(what.en) if language == "en" else what.zh
    if what in drawings.SHAPES:
        return what + "s" if language == "en" else drawings.SHAPES[what]
    return f"{what} shapes" if language == "en" else drawings.COLOURS[what][0] + "图形"


KINDS: dict[str, tuple[tuple[str, str], Callable]] = {  # how it is said, and of a thing its kind
    "colour": (("Colours: ", "颜色："), lambda obj: obj[0]), "shape": (("Shapes: ", "形状："), lambda obj: obj[1]),
    "thing": (("Things: ", "东西："), lambda obj: obj)}  # fmt: skip


def tally(content: Content, by: str, language: str) -> tuple[Counter, str]:
    """How many there are of every kind (`by` colour, shape or thing), and the counting:
    'Shapes: red circle 1, blue triangle 1, green circle 2.'"""
    said, kind = KINDS[by]
    numbers: Counter = Counter()
    steps = []
    for obj in content.objects:
        numbers[kind(obj)] += 1
        steps.append(name(obj, language) + " " * (language == "en") + str(numbers[kind(obj)]))
    return numbers, said[language == "zh"] + COMMA[language].join(steps) + STOP[language]


def found(numbers: Counter, kinds: Sequence[str | Category], language: str) -> str:
    """'circles 2, triangles 1.': of the kinds that are asked for, what the counting came to."""
    return COMMA[language].join(many(kind, language) + " " * (language == "en") + str(numbers[kind])
                                for kind in kinds) + STOP[language]


def in_order(objects: list, rng: random.Random) -> Content:
    """Things in cells of their own, shuffled."""
    rng.shuffle(objects)
    return Content(objects, sorted(rng.sample(range(9), len(objects))))


def some_shapes(rng: random.Random, n: int, shapes: Sequence[str] = SHAPES, colours: Sequence[str] = COLOURS) -> list[Shape]:
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(n)]


def of_kind(rng: random.Random, n: int, kind: str | Category) -> list:
    """So many shapes of one kind, in any colours, or things of one category."""
    return some_shapes(rng, n, [kind]) if isinstance(kind, str) else [kind] * n


# ---------------------------------------------------------------- the kinds: (content, question, glance, thoughts, answer)

Made = tuple[Content, str, str, str, str]


def count(rng: random.Random, language: str) -> Made:
    """How many circles, red shapes, or buses; each number from 0 to 6 as often as the others."""
    number, rest, by = rng.randint(0, 6), rng.randint(1, 3), rng.choice(tuple(KINDS))
    what: str | Category
    objects: list
    if by == "thing":
        what, *things = trained_things(rng, 4)
        objects = [what] * number + rng.choices(things, k=rest)
    else:
        words, within = (SHAPES, "shapes") if by == "shape" else (COLOURS, "colours")
        what = rng.choice(words)
        others = [word for word in words if word != what]
        objects = some_shapes(rng, number, **{within: [what]}) + some_shapes(rng, rest, **{within: others})
    content = in_order(objects, rng)
    numbers, thoughts = tally(content, by, language)
    thoughts = join(language, thoughts, found(numbers, [what], language))
    question = f"How many {many(what, 'en')} are there?" if language == "en" else f"有几个{many(what, 'zh')}？"
    return content, question, glance(language, many(what, language)), thoughts, str(numbers[what])


def compare(rng: random.Random, language: str) -> Made:
    """Circles or triangles, buses or cats: which are more. A fifth is equal."""
    shapes = rng.random() < 0.5
    first, second = rng.sample(SHAPES, 2) if shapes else trained_things(rng, 2)
    more = rng.choices(("equal", "first", "second"), (1, 2, 2))[0]
    low = rng.randint(1, 4)
    high = low if more == "equal" else rng.randint(low + 1, 5)
    one, two = (low, high) if more == "second" else (high, low)
    content = in_order(of_kind(rng, one, first) + of_kind(rng, two, second), rng)
    numbers, thoughts = tally(content, "shape" if shapes else "thing", language)
    sign = "=" if one == two else ">" if one > two else "<"
    answer = WORDS[language]["equal"] if one == two else many(first if one > two else second, language)
    question = (f"Are there more {many(first, 'en')} or more {many(second, 'en')}?" if language == "en"
                else f"{many(first, 'zh')}和{many(second, 'zh')}哪个多？")
    thoughts = join(language, thoughts, found(numbers, [first, second], language), f"{one}{sign}{two}.")
    return content, question, glance(language, many(first, language), many(second, language)), thoughts, answer


def largest(rng: random.Random, language: str) -> Made:
    """The colour of the largest shape, or the name of the largest thing."""
    n = rng.randint(3, 7)
    shapes = rng.random() < 0.5
    objects = some_shapes(rng, n) if shapes else trained_things(rng, n)
    content = in_order(objects, rng)
    content.largest = rng.randrange(n)
    sizes = [figures.SIZES[k == content.largest][language == "zh"] for k in range(n)]
    seen = [f"{size} {name(obj, 'en')}" if language == "en" else size + name(obj, "zh")
            for size, obj in zip(sizes, content.objects)]
    thoughts = COMMA[language].join(seen) + STOP[language]
    chosen = content.objects[content.largest]
    if shapes:
        answer = chosen[0] if language == "en" else drawings.COLOURS[chosen[0]][0]
        question = "What colour is the largest shape?" if language == "en" else "最大的图形是什么颜色？"
    else:
        answer = name(chosen, language)
        question = "What is the largest thing?" if language == "en" else "最大的东西是什么？"
    return content, question, glance(language, ALL[language][shapes]), thoughts, answer


def together(rng: random.Random, language: str) -> Made:
    """How many of two categories there are together, among others."""
    first, second, *others = trained_things(rng, 4)
    objects = [first] * rng.randint(1, 4) + [second] * rng.randint(1, 4)
    objects += others[:rng.randint(0, min(2, 9 - len(objects)))]
    return sum_of(in_order(objects, rng), first, second, "thing", language)


def shapes_together(rng: random.Random, language: str) -> Made:
    """The same with circles, rectangles and triangles."""
    first, second, other = rng.sample(SHAPES, 3)
    objects = some_shapes(rng, rng.randint(1, 4), [first]) + some_shapes(rng, rng.randint(1, 4), [second])
    objects += some_shapes(rng, rng.randint(0, min(2, 9 - len(objects))), [other])
    return sum_of(in_order(objects, rng), first, second, "shape", language)


def sum_of(content: Content, first: str | Category, second: str | Category, by: str, language: str) -> Made:
    """How many there are of two kinds; `by` as in `tally`."""
    numbers, thoughts = tally(content, by, language)
    one, two = numbers[first], numbers[second]
    question = (f"How many {many(first, 'en')} and {many(second, 'en')} are there together?" if language == "en"
                else f"{many(first, 'zh')}和{many(second, 'zh')}一共有几个？")
    thoughts = join(language, thoughts, found(numbers, [first, second], language), f"{one}+{two}={one + two}.")
    return content, question, glance(language, many(first, language), many(second, language)), thoughts, str(one + two)


def trained_things(rng: random.Random, n: int) -> list[Category]:
    """Different categories, no two of which are a pair that the world holds out."""
    while True:
        chosen = rng.sample(categories(), n)
        if not any(held_out_pair(a, b) for a in chosen for b in chosen if a is not b):
            return chosen


def glance(language: str, *names: str) -> str:
    """'circles, triangles.': what is looked for, and nothing of where it is or how much of it."""
    return COMMA[language].join(names) + STOP[language]


def join(language: str, *sentences: str) -> str:
    return (" " if language == "en" else "").join(sentences)


SCENES = {"count": count, "compare": compare, "largest": largest, "together": together, "shapes_together": shapes_together}
ALL = {"en": ("things", "shapes"), "zh": ("东西", "图形")}
NUMBERS = {"en": ("digits", "dice"), "zh": ("数字", "骰子")}
HIGHEST = {"en": ("What is the highest digit?", "What is the highest die?"), "zh": ("最大的数字是多少？", "最大的骰子是几点？")}


@TASKS.register("perception")
class Perception(ReasoningTask):
    """Counting, comparing, the largest, sums of counts; how many shapes of two kinds there are together is never trained.

    1,000 rows by default; split by what lies in a picture, whatever is asked about it.
    """

    name = "perception"
    kinds = ("count", "compare", "largest", "together", "highest")
    held_out = ("shapes_together",)

    def __init__(self, rows: int = 1_000, text: bool | None = None, first: int = 0, direct: float = 0.0):
        super().__init__(rows, text, first, direct)

    def problem(self, split: str, i: int) -> ReasoningProblem:
        rng = random.Random(f"perception/{split}/{i}")
        kind, language = self.kind(split, rng), rng.choice(LANGUAGES)
        if kind == "highest":
            return self.highest(split, i, language, rng)
        make = SCENES[kind]
        content, question, looked_for, thoughts, answer = make(rng, language)
        while split_of("perception", *content.state) != split or holds_out(content):
            content, question, looked_for, thoughts, answer = make(rng, language)
        seed = rng.random()
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = join(language, content.told(language), question)
        else:
            shown = [(name(obj, "en"), cell) for obj, cell in zip(content.objects, content.cells)]
            pictures = (drawn(f"perception:{shown}:{content.largest}", content.draw, seed),)
        state = ("perception", *content.state)
        return ReasoningProblem(kind, language, pictures, question, thoughts, answer, state, looked_for)

    def highest(self, split: str, i: int, language: str, rng: random.Random) -> ReasoningProblem:
        """The highest of three to seven digits or dice, by the highest so far: '3, 5, 1. 3, 5, 5.'"""
        dice = rng.random() < 0.5
        values: list[int] = []
        while not values or split_of(*(state := ("perception", "highest", *sorted(values)))) != split:
            values = [rng.randint(1, 6) if dice else rng.randint(0, 9) for _ in range(rng.randint(3, 7))]
        so_far = [max(values[: k + 1]) for k in range(len(values))]
        seen = f"{', '.join(map(str, values))}."
        question, seed = HIGHEST[language][dice], rng.random()
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = join(language, ", ".join(map(str, values)) + STOP[language], question)
        else:
            draw = drawings.dice if dice else drawings.digits
            pictures = (drawn(f"perception:{draw.__name__}:{values}", lambda own: draw(values, own), seed),)
        thoughts = f"{seen} {', '.join(map(str, so_far))}."
        looked_for = glance(language, NUMBERS[language][dice])
        return ReasoningProblem("highest", language, pictures, question, thoughts, str(max(values)), state, looked_for)


def holds_out(content: Content) -> bool:
    """Whether the picture has so many of a category as the world never trains."""
    counts = Counter(obj for obj in content.objects if isinstance(obj, Category))
    return any(chance("count", category.en, n) < 0.1 for category, n in counts.items() if n > 1)
