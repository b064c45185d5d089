"""Does the model understand people, or only the words of its training data? The questions of `world` in held-out wordings.

No stage of training has these wordings (dataset/world/wordings.py): either the whole is a new combination of known pieces, or a
piece of it, such as a word for the picture, is new.
"""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from dataset.tasks import Example, dialogue, means
from dataset.tasks.world import World, picture
from dataset.world.questions import Question
from dataset.world.scenes import Scene
from model.registry import TASKS

ENOUGH = 10  # questions that share a held-out piece, for their mean to say something


@TASKS.register("world_words")
class WorldWords(World):
    """The questions of `world` about the same scenes, each in a wording that is held out; it trains as `world` does."""

    def example(self, question: Question, scenes: Sequence[Scene], id: str, split: str) -> Example:
        """A question in held-out words; tags: the language, and what holds it out."""
        wording = question.worded(split, random.Random(f"held-out wording/{id}"))
        prompt = dialogue(f"words/{id}", [picture(scene) for scene in scenes], [(wording.text, "")])
        tags = question.language, wording.held_out
        return Example(prompt, question.answer, question.kind, tags, question.text)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """exact: all questions, captions too; by kind and language; new_piece and new_whole: by what is held out.

        worst_piece is the mean score of the held-out piece that is understood worst.
        """
        def groups(example: Example) -> list[str]:
            language, held_out = example.tags
            return [language, example.kind, f"{example.kind}_{language}", "new_whole" if held_out == "the whole" else "new_piece"]

        times = Counter(example.tags for example in examples)
        pieces = means(examples, scores, lambda example: [" ".join(example.tags)] * (times[example.tags] >= ENOUGH))
        return {"exact": sum(scores) / len(scores), **means(examples, scores, groups),
                **({"worst_piece": min(pieces.values())} if pieces else {})}
