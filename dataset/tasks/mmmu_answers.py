"""Answers to MMMU's questions, read as the rules of its eval_utils.py read them.

In:  an answer, with the options or the right answers.  Out: the letter that it gives, or whether it is right.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

BEFORE_AN_ANSWER = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",  # with commas
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # scientific
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",  # plain
)


def option_of(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer gives: (B), else B between blanks, else in more than five words an option's text; the last
    if there are several. None where the official code draws one.
    """
    letters = "ABCDEFGHI"[: len(options)]
    for sign in ",.!?;:'":
        answer = answer.strip(sign)
    answer = f" {answer} "
    for form in ("({})", " {} "):
        if found := [letter for letter in letters if form.format(letter) in answer]:
            return max(found, key=lambda letter: answer.rfind(form.format(letter)))
    text = answer.lower()
    if len(answer.split()) > 5 and (named := [k for k, option in enumerate(options) if option.lower() in text]):
        return letters[max(named, key=lambda k: text.rfind(options[k].lower()))]
    return None


def comparable(text: str) -> list[str | float]:
    """A text as it is compared: a number rounded to two places, else in lower case; one letter needs a blank beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answers(answer: str) -> list[str | float]:
    """What an answer to an open question may say: the shortest text behind an indicator in each line, and all numbers in it."""
    whole = answer.strip().strip(".").lower()
    lines = whole.split("\n")
    parts = []
    for k, line in enumerate(lines):
        indicators = (*BEFORE_AN_ANSWER, "=") if k == len(lines) - 1 else BEFORE_AN_ANSWER
        behind = [line.rpartition(word)[2].strip() for word in indicators if word in line]
        shortest = shortest_text(behind)
        if shortest and shortest not in list(":,.!?;'"):
            parts.append(shortest)
    parts = parts or [whole]
    numbers = [number for part in parts for pattern in NUMBERS for number in re.findall(pattern, part)]
    return [value for text in (*parts, *numbers) for value in comparable(text)]


def shortest_text(texts: Sequence[str]) -> str:
    """The first of the shortest texts; an empty one gives way to the next, as in the official loop."""
    shortest = ""
    for text in texts:
        if not shortest or len(text) < len(shortest):
            shortest = text
    return shortest


def open_is_right(answer: str, golds: Sequence[str]) -> bool:
    """Whether an answer contains one of the right texts, or has one of the right numbers."""
    right = [value for gold in golds for value in comparable(gold)]
    for value in open_answers(answer):
        if isinstance(value, str) and any(isinstance(gold, str) and gold in value for gold in right):
            return True
        if isinstance(value, float) and value in right:
            return True
    return False
