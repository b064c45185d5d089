"""Questions about scenes, in English and Chinese, whose answers follow from the truth.

In:  one scene (or two), a language, a random generator.  Out: a `Question`, whose words come from wordings.py.

Every kind balances its answers, because a model that never looks can score the share of the most common answer.
`KINDS` are about one picture, `PAIR_KINDS` about two pictures.
"""
from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from dataset.world.openmoji import Category, categories, plural, with_article
from dataset.world.phrases import PLACE_PHRASES, SIDE_PHRASES
from dataset.world.scenes import Object, Scene
from dataset.world.wordings import Wording, plain, typed, word
from dataset.world.words import PLACES, caption, description, phrase


@dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    names      what it asks about, by the placeholders of phrases.py: {"it": "the bus"}
    thoughts   the steps to the answer, for the kinds with reasoning
    """

    kind: str
    language: str
    names: Mapping[str, str]
    answer: str
    thoughts: str = ""

    @property
    def text(self) -> str:
        """The question in its plainest words."""
        return plain(self.kind, self.language, self.names)

    def worded(self, split: str, rng: random.Random) -> Wording:
        """The question in other words: in trained ones for "train", else in words that are held out."""
        return word(self.kind, self.language, self.names, split, rng)


WORDS = {  # answer words by language
    "en": dict(yes="yes", no="no", nothing="nothing", equal="equal", first="the first", second="the second", both="both",
               neither="neither", same="nothing changed"),
    "zh": dict(yes="是", no="否", nothing="没有东西", equal="一样多", first="第一张", second="第二张", both="都有",
               neither="都没有", same="没有变化"),
}


FOLLOW_UP = {"where": "it", "count": "many", "exists": "one"}  # kinds that can be asked again by a name alone -> its form
FOLLOW_UPS = {"en": ("And {}?", "What about {}?", "How about {}?"), "zh": ("{}呢？", "那{}呢？", "还有{}呢？")}


def follow_up(question: Question, rng: random.Random) -> tuple[str, str]:
    """("And the bus?", the answer): a question of the same kind as the one before."""
    form = FOLLOW_UP[question.kind] if question.language == "en" else "name"
    text = rng.choice(FOLLOW_UPS[question.language]).format(question.names[form])
    return typed(text, question.language, rng), question.answer


def named(category: Category, language: str) -> str:
    """'a bus', '公交车'. English names always follow a space, so that they are the same tokens everywhere."""
    return with_article(category.en) if language == "en" else category.zh


def names(category: Category, language: str) -> dict[str, str]:
    """A category in the forms that phrases.py asks for."""
    if language == "zh":
        return dict.fromkeys(("name", "it", "many"), category.zh)
    return {"name": category.en, "one": with_article(category.en), "many": plural(category.en), "it": f"the {category.en}",
            "its": f"the {category.en}'s"}  # fmt: skip


def absent(scene: Scene, rng: random.Random, which: str) -> Category:
    """A category that is not in the scene."""
    return rng.choice([category for category in rng.sample(categories(which), 12) if category not in scene.counts])


def single_objects(scene: Scene) -> list[Object]:
    """The objects whose category appears once, so that 'where is the ...' has one answer."""
    return [obj for obj in scene.objects if scene.counts[obj.category] == 1]


def what(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    if rng.random() < 0.1 and len(scene.objects) < 9:
        cell = rng.choice(sorted(set(range(9)) - {obj.cell for obj in scene.objects}))
        answer = WORDS[language]["nothing"]
    else:
        obj = rng.choice(scene.objects)
        cell, answer = obj.cell, named(obj.category, language)
    return Question("what", language, {"at": PLACE_PHRASES[language][cell]}, answer)


def where(scene: Scene, language: str, rng: random.Random, which: str) -> Question | None:
    if not (candidates := single_objects(scene)):
        return None
    obj = rng.choice(candidates)
    place = PLACES[language][obj.cell]
    return Question("where", language, names(obj.category, language), f"at the {place}" if language == "en" else place)


def count(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    counts = scene.counts
    amount = rng.choices((0, max(counts.values()), rng.choice(list(counts.values()))), (2, 5, 3))[0]  # balances 0 to 4
    category = rng.choice([c for c, n in counts.items() if n == amount]) if amount else absent(scene, rng, which)
    return Question("count", language, names(category, language), str(amount), count_thoughts(scene, category, language))


def count_thoughts(scene: Scene, category: Category, language: str) -> str:
    """The places of a category with a running count: 'top 1, left 2.'"""
    places = [PLACES[language][obj.cell] for obj in scene.objects if obj.category == category]
    if not places:
        return "I see none." if language == "en" else "一个也没有。"
    comma, stop = (", ", ".") if language == "en" else ("，", "。")
    return comma.join(f"{place} {i}" if language == "en" else f"{place}{i}" for i, place in enumerate(places, 1)) + stop


def total(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    return Question("total", language, {}, str(len(scene.objects)))


def exists(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    yes = rng.random() < 0.5
    category = rng.choice(sorted(scene.counts, key=lambda c: c.en)) if yes else absent(scene, rng, which)
    return Question("exists", language, names(category, language), WORDS[language]["yes" if yes else "no"])


def placed(scene: Scene, rng: random.Random, which: str) -> tuple[Category, int, bool]:
    """(a thing, a cell, whether it is there); if not, the thing is mostly in the scene, but elsewhere."""
    obj = rng.choice(scene.objects)
    if rng.random() < 0.5:
        return obj.category, obj.cell, True
    elsewhere = sorted(set(range(9)) - {other.cell for other in scene.objects if other.category == obj.category})
    if elsewhere and rng.random() < 0.6:
        return obj.category, rng.choice(elsewhere), False
    return absent(scene, rng, which), obj.cell, False


def exists_at(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    """Whether a thing is at a place."""
    category, cell, yes = placed(scene, rng, which)
    asked = {**names(category, language), "at": PLACE_PHRASES[language][cell]}
    return Question("exists_at", language, asked, WORDS[language]["yes" if yes else "no"])


def compare(scene: Scene, language: str, rng: random.Random, which: str) -> Question | None:
    """Which of two categories is more common; the more common one is named first or second at random."""
    counts = scene.counts
    if len(counts) < 2:
        return None
    by_count = sorted(counts, key=lambda c: -counts[c])
    first, second = (by_count[0], by_count[-1]) if rng.random() < 0.7 else rng.sample(sorted(counts, key=lambda c: c.en), 2)
    if rng.random() < 0.5:
        first, second = second, first
    more = counts[first] - counts[second]
    if more == 0 and rng.random() < 0.8:
        return None  # most pairs are equal: with all of them "equal" would be a good blind guess
    most = first if more > 0 else second
    if language == "en":
        answer = f"more {plural(most.en)}" if more else WORDS["en"]["equal"]
        thoughts = f"I see {phrase(first, counts[first], 'en')} and {phrase(second, counts[second], 'en')}."
    else:
        answer = most.zh if more else WORDS["zh"]["equal"]
        thoughts = f"我看到{phrase(first, counts[first], 'zh')}和{phrase(second, counts[second], 'zh')}。"
    other = names(second, language)
    asked = {**names(first, language), "others": other["many"], "other": other["it"]}
    return Question("compare", language, asked, answer, thoughts)


SIDES = {"en": {"left": "left of", "right": "right of", "above": "above", "below": "below"},
         "zh": {"left": "左边", "right": "右边", "above": "上面", "below": "下面"}}


def related(scene: Scene, rng: random.Random) -> tuple[Object, Object, str, bool] | None:
    """Two objects, a side of SIDES, and whether the first is on that side of the second; None where no two objects qualify."""
    pairs = [(a, b) for a in single_objects(scene) for b in single_objects(scene)
             if a is not b and (a.cell % 3 != b.cell % 3 or a.cell // 3 != b.cell // 3)]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    sideways, upright = b.cell % 3 - a.cell % 3, b.cell // 3 - a.cell // 3
    axis = rng.choice([axis for axis, gap in (("x", sideways), ("y", upright)) if gap])
    true = {"x": "left" if sideways > 0 else "right", "y": "above" if upright > 0 else "below"}[axis]
    yes = rng.random() < 0.5
    return a, b, true if yes else {"left": "right", "right": "left", "above": "below", "below": "above"}[true], yes


def relation(scene: Scene, language: str, rng: random.Random, which: str) -> Question | None:
    """Whether one object is left of, right of, above or below another."""
    if not (pair := related(scene, rng)):
        return None
    a, b, side, yes = pair
    asked = {**names(a.category, language), "side": SIDE_PHRASES[language][side], "other": names(b.category, language)["it"]}
    return Question("relation", language, asked, WORDS[language]["yes" if yes else "no"])


def listing(scene: Scene, language: str, rng: random.Random, which: str) -> Question:
    comma = ", " if language == "en" else "、"
    return Question("list", language, {}, comma.join(named(obj.category, language) for obj in scene.objects))


def difference(change: str, old: Object | None, new: Object | None, language: str) -> Question:
    """What changed between two pictures; `change`, `old` and `new` come from `scenes.changed_scene`."""
    gone, came = old.category if old else None, new.category if new else None
    return Question("difference", language, {}, changed(change, gone, came, language))


def changed(change: str, old: Category | None, new: Category | None, language: str) -> str:
    """'an ant became a bus', 'a bus was added', 'nothing changed'."""
    gone, came = old and named(old, language), new and named(new, language)
    if language == "en":
        return {"same": WORDS["en"]["same"], "added": f"{came} was added", "removed": f"{gone} was removed",
                "replaced": f"{gone} became {came}"}[change]
    return {"same": WORDS["zh"]["same"], "added": f"多了{came}", "removed": f"少了{gone}",
            "replaced": f"{gone}变成了{came}"}[change]


def which_picture(first: Scene, second: Scene, language: str, rng: random.Random, which: str) -> Question:
    """In which of two pictures a category appears."""
    in_first, in_second = set(first.counts), set(second.counts)
    groups = {"first": in_first - in_second, "second": in_second - in_first, "both": in_first & in_second}
    answer = rng.choice([name for name, group in groups.items() if group] + ["neither"])
    if answer == "neither":
        category = rng.choice([c for c in rng.sample(categories(which), 16) if c not in in_first | in_second])
    else:
        category = rng.choice(sorted(groups[answer], key=lambda c: c.en))
    return Question("which_picture", language, names(category, language), WORDS[language][answer])


def together(first: Scene, second: Scene, language: str, rng: random.Random, which: str) -> Question:
    """How many of a category there are in two pictures together."""
    counts = first.counts + second.counts
    category = rng.choice(sorted(counts, key=lambda c: (-counts[c], c.en))[:2])
    return Question("together", language, names(category, language), str(counts[category]))


def account(kind: str, scene: Scene, language: str) -> Question:
    """The request for a "caption" or a "description" of a scene."""
    return Question(kind, language, {}, {"caption": caption, "description": description}[kind](scene, language))


KINDS = {"what": what, "where": where, "count": count, "total": total, "exists": exists, "exists_at": exists_at,
         "compare": compare, "relation": relation, "list": listing}
PAIR_KINDS = ("difference", "which_picture", "together")


def ask(kind: str, scene: Scene, language: str, rng: random.Random, which: str = "nano") -> Question | None:
    """A question of a kind about a scene; None where the scene allows none (for "where": no object appears once)."""
    return KINDS[kind](scene, language, rng, which)
