"""Text without pictures: the names of the world's concepts in the other language, and who the model is.

A model that is tuned on pictures alone forgets that a conversation may have none; these rows keep the habit.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset import world
from dataset.chat import Conversation
from dataset.tasks import Example, Generated, dialogue, exact, means
from model.registry import TASKS

SMALL_TALK = {
    "en": [("Hello!", "Hello! Show me a picture."), ("Who are you?", "I am Pupil, a small model that reads pictures."),
           ("What can you do?", "I can name, count and compare the things in a picture."), ("Thank you!", "You are welcome!")],
    "zh": [("你好！", "你好！给我看一张图吧。"), ("你是谁？", "我是Pupil，一个会看图的小模型。"),
           ("你会做什么？", "我会说出、数出和比较图里的东西。"), ("谢谢！", "不客气！")],
}


def translation(concept: world.Concept, language: str) -> tuple[str, str]:
    """A question and its answer: the name in the other language."""
    if language == "en":
        return f"What is {concept.zh} in English?", concept.en
    return f"{concept.en}用中文怎么说？", concept.zh


@TASKS.register("text")
class Text:
    """Translations of the concepts' names and a little small talk: conversations without any picture."""

    size = 100  # pictures' worth of questions that make the test set

    def __init__(self, concepts: str = "nano", rows: int = 600):
        self.concepts, self.rows = concepts, rows

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        rng = random.Random(f"text/{i}")
        language = rng.choice(world.LANGUAGES)
        turns = [translation(concept, language) for concept in rng.sample(world.concepts(self.concepts), 4)]
        turns.append(rng.choice(SMALL_TALK[language]))
        rng.shuffle(turns)
        return dialogue(f"text/train/{i}", [], turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """The first n names, asked as they are trained: this is vocabulary, so there is no unseen half of it."""
        return [Example(dialogue(f"text/{language}/{concept.en}", [], [(question, "")]), answer, "translation", (language,))
                for concept in world.concepts(self.concepts)[:n] for language in world.LANGUAGES
                for question, answer in [translation(concept, language)]]

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"translation": sum(scores) / len(scores), **means(examples, scores, lambda example: example.tags)}
