"""Inventories: a list of names, each followed by its answer. "The bus at the top left, the key at the center."

To answer "Is there a bus?" a model must find the name in the picture, store the result, and fetch it a few tokens later.
Neither step lowers the loss without the other, so the model starts to learn neither. In an inventory one step is enough: the
answer follows its name at once. Names are prefilled (not learned); only answers are learned.

In:  one scene or two, a language, a random generator.  Out: [(prefill, learned), ...].
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation, Message, Prefill
from dataset.images import Picture
from dataset.world.openmoji import Category, categories, plural, with_article
from dataset.world.questions import SIDES, WORDS, changed, named, placed, related, single_objects
from dataset.world.scenes import Scene
from dataset.world.words import PLACES

# Kinds; "what" names places, "exists_at" a thing and a place, "relation" pairs of objects.
ONE_SCENE = ("place", "exists", "count", "what", "exists_at", "relation")
TWO_SCENES = ("which_picture", "together", "change")  # kinds; "change" names places, the others objects
LENGTH = 6  # lines of an inventory of places, things at places, or relations
ASK = {
    "en": {"place": "Give the place of each.", "exists": "Check for each.", "count": "Count each.",
           "what": "What is at each place?", "exists_at": "Check each place.", "relation": "Check each pair.",
           "which_picture": "In which picture is each?", "together": "Count each in both pictures together.",
           "change": "Compare each place."},
    "zh": {"place": "说出每个的位置。", "exists": "检查每个。", "count": "数一数每个。",
           "what": "每个位置是什么？", "exists_at": "检查每个位置。", "relation": "检查每一对。",
           "which_picture": "每个在哪张图里？", "together": "数一数两张图里的每个。", "change": "比较每个位置。"},
}
IN_WHICH = {"en": ("neither", "the first", "the second", "both"), "zh": ("都没有", "第一张", "第二张", "都有")}
ENGLISH_NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
                   "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen")  # up to two times nine objects


def conversation(id: str, pictures: Sequence[str | Picture], question: str, lines: Sequence[tuple[str, str]]) -> Conversation:
    """A question about pictures, answered by lines of (prefill, learned)."""
    parts = tuple(part for prefill, learned in lines for part in (Prefill(prefill), learned))
    return Conversation(id, (Message("user", (*pictures, question)), Message("assistant", parts)))


def lines(kind: str, scenes: Sequence[Scene], language: str, rng: random.Random, which: str) -> list[tuple[str, str]]:
    """The lines of an inventory, in random order: [("a bus", " yes"), (", an ant", " no")]; [] where no relation is clear."""
    if kind in ("what", "change"):
        describe = {"what": what, "change": change}[kind]
        items = [(place(cell, language), describe(scenes, cell, language)) for cell in rng.sample(range(9), LENGTH)]
    elif kind == "exists_at":
        items = list(dict(exists_at(scenes[0], language, rng, which) for _ in range(LENGTH)).items())
    elif kind == "relation":
        items = list(dict(line for _ in range(LENGTH) if (line := relation(scenes[0], language, rng))).items())
    else:
        selected = names(kind, scenes, rng, which)
        rng.shuffle(selected)
        items = [(name(kind, category, language), answer(kind, scenes, category, language)) for category in selected]
    return joined(items, language)


def joined(items: Sequence[tuple[str, str]], language: str) -> list[tuple[str, str]]:
    """Names and their answers with what stands between them: [("a bus", " yes"), (", an ant", " no")]."""
    comma, space = (", ", " ") if language == "en" else ("，", "")
    return [(comma * (i > 0) + prefill, space + learned) for i, (prefill, learned) in enumerate(items)]


def relation(scene: Scene, language: str, rng: random.Random) -> tuple[str, str] | None:
    """("the bus left of the key", "yes"), ("公交车在钥匙左边", "是")."""
    if not (pair := related(scene, rng)):
        return None
    a, b, side, yes = pair
    words = SIDES[language][side]
    prefill = (f"the {a.category.en} {words} the {b.category.en}" if language == "en"
               else f"{a.category.zh}在{b.category.zh}{words}")
    return prefill, WORDS[language]["yes" if yes else "no"]


def exists_at(scene: Scene, language: str, rng: random.Random, which: str) -> tuple[str, str]:
    """("a bus at the top left", "yes"), ("左上的公交车", "是")."""
    category, cell, yes = placed(scene, rng, which)
    prefill = (f"{with_article(category.en)} at {place(cell, language)}" if language == "en"
               else f"{place(cell, language)}的{category.zh}")
    return prefill, WORDS[language]["yes" if yes else "no"]


def place(cell: int, language: str) -> str:
    """'the top left', '左上'."""
    return f"the {PLACES['en'][cell]}" if language == "en" else PLACES["zh"][cell]


def at(scene: Scene, cell: int) -> Category | None:
    """The category in a cell; None for an empty cell."""
    return next((obj.category for obj in scene.objects if obj.cell == cell), None)


def what(scenes: Sequence[Scene], cell: int, language: str) -> str:
    """What is in a cell of the first scene: 'an ant', 'nothing'."""
    category = at(scenes[0], cell)
    return named(category, language) if category else WORDS[language]["nothing"]


def change(scenes: Sequence[Scene], cell: int, language: str) -> str:
    """What changed in a cell from the first scene to the second, in the words of `questions.changed`."""
    before, after = (at(scene, cell) for scene in scenes)
    if before == after:
        return WORDS[language]["nothing" if before is None else "same"]
    kind = "added" if before is None else "removed" if after is None else "replaced"
    return changed(kind, before, after, language)


def names(kind: str, scenes: Sequence[Scene], rng: random.Random, which: str) -> list[Category]:
    """The categories of the scenes and some absent ones, so that no answer is much more common.

    For "place": the categories that appear once.
    """
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
    """The answer for a category in one scene or two."""
    if kind == "place":
        cell = PLACES[language][next(obj.cell for obj in scenes[0].objects if obj.category == category)]
        return f"at the {cell}" if language == "en" else cell
    counts = [scene.counts[category] for scene in scenes]
    if kind == "exists":
        return WORDS[language]["yes" if counts[0] else "no"]
    if kind == "which_picture":
        return IN_WHICH[language][bool(counts[0]) + 2 * bool(counts[1])]
    return ENGLISH_NUMBERS[sum(counts)] if language == "en" else str(sum(counts))
