"""Evaluation: a model's answers to questions are scored, with two controls that test whether it uses the pictures.

In:  a task, a split, and an `Answerer`: conversations -> answers.  Out: scores (a flat dict) and one row per question.

`blank` replaces each picture by an empty one, `shuffled` by that of another question: both should fall to the level of
guessing. A benchmark that a model passes with either of them measures language, not sight.
"""
from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from PIL import Image

from dataset.chat import Conversation, Message
from dataset.images import Picture
from dataset.processor import Processor
from dataset.protocols import Run
from dataset.tasks import Example, Task, Truncated
from model.registry import TASKS, Default, UserError, specs

BLANK = Picture("blank", lambda: Image.new("RGB", (96, 96), (240, 240, 240)))


Answer = Callable[[Sequence[Conversation]], list[str]]  # conversations -> one answer each, in their order


@dataclasses.dataclass(frozen=True)
class Answerer:
    """Conversations -> the model's answer to each, in their order. A batch has prompts of similar length.

    generate   a padded batch of prompts -> objects with `.tokens` and `.stopped` (model.generate.generate with its options). An
               answer that reached the token limit is `Truncated`
    """

    processor: Processor
    generate: Callable[[dict], list]
    batch_size: int = 128

    @classmethod
    def greedy(cls, processor: Processor, generator: Callable[..., Callable], generate: Callable, model: Any,
               max_new_tokens: int) -> Answerer:
        """Greedy answers, for checks during training. `generator` is `Run.generator` (model/runtime.py)."""
        return cls(processor.on_one_rank(), generator(generate, model, max_new_tokens=max_new_tokens, temperature=0.0,
                                                      **processor.sampling))

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        prompts = [self.processor.prompt(conversation) for conversation in conversations]
        return [self.text(answer) for answer in self.processor.map(prompts, self.generate, self.batch_size)]

    def load(self, conversations: Sequence[Conversation]) -> dict:
        """A padded batch of all these prompts. Features of their pictures are computed before (`ImageProcessor.prepare`)."""
        return self.processor.padded([self.processor.prompt(conversation) for conversation in conversations])

    def answers(self, loaded: dict) -> list[str]:
        """The answers to the prompts of a batch."""
        return [self.text(answer) for answer in self.generate(loaded)]

    def text(self, answer: Any) -> str:
        """The text of a generated answer."""
        return (str if answer.stopped else Truncated)(self.processor.tokenizer.decode(answer.tokens))

    def sampled(self, conversations: Sequence[Conversation], group_size: int) -> list[list[str]]:
        """`group_size` answers to each conversation, all sampled with the same options."""
        answers = self([conversation for conversation in conversations for _ in range(group_size)])
        return [answers[k:k + group_size] for k in range(0, len(answers), group_size)]


# ---------------------------------------------------------------- controls


def with_pictures(conversation: Conversation, replace: Callable[[int], Picture]) -> Conversation:
    """The same conversation with its k-th picture, counted from 0, replaced by `replace(k)`."""
    count, messages = 0, []
    for message in conversation.messages:
        parts: list[str | Picture] = []
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
    """The same questions, each with the pictures of another question, which is searched from half the set away.

    The other question has as many pictures and none in common. A question without a match is left out: it is not a control.
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


# ---------------------------------------------------------------- scores


def all_files(data: Sequence[str]) -> bool:
    """Whether --data names files of one's own alone, and no task."""
    return bool(data) and not any(spec.partition(":")[0] in TASKS.names() for spec in data)


def make_tasks(bench: str, data: Sequence[str] = ()) -> dict[str, Task]:
    """The tasks of `--bench`, by name. UserError for an unknown name, or for two variants of one task.

    data   where all of it are files, held-out rows of theirs are asked, and no task unless the user gave --bench
    """
    if isinstance(bench, Default) and all_files(data):
        return {}
    tasks = {spec.partition(":")[0]: TASKS.make(spec) for spec in specs(bench)}
    if len(tasks) < len(specs(bench)):
        raise UserError(f"--bench {bench}: one variant of a task at a time, because its files have the task's name")
    return tasks


