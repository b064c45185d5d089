"""TextVQA (arXiv 1904.08920): questions about text in pictures, each answered by ten people.

    python 4-eval_chat.py --bench textvqa:path=benchmarks/textvqa

path     a folder with TextVQA_0.5.1_val.json of textvqa.org (5,000 questions; test: TextVQA_0.5.1_test.json, without answers)
images   its pictures; default: train_images (test: test_images) in that folder
split    val or test
ocr      true: every question comes with the text that an OCR system read, as LLaVA and TinyLLaVA ask; from LLaVA's
         llava_textvqa_val_v051_ocr.jsonl or from TextVQA_Rosetta_OCR_v0.2_SPLIT.json. Worth about five points to a model of 3B

accuracy is that of m4c's evaluation; `ocr` 0 or 1 says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.formats.official import Folder, checked, of_first, rows, under
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.vqa_score import SHORT, answer_habits, m4c_accuracy, m4c_normal, require_ten
from model.registry import TASKS, UserError

OCR = "\nReference OCR token: "


@TASKS.register("textvqa")
class TextVQA(Task):
    """TextVQA from its official file: accuracy against ten people, with or without text read by an OCR system."""

    size = 3_289  # pictures of the largest split

    def __init__(self, path: str = "", images: str = "", split: str = "val", ocr: bool = False):
        if split not in ("val", "test"):
            raise UserError(f"textvqa: split={split}: val or test")
        self.folder, self.split, self.ocr = Folder("textvqa", path, "textvqa.org", images), split, ocr

    def read_text(self) -> dict[str, str]:
        """Image id -> the words that an OCR system read in it, with commas between."""
        names = [f"llava_textvqa_{self.split}_v051_ocr.jsonl", f"TextVQA_Rosetta_OCR_v0.2_{self.split}.json"]
        file = self.folder.file(*names)
        if file.suffix == ".jsonl":
            listed = checked(rows(file), {"image": str, "text": str}, file, f"LLaVA's {names[0]}")
            return {Path(row["image"]).stem: row["text"].partition(OCR)[2].removesuffix(SHORT) for row in listed}
        listed = under("data", file, {"image_id": str, "ocr_tokens": [str]}, f"{names[1]} of textvqa.org")
        return {row["image_id"]: ", ".join(row["ocr_tokens"]) for row in listed}

    def examples(self, split: str, n: int) -> list[Example]:
        file = self.folder.file(f"TextVQA_0.5.1_{self.split}.json")
        fields = {"question": str, "question_id": int, "image_id": str, **({"answers": [str]} if self.split == "val" else {})}
        listed = under("data", file, fields, source := f"{file.name} of textvqa.org")
        if self.split == "val":
            require_ten(listed, file, source)
        text = self.read_text() if self.ocr else {}
        examples = []
        for row in of_first(listed, lambda row: row["image_id"], n):
            people = row["answers"] if self.split == "val" else []
            if self.ocr and row["image_id"] not in text:
                raise UserError(f"textvqa: ocr=true, and the file of OCR tokens has none for picture {row['image_id']}")
            names, folders = [f"{row['image_id']}.jpg"], ["train_images" if self.split == "val" else "test_images", ""]
            image = self.folder.picture(names, folders, "the pictures of textvqa.org")
            question = row["question"][:1].upper() + row["question"][1:]  # as LLaVA writes it
            asked = question + (OCR + text[row["image_id"]] if self.ocr else "") + SHORT
            prompt = dialogue(f"textvqa/{row['question_id']}", [image], [(asked, "")])
            examples.append(Example(prompt, max(people, key=people.count, default=""), "text", tuple(people)))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return m4c_accuracy(answer, example.tags) if example.tags else 0.0

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """accuracy, ocr (0 or 1), empty (share of answers); no scores where answers are not public."""
        habits = {"ocr": int(self.ocr), **answer_habits([m4c_normal(answer) for answer in answers], [False] * len(answers))}
        if self.split != "val":
            return [None] * len(answers), habits
        scores = [self.score(example, answer) for example, answer in zip(examples, answers, strict=True)]
        return scores, {"accuracy": sum(scores) / len(scores), **habits}

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """The file that EvalAI takes of the test set: [{question_id, answer}]."""
        answers = [{"question_id": int(Path(row["id"]).name), "answer": row["answer"]} for row in rows]
        return {"textvqa-test.json": answers} if self.split == "test" else {}
