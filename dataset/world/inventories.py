"""Inventories: names, each with the answer right behind it. "The bus at the top left, the key at the center."

To answer "Is there a bus?" a model must find the name in the picture, keep what it found, and fetch it a few tokens later.
Neither step lowers the loss without the other, so that neither begins: thousands of questions teach nothing. Here one step
is enough, and after some hundred large batches the far answers come with the near ones. The names are given, the answers alone
are learned.

In:  one scene or two, a language, a random generator.  Out: [(given, learned), ...].
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.world.openmoji import Category, categories, plural, with_article
from dataset.world.questions import SIDES, WORDS, changed, named, related, single_objects
from dataset.world.scenes import Scene
from dataset.world.words import PLACES

ONE = ("place", "exists", "count", "what", "relation")  # kinds about one scene; "what" asks of places, "relation" of pairs
TWO = ("which_picture", "together", "change")  # kinds about two; "change" asks of places, the others of things
ASKED = 6  # places of nine in an inventory of places, pairs of things in one of relations
ASK = {
    "en": {"place": "Give the place of each.", "exists": "Check for each.", "count": "Count each.",
           "what": "What is at each place?", "relation": "Check each pair.",
           "which_picture": "In which picture is each?", "together": "Count each in both pictures together.",
           "change": "Compare each place."},
    "zh": {"place": "说出每个的位置。", "exists": "检查每个。", "count": "数一数每个。",
           "what": "每个位置是什么？", "relation": "检查每一对。", "which_picture": "每个在哪张图里？",
           "together": "数一数两张图里的每个。", "change": "比较每个位置。"},
}
IN_WHICH = {"en": ("neither", "the first", "the second", "both"), "zh": ("都没有", "第一张", "第二张", "都有")}
ENGLISH_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
                   "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")  # two pictures of nine places


def conversation(id: str, pictures: Sequence[Picture], question: str, said: Sequence[tuple[str, str]]) -> Conversation:
    """A question about pictures, and lines of (given, learned) as its answer."""
    parts = tuple(part for given, learned in said for part in (Prefill(given), learned))
    return Conversation(id, (Message("user", (*pictures, question)), Message("assistant", parts)))


def lines(kind: str, scenes: Sequence[Scene], language: str, rng: random.Random, which: str) -> list[tuple[str, str]]:
    """Names in any order, each with its answer: [("a bus", " yes"), (", an ant", " no")]; [] where no pair is clear."""
    comma, space = (", ", " ") if language == "en" else ("，", "")
    if kind in ("what", "change"):
        tell = {"what": what, "change": change}[kind]
        found = [(place(cell, language), tell(scenes, cell, language)) for cell in rng.sample(range(9), ASKED)]
    elif kind == "relation":
        found = list(dict(line for _ in range(ASKED) if (line := relation(scenes[0], language, rng))).items())
    else:
        asked = names(kind, scenes, rng, which)
        rng.shuffle(asked)
        found = [(name(kind, category, language), answer(kind, scenes, category, language)) for category in asked]
    return [(comma * (i > 0) + given, space + learned) for i, (given, learned) in enumerate(found)]


def relation(scene: Scene, language: str, rng: random.Random) -> tuple[str, str] | None:
    """("the bus left of the key", "yes"), ("公交车在钥匙左边", "是")."""
    if not (found := related(scene, rng)):
        return None
    a, b, side, yes = found
    words = SIDES[language][side]
    given = (f"the {a.category.en} {words} the {b.category.en}" if language == "en"
             else f"{a.category.zh}在{b.category.zh}{words}")
    return given, WORDS[language]["yes" if yes else "no"]


def place(cell: int, language: str) -> str:
    """'the top left', '左上'."""
    return f"the {PLACES['en'][cell]}" if language == "en" else PLACES["zh"][cell]


def at(scene: Scene, cell: int) -> Category | None:
    """What lies in a cell."""
    return next((obj.category for obj in scene.objects if obj.cell == cell), None)


def what(scenes: Sequence[Scene], cell: int, language: str) -> str:
    """What is at a place of the one scene: 'an ant', 'nothing'."""
    category = at(scenes[0], cell)
    return named(category, language) if category else WORDS[language]["nothing"]


def change(scenes: Sequence[Scene], cell: int, language: str) -> str:
    """What became of a place from the first scene to the second, as the question about a whole picture is answered."""
    before, after = (at(scene, cell) for scene in scenes)
    if before == after:
        return WORDS[language]["nothing" if before is None else "same"]
    kind = "added" if before is None else "removed" if after is None else "replaced"
    return changed(kind, before, after, language)


def names(kind: str, scenes: Sequence[Scene], rng: random.Random, which: str) -> list[Category]:
    """The categories of the scenes and others that are not there, so that no answer is much commoner; for places, those that
    appear once."""
    present = list(dict.fromkeys(category for scene in scenes for category in scene.counts))
    if kind == "place":
        return [obj.category for obj in single_objects(scenes[0])] or present[:1]
    absent = [category for category in rng.sample(categories(which), 30) if category not in present]
    return present + absent[:len(present) if kind == "exists" else len(present) // 3 + 1]


def name(kind: str, category: Category, language: str) -> str:
    if language == "zh":
        return category.zh
    if kind in ("exists", "which_picture"):
        return with_article(category.en)
    return f"the {category.en if kind == 'place' else plural(category.en)}"


def answer(kind: str, scenes: Sequence[Scene], category: Category, language: str) -> str:
    """The truth about a category in a scene or two."""
    if kind == "place":
        cell = PLACES[language][next(obj.cell for obj in scenes[0].objects if obj.category == category)]
        return f"at the {cell}" if language == "en" else cell
    numbers = [scene.counts[category] for scene in scenes]
    if kind == "exists":
        return WORDS[language]["yes" if numbers[0] else "no"]
    if kind == "which_picture":
        return IN_WHICH[language][bool(numbers[0]) + 2 * bool(numbers[1])]
    return ENGLISH_NUMBERS[sum(numbers)] if language == "en" else str(sum(numbers))
