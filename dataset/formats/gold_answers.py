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
    several   (3, 4], {1, 2}   the same values in the same brackets; in any order in { }, with "and", and in a list of values
              x = 1 or x = 2   without brackets; the range 1 < x ≤ 2 is (1, 2]
    latex     \\sqrt{3}/2       what math-verify calls equal and is as worked out (latex_answers)
    any       ["3", "three"]   what is right for one of them: the text of a row's list
    text      red circle       the same words, whatever their case, articles and blanks around signs

An answer must match *in full*: "8 or 9", "maybe 8" and "about 8" are not 8, and of several numbers none is picked, because
hedging would pay. The text of a model is compared, never evaluated.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from dataset.bad_rows import BadRow
from dataset.formats.answer_kinds import KINDS, SIGNS, Several
from dataset.formats.answer_text import choice, is_closed, name_and_value, normal
from dataset.formats.latex_answers import is_formula, is_understood

MAX_LETTERS = 200  # characters of a final answer; a longer one is wrong


@dataclass(frozen=True)
class Gold:
    """A gold answer that was understood: its parts, each "" where it does not tell it, and the kind of its value.

    items   the golds of several values, or of a list of which any is right
    text    what stands in the file
    """

    letter: str
    name: str
    kind: str
    value: Any
    items: tuple[Gold, ...] = ()
    text: str = ""

    def matches(self, body: str) -> bool:
        """Whether a final answer is right. Never raises, for any text."""
        return len(body) <= MAX_LETTERS and (body == self.text or self.agrees(normal(body)))

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
        if gold.open and not answer.open and (gold.open + gold.close not in ("()", "{}") or "∞" in "".join(gold.items)):
            return False  # an interval needs its brackets
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
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) and abs(value) < 1e15 else str(value)
    if isinstance(value, list | tuple) and value and not any(isinstance(item, list | tuple) for item in value):
        return json.dumps([gold_text(item) for item in value], ensure_ascii=False)
    what = f"{value}, not a finite number" if isinstance(value, float) else f"{str(value)[:80]}, a {type(value).__name__}"
    raise BadRow(f"the gold answer is {what}", "write a text, a number, or a list of which any is right, or remove the row")


def any_of(text: str) -> Sequence[str]:
    """The texts of a JSON list of texts, any of which is right; the text itself where it is none. [1, 2] is an interval."""
    if text.startswith('["'):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        if all(isinstance(item, str) for item in found):
            return found
    return [text]


def gold(answer: Any) -> Gold:
    """The comparison for a gold answer. ValueError, when data is loaded, for a gold that no answer could ever match.

    A reward that always or never paid for such a row would be noise that looks like a signal.
    """
    return of_text("" if answer is None else gold_text(answer))


@lru_cache(maxsize=65536)
def of_text(text: str) -> Gold:
    """`gold` of a text, which is understood once for the many answers to its row."""
    texts = any_of(text)
    if len(texts) > 1:
        return Gold("", "", "any", None, tuple(map(of_text, texts)), text)
    value = normal(stated(texts[0]))
    if not (re.search(r"\w", value) or SIGNS.fullmatch(value)) or value.lower() in ("nan", "null"):
        raise ValueError(f"the gold answer is {text!r}: nothing can match it; write the right answer, or remove the row")
    if len(value) > MAX_LETTERS:
        raise ValueError(f"the gold answer has {len(value)} characters, and an answer may have {MAX_LETTERS}: nothing can match "
                         f"it; write the final answer alone, or remove the row")
    found = understood(value)
    if any(part.kind == "latex" for part in (found, *found.items)) and importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the gold answer {text!r} is LaTeX that only math-verify can compare: pip install math-verify, write "
                         f"it as a number or a text, or remove the row")
    if found.kind == "latex" and not is_understood(found.value.text):
        raise ValueError(f"the gold answer {text!r} is LaTeX that even math-verify cannot read: repair or remove the row")
    if not found.agrees(value):
        raise ValueError(f"the gold answer {text!r} is not equal even to itself: nothing can match it; repair or remove the row")
    return replace(found, text=text)
