"""One's own rows as questions with answers: what is right there, and how a model's answers to them are scored.

In:  rows of files (conversations).  Out: their gold answers; `scored`, the verdict on one answer; `OwnRows`, a task of held-out
     rows, which 3-rl_vlm.py asks and the report shows.
"""
from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Message
from dataset.evaluation import all_files
from dataset.formats.gold_answers import gold
from dataset.held_out import HeldOut
from dataset.mixture import name_and_weight
from dataset.protocols import Run
from dataset.rewards import RewardFunction, parts
from dataset.tasks import Example, Task, Truncated, exact, normal

SHOWN = 14  # rows in the report


def final_answer(text: str) -> str:
    """What stands in <answer>...</answer>, or all of a text without it."""
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return found[1].strip() if found else text.strip()


def gold_text(row: Conversation) -> str | None:
    """The gold answer of a row: its `answer`, or the assistant's last turn, of which the final answer; None without either."""
    if row.answer is not None:
        return row.answer
    return final_answer(row.messages[-1].text) if row.messages[-1].role == "assistant" else None


def as_example(row: Conversation) -> Example:
    """A row as a question with its gold answer, "" where it has none; a last turn of the assistant is left out.

    A caption without a question asks with its pictures alone.
    """
    messages = row.messages[:-1] if row.messages[-1].role == "assistant" else row.messages
    messages = messages or (Message("user", row.pictures),)
    return Example(dataclasses.replace(row, messages=messages, answer=None), gold_text(row) or "", "file")


def matches(example: Example, answer: str) -> bool:
    """Whether the final answer, in the form or bare, matches the gold answer by the rule of RL.

    A gold answer that the rule cannot compare wants the same words. An answer that was cut off is wrong.
    """
    final = final_answer(answer)
    try:
        return not isinstance(answer, Truncated) and gold(example.answer).matches(final)
    except ValueError:
        return normal(final) == normal(example.answer)


def scored(example: Example, answer: str) -> dict[str, float]:
    """The verdict on one answer, each 0 or 1.

    accuracy    the final answer is right by the rule, with or without <think>...</think><answer>...</answer>
    exact       it is the gold answer word for word, but for case and a final stop
    format      the whole answer has that form: without it RL's reward is 0
    truncated   it was cut off at the limit on its length
    """
    return {"accuracy": float(matches(example, answer)), "exact": exact(example, final_answer(answer)),
            "format": float(parts(answer) is not None), "truncated": float(isinstance(answer, Truncated))}


class Verdicts:
    """The mean verdict on the answers to the rows of a file, as far as they hold a gold answer."""

    def __init__(self) -> None:
        self.sums, self.n = Counter[str](), 0
        self.shown: list[tuple[Example, str]] = []  # the first rows with their answers, for the report

    def add(self, example: Example, answers: Sequence[str]) -> None:
        """Count a row by the mean of its answers."""
        self.shown += [(example, answers[0])] if len(self.shown) < SHOWN else []
        if example.answer:
            self.n += 1
            for answer in answers:
                self.sums.update({name: value / len(answers) for name, value in scored(example, answer).items()})

    def scores(self, name: str) -> dict[str, float]:
        """{"name/accuracy": share, ..., "name/n": rows}; {} where no row holds an answer."""
        if not self.n:
            return {}
        return {**{f"{name}/{metric}": value / self.n for metric, value in self.sums.items()}, f"{name}/n": self.n}


class OwnRows(Task):
    """Held-out questions, judged by the reward that is trained.

    reward   of an answer; None where no answers are sampled (the report of stages 1 and 2)
    ruled    whether `reward` is the rule, which knows right and wrong; a function of one's own has a value alone
    """

    def __init__(self, questions: Sequence[Example], reward: RewardFunction | None = None, ruled: bool = True):
        self.questions, self.reward_of, self.ruled = questions, reward, ruled

    def examples(self, split: str, n: int) -> list[Example]:
        return list(self.questions[:n])

    def score(self, example: Example, answer: str) -> float:
        if self.reward_of is None:
            return float(matches(example, answer))
        reward = self.reward_of(example, answer)
        return reward.accuracy if self.ruled else reward.total

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float | None], dict[str, float]]:
        assert self.reward_of is not None
        rewards = [self.reward_of(example, answer) for example, answer in zip(examples, answers, strict=True)]
        found = {"reward": [reward.total for reward in rewards], "format": [reward.format for reward in rewards]}
        if self.ruled:
            found["accuracy"] = [reward.accuracy for reward in rewards]
        return list(found.get("accuracy", found["reward"])), {name: sum(of) / len(of) for name, of in found.items()}

    def mark(self, example: Example, answer: str) -> str:
        return super().mark(example, answer) if self.ruled else f"{self.score(example, answer):.2f}"


def chosen_by(data: Sequence[str], own: dict[str, OwnRows]) -> str:
    """What chooses the checkpoint of a run that samples answers (model/best.py: MEASURES).

    own   {"held_out": the held-out questions of --data}, where there are any
    """
    if own and not own["held_out"].ruled:
        return "held_out/reward"  # no test knows it
    return "held_out/accuracy" if own and all_files(data) else "accuracy"


def measuring(run: Run, data: Sequence[str], otherwise: str) -> str:
    """The command that measures a finished run: on held-out rows where all data are files, else with the flags `otherwise`."""
    asks, share = f"python 4-eval_chat.py --model {run.out}", run.config.val_share
    if not all_files(data):
        return f"{asks} {otherwise}".strip()
    file = run.config.val_data[0] if run.config.val_data else name_and_weight(data[0])[0]
    if not Path(file).is_file():  # a folder, of which script 4 answers one file
        return asks
    return f"{asks} --data {file}{f' --val_share {share:g}' if share and not run.config.val_data else ''}"


def shown(held_out: HeldOut | None, max_new_tokens: int = 128) -> list[tuple[Task, Example]]:
    """Some held-out rows for the report; of a preference, the prompt and the chosen answer. Text alone asks nothing."""
    examples: list[Example] = []
    if not held_out:
        return []
    for row, _ in held_out.read[:SHOWN]:
        example = as_example(row) if isinstance(row, Conversation) else Example(row.prompt, row.chosen, "file")
        with suppress(BadRow):  # longer than the model reads; a picture that does not open is named where the rows are measured
            held_out.processor.require_answerable(example.prompt, held_out.processor.max_prompt_tokens(max_new_tokens))
            examples += [example] if example.prompt.messages[-1].parts else []
    task = OwnRows(examples)
    return [(task, example) for example in examples]
