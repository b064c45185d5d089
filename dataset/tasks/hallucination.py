"""Does the model name absent objects? Descriptions of scenes (CHAIR), and "is there a ...?" with hard negatives (POPE).

The truth of a scene is known, so the scores are exact: no extractor, no synonyms, no judge. Both tasks use held-out scenes.
How frequent categories are, and which appear together, is counted in training scenes.
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
from dataset.world.openmoji import LANGUAGES, Category, categories
from dataset.world.questions import WORDS, account, names
from dataset.world.scenes import Object, Scene, is_new, sample_scene
from dataset.world.wordings import plain
from dataset.world.words import description, mentions
from model.registry import TASKS


def language_of(i: int) -> str:
    """The language of scene i: it alternates every second scene, so new and trained combinations come in both languages."""
    return LANGUAGES[i // 2 % 2]


def tags(scene: Scene, language: str) -> tuple[str, str]:
    return language, "new" if is_new(scene) else "trained"


# ---------------------------------------------------------------- descriptions


@functools.cache
def sentences(which: str, language: str) -> dict[str, Category]:
    """Every sentence that a description can have (each category at each place), and the category it names."""
    objects = [Object(category, cell, 0, 0, 0) for category in categories(which) for cell in range(9)]
    return {description(Scene("", (obj,), (0, 0, 0)), language): obj.category for obj in objects}


def pieces(text: str, language: str) -> list[str]:
    """A text split where a sentence of a description begins; some names contain a full stop ("Mrs. Claus")."""
    return re.split(r"(?<=\.) (?=At the )" if language == "en" else r"(?<=。)(?=.)", text.strip())


def named(text: str, language: str, which: str = "nano") -> list[Category]:
    """The categories that a text names, in order: by known sentences, and elsewhere by their names.

    Sentences come first, because a short name may also be an ordinary word of a sentence.
    """
    known = sentences(which, language)
    return [category for piece in pieces(text, language)
            for category in ([known[piece]] if piece in known else mentions(piece, language, which))]  # fmt: skip


def malformed(answer: str, language: str, which: str = "nano") -> bool:
    """Whether an answer was cut off, repeats a sentence, or has a sentence that no description has."""
    parts = pieces(answer, language)
    return isinstance(answer, Truncated) or len(set(parts)) < len(parts) or not sentences(which, language).keys() >= set(parts)


def untrue(answer: str, truth: str, language: str, which: str = "nano") -> bool:
    """Whether a description states anything false: an absent thing, a wrong place, or the same thing more often than it is there.

    `truth` is the true description. Of a sentence that no description has, only the names are read.
    """
    known, true = sentences(which, language), set(pieces(truth, language))
    elsewhere = any(piece in known and piece not in true for piece in pieces(answer, language))
    return elsewhere or not Counter(named(answer, language, which)) <= Counter(named(truth, language, which))


def length(answer: str, language: str) -> int:
    """Words in English, characters in Chinese."""
    return len(answer.split()) if language == "en" else len(answer.strip())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@TASKS.register("hallucination")
class Hallucination(Task):
    """Descriptions of held-out scenes: the share with anything false, CHAIR, Cover, length, and the share that is malformed."""

    size = 1000  # scenes of the test set: a share near one half is accurate to +-3 points (95 %)

    def __init__(self, categories: str = "nano", most: int = 4):
        self.categories, self.most = categories, most

    def examples(self, split: str, n: int) -> list[Example]:
        examples = []
        for i in range(n):
            scene, language = sample_scene(split, i, self.categories, self.most), language_of(i)
            question = account("description", scene, language)
            prompt = dialogue(f"hallucination/{split}/{i}", [picture(scene)], [(question.text, "")])
            examples.append(Example(prompt, question.answer, "description", tags(scene, language)))
        return examples

    def named(self, answer: str, example: Example) -> list[Category]:
        return named(answer, example.tags[0], self.categories)

    def score(self, example: Example, answer: str) -> float:
        """F1 of the categories named: 1 where the answer names all that are present and no other."""
        return agreement(self.named(answer, example), self.named(example.answer, example))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """false: descriptions with any false statement; chair_s, chair_i, cover (dataset/tasks/chair.py), malformed;
        length: words in English and characters in Chinese.

        Categories are counted: the second of two buses may be named or not.
        """
        objects = [self.named(answer, example) for example, answer in zip(examples, answers, strict=True)]
        present = [set(self.named(example.answer, example)) for example in examples]
        lengths = defaultdict(list)
        for example, answer in zip(examples, answers):
            lengths[example.tags[0]].append(length(answer, example.tags[0]))
        units = {"en": "words", "zh": "characters"}
        scores = [self.score(example, answer) for example, answer in zip(examples, answers)]
        return scores, {
            "false": mean([untrue(answer, example.answer, example.tags[0], self.categories)
                           for example, answer in zip(examples, answers)]),
            **chair(objects, present),
            "length": mean([count for counts in lengths.values() for count in counts]),
            **{f"length_{units[language]}": mean(counts) for language, counts in lengths.items()},
            "malformed": mean([malformed(a, e.tags[0], self.categories) for e, a in zip(examples, answers)]),
        }


# ---------------------------------------------------------------- is there a ...?

POPULAR = 10  # a popular negative is one of the 10 most frequent categories that are absent from the scene


@functools.cache
def seen_in_training(which: str, most: int, scenes: int) -> tuple[Counter, dict[Category, Counter]]:
    """(category -> its training scenes, category -> the scenes that it shares with each other one), as counts."""
    alone: Counter[Category] = Counter()
    beside: dict[Category, Counter[Category]] = defaultdict(Counter)
    for i in range(scenes):
        present = set(sample_scene("train", i, which, most).counts)
        alone.update(present)
        for category in present:
            beside[category].update(present - {category})
    return alone, dict(beside)


def by_count(counts: Counter, categories: Sequence[Category]) -> list[Category]:
    """The categories by falling counts; equal ones in alphabetical order."""
    return sorted(categories, key=lambda category: (-counts[category], category.en))


def exists(category: Category, language: str) -> str:
    """The question in its plainest words."""
    return plain("exists", language, names(category, language))


@TASKS.register("world_pope")
class WorldPOPE(Task):
    """Is there a ...? With random, popular and adversarial absent categories (POPE, arXiv 2305.10355).

    Half the answers of each kind are yes, so a model that does not look is right half the time.
    """

    size = 500  # scenes of the test set, 6 questions each
    kinds = ("random", "popular", "adversarial")

    def __init__(self, categories: str = "nano", most: int = 4, scenes: int = 5_000):
        self.categories, self.most, self.scenes = categories, most, scenes

    def absent(self, kind: str, present: set[Category], rng: random.Random) -> Category:
        """An absent category: random, one of the most frequent, or the one that most often appears with those present."""
        missing = [category for category in categories(self.categories) if category not in present]
        alone, beside = seen_in_training(self.categories, self.most, self.scenes)
        if kind == "random":
            return rng.choice(missing)
        if kind == "popular":
            return rng.choice(by_count(alone, missing)[:POPULAR])
        return by_count(sum((beside.get(category, Counter()) for category in present), Counter()), missing)[0]

    def examples(self, split: str, n: int) -> list[Example]:
        """For each of n scenes and each kind, a question about a present category and one about an absent category."""
        examples = []
        for i in range(n):
            rng = random.Random(f"world_pope/{split}/{i}")
            scene, language = sample_scene(split, i, self.categories, self.most), language_of(i)
            present, questions = list(scene.counts), []
            positives = [present[k % len(present)] for k in range(len(self.kinds))]
            for kind, category in zip(self.kinds, positives):
                questions += [(kind, "yes", category), (kind, "no", self.absent(kind, set(present), rng))]
            rng.shuffle(questions)  # every eighth is repeated as a control, and those should not all be yes
            for kind, truth, category in questions:
                prompt = dialogue(f"world_pope/{split}/{i}/{kind}/{truth}", [picture(scene)], [(exists(category, language), "")])
                examples.append(Example(prompt, WORDS[language][truth], kind, tags(scene, language)))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return float(yes_or_no(answer) == yes_or_no(example.answer))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """accuracy, precision, recall and f1 of yes, and the share of yes: for each kind, and their means over the kinds."""
        parts = {}
        for kind in self.kinds:
            pairs = [(yes_or_no(a), YES_OR_NO[e.answer]) for e, a in zip(examples, answers, strict=True) if e.kind == kind]
            if pairs:
                parts[kind] = binary([answer for answer, _ in pairs], [truth for _, truth in pairs], positive="yes")
        overall = {metric: mean([part[metric] for part in parts.values()]) for metric in next(iter(parts.values()))}
        each = {f"{kind}_{metric}": value for kind, part in parts.items() for metric, value in part.items()}
        return [self.score(example, answer) for example, answer in zip(examples, answers)], {**overall, **each}
