"""VQAv2 (arXiv 1612.00837): open questions about COCO's pictures, each answered by ten people.

    python 4-eval_chat.py --bench vqav2:path=benchmarks/vqav2                      val: 214,354 questions with answers
    python 4-eval_chat.py --bench vqav2:path=benchmarks/vqav2,split=test-dev       a file for EvalAI, which has the answers

path     a folder with the files of visualqa.org: v2_OpenEnded_mscoco_val2014_questions.json and
         v2_mscoco_val2014_annotations.json; for test-dev and test v2_OpenEnded_mscoco_SPLIT2015_questions.json, or LLaVA's
         llava_vqav2_mscoco_SPLIT2015.jsonl
images   COCO's pictures; default: val2014 or test2015 in that folder
split    val, test-dev or test. Papers report test-dev; val is about two points lower

accuracy, then by type of answer (yes_no, number, other) and by the first words of the question. EvalAI wants an answer to
every question of test2015, so those that were not asked get "".
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.formats.official import Folder, checked, of_first, rows, under
from dataset.images import Picture
from dataset.tasks import Example, Task, dialogue, means
from dataset.tasks.vqa_score import SHORT, answer_habits, m4c_normal, require_ten, vqa_accuracy, vqa_normal
from dataset.uncollected import uncollected
from model.registry import TASKS, UserError

SPLITS = {"val": "val2014", "test-dev": "test2015", "test": "test2015"}  # -> the pictures of COCO


def only_text(value: dict) -> dict | str:
    """An answer of a person as its text alone: there are two million, and few different ones."""
    answer = value.get("answer")
    return sys.intern(answer) if isinstance(answer, str) and "question_id" not in value else value


@TASKS.register("vqav2")
class VQAv2(Task):
    """VQAv2 from its official files: accuracy against ten people; a file for EvalAI where the answers are not public."""

    size = 81_434  # pictures of the largest split

    def __init__(self, path: str = "", images: str = "", split: str = "val"):
        if split not in SPLITS:
            raise UserError(f"vqav2: split={split}: val, test-dev or test")
        self.folder, self.split = Folder("vqav2", path, "visualqa.org", images), split

    def questions(self, split: str, n: int) -> list[dict]:
        """The questions about n pictures, each with its question_id, image (a file's name) and text."""
        year = "2014" if split == "val" else "2015"
        names = [f"v2_OpenEnded_mscoco_{split}{year}_questions.json", f"llava_vqav2_mscoco_{split}{year}.jsonl"]
        file = self.folder.file(*names[: 1 if split == "val" else 2])
        if file.suffix == ".jsonl":
            listed = checked(rows(file), {"question_id": int, "image": str, "text": str}, file, f"LLaVA's {file.name}")
            found = [{**row, "text": row["text"].removesuffix(SHORT)} for row in listed]
        else:
            fields = {"question_id": int, "image_id": int, "question": str}
            listed = under("questions", file, fields, f"{file.name} of visualqa.org")
            found = [{"question_id": row["question_id"], "image": f"COCO_{SPLITS[split]}_{row['image_id']:012d}.jpg",
                      "text": row["question"]} for row in listed]  # fmt: skip
        return of_first(found, lambda row: row["image"], n)

    def notes(self) -> dict[int, tuple[str, ...]]:
        """Question id -> (answer type, question type, answer of most, the ten answers); {} where answers are not public."""
        if self.split != "val":
            return {}
        file = self.folder.file("v2_mscoco_val2014_annotations.json")
        fields = {"question_id": int, "answer_type": str, "question_type": str, "multiple_choice_answer": str, "answers": [str]}
        listed = under("annotations", file, fields, source := f"{file.name} of visualqa.org", only_text)
        require_ten(listed, file, source)
        return {row["question_id"]: (row["answer_type"], row["question_type"], row["multiple_choice_answer"], *row["answers"])
                for row in listed}  # fmt: skip

    @uncollected()
    def examples(self, split: str, n: int) -> list[Example]:
        asked, notes = self.questions(self.split, n), self.notes()
        pictures: dict[str, Picture] = {}
        examples = []
        for row in asked:
            if row["image"] not in pictures:
                folders, source = (SPLITS[self.split], ""), f"COCO's {SPLITS[self.split]} (cocodataset.org)"
                pictures[row["image"]] = self.folder.picture([row["image"]], folders, source)
            prompt = dialogue(f"vqav2/{row['question_id']}", [pictures[row["image"]]], [(row["text"] + SHORT, "")])
            note = notes.get(row["question_id"], ("", "", ""))
            if notes and len(note) == 3:
                raise UserError(f"vqav2: question {row['question_id']} has no answers in v2_mscoco_val2014_annotations.json: "
                                f"questions and annotations must be of one version")  # fmt: skip
            examples.append(Example(prompt, note[2], note[0], (note[1], *note[3:])))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return vqa_accuracy(answer, example.tags[1:]) if example.tags[1:] else 0.0

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """accuracy, by type of answer and of question; yes, unparsed, empty (`answer_habits`). No scores without answers."""
        habits = answer_habits([vqa_normal(answer) for answer in answers], [example.kind == "yes/no" for example in examples])
        if self.split != "val":
            return [None] * len(answers), habits
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        by_answer = means(examples, scores, lambda example: [example.kind.replace("/", "_")])
        by_question = means(examples, scores, lambda example: [f"asked_{example.tags[0].replace(' ', '_')}"])
        return scores, {"accuracy": sum(scores) / len(scores), **by_answer, **habits, **by_question}

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """The file that EvalAI takes: [{question_id, answer}], answers normalised as LLaVA's converter does."""
        given = {int(Path(row["id"]).name): m4c_normal(row["answer"]) for row in rows}
        if self.split == "val":
            return {}
        try:
            every = [row["question_id"] for row in self.questions("test", self.size)]
        except FileNotFoundError as missing:
            print(f"vqav2: the file for EvalAI has the {len(given)} questions that were asked, and EvalAI wants all: {missing}")
            every = list(given)
        return {f"vqav2-{self.split}.json": [{"question_id": id, "answer": given.get(id, "")} for id in every]}
