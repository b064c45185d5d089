"""Text without pictures: the names of the world's categories in the other language, and who the model is.

A model that is trained on pictures alone forgets how to answer without one; these rows prevent that.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation
from dataset.tasks import Example, Generated, Task, dialogue, exact, means
from dataset.world.openmoji import LANGUAGES, Category, categories
from model.registry import TASKS

SMALL_TALK = {
    "en": [("Hello!", "Hello! Show me a picture."), ("Who are you?", "I am Pupil, a small model that reads pictures."),
           ("What can you do?", "I can name, count and compare the things in a picture."), ("Thank you!", "You are welcome!")],
    "zh": [("你好！", "你好！给我看一张图吧。"), ("你是谁？", "我是Pupil，一个会看图的小模型。"),
           ("你会做什么？", "我会说出、数出和比较图里的东西。"), ("谢谢！", "不客气！")],
}


def translation(category: Category, language: str) -> tuple[str, str]:
    """A question for the name in the other language, and its answer."""
    if language == "en":
        return f"What is {category.zh} in English?", category.en
    return f"{category.en}用中文怎么说？", category.zh


@TASKS.register("text")
class Text(Task):
    """Translations of the categories' names and a little small talk: conversations without any picture."""

    size = 100  # categories of the test set

    def __init__(self, categories: str = "nano", rows: int = 600):
        self.categories, self.rows = categories, rows

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        rng = random.Random(f"text/{i}")
        language = rng.choice(LANGUAGES)
        turns = [translation(category, language) for category in rng.sample(categories(self.categories), 4)]
        turns.append(rng.choice(SMALL_TALK[language]))
        rng.shuffle(turns)
        return dialogue(f"text/train/{i}", [], turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """The first n names in each language, all of them trained: vocabulary has no unseen half."""
        return [Example(dialogue(f"text/{language}/{category.en}", [], [(question, "")]), answer, "translation", (language,))
                for category in categories(self.categories)[:n] for language in LANGUAGES
                for question, answer in [translation(category, language)]]

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return {"translation": sum(scores) / len(scores), **means(examples, scores, lambda example: example.tags)}
