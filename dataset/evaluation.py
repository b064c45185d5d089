"""Asking a model and scoring what it says, with two controls that a model which does not look cannot pass.

In:  a task, a split, and `ask`: conversations -> answers.  Out: scores (a flat dict) and one row per question.

`blank` shows an empty picture in place of the real one, `shuffled` that of another question: both should fall to the level
of guessing. A benchmark that a model passes with either of them measures language, not sight.

    python -m dataset.evaluation out/sft/predictions-mmhal.jsonl mmhal:path=...,images=...,judge=...
scores answers that were saved before, without the model: with another judge, say, or with the first one.
"""
from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from dataset.chat import Conversation, Message, Template, render_prompt
from dataset.collate import pad
from dataset.images import BadRow, Picture
from dataset.report import table
from dataset.tasks import Cut, Example
from dataset.vision.image_processor import Eyes
from model.registry import TASKS

BLANK = Picture("blank", lambda: Image.new("RGB", (96, 96), (240, 240, 240)))


@dataclasses.dataclass(frozen=True)
class Ask:
    """Conversations -> what the model says to each, in their order; prompts of about equal length share a batch.

    `generate` makes a list of objects with `.tokens` and `.stopped` of a padded batch of prompts (model.generate.generate
    with its options). An answer that did not stop by itself is a `Cut`.
    """

    template: Template
    tokenizer: object
    image_tokens: int
    eyes: Eyes
    generate: Callable[[dict], list]
    batch_size: int = 128
    progress: bool = False

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        self.eyes.prepare(picture for conversation in conversations for picture in conversation.pictures)
        prompts = [render_prompt(asked, self.template, self.tokenizer, self.image_tokens, views=self.eyes.views)
                   for asked in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        said = [""] * len(prompts)
        for start in tqdm(range(0, len(order), self.batch_size), unit="batch", disable=not self.progress, leave=False):
            chosen = order[start:start + self.batch_size]
            batch = pad([prompts[i] for i in chosen], self.eyes, self.tokenizer.pad)
            for i, answer in zip(chosen, self.generate(batch), strict=True):
                said[i] = (str if answer.stopped else Cut)(self.tokenizer.decode(answer.tokens))
        return said

    def require_room(self, asked: Conversation, room: int) -> None:
        """BadRow for a conversation of more than `room` tokens, or with a picture that does not open: it cannot be answered."""
        try:
            for picture in asked.pictures:
                picture.load()
            length = len(render_prompt(asked, self.template, self.tokenizer, self.image_tokens, views=self.eyes.views))
            if length > room:
                raise BadRow(f"{length} tokens, where the model reads {room} before an answer",
                             "shorten it, or lower --max_new_tokens")
        except BadRow as bad:
            bad.where = bad.where or asked.id
            raise


def several(ask: Callable[[Sequence[Conversation]], list[str]], prompts: Sequence[Conversation], answers: int) -> list[list[str]]:
    """So many answers to each prompt, sampled alike."""
    said = ask([prompt for prompt in prompts for _ in range(answers)])
    return [said[k:k + answers] for k in range(0, len(said), answers)]


def with_pictures(conversation: Conversation, replace: Callable[[int], Picture]) -> Conversation:
    """The same conversation with picture number k replaced by `replace(k)`."""
    count, messages = 0, []
    for message in conversation.messages:
        parts = []
        for part in message.parts:
            if isinstance(part, Picture):
                part, count = replace(count), count + 1
            parts.append(part)
        messages.append(Message(message.role, tuple(parts)))
    return dataclasses.replace(conversation, messages=tuple(messages))


def blank(examples: Sequence[Example]) -> list[Example]:
    """The same questions about empty pictures."""
    return [dataclasses.replace(example, prompt=with_pictures(example.prompt, lambda k: BLANK)) for example in examples]


def shuffled(examples: Sequence[Example]) -> list[Example]:
    """The same questions, each about the pictures of the question half the set away, or the next that has as many and all others.

    A question to which there is no such other is left out: with its own picture it would be no control.
    """
    result = []
    for k, example in enumerate(examples):
        own = example.prompt.pictures
        for step in range(len(examples)):
            other = examples[(k + len(examples) // 2 + step) % len(examples)].prompt.pictures
            if len(other) == len(own) and not set(own) & set(other):
                result.append(dataclasses.replace(example, prompt=with_pictures(example.prompt, other.__getitem__)))
                break
    return result


def measure(task, examples: Sequence[Example], said: Sequence[str]) -> tuple[list[float | None], dict[str, float]]:
    """The score of every answer (None: nobody could judge it) and the task's metrics."""
    if hasattr(task, "measure"):
        return task.measure(examples, said)
    scores = [task.score(example, answer) for example, answer in zip(examples, said, strict=True)]
    return scores, task.summary(examples, scores)


def scored(name: str, task, examples: Sequence[Example], said: Sequence[str]) -> tuple[dict[str, float], list[dict]]:
    """The metrics of answers as "name/metric": value, and a row for every question."""
    scores, metrics = measure(task, examples, said)
    rows = [{"id": example.prompt.id, "kind": example.kind, "question": example.prompt.messages[-1].text, "truth": example.answer,
             "answer": answer, "cut": isinstance(answer, Cut), "score": score}
            for example, answer, score in zip(examples, said, scores, strict=True)]
    return {**{f"{name}/{metric}": value for metric, value in metrics.items()}, f"{name}/n": len(examples)}, rows


def evaluate(name: str, task, split: str, ask: Callable[[Sequence[Conversation]], list[str]], n: int, controls: int = 0,
             kinds: Sequence[str] = ()) -> tuple[dict[str, float], list[dict]]:
    """Scores of a task ("name/metric": value) on n pictures' worth of questions of a split, and a row for every question.

    controls   ask every so-many-th question again about a blank and a shuffled picture; 0: none
    kinds      only these kinds of questions; (): all
    """
    examples = [example for example in task.examples(split, n) if not kinds or example.kind in kinds]
    if not examples:
        raise ValueError(f"the task {name!r} asks no question{' of the kind ' + ' or '.join(kinds) if kinds else ''}: "
                         f"leave it out of --bench")
    said = ask([example.prompt for example in examples])
    result, rows = scored(name, task, examples, said)
    if controls:
        if hasattr(task, "guess"):
            result[f"{name}/guessing"] = task.guess(examples)
        some = [example for example in examples if example.prompt.pictures and example.kind != "caption"][::controls]
        for control, change in (("blank", blank), ("shuffled", shuffled)):
            asked = change(some)
            if not asked:  # a task in words alone has no picture to hide
                continue
            answers_given = ask([example.prompt for example in asked])
            right = [score for score in measure(task, asked, answers_given)[0] if score is not None]
            if right:
                result[f"{name}/{control}"] = sum(right) / len(right)
    return result, rows


def rescore(name: str, task, rows: Sequence[dict], split: str = "test") -> tuple[dict[str, float], list[dict]]:
    """What `evaluate` says without controls, from rows that it wrote: the model is not asked again, only a judge."""
    saved = {row["id"]: (Cut if row["cut"] else str)(row["answer"]) for row in rows}
    examples = [example for example in task.examples(split, task.size) if example.prompt.id in saved]
    if not examples or len(examples) != len(rows):
        raise ValueError(f"of {len(rows)} saved answers {len(examples)} are to questions of {name!r}: "
                         f"give the task the options that it had")
    return scored(name, task, examples, [saved[example.prompt.id] for example in examples])


def add_scores(folder: Path, scores: dict[str, float]) -> None:
    """Put scores into FOLDER/scores.json beside those of other benchmarks."""
    file = folder / "scores.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **scores}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("python -m dataset.evaluation PREDICTIONS.jsonl TASK:option=value,...")
    predictions, spec = Path(sys.argv[1]), sys.argv[2]
    new, _ = rescore(spec.partition(":")[0], TASKS.make(spec), [json.loads(line) for line in predictions.open(encoding="utf-8")])
    add_scores(predictions.parent, new)
    print(f"{table(new)}\nwrote {predictions.parent / 'scores.json'}")
