"""GQA (arXiv 1902.09506): compositional questions about pictures, answered with one word.

    python 4-eval_chat.py --bench gqa:path=benchmarks/gqa

path     a folder with testdev_balanced_questions.json of gqadataset.org (questions1.2.zip): 12,578 questions about 398 pictures
images   its pictures; default: images in that folder
split    testdev or val; the file is SPLIT_balanced_questions.json

accuracy: the answer without a final stop, in lower case, is exactly the right word. binary and open are its two halves: a
model that only guesses does well in the first. distribution: how far the answers to a group of questions are distributed from
the right ones (chi-square / 100; 0 is best), as GQA's eval.py has it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from dataset.formats.official import Folder, by_id, of_first
from dataset.tasks import Example, Task, dialogue, means
from dataset.tasks.vqa_score import SHORT, answer_habits
from model.registry import TASKS, UserError

SOURCE = "gqadataset.org (questions1.2.zip)"
PARTS = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}


def gqa_normal(answer: str) -> str:
    """An answer as it is compared: without final stops, in lower case (LLaVA's convert_gqa_for_eval.py)."""
    return answer.rstrip(".").lower()


def distribution(groups: Sequence[str], right: Sequence[str], given: Sequence[str]) -> float:
    """The chi-square statistic of answers against right ones in each group, averaged over questions, / 100; "": in no group."""
    expected: dict[str, Counter] = defaultdict(Counter)
    observed: dict[str, Counter] = defaultdict(Counter)
    for group, truth, answer in zip(groups, right, given, strict=True):
        if group:
            expected[group][truth] += 1
            observed[group][answer] += 1
    total = weight = 0.0
    for group, counts in expected.items():
        questions = counts.total()
        total += questions * sum((observed[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weight += questions
    return total / weight / 100 if weight else 0.0


@TASKS.register("gqa")
class GQA(Task):
    """GQA from its official file: exact match, by structure and by what is asked about."""

    size = 10_696  # pictures; testdev has 398

    def __init__(self, path: str = "", images: str = "", split: str = "testdev"):
        if split not in ("testdev", "val"):
            raise UserError(f"gqa: split={split}: testdev or val")
        self.folder, self.split = Folder("gqa", path, SOURCE, images), split

    def examples(self, split: str, n: int) -> list[Example]:
        name = f"{self.split}_balanced_questions.json"
        file = self.folder.file(name, f"data/{name}")
        fields = {"imageId": str, "question": str, "answer": str, "isBalanced": bool,
                  "types": {"structural": str, "semantic": str}, "groups": {"global": (str, NoneType)}}  # fmt: skip
        listed = [row for row in by_id(file, fields, f"{name} of {SOURCE}") if row["isBalanced"]]
        examples = []
        for row in of_first(listed, lambda row: row["imageId"], n):
            image = self.folder.picture([f"{row['imageId']}.jpg"], ["images", "data/images"], "GQA's pictures (gqadataset.org)")
            prompt = dialogue(f"gqa/{row['id']}", [image], [(row["question"] + SHORT, "")])
            kinds = row["types"]["structural"], row["types"]["semantic"]
            examples.append(Example(prompt, row["answer"], "open" if kinds[0] == "query" else "binary",
                                    (*kinds, row["groups"]["global"] or "")))  # fmt: skip
        return examples

    def score(self, example: Example, answer: str) -> float:
        return float(gqa_normal(answer) == example.answer)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """accuracy; binary, open; yes, unparsed, empty (`answer_habits`); distribution; by structure and by what is asked."""
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        given, right = [gqa_normal(answer) for answer in answers], [example.answer for example in examples]
        return scores, {
            "accuracy": sum(scores) / len(scores),
            **means(examples, scores, lambda example: [example.kind]),
            **answer_habits(given, [truth in ("yes", "no") for truth in right]),
            "distribution": distribution([example.tags[2] for example in examples], right, given),
            **means(examples, scores, lambda example: [f"structure_{example.tags[0]}"]),
            **means(examples, scores, lambda example: [f"about_{PARTS.get(example.tags[1], example.tags[1])}"]),
        }

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """The file that GQA's eval.py reads."""
        given = [{"questionId": Path(row["id"]).name, "prediction": gqa_normal(row["answer"])} for row in rows]
        return {f"gqa-{self.split}.json": given}