def scores_and_rows(name: str, task: Task, examples: Sequence[Example],
                    answers: Sequence[str]) -> tuple[dict[str, float], list[dict]]:
    """(scores, rows): the metrics of the answers as "name/metric": value, and one row per question."""
    if task.judge:
        task.judge.tokens = 0
    scores, metrics = task.measure(examples, answers)
    if task.judge and task.judge.tokens:
        metrics = {**metrics, "judge_tokens": task.judge.tokens}
    rows = [{"id": example.prompt.id, "kind": example.kind, "question": example.prompt.messages[-1].text, "truth": example.answer,
             "answer": answer, "truncated": isinstance(answer, Truncated), "score": score}
            for example, answer, score in zip(examples, answers, scores, strict=True)]
    return {**{f"{name}/{metric}": value for metric, value in metrics.items()}, f"{name}/n": len(examples)}, rows


@dataclasses.dataclass(frozen=True)
class Asked:
    """The questions of a benchmark, and those of its controls: some of them again, with a blank and with a shuffled picture."""

    name: str
    task: Task
    examples: list[Example]
    controls: dict[str, list[Example]]  # by the control's name; {} without controls

    @classmethod
    def of(cls, name: str, task: Task, split: str, n: int, *, controls: int = 0, kinds: Sequence[str] = ()) -> Asked:
        """What is asked about n pictures of a split; `evaluate` explains the options. UserError where nothing is, or where two
        questions have one id, by which their answers are saved.
        """
        examples = [example for example in task.examples(split, n) if not kinds or example.kind in kinds]
        if not examples:
            raise UserError(f"the task {name!r} asks no question{' of the kind ' + ' or '.join(kinds) if kinds else ''}: "
                            f"leave it out of --bench")
        ids = Counter(example.prompt.id for example in examples)
        if len(ids) < len(examples):
            id, times = ids.most_common(1)[0]
            raise UserError(f"the task {name!r} asks {times} questions with the id {id}: download its files again")
        subset = [example for example in examples if example.prompt.pictures and example.kind != "caption"][::controls or None]
        made = {"blank": blank(subset), "shuffled": shuffled(subset), **task.controls(subset)} if controls else {}
        return cls(name, task, examples, made)

    @property
    def prompts(self) -> list[Conversation]:
        """What a model is asked: all questions, and then those of the controls."""
        return [example.prompt for examples in (self.examples, *self.controls.values()) for example in examples]

    def scored(self, answers: Sequence[str]) -> tuple[dict[str, float], list[dict]]:
        """(scores, rows) of the answers to `prompts`. A task in words alone has no picture to replace, and no controls."""
        rest = iter(answers)
        result, rows = scores_and_rows(self.name, self.task, self.examples, list(islice(rest, len(self.examples))))
        if self.controls and (guessing := self.task.guess(self.examples)) is not None:
            result[f"{self.name}/guessing"] = guessing
        for control, changed in self.controls.items():
            said = list(islice(rest, len(changed)))
            right = [score for score in self.task.measure(changed, said)[0] if score is not None] if changed else []
            if right:
                result[f"{self.name}/{control}"] = sum(right) / len(right)
        return result, rows


def evaluate(name: str, task: Task, split: str, answer: Answer, n: int, *, controls: int = 0,
             kinds: Sequence[str] = ()) -> tuple[dict[str, float], list[dict]]:
    """(scores, rows) of a task on n pictures' worth of questions of a split.

    controls   repeat every `controls`-th question with a blank and with a shuffled picture; 0: none
    kinds      only these kinds of questions; (): all
    """
    asked = Asked.of(name, task, split, n, controls=controls, kinds=kinds)
    return asked.scored(answer(asked.prompts))


def validate(tasks: dict[str, Task], answer: Answer, n: int, run: Run, step: int, *,
             kinds: Sequence[str] = ()) -> dict[str, float]:
    """Scores on the validation split, logged at this step; {} on every rank but the first, which answers alone."""
    run.gather()
    scores: dict[str, float] = {}
    if run.is_main:
        for name, task in tasks.items():
            scores.update(evaluate(name, task, "val", answer, n, kinds=kinds)[0])
    run.log(step, **scores)
    run.barrier()
    return scores
