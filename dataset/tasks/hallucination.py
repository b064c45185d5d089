"""Does the model name what is not there? Descriptions of scenes (CHAIR), and "is there a ...?" with hard negatives (POPE).

The truth of a scene is known, so these are exact numbers: no extractor, no synonyms, no judge. Both are measured on scenes
that no one trained on; what is frequent, and what appears together, is counted in the training scenes alone.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from dataset.tasks import Example, Task, Truncated, dialogue
from dataset.tasks.chair import YES_OR_NO, agreement, binary, chair, yes_or_no
from dataset.tasks.world import picture
from dataset.world.openmoji import LANGUAGES, Category, categories, with_article
from dataset.world.questions import ASK_DESCRIPTION, WORDS
from dataset.world.scenes import Object, Scene, is_new, sample_scene
from dataset.world.words import description, mentions
from model.registry import TASKS


def language_of(i: int) -> str:
    """Languages alternate every second scene: every other scene is a new combination, and both come in both languages."""
    return LANGUAGES[i // 2 % 2]


def tags(scene: Scene, language: str) -> tuple[str, str]:
    return language, "new" if is_new(scene) else "trained"


# ---------------------------------------------------------------- descriptions


@functools.cache
def sentences(which: str, language: str) -> dict[str, Category]:
    """Every sentence that a description can have, each category at each place, and what it names."""
    objects = [Object(category, cell, 0, 0, 0) for category in categories(which) for cell in range(9)]
    return {description(Scene("", (obj,), (0, 0, 0)), language): obj.category for obj in objects}


def pieces(text: str, language: str) -> list[str]:
    """A text cut where a sentence of a description begins; some names hold a full stop ("Mrs. Claus")."""
    return re.split(r"(?<=\.) (?=At the )" if language == "en" else r"(?<=。)(?=.)", text.strip())


def named(text: str, language: str, which: str = "nano") -> list[Category]:
    """What a text names, in order: sentence by sentence, and by the names themselves where it is no sentence.

    Among all 1,900 categories one is called 有, which stands in every Chinese sentence.
    """
    known = sentences(which, language)
    return [category for piece in pieces(text, language)
            for category in ([known[piece]] if piece in known else mentions(piece, language, which))]  # fmt: skip


def malformed(answer: str, language: str, which: str = "nano") -> bool:
    """Whether an answer is anything but sentences of a description, each once, that the model ended by itself."""
    said = pieces(answer, language)
    return isinstance(answer, Truncated) or len(set(said)) < len(said) or not sentences(which, language).keys() >= set(said)


def length(answer: str, language: str) -> int:
    """Words in English, characters in Chinese."""
    return len(answer.split()) if language == "en" else len(answer.strip())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@TASKS.register("hallucination")
class Hallucination(Task):
    """Descriptions of held-out scenes: CHAIR, Cover, length, and the share that is malformed."""

    size = 1000  # scenes of the test set: a share of one half is known to +-3 points (95 %)

    def __init__(self, categories: str = "nano", most: int = 4):
        self.categories, self.most = categories, most

    def examples(self, split: str, n: int) -> list[Example]:
        found = []
        for i in range(n):
            scene, language = sample_scene(split, i, self.categories, self.most), language_of(i)
            question = ASK_DESCRIPTION[language][0]
            prompt = dialogue(f"hallucination/{split}/{i}", [picture(scene)], [(question, "")])
            found.append(Example(prompt, description(scene, language), "description", tags(scene, language)))
        return found

    def named(self, answer: str, example: Example) -> list[Category]:
        return named(answer, example.tags[0], self.categories)

    def score(self, example: Example, answer: str) -> float:
        """F1 of the things that are named: 1 where it names all that is there and nothing else."""
        return agreement(self.named(answer, example), self.named(example.answer, example))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """chair_s, chair_i, cover (dataset/tasks/chair.py), malformed; length: words in English and characters in Chinese.

        A thing is a category: the second of two buses that are there may be named or not.
        """
        said = [self.named(answer, example) for example, answer in zip(examples, answers, strict=True)]
        present = [set(self.named(example.answer, example)) for example in examples]
        lengths = defaultdict(list)
        for example, answer in zip(examples, answers):
            lengths[example.tags[0]].append(length(answer, example.tags[0]))
        units = {"en": "words", "zh": "characters"}
        scores = [self.score(example, answer) for example, answer in zip(examples, answers)]
        return scores, {
            **chair(said, present),
            "length": mean([count for counts in lengths.values() for count in counts]),
            **{f"length_{units[language]}": mean(counts) for language, counts in lengths.items()},
            "malformed": mean([malformed(a, e.tags[0], self.categories) for e, a in zip(examples, answers)]),
        }


# ---------------------------------------------------------------- is there a ...?

POPULAR = 10  # a popular negative is one of this many most frequent categories that are not in the scene


@functools.cache
def seen_in_training(which: str, most: int, scenes: int) -> tuple[Counter, dict[Category, Counter]]:
    """In how many training scenes each category is, and beside each category each other one."""
    alone: Counter[Category] = Counter()
    beside: dict[Category, Counter[Category]] = defaultdict(Counter)
    for i in range(scenes):
        there = set(sample_scene("train", i, which, most).counts)
        alone.update(there)
        for category in there:
            beside[category].update(there - {category})
    return alone, dict(beside)


def by_count(counts: Counter, categories: Sequence[Category]) -> list[Category]:
    """The categories with the highest counts first; the alphabet decides between equals."""
    return sorted(categories, key=lambda category: (-counts[category], category.en))


def exists(category: Category, language: str) -> str:
    """The question as the task `world` asks it."""
    return f"Is there {with_article(category.en)}?" if language == "en" else f"有{category.zh}吗？"


@TASKS.register("world_pope")
class WorldPOPE(Task):
    """Is there a ...? With random, popular and adversarial absent things (POPE, arXiv 2305.10355).

    Of every kind half the answers are yes: a model that does not look is right half the time.
    """

    size = 500  # scenes of the test set, 6 questions each
    kinds = ("random", "popular", "adversarial")

    def __init__(self, categories: str = "nano", most: int = 4, scenes: int = 5_000):
        self.categories, self.most, self.scenes = categories, most, scenes

    def absent(self, kind: str, there: set[Category], rng: random.Random) -> Category:
        """A thing that is not in the scene, and that a model which does not look closely would expect there."""
        missing = [category for category in categories(self.categories) if category not in there]
        alone, beside = seen_in_training(self.categories, self.most, self.scenes)
        if kind == "random":
            return rng.choice(missing)
        if kind == "popular":
            return rng.choice(by_count(alone, missing)[:POPULAR])
        return by_count(sum((beside.get(category, Counter()) for category in there), Counter()), missing)[0]

    def examples(self, split: str, n: int) -> list[Example]:
        """For every kind one thing that is there and one that is not, about each of n scenes."""
        found = []
        for i in range(n):
            rng = random.Random(f"world_pope/{split}/{i}")
            scene, language = sample_scene(split, i, self.categories, self.most), language_of(i)
            there, asked = list(scene.counts), []
            present = [there[k % len(there)] for k in range(len(self.kinds))]
            for kind, category in zip(self.kinds, present):
                asked += [(kind, "yes", category), (kind, "no", self.absent(kind, set(there), rng))]
            rng.shuffle(asked)  # every eighth is asked again as a control, and those should not all be yes
            for kind, truth, category in asked:
                prompt = dialogue(f"world_pope/{split}/{i}/{kind}/{truth}", [picture(scene)], [(exists(category, language), "")])
                found.append(Example(prompt, WORDS[language][truth], kind, tags(scene, language)))
        return found

    def score(self, example: Example, answer: str) -> float:
        return float(yes_or_no(answer) == yes_or_no(example.answer))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """accuracy, precision, recall and f1 of yes, share of yes: of each kind, and the mean of the kinds."""
        parts = {}
        for kind in self.kinds:
            pairs = [(yes_or_no(a), YES_OR_NO[e.answer]) for e, a in zip(examples, answers, strict=True) if e.kind == kind]
            if pairs:
                parts[kind] = binary([said for said, _ in pairs], [true for _, true in pairs], positive="yes")
        whole = {metric: mean([part[metric] for part in parts.values()]) for metric in next(iter(parts.values()))}
        each = {f"{kind}_{metric}": value for kind, part in parts.items() for metric, value in part.items()}
        return [self.score(example, answer) for example, answer in zip(examples, answers)], {**whole, **each}
