"""Score saved answers again, without the model and without the pictures, for example with another judge.

In:  predictions-TASK.jsonl, as 4-eval_chat.py writes it, and the task with its options.  Out: scores.json beside it.

    python -m dataset.studies.rescore out/sft/predictions-mmhal.jsonl mmhal:path=...,judge=...
"""
from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset.evaluation import scores_and_rows
from dataset.formats.official import without_pictures
from dataset.report import add_scores, known_scores, table
from dataset.tasks import Task, Truncated
from model.registry import TASKS, UserError


def rescore(name: str, task: Task, rows: Sequence[dict], split: str = "test") -> tuple[dict[str, float], list[dict]]:
    """(scores, rows) as `evaluate` returns them without controls, from the rows that it saved. Only a judge may run again."""
    saved = {row["id"]: (Truncated if row["truncated"] else str)(row["answer"]) for row in rows}
    with without_pictures():
        examples = [example for example in task.examples(split, task.size) if example.prompt.id in saved]
    if not examples or len(examples) != len(rows):
        raise UserError(f"of {len(rows)} saved answers {len(examples)} are to questions of {name!r}: "
                        f"give the task the options of the saved run")
    return scores_and_rows(name, task, examples, [saved[example.prompt.id] for example in examples])


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise UserError("python -m dataset.studies.rescore PREDICTIONS.jsonl TASK:option=value,...")
    predictions, spec = Path(arguments[0]), arguments[1]
    try:
        saved_rows = [json.loads(line) for line in predictions.open(encoding="utf-8")]
    except ValueError as error:
        raise UserError(f"{predictions} is not a file of predictions: {error}") from error
    new, _ = rescore(spec.partition(":")[0], TASKS.make(spec), saved_rows)
    folder, name = predictions.parent, spec.partition(":")[0]
    of_the_model = {f"{name}/{metric}" for metric in ("guessing", "blank", "shuffled", "seconds")}
    kept = {metric: value for metric, value in known_scores(folder).items() if metric in of_the_model}
    add_scores(folder, {**kept, **new}, name)
    print(f"{table(new)}\nwrote {predictions.parent / 'scores.json'}")


if __name__ == "__main__":
    from model import cli

    cli.run(main, sys.argv[1:])
