"""Does the model know what it does not know? Names and drawings of the world that are not among its hundred.

"Is there a dinosaur?" is answered "I do not know what that is.", and a place with a drawing that it never learned shows
"something I do not know". Nine tenths of the 1,800 other names and drawings are trained, so that the model cannot learn them one
by one as the known ones; it is asked about the last tenth.

    python 2-sft_vlm.py --data world:1.2 easy_vqa:1.5 text world_unknown --bench world,world_unknown
"""
from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from dataset.chat import Conversation
from dataset.tasks import Example, Generated, Task, dialogue, exact, means, normal
from dataset.tasks.world import World, picture
from dataset.world import inventories, questions
from dataset.world.openmoji import LANGUAGES, Category, altered, categories
from dataset.world.phrases import PLACE_PHRASES
from dataset.world.questions import Question
from dataset.world.scenes import Object, Scene, sample_scene
from dataset.world.wordings import split_of
from model.registry import TASKS

UNKNOWN_NAME = {"en": "I do not know what that is.", "zh": "我不知道那是什么。"}
SOMETHING = {"en": "something I do not know", "zh": "我不认识的东西"}
INVENTORIES = 0.5  # share of the rows that are inventories
ABOUT_A_NAME = ("exists", "exists", "where", "count")  # kinds of questions about an unknown name


@functools.cache
def unknown(split: str) -> tuple[Category, ...]:
    """The categories outside of nano's hundred that belong to a split."""
    known = set(categories("nano"))
    return tuple(category for category in categories("all") if category not in known and split_of(category.en) == split)


def about_a_name(category: Category, language: str, rng: random.Random) -> Question:
    """A question about a thing whose name the model does not know."""
    kind = rng.choice(ABOUT_A_NAME)
    return Question(kind, language, questions.names(category, language), UNKNOWN_NAME[language])


def with_a_stranger(scene: Scene, split: str, rng: random.Random) -> tuple[Scene, Object]:
    """(the scene with one of its drawings replaced by one that the model does not know, that drawing).

    In training it is altered: what is unknown is everything else, and 1,500 drawings are few examples of that.
    """
    k = rng.randrange(len(scene.objects))
    old, category = scene.objects[k], rng.choice(unknown(split))
    stranger = Object(altered(category, rng) if split == "train" else category, old.cell, old.x, old.y, old.size)
    objects = (*scene.objects[:k], stranger, *scene.objects[k + 1:])
    return Scene(f"{scene.key}/{stranger.category.en}", objects, scene.background), stranger


def at(stranger: Object, language: str) -> Question:
    """What is at the place of a drawing that the model does not know?"""
    return Question("what", language, {"at": PLACE_PHRASES[language][stranger.cell]}, SOMETHING[language])


@TASKS.register("world_unknown")
class WorldUnknown(Task):
    """Names and drawings outside of the hundred of `nano`, among known ones.

    rows, scenes   training rows of stage 2, and the scenes they share
    """

    size = 300  # scenes of the test set

    def __init__(self, rows: int = 12_000, scenes: int = 6_000):
        self.rows, self.scenes, self.world = rows, scenes, World()

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def scene(self, split: str, i: int) -> tuple[Scene, Object]:
        base = sample_scene(split, i)
        return with_a_stranger(base, split, random.Random(f"stranger/{split}/{i}"))

    def row(self, i: int) -> Conversation:
        """An inventory of known and unknown drawings, or a scene with a stranger: what it is, an unknown name, known things."""
        rng = random.Random(f"world_unknown/{i}")
        if rng.random() < INVENTORIES:
            return self.inventory(i, rng)
        scene, stranger = self.scene("train", i % self.scenes)
        language = rng.choice(LANGUAGES)
        known = [obj for obj in scene.objects if obj is not stranger]
        asked = [at(stranger, language), about_a_name(rng.choice(unknown("train")), language, rng)]
        asked += [self.known(obj, language, rng) for obj in rng.sample(known, min(2, len(known)))]
        turns = [(question.worded("train", rng).text, question.answer) for question in asked]
        rng.shuffle(turns)
        return dialogue(f"world_unknown/train/{i}", [picture(scene)], turns)

    def inventory(self, i: int, rng: random.Random) -> Conversation:
        """What is at each of the nine places of a crowded scene, about half of whose drawings are unknown."""
        language, replaced = rng.choice(LANGUAGES), random.Random(f"strangers/{i % self.scenes}")
        scene = self.world.crowded(i % self.scenes)
        cells = set()
        for _ in range(len(scene.objects) // 2):
            scene, stranger = with_a_stranger(scene, "train", replaced)
            cells.add(stranger.cell)
        items = [(inventories.place(cell, language),
                  SOMETHING[language] if cell in cells else inventories.what([scene], cell, language))
                 for cell in rng.sample(range(9), 9)]
        return inventories.conversation(f"world_unknown/train/{i}", [picture(scene)], inventories.ASK[language]["what"],
                                        inventories.joined(items, language))

    def known(self, obj: Object, language: str, rng: random.Random) -> Question:
        """A question about a known thing beside the stranger."""
        if rng.random() < 0.5:
            answer = questions.named(obj.category, language)
            return Question("what", language, {"at": PLACE_PHRASES[language][obj.cell]}, answer)
        return Question("exists", language, questions.names(obj.category, language), questions.WORDS[language]["yes"])

    def examples(self, split: str, n: int) -> list[Example]:
        """Of each of n scenes the stranger, an unknown name, and a known thing, in trained wordings; tags: the language."""
        examples = []
        for i in range(n):
            rng, language = random.Random(f"world_unknown/{split}/{i}"), LANGUAGES[i // 2 % 2]
            scene, stranger = self.scene(split, i)
            asked = {"drawing": at(stranger, language), "name": about_a_name(rng.choice(unknown(split)), language, rng)}
            if known := [obj for obj in scene.objects if obj is not stranger]:
                asked["known"] = self.known(rng.choice(known), language, rng)
            for kind, question in asked.items():
                prompt = dialogue(f"world_unknown/{split}/{i}/{kind}", [picture(scene)],
                                  [(question.worded("train", rng).text, "")])  # fmt: skip
                examples.append(Example(prompt, question.answer, kind, (language,), question.text))
        return examples

    def score(self, example: Example, answer: str) -> float:
        """For what is unknown 1 for the exact answer; for a known thing 1 unless the model says that it does not know it."""
        if example.kind != "known":
            return exact(example, answer)
        return float(normal(answer) not in {normal(unsure) for unsure in (*UNKNOWN_NAME.values(), *SOMETHING.values())})

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """name, drawing: recognised as unknown; known_as_unknown: known things that were taken for unknown."""
        kinds = means(examples, scores, lambda example: [example.kind])
        return {**{kind: kinds[kind] for kind in ("name", "drawing") if kind in kinds},
                **({"known_as_unknown": 1 - kinds["known"]} if "known" in kinds else {})}
