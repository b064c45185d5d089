"""MMMU (arXiv 2311.16502): college exams in 30 subjects, most with options, some with a short answer.

    python 4-eval_chat.py --bench mmmu:path=benchmarks/mmmu

path     the data set huggingface.co/datasets/MMMU/MMMU: a folder for each subject with SPLIT-00000-of-00001.parquet
split    validation (900 questions: "MMMU-val"), dev (150), or test (10,500 without public answers: a file for EvalAI)
images   how many of a question's up to seven pictures are shown; 1, as the official run for models of one picture

accuracy: that of MMMU's eval_utils.py, then by its six fields and 30 subjects. Its parser gives an option at random where it
finds none; with the official seed and order that is the official digit. So beside it: `unparsed`, questions with options whose
option was drawn, and strict_accuracy, in which those are wrong. An open answer is right that contains a right one.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from dataset.formats.official import Folder, checked
from dataset.images import from_bytes
from dataset.tasks import Example, Task, dialogue, means
from dataset.tasks.mmmu_answers import open_is_right, option_of
from dataset.tasks.vqa_score import LETTER, SHORT
from model.registry import TASKS, UserError

SOURCE = "huggingface.co/datasets/MMMU/MMMU"
FIELDS = {
    "art_and_design": ("Art", "Art_Theory", "Design", "Music"),
    "business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "health_and_medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
                            "Public_Health"),
    "humanities_and_social_science": ("History", "Literature", "Sociology", "Psychology"),
    "tech_and_engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                             "Energy_and_Power", "Materials", "Mechanical_Engineering"),
}  # fmt: skip
FIELD = {subject: field for field, subjects in FIELDS.items() for subject in subjects}
LETTERS = "ABCDEFGHI"


def subject_and_number(id: str) -> tuple[str, int]:
    """("Art_Theory", 12) of validation_Art_Theory_12."""
    _, _, rest = id.partition("_")
    subject, _, number = rest.rpartition("_")
    if subject not in FIELD or not number.isdigit():
        raise UserError(f"mmmu: {id!r} is not the id of a question of {SOURCE}, such as validation_Art_Theory_12")
    return subject, int(number)


def listed(text: str) -> list[str]:
    """The strings of a Python list that is written as text; [] for any other text."""
    try:
        value = ast.literal_eval(text) if text.startswith("[") else []
    except (SyntaxError, ValueError):
        return []
    return [str(one) for one in value]


@TASKS.register("mmmu")
class MMMU(Task):
    """MMMU from its official data set: accuracy with the official parser, and without its luck."""

    size = 10_500  # questions of the largest split

    def __init__(self, path: str = "", split: str = "validation", images: int = 1):
        if split not in ("validation", "dev", "test") or not 0 <= images <= 7:
            raise UserError(f"mmmu: split={split}, images={images}: validation, dev or test, and 0 to 7 pictures")
        self.folder, self.split, self.images = Folder("mmmu", path, SOURCE), split, images

    def questions(self) -> list[dict]:
        """The questions in the official order: subjects by name, then numbers."""
        from pyarrow import ArrowInvalid, parquet

        pictures = [f"image_{k + 1}" for k in range(self.images)]
        texts = ("id", "question", "options", "answer", "question_type")
        fields = {**dict.fromkeys(texts, str), **dict.fromkeys(pictures, ({"bytes": bytes}, NoneType))}
        files = sorted(self.folder.root.rglob(f"{self.split}-*.parquet"))
        if not files:
            self.folder.file(f"Accounting/{self.split}-00000-of-00001.parquet")
        rows = []
        for file in files:
            try:
                table = parquet.read_table(file)
            except ArrowInvalid as error:
                raise UserError(f"{file} is not parquet ({error}): download it again, with git lfs if by git") from error
            present = [field for field in fields if field in table.column_names]
            rows += checked(table.select(present).to_pylist(), fields, file, f"a file of {SOURCE}")
        return sorted(rows, key=lambda row: subject_and_number(row["id"]))

    def examples(self, split: str, n: int) -> list[Example]:
        """The first n questions, the subjects in turns; tags: subject, and the options or the right answers."""
        rows = self.questions()
        places: dict[str, int] = {}
        for row in rows:
            subject = subject_and_number(row["id"])[0]
            row["turn"] = places[subject] = places.get(subject, -1) + 1
        if missing := sorted(FIELD.keys() - places.keys()):
            print(f"mmmu: {len(missing)} of 30 subjects are not in {self.folder.root}: {', '.join(missing)}")
        return [self.example(row) for row in sorted(rows, key=lambda row: row["turn"])[:n]]

    def example(self, row: dict) -> Example:
        stored = [row[f"image_{k + 1}"] for k in range(self.images)]
        pictures = [from_bytes(image["bytes"]) for image in stored if image]
        chosen = row["question_type"] == "multiple-choice"
        options = listed(row["options"]) if chosen else []
        lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options)]
        asked = "\n".join([row["question"], *lines]) + ("\n" + LETTER if chosen else SHORT)
        golds = options if chosen else listed(row["answer"]) or [row["answer"]]
        if chosen and not 2 <= len(options) <= len(LETTERS):
            raise UserError(f"mmmu: {row['id']} has the options {row['options']!r}: download {SOURCE} again")
        subject = subject_and_number(row["id"])[0]
        prompt = dialogue(f"mmmu/{row['id']}", pictures, [(asked, "")])
        return Example(prompt, row["answer"], "options" if chosen else "open", (subject, *golds))

    def score(self, example: Example, answer: str) -> float:
        """1 if the answer is right; where the official parser draws an option, 0."""
        if example.kind == "open":
            return float(open_is_right(answer, example.tags[1:]))
        return float(option_of(answer, example.tags[1:]) == example.answer)

    def options_given(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, str]:
        """Id -> the option by the official parser, drawn where it finds none: in the official order, with the official seed."""
        rng = random.Random(42)
        order = sorted(range(len(examples)), key=lambda k: subject_and_number(Path(examples[k].prompt.id).name))
        given = {}
        for k in order:
            if examples[k].kind == "options":
                letters = LETTERS[: len(examples[k].tags) - 1]
                given[examples[k].prompt.id] = option_of(answers[k], examples[k].tags[1:]) or rng.choice(letters)
        return given

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """accuracy, strict_accuracy, unparsed; options and open; by field and subject. No scores where answers are not public."""
        parsed = [option_of(answer, e.tags[1:]) for e, answer in zip(examples, answers, strict=True) if e.kind == "options"]
        habits = {"unparsed": parsed.count(None) / len(parsed)} if parsed else {}
        if self.split == "test":
            return [None] * len(answers), habits
        given = self.options_given(examples, answers)
        strict = [self.score(example, answer) for example, answer in zip(examples, answers)]
        scores = [float(given[e.prompt.id] == e.answer) if e.kind == "options" else one for e, one in zip(examples, strict)]
        return scores, {
            "accuracy": sum(scores) / len(scores),
            "strict_accuracy": sum(strict) / len(strict),
            **habits,
            **means(examples, scores, lambda example: [example.kind]),
            **means(examples, scores, lambda example: [FIELD[example.tags[0]]]),
            **means(examples, scores, lambda example: [f"subject_{example.tags[0].lower()}"]),
        }

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """The file that main_eval_only.py and EvalAI take: {id: a letter, or the answer to an open question}."""
        known = {example.prompt.id: example for example in self.examples("test", self.size)}
        answers = [row["answer"] for row in rows]
        given = self.options_given([known[row["id"]] for row in rows], answers)
        return {f"mmmu-{self.split}.json": {Path(row["id"]).name: given.get(row["id"], row["answer"]) for row in rows}}
