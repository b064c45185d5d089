"""The embedded world as a task: captions to pretrain on, conversations to tune on, questions whose answers are known.

Training rows are functions of their number alone. Row i of either stage shows scene i (modulo `scenes`), so that the features
of a scene are computed once for both. Test scenes are other scenes; every second one holds a combination that is never trained.
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

# Kinds of inventories: two at first, because five kinds at once are not learned in the same steps; then the rest.
FIRST = ("place", "exists")
LATER = ("place", "count", "what", *4 * ("relation",), "which_picture", *2 * ("together",), *2 * ("change",))
ASKED = {"what": 2, "where": 2, "count": 2, "total": 1, "exists": 1, "compare": 3, "relation": 4}  # shares: the harder, the more
THINK = {"en": " Think step by step.", "zh": "请一步步思考。"}  # asks for <think>...</think><answer>...</answer>


def picture(scene: Scene) -> Picture:
    """The scene's picture, drawn when it is needed; the key is what is drawn."""
    drawn = [(obj.category.code, obj.x, obj.y, obj.size) for obj in scene.objects]
    return Picture(f"world:{scene.background}:{drawn}", lambda: draw_scene(scene), lambda: (CANVAS, CANVAS))


def reasoned(question: Question) -> str:
    """The answer with its reasoning before it, in the format that RL rewards."""
    return f"<think>{question.thoughts}</think><answer>{question.answer}</answer>"


