"""Perception and reasoning: count, compare and find the largest among shapes, dice and emoji drawings.

The reasoning first says what it counts, then names each object with a running count of its kind, then answers the question. A
direct answer only names the kinds to look for. Adding up shapes of two kinds is held out: in training shapes are counted and
compared, and only emoji are added up.
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
    """The objects of one picture.

    objects  shapes or categories, in reading order
    cells    the cell of each
    largest  the index of the one large object among small ones, or None
    """

    def __init__(self, objects: Sequence, cells: Sequence[int], largest: int | None = None):
        self.objects, self.cells, self.largest = list(objects), list(cells), largest

    @property
    def state(self) -> tuple:
        """The latent state that decides the split: all objects, wherever they are, and which one is large."""
        names = [name(obj, "en") for obj in self.objects]
        return (*sorted(names), "" if self.largest is None else names[self.largest])

    def draw(self, rng: random.Random) -> drawings.Drawing:
        draw = figures.shapes if isinstance(self.objects[0], tuple) else figures.objects
        return draw(self.objects, self.cells, self.largest, rng)

    def in_words(self, language: str) -> str:
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


def plural_name(kind: str | Category, language: str) -> str:
    """A kind in the plural: 'circles', 'red shapes', 'buses', '圆形'."""
    if isinstance(kind, Category):
        return plural(kind.en) if language == "en" else kind.zh
    if kind in drawings.SHAPES:
        return kind + "s" if language == "en" else drawings.SHAPES[kind]
    return f"{kind} shapes" if language == "en" else drawings.COLOURS[kind][0] + "图形"


KINDS: dict[str, tuple[tuple[str, str], Callable]] = {  # the heading of the counting, and the kind of an object
    "colour": (("Colours: ", "颜色："), lambda obj: obj[0]), "shape": (("Shapes: ", "形状："), lambda obj: obj[1]),
    "thing": (("Things: ", "东西："), lambda obj: obj)}  # fmt: skip


def tally(content: Content, by: str, language: str) -> tuple[Counter, str]:
    """(the count of each kind, the counting as text); `by`: a key of KINDS.

    'Shapes: red circle 1, blue triangle 1, green circle 2.'
    """
    heading, kind = KINDS[by]
    counts: Counter = Counter()
    steps = []
    for obj in content.objects:
        counts[kind(obj)] += 1
        steps.append(name(obj, language) + " " * (language == "en") + str(counts[kind(obj)]))
    return counts, heading[language == "zh"] + COMMA[language].join(steps) + STOP[language]


def totals(counts: Counter, kinds: Sequence[str | Category], language: str) -> str:
    """'circles 2, triangles 1.': the counts of the kinds in question."""
    return COMMA[language].join(plural_name(kind, language) + " " * (language == "en") + str(counts[kind])
                                for kind in kinds) + STOP[language]


def arrange(objects: list, rng: random.Random) -> Content:
    """Shuffle objects (in place) and put each into a cell of its own."""
    rng.shuffle(objects)
    return Content(objects, sorted(rng.sample(range(9), len(objects))))


def random_shapes(rng: random.Random, n: int, shapes: Sequence[str] = SHAPES, colours: Sequence[str] = COLOURS) -> list[Shape]:
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(n)]


def objects_of_kind(rng: random.Random, n: int, kind: str | Category) -> list:
    """n shapes of one kind in random colours, or n objects of one category."""
    return random_shapes(rng, n, [kind]) if isinstance(kind, str) else [kind] * n


# ---------------------------------------------------------------- the kinds of problems

SceneProblem = tuple[Content, str, str, str, str]  # content, question, direct thoughts, thoughts, answer


def count(rng: random.Random, language: str) -> SceneProblem:
    """How many circles, red shapes or buses; the answers 0 to 6 are equally frequent."""
    n, n_others, by = rng.randint(0, 6), rng.randint(1, 3), rng.choice(tuple(KINDS))
    kind: str | Category
    objects: list
    if by == "thing":
        kind, *other_categories = trained_categories(rng, 4)
        objects = [kind] * n + rng.choices(other_categories, k=n_others)
    else:
        words, within = (SHAPES, "shapes") if by == "shape" else (COLOURS, "colours")
        kind = rng.choice(words)
        other_words = [word for word in words if word != kind]
        objects = random_shapes(rng, n, **{within: [kind]}) + random_shapes(rng, n_others, **{within: other_words})
    content = arrange(objects, rng)
    counts, thoughts = tally(content, by, language)
    thoughts = join(language, thoughts, totals(counts, [kind], language))
    question = f"How many {plural_name(kind, 'en')} are there?" if language == "en" else f"有几个{plural_name(kind, 'zh')}？"
    return content, question, targets(language, plural_name(kind, language)), thoughts, str(counts[kind])


def compare(rng: random.Random, language: str) -> SceneProblem:
    """Circles or triangles, buses or cats: which are more? In a fifth of the problems they are equal."""
    shapes = rng.random() < 0.5
    first, second = rng.sample(SHAPES, 2) if shapes else trained_categories(rng, 2)
    more = rng.choices(("equal", "first", "second"), (1, 2, 2))[0]
    low = rng.randint(1, 4)
    high = low if more == "equal" else rng.randint(low + 1, 5)
    a, b = (low, high) if more == "second" else (high, low)
    content = arrange(objects_of_kind(rng, a, first) + objects_of_kind(rng, b, second), rng)
    counts, thoughts = tally(content, "shape" if shapes else "thing", language)
    sign = "=" if a == b else ">" if a > b else "<"
    answer = WORDS[language]["equal"] if a == b else plural_name(first if a > b else second, language)
    question = (f"Are there more {plural_name(first, 'en')} or more {plural_name(second, 'en')}?" if language == "en"
                else f"{plural_name(first, 'zh')}和{plural_name(second, 'zh')}哪个多？")
    thoughts = join(language, thoughts, totals(counts, [first, second], language), f"{a}{sign}{b}.")
    direct_thoughts = targets(language, plural_name(first, language), plural_name(second, language))
    return content, question, direct_thoughts, thoughts, answer


def largest(rng: random.Random, language: str) -> SceneProblem:
    """The colour of the largest shape, or the name of the largest emoji."""
    n = rng.randint(3, 7)
    shapes = rng.random() < 0.5
    objects = random_shapes(rng, n) if shapes else trained_categories(rng, n)
    content = arrange(objects, rng)
    content.largest = rng.randrange(n)
    sizes = [figures.SIZES[k == content.largest][language == "zh"] for k in range(n)]
    names = [f"{size} {name(obj, 'en')}" if language == "en" else size + name(obj, "zh")
             for size, obj in zip(sizes, content.objects)]
    thoughts = COMMA[language].join(names) + STOP[language]
    target = content.objects[content.largest]
    if shapes:
        answer = target[0] if language == "en" else drawings.COLOURS[target[0]][0]
        question = "What colour is the largest shape?" if language == "en" else "最大的图形是什么颜色？"
    else:
        answer = name(target, language)
        question = "What is the largest thing?" if language == "en" else "最大的东西是什么？"
    return content, question, targets(language, ALL[language][shapes]), thoughts, answer


def together(rng: random.Random, language: str) -> SceneProblem:
    """How many objects of two categories there are together, with others beside them."""
    first, second, *others = trained_categories(rng, 4)
    objects = [first] * rng.randint(1, 4) + [second] * rng.randint(1, 4)
    objects += others[:rng.randint(0, min(2, 9 - len(objects)))]
    return sum_of(arrange(objects, rng), first, second, "thing", language)


def shapes_together(rng: random.Random, language: str) -> SceneProblem:
    """How many circles, rectangles or triangles of two kinds there are together."""
    first, second, other = rng.sample(SHAPES, 3)
    objects = random_shapes(rng, rng.randint(1, 4), [first]) + random_shapes(rng, rng.randint(1, 4), [second])
    objects += random_shapes(rng, rng.randint(0, min(2, 9 - len(objects))), [other])
    return sum_of(arrange(objects, rng), first, second, "shape", language)


def sum_of(content: Content, first: str | Category, second: str | Category, by: str, language: str) -> SceneProblem:
    """The problem: how many objects of two kinds are there together? `by` as in `tally`."""
    counts, thoughts = tally(content, by, language)
    a, b = counts[first], counts[second]
    question = (f"How many {plural_name(first, 'en')} and {plural_name(second, 'en')} are there together?" if language == "en"
                else f"{plural_name(first, 'zh')}和{plural_name(second, 'zh')}一共有几个？")
    thoughts = join(language, thoughts, totals(counts, [first, second], language), f"{a}+{b}={a + b}.")
    direct_thoughts = targets(language, plural_name(first, language), plural_name(second, language))
    return content, question, direct_thoughts, thoughts, str(a + b)


def trained_categories(rng: random.Random, n: int) -> list[Category]:
    """n different categories without a pair that the world holds out."""
    while True:
        members = rng.sample(categories(), n)
        if not any(held_out_pair(a, b) for a in members for b in members if a is not b):
            return members


def targets(language: str, *names: str) -> str:
    """'circles, triangles.': what to look for, without places or counts."""
    return COMMA[language].join(names) + STOP[language]


def join(language: str, *sentences: str) -> str:
    return (" " if language == "en" else "").join(sentences)


SCENES = {"count": count, "compare": compare, "largest": largest, "together": together, "shapes_together": shapes_together}
ALL = {"en": ("things", "shapes"), "zh": ("东西", "图形")}
NUMBERS = {"en": ("digits", "dice"), "zh": ("数字", "骰子")}
HIGHEST = {"en": ("What is the highest digit?", "What is the highest die?"), "zh": ("最大的数字是多少？", "最大的骰子是几点？")}


@TASKS.register("perception")
class Perception(ReasoningTask):
    """Counting, comparing, the largest, sums of counts; adding up shapes of two kinds is never trained.

    1,000 rows by default. The objects of a picture decide its split, for all questions about it.
    """

    name = "perception"
    kinds = ("count", "compare", "largest", "together", "highest")
    held_out = ("shapes_together",)

    def __init__(self, rows: int = 1_000, text: bool | None = None, first: int = 0, direct: float = 0.0,
                 new_words: bool = False):
        super().__init__(rows, text, first, direct, new_words)

    def problem(self, split: str, i: int) -> ReasoningProblem:
        rng = random.Random(f"perception/{split}/{i}")
        kind, language = self.kind(split, rng), rng.choice(LANGUAGES)
        if kind == "highest":
            return self.highest(split, i, language, rng)
        make = SCENES[kind]
        content, question, direct_thoughts, thoughts, answer = make(rng, language)
        while split_of("perception", *content.state) != split or holds_out(content):
            content, question, direct_thoughts, thoughts, answer = make(rng, language)
        seed = rng.random()
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = join(language, content.in_words(language), question)
        else:
            placed = [(name(obj, "en"), cell) for obj, cell in zip(content.objects, content.cells)]
            pictures = (drawn(f"perception:{placed}:{content.largest}", content.draw, seed),)
        state = ("perception", *content.state)
        return ReasoningProblem(kind, language, pictures, question, thoughts, answer, state, direct_thoughts)

    def highest(self, split: str, i: int, language: str, rng: random.Random) -> ReasoningProblem:
        """The highest of three to seven digits or dice, by a running maximum: '3, 5, 1. 3, 5, 5.'"""
        dice = rng.random() < 0.5
        values: list[int] = []
        while not values or split_of(*(state := ("perception", "highest", *sorted(values)))) != split:
            values = [rng.randint(1, 6) if dice else rng.randint(0, 9) for _ in range(rng.randint(3, 7))]
        so_far = [max(values[: k + 1]) for k in range(len(values))]
        reading = f"{', '.join(map(str, values))}."
        question, seed = HIGHEST[language][dice], rng.random()
        pictures: tuple[Picture, ...] = ()
        if self.words_only(i):
            question = join(language, ", ".join(map(str, values)) + STOP[language], question)
        else:
            draw = drawings.dice if dice else drawings.digits
            pictures = (drawn(f"perception:{draw.__name__}:{values}", lambda drawing_rng: draw(values, drawing_rng), seed),)
        thoughts = f"{reading} {', '.join(map(str, so_far))}."
        direct_thoughts = targets(language, NUMBERS[language][dice])
        return ReasoningProblem("highest", language, pictures, question, thoughts, str(max(values)), state, direct_thoughts)


def holds_out(content: Content) -> bool:
    """Whether the picture has a category x count combination that the world holds out."""
    counts = Counter(obj for obj in content.objects if isinstance(obj, Category))
    return any(chance("count", category.en, n) < 0.1 for category, n in counts.items() if n > 1)
