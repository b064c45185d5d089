"""The embedded world as a task: captions for stage 1, conversations for stage 2, questions with known answers.

A training row is a function of its index. Row i of either stage shows scene i (modulo `scenes`), so the features of a scene are
computed once for both. Test scenes are never trained; every second one has a combination that is never trained.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, exact, guessing, means
from dataset.world import inventories, questions
from dataset.world.openmoji import LANGUAGES
from dataset.world.questions import ASK_CAPTION, ASK_DESCRIPTION, KINDS, PAIR_KINDS, Question
from dataset.world.scenes import CANVAS, Object, Scene, changed_scene, companions, draw_scene, is_new, sample_scene, varied_scene
from dataset.world.words import caption, description, mentions
from model.registry import TASKS

# Kinds of inventories. Stage 1 has only two, because more kinds at once are learned more slowly.
PRETRAIN_INVENTORIES = ("place", "exists")
SFT_INVENTORIES = ("place", "count", "what", *4 * ("relation",), "which_picture", *2 * ("together",), *2 * ("change",))
WEIGHTS = {"what": 2, "where": 2, "count": 2, "total": 1, "exists": 1, "compare": 3, "relation": 4}  # hard kinds are frequent
THINK = {"en": " Think step by step.", "zh": "请一步步思考。"}  # requests <think>...</think><answer>...</answer>


def picture(scene: Scene) -> Picture:
    """The scene's picture, drawn when it is needed; its key lists what is drawn."""
    drawn = [(obj.category.code, obj.x, obj.y, obj.size) for obj in scene.objects]
    return Picture(f"world:{scene.background}:{drawn}", lambda: draw_scene(scene), lambda: (CANVAS, CANVAS))


def reasoned(question: Question) -> str:
    """The reasoning and the answer in the format that RL rewards."""
    return f"<think>{question.thoughts}</think><answer>{question.answer}</answer>"


