"""Formulas: whether two are equal, by math-verify, behind a guard on what a model may make it compute.

In:  a gold answer and an answer as texts, `2\\sqrt{3}`, `2√3`, `x^2+1`.  Out: `same_formula(formula(gold), formula(answer))`.

math-verify (0.9.0) is good at algebra: fractions, roots, polynomials in another order. What it is bad at stays outside: it calls
3*4 equal to 12, picks the last of several numbers, and evaluates whatever it reads.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache

from dataset.formats.units import Unit, unit

WRITTEN = [(re.compile(pattern), text) for pattern, text in [
    (r"√\s*\(([^()]*)\)|(?<!\\)sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2}"), (r"√\s*(\d+(?:\.\d+)?|[a-zA-Z])", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"), (r"\^\s*\(([^()^]*)\)", r"^{\1}"), (r"≥", r"\\geq "), (r"≤", r"\\leq "), (r"≠", r"\\neq "),
    (r"±", r"\\pm "), (r"π|(?<![a-zA-Z\\])pi(?![a-z])", r"\\pi "), (r"∞", r"\\infty "), (r"∪", r"\\cup "), (r"∠", ""),
    (r"\s*(?:×|·|\\times(?![a-z])|\\cdot(?![a-z]))\s*", "*"), (r"÷|\\div(?![a-z])", "/"), (r"\*(?=[a-zA-Z(])", ""),
    (r"(?<![a-zA-Z\\])(sin|cos|tan|log|ln|exp)(?![a-z])", r"\\\1 "),
]]  # fmt: skip
LATEX = re.compile(r"\\[a-zA-Z]+|[\^_=√≥≤≠<>±]|\d\s*[+*]\s*\d|[{}]|sqrt\(")
ALGEBRA = re.compile(r"(?=.*[A-Za-zα-ω])(?=.*[\d+*/()-])(?!.*[A-Za-z]{3})[\dA-Za-zα-ω+*/().,\s·×-]+")
MEASURED = re.compile(r"(.*[}\d)])(\s*)([A-Za-zμΩ°\u4e00-\u9fff].*)")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
OPERATORS = ("*", "^", "/", "=", "\\sqrt", "!", "|")
COMMAND = re.compile(r"\\[a-zA-Z]+")
COSTLY = {"\\binom", "\\dbinom", "\\tbinom", "\\sum", "\\prod", "\\int", "\\lim"}
NUMBER = re.compile(r"[0-9]+")
POWER = re.compile(r"\^(?:\{-?\w{1,2}\}|\w(?!\^))")  # of one or two characters; a tower of powers does not match


@dataclass(frozen=True)
class Formula:
    """A formula and the unit behind it."""

    text: str
    unit: Unit = Unit()


def formula(text: str) -> Formula:
    """A text as a formula; a unit stands behind a blank, or has several letters: 2√3 cm, 2√3cm, but 2x√3 m^2 and 3t."""
    match = MEASURED.fullmatch(text)
    found = match and (match[2] or len(match[3]) > 1 or not match[3].isascii()) and unit(match[3])
    return Formula(match[1], found) if match and found else Formula(text)


def is_formula(text: str) -> bool:
    """Whether a text is LaTeX or algebra, and not words: x^2, 2\\sqrt{3}, 2x+1, but not T-shirt."""
    if "\\" in text:
        return LATEX.search(text) is not None
    return bool(LATEX.search(text) or ALGEBRA.fullmatch(text)) and is_understood(text)


@lru_cache(maxsize=4096)
def latex(text: str) -> str:
    """A formula as LaTeX, whatever signs it is written with: 2√3 -> 2\\sqrt{3}."""
    for pattern, replacement in WRITTEN:
        text = pattern.sub(replacement, text)
    return text


def compact(text: str) -> str:
    """A formula without what is layout in LaTeX: blanks, and the braces and underscores of x_{1}."""
    return re.sub(r"[\s{}_]|\\(?![a-z])", "", text).casefold()


@lru_cache(maxsize=4096)
def as_math(text: str) -> list:
    """The expressions that math-verify reads in LaTeX.

    The text is put into $...$: 25\\pi alone is read as 25. Only LaTeX is read, because plain expressions go through an evaluator.
    There is no timeout, because it raises in threads.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


def is_understood(text: str) -> bool:
    """Whether math-verify reads an expression in a formula, and not only its text. Without math-verify nobody knows: True."""
    return importlib.util.find_spec("math_verify") is None or any(not isinstance(part, str) for part in as_math(latex(text)))


def operators(text: str) -> tuple[set[str], int]:
    """The operators of a formula, a fraction being a division; how many terms are added, without the signs of first terms."""
    text = re.sub(r"\s", "", text.replace("\\frac", "/"))
    return {sign for sign in OPERATORS if sign in text}, len(re.findall(r"(?<=[\w)}\]!])[+-]", text))


def is_small(gold: str, answer: str) -> bool:
    """Whether an answer costs math-verify no more work than the gold answer does.

    math-verify evaluates what it reads, and 9^{9^{9}} or 99!!! would never end. So an answer has the letters of the gold, no
    command that it lacks, no number of many more digits, no factorial, and is not much longer. It has no more powers: those are
    short or occur in the gold, and not above its largest number or 10, as (x+9)^{99} would be multiplied out. Sums and binomials
    are compared as texts alone.
    """
    known = {*COMMAND.findall(gold)} - COSTLY | {"\\pi", *(["\\frac"] if "/" in gold else [])}
    if not set(COMMAND.findall(answer)) <= known or letters(answer) != letters(gold):
        return False
    answer, gold = re.sub(r"\s", "", answer), re.sub(r"\s", "", gold)
    numbers = [int(digits) for digits in NUMBER.findall(gold)]
    if any(len(digits) > len(str(max(numbers, default=0))) + 3 for digits in NUMBER.findall(answer)):
        return False
    if any(int(power) > max([10, *numbers]) for power in re.findall(r"\^\{?-?([0-9]+)", answer)):
        return False
    powers = re.findall(r"\^(?:\{[^{}^]*\}|\w)", gold)
    rest = POWER.sub("", answer)
    for power in powers:
        rest = rest.replace(power, "")
    groups = [len(re.findall(r"[})\]]\^", text)) for text in (answer, gold)]
    return (len(answer) <= 3 * len(gold) + 20 and "!" not in answer and "^" not in rest
            and answer.count("^") <= gold.count("^") and groups[0] <= groups[1])


def letters(text: str) -> set[str]:
    """The variables of a formula, which equal formulas share."""
    return set(re.findall(r"[A-Za-zα-ω]", COMMAND.sub("", text).replace("°", "")))


def same_formula(one: Formula, other: Formula) -> bool:
    """Whether the second formula is equal to the first, the gold, and as worked out. A missing unit fits every unit.

    An operator that the gold lacks is refused: the calculation is the task. So are several values and words of choice, of which
    math-verify would take the last.
    """
    if one.unit.dimension and other.unit.dimension and one.unit != other.unit:
        return False
    gold, answer = latex(one.text), latex(other.text)
    if compact(gold) == compact(answer):
        return True
    (known, terms), (used, more) = operators(gold), operators(answer)
    if not used <= known or more > terms or not is_small(gold, answer):
        return False
    if not set(WORD.findall(answer)) <= set(WORD.findall(gold)) or re.search(r"[,;$?]|\bor\b|\band\b|[^\x20-\x7e°α-ω]", answer):
        return False
    from math_verify import verify

    return bool(verify(as_math(gold), as_math(answer), timeout_seconds=None))
