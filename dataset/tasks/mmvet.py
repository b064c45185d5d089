"""MM-Vet (arXiv 2308.02490): 218 free questions that need several abilities together, graded from 0 to 1 by a judge.

    python 4-eval_chat.py --bench mmvet:path=benchmarks/mmvet,judge=http://localhost:8000/v1,model=NAME

path     the folder mm-vet of github.com/yuweihao/MM-Vet (release v1, mm-vet.zip): mm-vet.json and its folder images. With
         mm-vet_evaluator.py of the same project beside them, the judge gets the official prompt with its seven examples
grades   a file of grades that the project's evaluator wrote, {id: {"score": [...]}}, in the place of a judge
judge, model, key    address, name and the key's environment variable of the judge; without a judge answers are only saved

total: the mean grade, then by ability and by set of abilities (only_...). The paper's judge is gpt-4-0613: grades of another
judge, or of another prompt (`official_prompt` 0), do not compare with the paper's. `contains` is no score of MM-Vet: the
share of answers that literally hold what is asked for, by a rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.formats.official import Folder, by_id, content, existing
from dataset.judge import Failure, failures, judge_or_none, message
from dataset.tasks import Example, Task, dialogue, means
from model.registry import TASKS, UserError

SOURCE = "github.com/yuweihao/MM-Vet (release v1, mm-vet.zip)"
PROMPT = """Grade how right a model's answer to a question is, from 0.0 (wrong) in steps of 0.1 to 1.0 (right), by comparing it
with the reference. Where the reference joins parts with <AND>, a right answer has all of them, and an answer with some gets its
share; where it joins them with <OR>, one is enough. Write the grade of the last row and nothing else.

Question | Reference | Answer | Grade
--- | --- | --- | ---
Which two fruits are in the bowl? | apple <AND> pear | A banana. | 0.0
Which two fruits are in the bowl? | apple <AND> pear | An apple and a plum. | 0.5
Which two fruits are in the bowl? | apple <AND> pear | Pears, and an apple. | 1.0
What is the clock's time? | 9:15 <OR> quarter past nine | It is a quarter past nine. | 1.0
"""
AGAIN = "\nThe grade of the last row, as a number from 0.0 to 1.0: "


def grade(reply: str | Failure) -> float | Failure:
    """The grade at the start of a reply; a `Failure`, not a zero, for none or one outside 0..1."""
    if isinstance(reply, Failure):
        return reply
    number = re.fullmatch(r"[01](\.\d+)?|\.\d+", (reply.split() or [""])[0])
    if number is None or float(number[0]) > 1:
        return Failure(f"no grade from 0 to 1 at the start of {reply[:80]!r}")
    return float(number[0])


def contains(answer: str, reference: str) -> bool:
    """Whether an answer literally has one alternative of every part of a reference, in any case."""
    parts = [[option.strip().lower() for option in part.split("<OR>")] for part in reference.split("<AND>")]
    return all(any(option in answer.lower() for option in options) for options in parts)


@TASKS.register("mmvet")
class MMVet(Task):
    """MM-Vet from its official file: mean grade of a judge, by ability."""

    size = 218

    def __init__(self, path: str = "", grades: str = "", judge: str = "", model: str = "gpt-4-0613", key: str = "OPENAI_API_KEY"):
        self.folder, self.grades = Folder("mmvet", path, SOURCE), grades
        self.judge = None if grades else judge_or_none("mmvet", judge, model, key)

    def examples(self, split: str, n: int) -> list[Example]:
        file = self.folder.file("mm-vet.json", "mm-vet/mm-vet.json")
        fields = {"imagename": str, "question": str, "answer": str, "capability": [str]}
        listed = by_id(file, fields, f"mm-vet.json of {SOURCE}")
        examples = []
        for row in listed[:n]:
            image = self.folder.picture([row["imagename"]], ["images", "mm-vet/images"], f"the pictures of {SOURCE}")
            prompt = dialogue(f"mmvet/{row['id']}", [image], [(row["question"], "")])
            examples.append(Example(prompt, row["answer"], "graded", tuple(sorted(set(row["capability"])))))
        return examples

    def instructions(self) -> tuple[str, bool]:
        """(the text before a row to grade, whether it is the official one)."""
        file = self.folder.find("mm-vet_evaluator.py", "mm-vet/mm-vet_evaluator.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body if file else []:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "prompt" and isinstance(node.value, ast.Constant):
                return str(node.value.value), True
        return PROMPT, False

    def judged(self, examples: Sequence[Example], answers: Sequence[str]) -> list[float | Failure]:
        """The judge's grade of each answer; a reply without a grade is asked for once more."""
        assert self.judge is not None
        before, _ = self.instructions()
        texts = []
        for example, answer in zip(examples, answers, strict=True):
            reference = example.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            texts.append(before + "\n" + " | ".join([example.prompt.messages[-1].text, reference, answer, ""]))
        grades = [grade(reply) for reply in self.judge.ask([[message(text)] for text in texts], grade)]
        failed = [k for k, one in enumerate(grades) if isinstance(one, Failure)]
        for k, reply in zip(failed, self.judge.ask([[message(texts[k] + AGAIN)] for k in failed], grade), strict=True):
            grades[k] = grade(reply)
        return grades

    def read_grades(self, examples: Sequence[Example]) -> list[float | Failure]:
        """The grades in the file `grades`, means over its runs; a `Failure` for a question that it lacks."""
        file = existing(self.grades, "grades", "a file of grades that MM-Vet's evaluator wrote")
        graded = content(file)
        if not isinstance(graded, dict) or any(not isinstance(one, dict) or not one.get("score") for one in graded.values()):
            raise UserError(f"grades={file} is not what MM-Vet's evaluator writes: {{id: {{'score': [...]}}}}")
        ids = [Path(example.prompt.id).name for example in examples]
        return [sum(graded[id]["score"]) / len(graded[id]["score"]) if id in graded else Failure(f"no grade of {id} in {file}")
                for id in ids]  # fmt: skip

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Sequence[float | None], dict[str, float]]:
        """total, by ability and by set of abilities, over the graded answers; counts judged, judge_failures; contains."""
        rule = {"contains": sum(contains(answer, e.answer) for e, answer in zip(examples, answers, strict=True)) / len(answers)}
        if self.judge is None and not self.grades:
            return [None] * len(answers), {"judged": 0, **rule}
        grades = self.judged(examples, answers) if self.judge else self.read_grades(examples)
        failed = failures("mmvet", grades, [example.prompt.id for example in examples])
        valid = [(example, one) for example, one in zip(examples, grades) if not isinstance(one, Failure)]
        metrics: dict[str, float] = {}
        if valid:
            graded, marks = [example for example, _ in valid], [one for _, one in valid]
            metrics = {"total": sum(marks) / len(marks), **means(graded, marks, lambda example: example.tags),
                       **means(graded, marks, lambda example: ["only_" + "_".join(example.tags)])}  # fmt: skip
        prompt = {"official_prompt": int(self.instructions()[1])} if self.judge else {}
        return ([None if isinstance(one, Failure) else one for one in grades],
                {**metrics, "judged": len(valid), "judge_failures": failed, **prompt, **rule})  # fmt: skip

    def submission(self, rows: Sequence[dict]) -> dict[str, Any]:
        """The file that MM-Vet's evaluator, on its page too, takes: {id: answer}."""
        return {"mmvet.json": {Path(row["id"]).name: row["answer"] for row in rows}}