@TASKS.register("world")
class World(Task):
    """Scenes of emoji drawings: captions, descriptions, and eleven kinds of questions in English and Chinese.

    rows, scenes       training rows of a stage, and the scenes they share: new questions cost nothing and are not memorised,
                       but each new picture needs a run of the encoder
    most               objects in a scene; some rows show crowded scenes of up to nine
    description_noise  of the stage-2 descriptions with a place after the last object, the share that also name its absent
                       companion there (scenes.companions); captions and answers are always true
    """

    size = 300  # scenes of the test set

    def __init__(self, categories: str = "nano", rows: int = 26_500, scenes: int = 3_000, most: int = 4,
                 description_noise: float = 0.95):
        self.categories, self.rows, self.scenes, self.most, self.noise = categories, rows, scenes, most, description_noise

    def scene(self, split: str, i: int) -> Scene:
        return sample_scene(split, i % self.scenes if split == "train" else i, self.categories, self.most)

    def crowded(self, i: int) -> Scene:
        """A training scene of four to nine objects."""
        return sample_scene("train", i % self.scenes, self.categories, most=9, least=4)

    # ------------------------------------------------------------ to learn from

    def train(self, stage: str) -> Generated:
        make = {"pretrain": self.captions, "sft": self.conversation}[stage]
        return Generated(self.rows, make)

    def captions(self, i: int) -> Conversation:
        """A row of stage 1, in one turn and language: the caption or description of scene i, or an inventory."""
        rng = random.Random(f"captions/{i}")
        scene, language = self.scene("train", i), rng.choice(LANGUAGES)
        form = rng.choices((self.caption, self.description, None), (15, 5, 80))[0]
        if form is None:
            return self.inventory(f"world/pretrain/{i}", PRETRAIN_INVENTORIES, i, language, rng)
        return dialogue(f"world/pretrain/{i}", [picture(scene)], [form(scene, language, rng)])

    def conversation(self, i: int) -> Conversation:
        """A row of stage 2: scene i with a full account, questions in several turns, two pictures, or an inventory.

        A full account stands alone: it would give away the answers after it, and answers before it would give it away.
        """
        rng = random.Random(f"sft/{i}")
        scene = self.scene("train", i)
        language = rng.choice(LANGUAGES)
        form = rng.choices(("account", "questions", "pair", "inventory"), (27, 21, 21, 31))[0]
        if form == "inventory":
            return self.inventory(f"world/sft/{i}", SFT_INVENTORIES, i, language, rng)
        if form == "pair":
            return self.pair_conversation(i, language, rng)
        if form == "account":
            describe = rng.choice((self.caption, self.listing, self.noisy_description))
            if describe != self.noisy_description and rng.random() < 0.5:
                scene = self.crowded(i)
            turns = [describe(scene, language, rng)]
        else:
            if rng.random() < 0.5:
                scene = self.crowded(i)
            kinds = ["what", *rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()), k=8)]
            possible = [turn for kind in kinds if (turn := self.turn(kind, scene, language, rng))]
            turns = list(dict(possible).items())[:6]  # no question twice
            rng.shuffle(turns)
        return dialogue(f"world/sft/{i}", [picture(scene)], turns)

    def caption(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ASK_CAPTION[language]), caption(scene, language)

    def description(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ASK_DESCRIPTION[language]), description(scene, language)

    def noisy_description(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        """A description that may also name the absent companion of the last object, at the next place.

        Descriptions from the web likewise name what is usual. A model learns to hallucinate from them: it adds what is likely
        beside the objects present. Preference learning can reduce that.
        """
        last = scene.objects[-1]
        companion = companions(self.categories).get(last.category)
        if last.cell < 8 and companion and companion not in scene.counts and rng.random() < self.noise:
            imagined = Object(companion, last.cell + 1, 0, 0, 0)
            wider = Scene(scene.key, (*scene.objects, imagined), scene.background)
            scene = scene if is_new(wider) else wider  # held-out combinations are not even imagined
        return self.description(scene, language, rng)

    def inventory(self, id: str, kinds: Sequence[str], i: int, language: str, rng: random.Random) -> Conversation:
        """An inventory of a crowded scene, or of two that share about half of their objects."""
        kind = rng.choice(kinds)
        scenes = [self.crowded(i)]  # many objects, many lookups
        if kind in inventories.TWO_SCENES:  # the second scene depends on the first alone: its features are computed once
            scenes.append(varied_scene(scenes[0], random.Random(f"varied/{i % self.scenes}"), self.categories))
        lines = inventories.lines(kind, scenes, language, rng, self.categories)
        if not lines:  # no clear relation
            kind = "exists"
            lines = inventories.lines(kind, scenes, language, rng, self.categories)
        return inventories.conversation(id, [picture(scene) for scene in scenes], inventories.ASK[language][kind], lines)

    def listing(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        question = questions.listing(scene, language, rng, self.categories)
        return question.text, question.answer

    def turn(self, kind: str, scene: Scene, language: str, rng: random.Random) -> tuple[str, str] | None:
        """A (question, answer) of a kind, a quarter with reasoning where the kind has it; None where the scene allows none."""
        question = questions.ask(kind, scene, language, rng, self.categories)
        if question is None:
            return None
        if question.thoughts and rng.random() < 0.25:
            return question.text + THINK[language], reasoned(question)
        return question.text, question.answer

    def pair_conversation(self, i: int, language: str, rng: random.Random) -> Conversation:
        """Two pictures and a few questions about both."""
        first = self.scene("train", i)
        second, change = self.second_scene(first, "train", i, random.Random(f"changed/{i % self.scenes}"))
        selected = [ask(first, second, language, rng, self.categories)
                    for ask in (questions.which_picture, questions.together) for _ in range(2)]
        selected += [questions.difference(*change, language)] if change else []
        turns = list(dict.fromkeys((question.text, question.answer) for question in selected))  # no question twice
        rng.shuffle(turns)
        return dialogue(f"world/sft/{i}", [picture(first), picture(second)], turns)

    def second_scene(self, first: Scene, split: str, i: int,
                     rng: random.Random) -> tuple[Scene, tuple[str, Object | None, Object | None] | None]:
        """(a second scene, what changed): in most pairs the first scene with a change, else another scene and None."""
        if rng.random() < 0.6:
            second, change, old, new = changed_scene(first, rng, self.categories)
            return second, (change, old, new)
        return self.scene(split, rng.randrange(self.scenes) if split == "train" else i + 1_000_000), None

    # ------------------------------------------------------------ to be scored by

    def examples(self, split: str, n: int) -> list[Example]:
        """Each kind of question about n scenes, in alternating languages; tags: language, and new or trained combination."""
        examples = []
        for i in range(n):
            rng = random.Random(f"{split}/questions/{i}")
            scene = self.scene(split, i)
            freshness = "new" if is_new(scene) else "trained"
            for k, kind in enumerate((*KINDS, "caption", *PAIR_KINDS)):
                language = LANGUAGES[(i // 2 + k) % 2]
                if kind in KINDS:
                    scenes, question = [scene], questions.ask(kind, scene, language, rng, self.categories)
                elif kind == "caption":
                    scenes = [scene]
                    question = Question(kind, ASK_CAPTION[language][0], caption(scene, language))
                else:
                    scenes, question = self.pair_question(kind, scene, split, i, language, rng)
                if question:
                    id = f"world/{split}/{i}/{kind}"
                    prompt = dialogue(id, [picture(scene) for scene in scenes], [(question.text, "")])
                    examples.append(Example(prompt, question.answer, kind, (language, freshness)))
        return examples

    def pair_question(self, kind: str, first: Scene, split: str, i: int, language: str,
                      rng: random.Random) -> tuple[list[Scene], Question]:
        if kind == "difference":
            second, change, old, new = changed_scene(first, rng, self.categories)
            return [first, second], questions.difference(change, old, new, language)
        second, _ = self.second_scene(first, split, i, rng)
        ask = {"which_picture": questions.which_picture, "together": questions.together}[kind]
        return [first, second], ask(first, second, language, rng, self.categories)

    def score(self, example: Example, answer: str) -> float:
        """1 for the exact answer; for a caption, 1 if it names exactly the categories present, with any counts."""
        if example.kind != "caption":
            return exact(example, answer)
        language = example.tags[0]
        return float(set(mentions(answer, language, self.categories))
                     == set(mentions(example.answer, language, self.categories)))

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        def mean(kinds: Sequence[str]) -> float | None:
            values = [score for example, score in zip(examples, scores, strict=True) if example.kind in kinds]
            return sum(values) / len(values) if values else None

        overall = {"exact": mean((*KINDS, *PAIR_KINDS)), "multi_image": mean(PAIR_KINDS)}
        return {**{name: value for name, value in overall.items() if value is not None},
                **means(examples, scores, lambda example: [] if example.kind == "caption" else example.tags),
                **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The score of the most common answer to each question, among 300 validation scenes."""
        return guessing([example for example in examples if example.kind != "caption"], self.examples("val", 300))
