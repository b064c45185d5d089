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

from dataset import world
from dataset.chair import agreement, binary, chair, yes_or_no
from dataset.questions import ASK_DESCRIPTION, WORDS
from dataset.tasks import Cut, Example, dialogue
from dataset.tasks.world import picture
from model.registry import TASKS


def language_of(i: int) -> str:
    """Languages alternate every second scene: every other scene is a new combination, and both come in both languages."""
    return world.LANGUAGES[i // 2 % 2]


def tags(scene: world.Scene, language: str) -> tuple[str, str]:
    return language, "new" if world.is_new(scene) else "trained"


# ---------------------------------------------------------------- descriptions


@functools.cache
def sentences(which: str, language: str) -> dict[str, world.Concept]:
    """Every sentence that a description can have, each concept at each place, and what it names."""
    things = [world.Thing(concept, cell, 0, 0, 0) for concept in world.concepts(which) for cell in range(9)]
    return {world.description(world.Scene("", (thing,), (0, 0, 0)), language): thing.concept for thing in things}


def pieces(text: str, language: str) -> list[str]:
    """A text cut where a sentence of a description begins; some names hold a full stop ("Mrs. Claus")."""
    return re.split(r"(?<=\.) (?=At the )" if language == "en" else r"(?<=。)(?=.)", text.strip())


def named(text: str, language: str, which: str = "nano") -> list[world.Concept]:
    """What a text names, in order: sentence by sentence, and by the names themselves where it is no sentence.

    Among all 1,900 concepts one is called 有, which stands in every Chinese sentence.
    """
    known = sentences(which, language)
    return [concept for piece in pieces(text, language)
            for concept in ([known[piece]] if piece in known else world.mentions(piece, language, which))]  # fmt: skip


def malformed(answer: str, language: str, which: str = "nano") -> bool:
    """Whether an answer is anything but sentences of a description, each once, that the model ended by itself."""
    said = pieces(answer, language)
    return isinstance(answer, Cut) or len(set(said)) < len(said) or not sentences(which, language).keys() >= set(said)


def length(answer: str, language: str) -> int:
    """Words in English, characters in Chinese."""
    return len(answer.split()) if language == "en" else len(answer.strip())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@TASKS.register("hallucination")
class Hallucination:
    """Descriptions of held-out scenes: CHAIR, Cover, length, and the share that is malformed."""

    size = 1000  # scenes of the test set: a share of one half is known to +-3 points (95 %)

    def __init__(self, concepts: str = "nano", most: int = 4):
        self.concepts, self.most = concepts, most

    def train(self, stage: str) -> None:
        """Nothing: the task `world` teaches to describe."""

    def examples(self, split: str, n: int) -> list[Example]:
        found = []
        for i in range(n):
            scene, language = world.scene(split, i, self.concepts, self.most), language_of(i)
            question = ASK_DESCRIPTION[language][0]
            prompt = dialogue(f"hallucination/{split}/{i}", [picture(scene)], [(question, "")])
            found.append(Example(prompt, world.description(scene, language), "description", tags(scene, language)))
        return found

    def named(self, answer: str, example: Example) -> list[world.Concept]:
        return named(answer, example.tags[0], self.concepts)

    def score(self, example: Example, answer: str) -> float:
        """F1 of the things that are named: 1 where it names all that is there and nothing else."""
        return agreement(self.named(answer, example), self.named(example.answer, example))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """chair_s, chair_i, cover (dataset/chair.py), malformed; length: words in English and characters in Chinese.

        A thing is a concept: the second of two buses that are there may be named or not.
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
            "malformed": mean([malformed(a, e.tags[0], self.concepts) for e, a in zip(examples, answers)]),
        }


# ---------------------------------------------------------------- is there a ...?

POPULAR = 10  # a popular negative is one of this many most frequent concepts that are not in the scene


@functools.cache
def seen_in_training(which: str, most: int, scenes: int) -> tuple[Counter, dict[world.Concept, Counter]]:
    """In how many training scenes each concept is, and beside each concept each other one."""
    alone, beside = Counter(), defaultdict(Counter)
    for i in range(scenes):
        there = set(world.scene("train", i, which, most).counts)
        alone.update(there)
        for concept in there:
            beside[concept].update(there - {concept})
    return alone, dict(beside)


def by_count(counts: Counter, concepts: Sequence[world.Concept]) -> list[world.Concept]:
    """The concepts with the highest counts first; the alphabet decides between equals."""
    return sorted(concepts, key=lambda concept: (-counts[concept], concept.en))


def exists(concept: world.Concept, language: str) -> str:
    """The question as the task `world` asks it."""
    return f"Is there {world.with_article(concept.en)}?" if language == "en" else f"有{concept.zh}吗？"


@TASKS.register("world_pope")
class WorldPOPE:
    """Is there a ...? With random, popular and adversarial absent things (POPE, arXiv 2305.10355).

    Of every kind half the answers are yes: a model that does not look is right half the time.
    """

    size = 500  # scenes of the test set, 6 questions each
    kinds = ("random", "popular", "adversarial")

    def __init__(self, concepts: str = "nano", most: int = 4, scenes: int = 5_000):
        self.concepts, self.most, self.scenes = concepts, most, scenes

    def train(self, stage: str) -> None:
        """Nothing: the task `world` teaches to say what exists."""

    def absent(self, kind: str, there: set[world.Concept], rng: random.Random) -> world.Concept:
        """A thing that is not in the scene, and that a model which does not look closely would expect there."""
        missing = [concept for concept in world.concepts(self.concepts) if concept not in there]
        alone, beside = seen_in_training(self.concepts, self.most, self.scenes)
        if kind == "random":
            return rng.choice(missing)
        if kind == "popular":
            return rng.choice(by_count(alone, missing)[:POPULAR])
        return by_count(sum((beside.get(concept, Counter()) for concept in there), Counter()), missing)[0]

    def examples(self, split: str, n: int) -> list[Example]:
        """For every kind one thing that is there and one that is not, about each of n scenes."""
        found = []
        for i in range(n):
            rng = random.Random(f"world_pope/{split}/{i}")
            scene, language = world.scene(split, i, self.concepts, self.most), language_of(i)
            there, asked = list(scene.counts), []
            present = [there[k % len(there)] for k in range(len(self.kinds))]
            for kind, concept in zip(self.kinds, present):
                asked += [(kind, "yes", concept), (kind, "no", self.absent(kind, set(there), rng))]
            rng.shuffle(asked)  # every eighth is asked again as a control, and those should not all be yes
            for kind, truth, concept in asked:
                prompt = dialogue(f"world_pope/{split}/{i}/{kind}/{truth}", [picture(scene)], [(exists(concept, language), "")])
                found.append(Example(prompt, WORDS[language][truth], kind, tags(scene, language)))
        return found

    def score(self, example: Example, answer: str) -> float:
        return float(yes_or_no(answer) == yes_or_no(example.answer))

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """accuracy, precision, recall and f1 of yes, share of yes: of each kind, and the mean of the kinds."""
        parts = {}
        for kind in self.kinds:
            pairs = [(yes_or_no(a), yes_or_no(e.answer)) for e, a in zip(examples, answers, strict=True) if e.kind == kind]
            if pairs:
                parts[kind] = binary(*map(list, zip(*pairs)), positive="yes")
        whole = {metric: mean([part[metric] for part in parts.values()]) for metric in next(iter(parts.values()))}
        each = {f"{kind}_{metric}": value for kind, part in parts.items() for metric, value in part.items()}
        return [self.score(example, answer) for example, answer in zip(examples, answers)], {**whole, **each}
