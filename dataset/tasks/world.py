"""The embedded world as a task: captions for stage 1, conversations for stage 2, questions with known answers.

A training row is a function of its index. Row i of either stage shows scene i (modulo `scenes`), so the features of a scene are
computed once for both. Test scenes are never trained; every second one has a combination that is never trained.
"""
from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dataset.chat import Conversation
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, exact, guessing, means
from dataset.world import inventories, questions
from dataset.world.openmoji import LANGUAGES, categories
from dataset.world.questions import KINDS, PAIR_KINDS, Question, account
from dataset.world.scenes import CANVAS, Object, Scene, changed_scene, companions, draw_scene, is_new, sample_scene, varied_scene
from dataset.world.small_talk import SMALL_TALK, small_talk
from dataset.world.words import mentions
from model.registry import TASKS, UserError

# What the rows of a stage are, and how often.
FORMS = {"pretrain": {"caption": 15, "description": 5, "inventory": 80},
         "sft": {"account": 22, "questions": 25, "pair": 20, "inventory": 33}}
# Kinds of inventories. Stage 1 has only two, because more kinds at once are learned more slowly.
INVENTORIES = {"pretrain": ("place", "exists"),
               "sft": ("place", "count", "what", "exists_at", *6 * ("relation",),
                       "which_picture", *2 * ("together",), *3 * ("change",))}
WEIGHTS = {"what": 2, "where": 2, "count": 2, "total": 1, "exists": 2, "exists_at": 2, "compare": 3, "relation": 4}  # hard: often
# Shares of the rows of questions, for people chat: with small talk (accounts, too), in two languages, with "And the bus?" after a
# question, and with an account at the end.
CHATTER, BILINGUAL, FOLLOWED, ACCOUNT_LAST = 0.2, 0.15, 0.2, 0.15
WORDLESS = 0.08  # share of the captions that are asked for by a picture without a word
THINK = {"en": " Think step by step.", "zh": "请一步步思考。"}  # requests <think>...</think><answer>...</answer>


Change = tuple[str, Object | None, Object | None]  # how a second scene differs from the first: kind, old and new object


class Plan(NamedTuple):
    """What a training row is about, before a word of it is chosen: all pictures are listed in a fraction of the rows' time.

    form     caption, list, description, questions, pair or inventory
    kind     of an inventory
    change   how the second scene of a pair differs, where it is the first one changed
    """

    form: str
    language: str
    rng: random.Random
    scenes: list[Scene]
    kind: str = ""
    change: Change | None = None


def picture(scene: Scene) -> Picture:
    """The scene's picture, drawn when it is needed; its key lists what is drawn."""
    drawn = [(obj.category.code, obj.x, obj.y, obj.size) for obj in scene.objects]
    return Picture(f"world:{scene.background}:{drawn}", lambda: draw_scene(scene), lambda: (CANVAS, CANVAS))


def reasoned(question: Question) -> str:
    """The reasoning and the answer in the format that RL rewards."""
    return f"<think>{question.thoughts}</think><answer>{question.answer}</answer>"


def turn(question: Question, rng: random.Random) -> tuple[str, str]:
    """The question in trained words, and the answer: a quarter with reasoning where the kind has it."""
    if question.kind == "caption" and rng.random() < WORDLESS:
        return "", question.answer
    text = question.worded("train", rng).text
    if question.thoughts and rng.random() < 0.25:
        return text + THINK[question.language], reasoned(question)
    return text, question.answer


def different(asked: Sequence[Question]) -> list[Question]:
    """The questions without those that ask the same again."""
    return list({question.text: question for question in asked}.values())


