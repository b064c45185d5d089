"""Gold answers: whether a final answer is right, in whatever form a file has the gold answer.

In:  a gold answer and the final answer of a model, as texts.  Out: `gold(text).matches(answer)`.

Both are brought to a normal form, in this order, and then compared by the gold's kind:

1. What is put around an answer goes: tags, $, \\boxed, bold type, "The answer is", a final stop (answer_text.normal).
2. What may stand alone is taken apart: "B. 30" is the letter B and the text 30, "x = 3" is the name x and the value 3. What both
   tell must agree, and what one leaves out is not held against it: B, 30 and B. 30 are right for B. 30, and C. 30 is wrong.
3. The rest is read by the first kind below that understands the gold. An answer is read by that kind alone.

    kind      gold             what is right besides the same text
    time      3:30 PM          the same time: 15:30, 下午3点半; where one does not tell the half of the day, any half
    date      2024-03-05       the same date: March 5, 2024, 2024年3月5日
    number    42, 1/2, 5 cm    the same number in any form: 0.5, \\frac12, 5×10^{-1}, 五; 33.33 is not 100/3.
                               A missing unit is right, another one is converted: 50 mm is 5 cm, and 5 m or 5 kg is wrong
              3.14             a decimal was rounded by its author: right within half a unit of the last place, and within 1 %
              25\\pi            the same multiple of pi; 78.54 is not 25 pi
    letters   AC               the same letters of a choice of several: A, C
    actions   up, left         the same list of actions in English, Chinese or initials
    yes_no    yes, 是, true     the same in both languages
    ratio     3:4              the same ratio
    several   (3, 4]  {1, 2}   the same values in the same brackets; in any order in { }, with "and", and in a bare list of values;
              x = 1 or x = 2   a range 1 < x ≤ 2 is (1, 2]
    latex     \\sqrt{3}/2       what math-verify calls equal and is as worked out (latex_answers)
    text      red circle       the same words, whatever their case, articles and blanks around signs

An answer must match *in full*: "8 or 9", "maybe 8" and "about 8" are not 8, and of several numbers none is picked, because
hedging would pay. The text of a model is compared, never evaluated.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from dataset.bad_rows import BadRow
from dataset.formats.answer_text import LIST, choice, is_closed, letter, name_and_value, normal, split
from dataset.formats.latex_answers import formula, is_formula, is_understood, same_formula
from dataset.formats.moments import date, same_moment, time_of_day
from dataset.formats.quantities import quantity, same_quantity

MAX_LETTERS = 200  # characters of a final answer; a longer one is wrong

# ---------------------------------------------------------------- kinds: how each reads a text

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
    """A text for comparison: in lower case, without quotes, an article, and blanks around signs and between Chinese characters."""
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

# ---------------------------------------------------------------- a gold answer


@dataclass(frozen=True)
class Gold:
    """A gold answer that was understood: the parts it tells, each "" or None where it does not, and the kind of its value."""

    letter: str
    name: str
    kind: str
    value: Any
    items: tuple[Gold, ...] = ()  # of several

    def matches(self, body: str) -> bool:
        """Whether a final answer is right. Never raises, for any text."""
        return len(body) <= MAX_LETTERS and self.agrees(normal(body))

    def agrees(self, text: str) -> bool:
        """Whether a normalised answer, or one of several values, has the parts of this one."""
        if self.kind == "any":
            return any(item.agrees(text) for item in self.items)
        chosen, rest = choice(text)
        if self.letter and chosen:
            return self.letter == chosen and (not rest or not self.kind or self.is_value(rest))
        if not self.kind:  # a letter alone
            return False
        return self.is_value(text) or bool(chosen and rest) and self.is_value(rest)

    def is_value(self, text: str) -> bool:
        """Whether a text is the value, with the same name or without one."""
        name, value = name_and_value(text)
        if name and self.name and not same_name(name, self.name):
            return False
        answer = KINDS[self.kind].read(value)
        if answer is None:
            return False
        return self.are_all(answer) if self.kind == "several" else KINDS[self.kind].same(self.value, answer)

    def are_all(self, answer: Several) -> bool:
        """Whether several values are those of the gold, in its brackets and, where it matters, in its order."""
        gold = self.value
        if len(answer.items) != len(self.items) or "|" in answer.joined and any(item.kind == "text" for item in self.items):
            return False
        if gold.open and answer.open and (gold.open, gold.close) != (answer.open, answer.close):
            return False
        if gold.open and not answer.open and ((gold.open, gold.close) not in (("(", ")"), ("{", "}")) or "∞" in "".join(gold.items)):
            return False
        words = all(item.kind == "text" for item in self.items)
        if gold.open in ("(", "[") or not gold.open and not gold.joined and words:
            return all(item.agrees(normal(text)) for item, text in zip(self.items, answer.items, strict=True))
        left = list(self.items)
        for text in map(normal, answer.items):
            match = next((item for item in left if item.agrees(text)), None)
            if match is None:
                return False
            left.remove(match)
        return True


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same; x_1 and x_2 are both an x."""
    return one == other or one.rstrip("0123456789") == other or one == other.rstrip("0123456789")


