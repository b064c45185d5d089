"""A model's answers to the rows of a file, and how many of them are right.

In:  a file of conversations, and a model that answers.
Out: one line a row in the MM-EUREKA format with `prediction`, its reasoning and its final answer; scores where rows hold answers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset.answers import Journal, Model
from dataset.bad_rows import BadRow
from dataset.chat import Conversation
from dataset.formats.files import FileSource
from dataset.own_rows import OwnRows, Verdicts, as_example, final_answer
from dataset.processor import Processor
from dataset.report import add_scores, section, sheet, table
from dataset.rewards import answer_reward, matches_gold
from dataset.tasks import Example, Truncated
from dataset.writing import write_text

Prompts = dict[int, Conversation]  # by the row


@dataclass(frozen=True)
class Predictions:
    """The answers to the rows of a file.

    max_prompt_tokens   the longest prompt that leaves space for an answer
    samples             answers to each row; several are all saved, with `pass_rate`, the share that RL's rule calls right
    """

    source: FileSource
    rows: Sequence[int]
    model: Model
    processor: Processor
    max_prompt_tokens: int
    samples: int
    started: float = field(default_factory=time.time)

    def results(self, journal: Journal) -> list[dict]:
        """{"line": ..., "truncated": whether each answer was cut off} of each row; of a bad row the line has its error."""
        return journal.results(self.rows, self.rows, self.load, lambda rows, loaded: list(self.answered(rows, *loaded)))

    def load(self, rows: Sequence[int]) -> tuple[Prompts, dict[int, str], Any]:
        """(prompts, errors of bad rows, what the model needs of the prompts)."""
        prompts: Prompts = {}
        errors: dict[int, str] = {}
        for row in rows:
            try:
                prompt = self.source[row]
                self.processor.require_answerable(prompt, self.max_prompt_tokens)
                prompts[row] = prompt
            except BadRow as bad:
                errors[row] = str(bad)
        asked = [prompt for prompt in prompts.values() for _ in range(self.samples)]
        return prompts, errors, self.model.load(asked) if asked else None

    def answered(self, rows: Sequence[int], prompts: Prompts, errors: dict[int, str], loaded: Any) -> Iterator[dict]:
        """The results of these rows."""
        answers = iter(self.model.answers(loaded) if prompts else [])
        for row in rows:
            if row in errors:
                yield {"line": {"id": f"{self.source.path}:{row + 1}", "error": errors[row]}}
            else:
                said = [next(answers) for _ in range(self.samples)]
                yield {"line": self.line(self.source.rows[row], prompts[row], said),
                       "truncated": [isinstance(answer, Truncated) for answer in said]}  # fmt: skip

    def line(self, raw: dict, prompt: Conversation, answers: list[str]) -> dict:
        """The line of one row."""
        example = as_example(prompt)
        reasoning = re.search(r"<think>(.*?)</think>", answers[0], re.DOTALL)
        words = [(turn.role, [part if isinstance(part, str) else "<image>" for part in turn.parts])
                 for turn in example.prompt.messages]  # fmt: skip
        return {"id": raw.get("id", prompt.id), "answer": example.answer,
                "conversations": [{"role": role, "content": "".join(parts)} for role, parts in words],
                "image_urls": [picture.address for picture in prompt.pictures], "prediction": answers[0],
                "reasoning": reasoning[1] if reasoning else "", "predicted_answer": final_answer(answers[0]),
                **(solved(example, answers) if self.samples > 1 else {})}  # fmt: skip

    def write(self, results: Sequence[dict], file: Path) -> None:
        """Write the lines, and name the bad rows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [result["line"] for result in results]
        write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        errors = [line["error"] for line in lines if "error" in line]
        print("".join(f"skipped {error}\n" for error in errors), end="")
        counts = f"{len(lines) - len(errors)} predictions, {len(errors)} bad rows"
        print(f"wrote {file}: {counts}, in {time.monotonic() - self.started:.0f} s")

    def report(self, results: Sequence[dict], name: str, folder: Path) -> None:
        """Print the scores of the rows that hold answers; they go to scores.json, and with some answers to the report."""
        verdicts, page = Verdicts(), folder.parent / "report.md"
        for row, result in zip(self.rows, results, strict=True):
            if "truncated" in result:
                said = result["line"].get("predictions", [result["line"]["prediction"]])
                cut = [(Truncated if flag else str)(answer) for answer, flag in zip(said, result["truncated"], strict=True)]
                verdicts.add(as_example(self.source[row]), cut)
        scores = verdicts.scores(name)
        if not scores:
            print(f"{self.source.path} holds no answers, so its rows are not scored")
            return
        print(f"\n{table(scores)}")
        folder.mkdir(exist_ok=True)
        add_scores(folder, scores)
        examples, answers = zip(*verdicts.shown)
        rows = sheet(folder / name, page, [(OwnRows(examples), example) for example in examples], {"answer": answers})
        section(page, f"{name}, answered by {folder.name}", f"{table(scores)}\n\n{rows}")
        print(f"accuracy: the final answer is right by the rule of RL, with or without <think>...</think><answer>...</answer>; "
              f"format: the share with it. They are in {folder / 'scores.json'} and {page}")  # fmt: skip


def solved(example: Example, answers: list[str]) -> dict:
    """All answers to a row, and the share of right ones where the row has a gold answer that can be checked."""
    reward = answer_reward(matches_gold)
    try:
        right = [reward(example, text).accuracy for text in answers]
    except ValueError:
        return {"predictions": answers}
    return {"predictions": answers, "pass_rate": sum(right) / len(right)}
