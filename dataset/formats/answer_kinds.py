"""Kinds of answers: how each is read from a text, and when two readings are the same. gold_answers has the table of them.

In:  a normalised text, without a choice's letter and a name.  Out: KINDS, in the order in which a gold answer is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dataset.formats.answer_text import LIST, is_closed, letter, split
from dataset.formats.latex_answers import formula, same_formula
from dataset.formats.moments import date, same_moment, time_of_day
from dataset.formats.quantities import quantity, same_quantity

ACTIONS = {"up": "U", "down": "D", "left": "L", "right": "R", "上": "U", "下": "D", "左": "L", "右": "R"}
YES_NO = {**dict.fromkeys("yes y yeah true correct 是 是的 对 对的 正确 有 √ ✓ ✔".split(), True),
          **dict.fromkeys("no n nope false incorrect 否 不 不是 不对 错 错误 不正确 没有 × ✗ ✘".split(), False)}  # fmt: skip
SIGNS = re.compile(r"[<>=≤≥≠+\-×÷√∞∅∥⊥✓✔✗✘]")  # an answer by itself: 3 __ 5


def actions(text: str) -> str | None:
    """The initials of a list of actions: `up, left`, `U L`, `UL`, `上左` -> "UL". A single initial is not a list."""
    words = re.split(r"[\s,;、]+|->|→", text.lower())
    if len(words) == 1 and re.fullmatch(r"[UDLR]{2,}|[上下左右]+", text):
        words = list(text.lower())
    initials = {**ACTIONS, "u": "U", "d": "D", "l": "L", "r": "R"}
    words = [word for word in words if word]
    listed = [initials[word] for word in words if word in initials]
    return "".join(listed) if listed and len(listed) == len(words) and (len(listed) > 1 or words[0] in ACTIONS) else None


def letters(text: str) -> str | None:
    """The letters of a choice of several, in order: `AC`, `C, A`, `A and C`, `A、C` -> "AC"; `BAD` is a word."""
    found = [letter(piece) for piece in split(text, LIST)] if len(text) > 1 else []
    if re.fullmatch(r"[A-J]{2,}", text) and list(text) == sorted(set(text)):
        found = list(text)
    return "".join(sorted(set(found))) if len(found) > 1 and all(found) and not re.search(r"\bor\b|或", text) else None


def yes_no(text: str) -> bool | None:
    """Yes or no, in English or Chinese."""
    return YES_NO.get(text.lower().rstrip("!"))


def ratio(text: str) -> tuple[Fraction, ...] | None:
    """`3:4`, `6 : 8`, `3 to 4`, `3比4`: its terms divided by the first; None for any other text."""
    terms = [quantity(term.strip()) for term in re.split(r":|/|比|\bto\b", text)]
    values = [term.value for term in terms if term and not term.power]
    return tuple(value / values[0] for value in values) if 1 < len(values) == len(terms) and values[0] else None


def plain(text: str) -> str:
    """A text for comparison: in lower case, without quotes, article, blanks around signs and between Chinese characters."""
    text = re.sub(r"^(?:an?|the)\s+(?=\w)|[\"!]", "", text.casefold().strip())
    return re.sub(r"\s*([^\w\s]|[\u4e00-\u9fff])\s*", r"\1", " ".join(text.split()))


RANGE = re.compile(r"([<>≤≥])")
OPEN, CLOSE = {"<": "(", "≤": "["}, {"<": ")", "≤": "]"}


def as_interval(text: str) -> str:
    """A range of one variable as an interval: `x ≥ 3` -> `[3, ∞)`, `1 < x ≤ 2` -> `(1, 2]`; any other text as it is."""
    builder = re.fullmatch(r"\\?\{?\s*[a-z]\s*(?:\||\\mid)(.*?)\\?\}?", text)  # {x | x > 3}
    pieces = [piece.strip() for piece in RANGE.split(builder[1] if builder else text)]
    if len(pieces) not in (3, 5) or not all(pieces):
        return text
    if pieces[1] in ">≥":  # from the smaller to the larger
        pieces = [{">": "<", "≥": "≤"}.get(piece, "?" if piece in "<≤" else piece) for piece in reversed(pieces)]
    if not set(pieces[1::2]) <= {"<", "≤"}:
        return text
    is_name = [re.fullmatch(r"[a-zA-Zα-ω]", piece) is not None for piece in pieces[::2]]
    if is_name == [True, False]:
        return f"(-∞, {pieces[2]}{CLOSE[pieces[1]]}"
    if is_name == [False, True]:
        return f"{OPEN[pieces[1]]}{pieces[0]}, ∞)"
    return f"{OPEN[pieces[1]]}{pieces[0]}, {pieces[4]}{CLOSE[pieces[3]]}" if is_name == [False, True, False] else text


@dataclass(frozen=True)
class Several:
    """Values that are an answer together: their brackets ("" where there are none), each value's text, how they are joined."""

    open: str
    items: tuple[str, ...]
    close: str
    joined: str


def several(text: str) -> Several | None:
    """The values of `(3, 4]`, `\\{1, 2\\}`, `1 and 2`, `x = 1 or x = 2`, `±3`, `1 < x < 2`; None for a single value."""
    text = as_interval(text)
    match = re.fullmatch(r"(\\?\{|\(|\[)(.*?)(\\?\}|\)|\])", text)
    inside = match[2] if match and is_closed(match[2]) else text
    items = split(inside, LIST)
    if len(items) == 1 and "±" in text:
        items = [text.replace("±", "+", 1).removeprefix("+"), text.replace("±", "-", 1)]
    if len(items) < 2 or not all(items):
        return None
    joined = "".join(mark for mark, pattern in (("|", r"\bor\b|或"), ("&", r"\band\b|[和与及、]")) if re.search(pattern, inside))
    brackets = (match[1].strip("\\"), match[3].strip("\\")) if match and inside != text else ("", "")
    return Several(brackets[0], tuple(items), brackets[1], joined)


@dataclass(frozen=True)
class Kind:
    """How a kind of answer is read from a text, None where it is not of the kind; and when two readings are the same."""

    read: Callable[[str], Any]
    same: Callable[[Any, Any], bool] = lambda gold, answer: gold == answer


KINDS = {
    "time": Kind(time_of_day, same_moment), "date": Kind(date, same_moment), "number": Kind(quantity, same_quantity),
    "letters": Kind(letters), "actions": Kind(actions), "yes_no": Kind(yes_no), "ratio": Kind(ratio), "several": Kind(several),
    "latex": Kind(formula, same_formula), "text": Kind(plain),
}  # fmt: skip