@TASKS.register("world")
class World(Task):
    """Scenes of emoji drawings: captions, descriptions, and eleven kinds of questions in English and Chinese.

    rows, scenes       training rows of a stage, and how many scenes they are about: a question costs nothing, and one that is
                       asked twice is learned by heart; but every picture costs a run of the encoder
    most               things in a scene (a part of the rows is about crowded ones, of up to nine)
    description_noise  of the detailed descriptions in stage 2 with a place left behind the last thing, the share that also names
                       its absent companion there (scenes.companions); captions and answers are always true
    """

    size = 300  # pictures' worth of questions that make the test set

    def __init__(self, categories: str = "nano", rows: int = 26_500, scenes: int = 3_000, most: int = 4,
                 description_noise: float = 0.95):
        self.categories, self.rows, self.scenes, self.most, self.noise = categories, rows, scenes, most, description_noise

    def scene(self, split: str, i: int) -> Scene:
        return sample_scene(split, i % self.scenes if split == "train" else i, self.categories, self.most)

    def crowded(self, i: int) -> Scene:
        """A training scene of four to nine things."""
        return sample_scene("train", i % self.scenes, self.categories, most=9, least=4)

    # ------------------------------------------------------------ to learn from

    def train(self, stage: str) -> Generated:
        make = {"pretrain": self.captions, "sft": self.conversation}[stage]
        return Generated(self.rows, make)

    def captions(self, i: int) -> Conversation:
        """Scene i in one turn of one language: its caption, its description, or an inventory."""
        rng = random.Random(f"captions/{i}")
        scene, language = self.scene("train", i), rng.choice(LANGUAGES)
        form = rng.choices((self.caption, self.description, None), (15, 5, 80))[0]
        if form is None:
            return self.inventory(f"world/pretrain/{i}", FIRST, i, language, rng)
        return dialogue(f"world/pretrain/{i}", [picture(scene)], [form(scene, language, rng)])

    def conversation(self, i: int) -> Conversation:
        """Scene i in an instruction-tuning row: it is told at once, or questions in several turns, or two pictures.

        What tells everything stands alone: after questions it could be said without looking, and so could answers after it.
        """
        rng = random.Random(f"sft/{i}")
        scene = self.scene("train", i)
        language = rng.choice(LANGUAGES)
        form = rng.choices(("told", "asked", "pair", "inventory"), (27, 21, 21, 31))[0]
        if form == "inventory":
            return self.inventory(f"world/sft/{i}", LATER, i, language, rng)
        if form == "pair":
            return self.pair_conversation(i, language, rng)
        if form == "told":
            tell = rng.choice((self.caption, self.listing, self.noisy_description))
            if tell != self.noisy_description and rng.random() < 0.5:
                scene = self.crowded(i)
            turns = [tell(scene, language, rng)]
        else:
            if rng.random() < 0.5:
                scene = self.crowded(i)
            asked = ["what", *rng.choices(tuple(ASKED), tuple(ASKED.values()), k=8)]
            found = [turn for kind in asked if (turn := self.turn(kind, scene, language, rng))]
            turns = list(dict(found).items())[:6]  # nothing is asked twice
            rng.shuffle(turns)
        return dialogue(f"world/sft/{i}", [picture(scene)], turns)

    def caption(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ASK_CAPTION[language]), caption(scene, language)

    def description(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        return rng.choice(ASK_DESCRIPTION[language]), description(scene, language)

    def noisy_description(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        """A description that may go on from the last thing to its absent partner, at the place after it, if there is one.

        Descriptions from the web do so: they say what is usual. A model learns from them to say what is likely beside what is
        there: it hallucinates, and preference learning can mend it.
        """
        last = scene.objects[-1]
        companion = companions(self.categories).get(last.category)
        if last.cell < 8 and companion and companion not in scene.counts and rng.random() < self.noise:
            imagined = Object(companion, last.cell + 1, 0, 0, 0)
            wider = Scene(scene.key, (*scene.objects, imagined), scene.background)
            scene = scene if is_new(wider) else wider  # what is held out is not even imagined
        return self.description(scene, language, rng)

    def inventory(self, id: str, kinds: Sequence[str], i: int, language: str, rng: random.Random) -> Conversation:
        """A crowded scene, or two that share about half, with answers right behind names."""
        kind = rng.choice(kinds)
        shown = [self.crowded(i)]  # many things, many lookups
        if kind in inventories.TWO:  # a scene's second one is the same in every row
            shown.append(varied_scene(shown[0], random.Random(f"varied/{i % self.scenes}"), self.categories))
        lines = inventories.lines(kind, shown, language, rng, self.categories)
        if not lines:  # no clear pair to compare
            kind = "exists"
            lines = inventories.lines(kind, shown, language, rng, self.categories)
        return inventories.conversation(id, [picture(one) for one in shown], inventories.ASK[language][kind], lines)

    def listing(self, scene: Scene, language: str, rng: random.Random) -> tuple[str, str]:
        question = questions.listing(scene, language, rng, self.categories)
        return question.text, question.answer

    def turn(self, kind: str, scene: Scene, language: str, rng: random.Random) -> tuple[str, str] | None:
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
        asked = [ask(first, second, language, rng, self.categories)
                 for ask in (questions.which_picture, questions.together) for _ in range(2)]
        asked += [questions.difference(*change, language)] if change else []
        turns = list(dict.fromkeys((question.text, question.answer) for question in asked))  # nothing is asked twice
        rng.shuffle(turns)
        return dialogue(f"world/sft/{i}", [picture(first), picture(second)], turns)

    def second_scene(self, first: Scene, split: str, i: int,
                     rng: random.Random) -> tuple[Scene, tuple[str, Object | None, Object | None] | None]:
        """A second scene for a pair, and what changed: in most pairs the first scene with a change, else another scene."""
        if rng.random() < 0.6:
            second, change, old, new = changed_scene(first, rng, self.categories)
            return second, (change, old, new)
        return self.scene(split, rng.randrange(self.scenes) if split == "train" else i + 1_000_000), None

    # ------------------------------------------------------------ to be judged by

    def examples(self, split: str, n: int) -> list[Example]:
        """Every kind of question about n scenes, in alternating languages; tags: language, and new or trained."""
        found = []
        for i in range(n):
            rng = random.Random(f"{split}/questions/{i}")
            scene = self.scene(split, i)
            freshness = "new" if is_new(scene) else "trained"
            for k, kind in enumerate((*KINDS, "caption", *PAIR_KINDS)):
                language = LANGUAGES[(i // 2 + k) % 2]
                if kind in KINDS:
                    pictures, question = [scene], questions.ask(kind, scene, language, rng, self.categories)
                elif kind == "caption":
                    pictures = [scene]
                    question = Question(kind, ASK_CAPTION[language][0], caption(scene, language))
                else:
                    pictures, question = self.pair_question(kind, scene, split, i, language, rng)
                if question:
                    id = f"world/{split}/{i}/{kind}"
                    prompt = dialogue(id, [picture(shown) for shown in pictures], [(question.text, "")])
                    found.append(Example(prompt, question.answer, kind, (language, freshness)))
        return found

    def pair_question(self, kind: str, first: Scene, split: str, i: int, language: str,
                      rng: random.Random) -> tuple[list[Scene], Question]:
        if kind == "difference":
            second, change, old, new = changed_scene(first, rng, self.categories)
            return [first, second], questions.difference(change, old, new, language)
        second, _ = self.second_scene(first, split, i, rng)
        ask = {"which_picture": questions.which_picture, "together": questions.together}[kind]
        return [first, second], ask(first, second, language, rng, self.categories)

    def score(self, example: Example, answer: str) -> float:
        """Questions: the exact answer. Captions: exactly the things that are there are named (numbers are scored apart)."""
        if example.kind != "caption":
            return exact(example, answer)
        language = example.tags[0]
        return float(set(mentions(answer, language, self.categories))
                     == set(mentions(example.answer, language, self.categories)))

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        def mean(wanted: Sequence[str]) -> float | None:
            chosen = [score for example, score in zip(examples, scores, strict=True) if example.kind in wanted]
            return sum(chosen) / len(chosen) if chosen else None

        whole = {"exact": mean((*KINDS, *PAIR_KINDS)), "multi_image": mean(PAIR_KINDS)}
        return {**{name: value for name, value in whole.items() if value is not None},
                **means(examples, scores, lambda example: [] if example.kind == "caption" else example.tags),
                **means(examples, scores, lambda example: [example.kind])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The level of guessing on these questions, from the answers to the same questions about validation scenes."""
        return guessing([example for example in examples if example.kind != "caption"], self.examples("val", 300))
