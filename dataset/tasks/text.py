"""Text without pictures: the names of the world's categories in the other language, and who the model is.

A model that is trained on pictures alone forgets how to answer without one; these rows prevent that.
"""
from __future__ import annotations

import random
from collections.abc import Sequence

from dataset.chat import Conversation
from dataset.tasks import Example, Generated, Task, dialogue, exact, means
from dataset.world.openmoji import LANGUAGES, Category, categories
from dataset.world.small_talk import SMALL_TALK, small_talk
from model.registry import TASKS


def translation(category: Category, language: str) -> tuple[str, str]:
    """A question for the name in the other language, and its answer."""
    if language == "en":
        return f"What is {category.zh} in English?", category.en
    return f"{category.en}用中文怎么说？", category.zh


@TASKS.register("text")
class Text(Task):
    """Translations of the categories' names, and small talk: conversations without any picture."""

    size = 100  # categories of the test set

    def __init__(self, categories: str = "nano", rows: int = 600):
        self.categories, self.rows = categories, rows

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def row(self, i: int) -> Conversation:
        rng = random.Random(f"text/{i}")
        language = rng.choice(LANGUAGES)
        turns = [translation(category, language) for category in rng.sample(categories(self.categories), 3)]
        turns += [small_talk(kind, language, "train", rng) for kind in rng.sample(tuple(SMALL_TALK[language]), 3)]
        rng.shuffle(turns)
        return dialogue(f"text/train/{i}", [], turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """Small talk in new words, and the first n names in each language, all trained: vocabulary has no unseen half."""
        examples = []
        for i in range(n):
            rng, language = random.Random(f"text/{split}/{i}"), LANGUAGES[i % 2]
            kinds = tuple(SMALL_TALK[language])
            said, answer = small_talk(kinds[i // 2 % len(kinds)], language, split, rng)
            examples.append(Example(dialogue(f"text/{split}/{i}", [], [(said, "")]), answer, "small_talk", (language,)))
        for category in categories(self.categories)[:n]:
            for language in LANGUAGES:
                question, answer = translation(category, language)
                prompt = dialogue(f"text/{language}/{category.en}", [], [(question, "")])
                examples.append(Example(prompt, answer, "translation", (language,)))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return exact(example, answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        return means(examples, scores, lambda example: [example.kind, *example.tags])
