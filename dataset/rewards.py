"""Verifiable rewards: is an answer right, and has it the form that was asked for?

In:  a question with its gold answer, and a model's answer.  Out: a `Reward` in 0..1 + 0.1.

    <think>3+5=8</think><answer>8</answer>          right and well formed: 1.1
    <think>3+5=9</think><answer>9</answer>          well formed: 0.1
    The answer is 8.                                right, but not in the form: 0

The small reward of the form is enough to learn it from and too little to live on. What is right for a task its own score says;
for a row of a file, the comparison with the row's gold answer (dataset/formats/gold_answers.py).
"""
from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataset.formats.gold_answers import gold
from dataset.tasks import Example, Truncated
from model.registry import UserError

FORMAT_WEIGHT = 0.1
FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def parts(answer: str) -> tuple[str, str] | None:
    """(reasoning, final answer) of an answer that has the form as a whole and ended by itself, else None.

    Each tag once, nothing before or behind, both parts not empty.
    """
    found = FORM.fullmatch(answer)
    if isinstance(answer, Truncated) or not found or any(answer.count(tag) != 1 for tag in TAGS):
        return None
    reasoning, final = found.groups()
    return (reasoning, final) if reasoning.strip() and final.strip() else None


@dataclass(frozen=True)
class Reward:
    """accuracy and format as they are, 0..1; `total` is what is learned from."""

    accuracy: float
    format: float
    total: float


RewardFunction = Callable[[Example, str], Reward]


def answer_reward(score: Callable[[Example, str], float], paid: Callable[[Example, str], float] | None = None) -> RewardFunction:
    """accuracy + 0.1 format, where an answer without the form is not even looked at (arXiv 2503.07365 adds them, weight 0.5).

    score   0..1, how right an answer is
    paid    what a right or wrong answer is worth, where that is not its score (sokoban:reward=hackable)
    """

    def reward(example: Example, answer: str) -> Reward:
        formed = parts(answer) is not None
        accuracy = score(example, answer) if formed else 0.0
        worth = accuracy if paid is None or not formed else paid(example, answer)
        return Reward(accuracy, float(formed), worth + FORMAT_WEIGHT * formed)

    return reward


def matches_gold(example: Example, answer: str) -> float:
    """1 where the final answer matches the example's gold answer: for rows of files."""
    found = parts(answer)
    return float(found is not None and gold(example.answer).matches(found[1]))


def reward_function(spec: str) -> RewardFunction | None:
    """What --reward names: None for `rule`, which asks the task or compares with the gold answer; else a function in a file.

    `my_file.py:function` takes (example, answer) and returns a number, which is the reward.

    example: prompt, answer (the gold), kind, tags (dataset.tasks.Example). answer: a text, of type dataset.tasks.Truncated where
    the limit on its length ended it. The log then tells rewards alone, for nothing says what is right. What the function raises
    ends the run: a bug is never a zero reward.
    """
    if spec == "rule":
        return None
    name, _, function = spec.rpartition(":")
    if not name.endswith(".py") or not Path(name).is_file():
        raise UserError(f"--reward is rule, or a function in a file, my_file.py:function, not {spec!r}")
    found = runpy.run_path(name)
    if not callable(found.get(function)):
        near = ", ".join(key for key, value in found.items() if callable(value) and not key.startswith("_"))
        raise UserError(f"{name} has no function {function!r}; it has {near or 'none'}")

    def reward(example: Example, answer: str) -> Reward:
        value = float(found[function](example, answer))
        if not math.isfinite(value):
            raise UserError(f"{spec} gave {value} to {answer!r} ({example.prompt.id}): a reward is a finite number")
        return Reward(min(1.0, max(0.0, value)), float(parts(answer) is not None), value)

    return reward