@TASKS.register("world")
class World(Task):
    """Scenes of emoji drawings: captions, descriptions, and twelve kinds of questions in English and Chinese.

    rows, scenes       training rows of a stage, and the scenes they share: new questions cost nothing and are not memorised,
                       but each new picture needs a run of the encoder
    most               objects in a scene; some rows show crowded scenes of up to nine
    description_noise  of the stage-2 descriptions with two places after the last object, the share that also name its absent
                       companion there (scenes.companions); captions and answers are always true
    """

    size = 300  # scenes of the test set

    def __init__(self, categories: str = "nano", rows: int = 26_500, scenes: int = 3_000, most: int = 4,
                 description_noise: float = 0.8):
        if scenes < 1:
            raise UserError("world:scenes=0: name one or more, which the rows are about")
        self.categories, self.rows, self.scenes, self.most, self.noise = categories, rows, scenes, most, description_noise

    def scene(self, split: str, i: int) -> Scene:
        return sample_scene(split, i % self.scenes if split == "train" else i, self.categories, self.most)

    def crowded(self, i: int) -> Scene:
        """A training scene of four to nine objects."""
        return sample_scene("train", i % self.scenes, self.categories, most=9, least=4)

    # ------------------------------------------------------------ to learn from

    def train(self, stage: str) -> Generated:
        return Generated(self.rows, partial(self.row, stage), lambda i: [picture(scene) for scene in self.plan(stage, i).scenes])

    def plan(self, stage: str, i: int) -> Plan:
        """What row i of a stage is about: a caption or another account, questions, two pictures, or an inventory."""
        rng = random.Random(f"{'captions' if stage == 'pretrain' else stage}/{i}")
        scene, language = self.scene("train", i), rng.choice(LANGUAGES)
        form = rng.choices(tuple(FORMS[stage]), tuple(FORMS[stage].values()))[0]
        if form == "inventory":
            kind, scene = rng.choice(INVENTORIES[stage]), self.crowded(i)  # many objects, many lookups
            if kind not in inventories.TWO_SCENES:
                return Plan(form, language, rng, [scene], kind)
            # The second scene depends on the first alone: its features are computed once.
            second = varied_scene(scene, random.Random(f"varied/{i % self.scenes}"), self.categories)
            return Plan(form, language, rng, [scene, second], kind)
        if form == "pair":
            second, change = self.second_scene(scene, "train", i, random.Random(f"changed/{i % self.scenes}"))
            return Plan(form, language, rng, [scene, second], change=change)
        if form == "account":
            form = rng.choice(("caption", "list", "description"))
        if stage == "sft" and form != "description" and rng.random() < 0.5:
            scene = self.crowded(i)
        return Plan(form, language, rng, [scene])

    def row(self, stage: str, i: int) -> Conversation:
        """Row i of stage "pretrain", in one turn and language, or of stage "sft", which has conversations.

        A full account mostly stands alone: it would give away the answers after it, and answers before it would give it away.
        """
        plan = self.plan(stage, i)
        scene, language, rng = plan.scenes[0], plan.language, plan.rng
        if plan.form == "inventory":
            return self.inventory(f"world/{stage}/{i}", plan)
        if plan.form == "pair":
            turns = self.about_two(plan)
        elif plan.form == "questions":
            turns = self.exchanges(scene, language, rng)
        elif stage == "pretrain":
            turns = [turn(account(plan.form, scene, language), rng)]
        else:
            turns = [self.chatter(language, rng)] if rng.random() < CHATTER else []
            turns += [turn(self.account(plan.form, scene, language, rng), rng)]
        return dialogue(f"world/{stage}/{i}", [picture(scene) for scene in plan.scenes], turns)

    def exchanges(self, scene: Scene, language: str, rng: random.Random) -> list[tuple[str, str]]:
        """Questions about a scene, at times in two languages, with small talk, "And the bus?", or an account at the end."""
        spoken = LANGUAGES if rng.random() < BILINGUAL else (language,)

        def asked(*kinds: str) -> list[Question]:
            return [question for kind in kinds
                    if (question := questions.ask(kind, scene, rng.choice(spoken), rng, self.categories))]

        kinds = rng.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()), k=8)
        turns = [turn(question, rng) for question in different(asked("what", *kinds))[:6]]
        if rng.random() < CHATTER:
            turns.append(self.chatter(language, rng))
        rng.shuffle(turns)
        if rng.random() < FOLLOWED:
            pair = different(asked(*2 * [rng.choice(tuple(questions.FOLLOW_UP))]))
            turns += [questions.follow_up(question, rng) if k else turn(question, rng) for k, question in enumerate(pair)]
        if rng.random() < ACCOUNT_LAST:
            turns.append(turn(self.account(rng.choice(("caption", "description")), scene, language, rng), rng))
        return turns

    def chatter(self, language: str, rng: random.Random) -> tuple[str, str]:
        """A turn of small talk."""
        return small_talk(rng.choice(tuple(SMALL_TALK[language])), language, "train", rng)

    def account(self, kind: str, scene: Scene, language: str, rng: random.Random) -> Question:
        """The request for a full account of a scene: a "caption", a "list", or a "description", which is noisy."""
        if kind == "list":
            return questions.listing(scene, language, rng, self.categories)
        return account(kind, self.imagined(scene, rng) if kind == "description" else scene, language)

    def imagined(self, scene: Scene, rng: random.Random) -> Scene:
        """The scene to describe: mostly with the absent companion of the last object, where two places are free behind it.

        Descriptions from the web likewise name what is usual. A model learns to hallucinate from them: it adds what is likely
        beside the objects present. Preference learning can reduce that.
        """
        last = scene.objects[-1]
        if last.cell > 6 or rng.random() > self.noise:
            return scene
        order = categories(self.categories)  # its companion, or where that is no new thing the one after it in this order
        start = order.index(companions(self.categories).get(last.category, last.category))
        for category in order[start:] + order[:start]:
            wider = Scene(scene.key, (*scene.objects, Object(category, last.cell + 1, 0, 0, 0)), scene.background)
            if category not in scene.counts and not is_new(wider):  # held-out combinations are not even imagined
                return wider
        return scene

    def inventory(self, id: str, plan: Plan) -> Conversation:
        """An inventory of a crowded scene, or of two that share about half of their objects."""
        kind, scenes = plan.kind, plan.scenes
        lines = inventories.lines(kind, scenes, plan.language, plan.rng, self.categories)
        if not lines:  # no clear relation
            kind = "exists"
            lines = inventories.lines(kind, scenes, plan.language, plan.rng, self.categories)
        return inventories.conversation(id, [picture(scene) for scene in scenes], inventories.ASK[plan.language][kind], lines)

    def about_two(self, plan: Plan) -> list[tuple[str, str]]:
        """A few questions about two pictures."""
        (first, second), language, rng = plan.scenes, plan.language, plan.rng
        selected = [ask(first, second, language, rng, self.categories)
                    for ask in (questions.which_picture, questions.together) for _ in range(2)]
        selected += [questions.difference(*plan.change, language)] if plan.change else []
        turns = [turn(question, rng) for question in different(selected)]
        rng.shuffle(turns)
        return turns

    def second_scene(self, first: Scene, split: str, i: int,
                     rng: random.Random) -> tuple[Scene, Change | None]:
        """(a second scene, what changed): in most pairs the first scene with a change, else another scene and None."""
        if rng.random() < 0.6:
            second, change, old, new = changed_scene(first, rng, self.categories)
            return second, (change, old, new)
        return self.scene(split, rng.randrange(self.scenes) if split == "train" else i + 1_000_000), None

    # ------------------------------------------------------------ to be scored by

    def examples(self, split: str, n: int) -> list[Example]:
        """Each kind of question about n scenes, in alternating languages; tags: language, and new or trained combination."""
        return [self.example(question, scenes, f"world/{split}/{i}/{question.kind}", split)
                for i, scenes, question in self.asked(split, n)]

    def example(self, question: Question, scenes: Sequence[Scene], id: str, split: str) -> Example:
        """A question in trained words."""
        text = question.worded("train", random.Random(f"wording/{id}")).text
        prompt = dialogue(id, [picture(scene) for scene in scenes], [(text, "")])
        tags = question.language, "new" if is_new(scenes[0]) else "trained"
        return Example(prompt, question.answer, question.kind, tags, question.text)

    def asked(self, split: str, n: int) -> list[tuple[int, list[Scene], Question]]:
        """(index, its scene or two scenes, a question about them): each kind of question about n scenes of a split."""
        asked = []
        for i in range(n):
            rng = random.Random(f"{split}/questions/{i}")
            scene = self.scene(split, i)
            for k, kind in enumerate((*KINDS, "caption", *PAIR_KINDS)):
                language = LANGUAGES[(i // 2 + k) % 2]
                if kind in KINDS:
                    scenes, question = [scene], questions.ask(kind, scene, language, rng, self.categories)
                elif kind == "caption":
                    scenes, question = [scene], account(kind, scene, language)
                else:
                    scenes, question = self.pair_question(kind, scene, split, i, language, rng)
                if question:
                    asked.append((i, scenes, question))
        return asked

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
