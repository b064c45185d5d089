"""ScienceQA (arXiv 2209.09513): school questions with two to five options; half of them have a picture.

    python 4-eval_chat.py --bench scienceqa:path=benchmarks/scienceqa

path     a folder with problems.json and pid_splits.json of github.com/lupantech/ScienceQA (data/scienceqa)
images   its pictures; default: images/test in that folder, with one folder for each problem
split    test (4,241 problems, 2,017 with a picture), val, minitest, ...

image_accuracy is what papers call SQA-I, accuracy that of all problems; then by subject (NAT, SOC, LAN), context (TXT, IMG,
NO) and grade. The parser is LLaVA's: a bare letter, a letter with ". " behind it, or one "The answer is X.". Every other answer
is wrong and counts in `unparsed`: "a", "(B)" and "C." too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import NoneType

from dataset.formats.official import Folder, by_id, content, fits
from dataset.tasks import Example, Task, dialogue, means
from dataset.tasks.vqa_score import LETTER
from model.registry import TASKS, UserError

SOURCE = "github.com/lupantech/ScienceQA (data/scienceqa)"
LETTERS = "ABCDE"
SUBJECTS = {"natural science": "natural", "social science": "social", "language science": "language"}


def sqa_letter(answer: str) -> str | None:
    """The letter that an answer gives, by LLaVA's rules; None for an answer that they do not read."""
    if len(answer) == 1 and answer in LETTERS:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    named = re.findall(r"The answer is ([A-Z]).", answer)
    return named[0] if len(named) == 1 else None


def groups(row: dict) -> tuple[str, ...]:
    """The official groups of a problem: subject, contexts and grade."""
    contexts = [name for name, there in (("text", row["hint"]), ("image", row["image"])) if there] or ["no_context"]
    grade = "grade_1_6" if int(row["grade"].removeprefix("grade")) <= 6 else "grade_7_12"
    return (SUBJECTS.get(row["subject"], row["subject"]), *contexts, grade)


@TASKS.register("scienceqa")
class ScienceQA(Task):
    """ScienceQA from its official files: accuracy of the problems with a picture, and of all."""

    size = 12_726  # problems of the largest split

    def __init__(self, path: str = "", images: str = "", split: str = "test"):
        self.folder, self.split = Folder("scienceqa", path, SOURCE, images), split

    def problems(self) -> list[dict]:
        """The problems of the split, those with a picture first."""
        splits = content(split_file := self.folder.file("pid_splits.json"))
        if not fits(splits, {self.split: [str]}):
            named = ", ".join(splits) if isinstance(splits, dict) else "no object"
            raise UserError(f"{split_file} has no split {self.split!r}; it has {named}")
        fields = {"question": str, "choices": [str], "answer": int, "hint": str, "image": (str, NoneType), "grade": str,
                  "subject": str, "split": str}  # fmt: skip
        file = self.folder.file("problems.json")
        known = {row["id"]: row for row in by_id(file, fields, f"problems.json of {SOURCE}")}
        if unknown := [id for id in splits[self.split] if id not in known]:
            raise UserError(f"{file} lacks {len(unknown)} problems of {self.split}, {unknown[0]} the first: download it again")
        for id in splits[self.split]:
            answer, count = known[id]["answer"], len(known[id]["choices"])
            if not 0 <= answer < count <= len(LETTERS):
                raise UserError(f"{file}: problem {id} has answer {answer} of {count} choices: it is not that of {SOURCE}")
        return sorted((known[id] for id in splits[self.split]), key=lambda row: not row["image"])

    def examples(self, split: str, n: int) -> list[Example]:
        """The first n problems; the answer is a letter, the first tag the number of options."""
        examples = []
        for row in self.problems()[:n]:
            pictures = []
            if row["image"]:
                folders = [f"images/{row['split']}", row["split"]]
                pictures = [self.folder.picture([f"{row['id']}/{row['image']}"], folders, f"the pictures of {SOURCE}")]
            options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"])]
            hint = [f"Context: {row['hint']}"] if row["hint"] else []
            asked = "\n".join([*hint, row["question"], *options]) + LETTER
            prompt = dialogue(f"scienceqa/{row['id']}", pictures, [(asked, "")])
            kind = "image" if row["image"] else "no_image"
            examples.append(Example(prompt, LETTERS[row["answer"]], kind, (str(len(options)), *groups(row))))
        return examples

    def score(self, example: Example, answer: str) -> float:
        return float(sqa_letter(answer) == example.answer)

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        with_picture = [score for example, score in zip(examples, scores) if example.kind == "image"]
        first = {"image_accuracy": sum(with_picture) / len(with_picture)} if with_picture else {}
        return {**first, "accuracy": sum(scores) / len(scores), **means(examples, scores, lambda example: example.tags[1:])}

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """image_accuracy, accuracy, by group; unparsed: answers that are no letter of an option; first: share of the letter A."""
        scores, metrics = super().measure(examples, answers)
        letters = [letter if letter and LETTERS.find(letter) in range(int(example.tags[0])) else None
                   for example, letter in zip(examples, map(sqa_letter, answers))]  # fmt: skip
        return scores, {**metrics, "unparsed": letters.count(None) / len(letters), "first": letters.count("A") / len(letters)}