def understood(text: str) -> Gold:
    """A normalised gold answer with its parts and its kind."""
    chosen, rest = choice(text)
    if chosen and not rest:
        return Gold(chosen, "", "", None)
    name, value = name_and_value(rest)
    for kind, way in KINDS.items():
        if kind == "latex" and not is_formula(value) or (reading := way.read(value)) is None:
            continue
        if kind != "several":
            return Gold(chosen, name, kind, reading)
        items = tuple(understood(normal(item)) for item in reading.items)
        if "|" not in reading.joined or all(item.kind != "text" for item in items):  # "cat or dog" is a text
            return Gold(chosen, name, kind, reading, items)
    raise AssertionError("every text is of the kind text")


def stated(text: str) -> str:
    """What a gold answer states, without the solution around it: behind `####`, in the last \\boxed{} or in <answer>."""
    text = re.sub(r"[\u200b-\u200f\u2060\ufeff]", "", text).rpartition("####")[2]
    if found := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        text = found[-1]
    start = text.rfind("\\boxed{") + 7
    if start >= 7:
        end = next((k for k in range(start, len(text)) if text[k] == "}" and is_closed(text[start:k])), start)
        text = text[start:end]
    return text


def gold_text(value: Any) -> str:
    """The gold answer of a row as a text; a list, of which any is right, as a JSON list of texts.

    BadRow names what cannot be an answer: NaN, true or false, an object, an empty list.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise BadRow(f"the gold answer is {value}, a bool", f'write a text, "{"yes" if value else "no"}", or remove the row')
    if isinstance(value, int | float) and math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    if isinstance(value, list | tuple) and value and not any(isinstance(item, list | tuple) for item in value):
        return json.dumps([gold_text(item) for item in value], ensure_ascii=False)
    what = f"{value}, not a finite number" if isinstance(value, float) else f"{str(value)[:80]}, a {type(value).__name__}"
    raise BadRow(f"the gold answer is {what}", "write a text, a number, or a list of texts of which any is right, or remove the row")


def any_of(text: str) -> Sequence[str]:
    """The texts of a JSON list of texts, any of which is right; the text itself where it is none. [1, 2] is an interval."""
    if text.startswith('["'):
        try:
            found = json.loads(text)
        except ValueError:
            return [text]
        if all(isinstance(item, str) for item in found):
            return found
    return [text]


@lru_cache(maxsize=65536)
def gold(text: str | None) -> Gold:
    """The comparison for a gold answer. ValueError, when data is loaded, for a gold that no answer could ever match.

    A reward that always or never paid for such a row would be noise that looks like a signal.
    """
    several_texts = any_of(text or "")
    if len(several_texts) > 1:
        return Gold("", "", "any", None, tuple(gold(item) for item in several_texts))
    (text,) = several_texts
    value = normal(stated(text))
    if not (re.search(r"\w", value) or SIGNS.fullmatch(value)) or value.lower() in ("nan", "null"):
        raise ValueError(f"the gold answer is {text!r}: nothing can match it; write the right answer, or remove the row")
    if len(value) > MAX_LETTERS:
        raise ValueError(f"the gold answer has {len(value)} characters, and an answer may have {MAX_LETTERS}: nothing can match it; "
                         f"write the final answer alone, or remove the row")
    found = understood(value)
    if any(part.kind == "latex" for part in (found, *found.items)) and importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the gold answer {text!r} is LaTeX that only math-verify can compare: pip install math-verify, write "
                         f"it as a number or a text, or remove the row")
    if found.kind == "latex" and not is_understood(found.value.text):  # text alone: it was not understood
        raise ValueError(f"the gold answer {text!r} is LaTeX that even math-verify cannot read: repair or remove the row")
    if not found.agrees(value):
        raise ValueError(f"the gold answer {text!r} is not equal even to itself: nothing can match it; repair or remove the row")
    return found
