"""Gold answers: whether a final answer is right, in whatever form a file has the gold answer.

In:  a gold answer and the final answer of a model, as texts.  Out: `gold(text).matches(answer)`.

A model's answer must match *in full*: "8 or 9" is not 8, and of several numbers none is picked, because hedging would pay.
The text of a model is compared, never evaluated.

    gold            what is right besides the same text
    42, -7, 1/2     the same number, as integer, fraction or finite decimal: 0.5 is 1/2, 33.33 is not 100/3
    3.14            a decimal was rounded by its author: right within half a unit of the last place, and within 1 %
    25\\pi, pi/4     the same multiple of pi; 78.54 is not 25 pi
    B               the same letter: b, (B), B.
    up, left, U     the same list of actions in English, Chinese or initials
    other LaTeX     what math-verify calls equal; such golds need it installed
Ignored around an answer: $...$, \\boxed{...}, spaces, degrees, units, a final full stop.
"""
from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LETTERS = 200  # characters of a final answer; a longer one is wrong

WIDE = str.maketrans({**{chr(0xFF01 + k): chr(0x21 + k) for k in range(94)}, "　": " ", "−": "-", "–": "-", "。": ".", "、": ","})
UNITS = re.compile(
    r"(?<=[\d}πi)])\s*(\\?%|°|\^\{?\\circ\}?|\\circ|\\degree|degrees?|度|"
    r"(square\s+)?(units?|cm|mm|km|dm|m|in|ft|inches|feet|meters?|metres?|centimeters?|centimetres?|厘米|毫米|平方厘米|平方米|米|个|"
    r"minutes?|min|seconds?|s|hours?|h|kg|g|元|岁)(\s*(\^\{?[23]\}?|²|³))?)$")  # fmt: skip
WRAPPED = (re.compile(r"\$+(.*?)\$+"), re.compile(r"\\\((.*)\\\)"), re.compile(r"\\\[(.*)\\\]"),
           re.compile(r"\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{(.*)\}"))  # fmt: skip


def normal(text: str) -> str:
    """A final answer without full-width characters, $, \\boxed, \\text, outer spaces, units, degrees and a final full stop."""
    text, before = text.translate(WIDE).strip(), None
    while text != before:
        before = text
        for wrapping in WRAPPED:
            if (match := wrapping.fullmatch(text)) and balanced(match[1]):
                text = match[1].strip()
        text = text.replace("\\left", "").replace("\\right", "").replace("\\,", " ").replace("\\!", "").strip()
        if re.search(r"[^.]\.$", text):
            text = text[:-1].strip()
        text = UNITS.sub("", re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}$", r"\1", text)).strip()
    return text


def balanced(text: str) -> bool:
    """Whether every brace of a text is closed inside it: "a}{b" is not what \\boxed{a}{b} wraps."""
    depth = 0
    for character in text:
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
PLAIN = re.compile(rf"([+-]?)\s*({NUMBER})")
RATIO = re.compile(rf"([+-]?)\s*({NUMBER})\s*/\s*({NUMBER})")
FRAC = re.compile(rf"([+-]?)\s*\\[dt]?frac\s*\{{\s*([+-]?(?:{NUMBER}))\s*\}}\s*\{{\s*({NUMBER})\s*\}}")
PI = re.compile(r"\s*\*?\s*(?:\\pi|π|pi)(?![a-z])\s*")


@dataclass(frozen=True)
class Number:
    """value x pi^power, exactly. `half` is half a unit of the last decimal place; 0 for other numbers."""

    value: Fraction
    power: int = 0
    half: Fraction = Fraction(0)


def fraction(sign: str, top: str, bottom: str = "1") -> Fraction | None:
    """The number of matched digits, top / bottom; None for a division by 0."""
    above, below = Fraction(top.replace(",", "")), Fraction(bottom.replace(",", ""))
    return None if below == 0 else -above / below if sign == "-" else above / below


def rational(text: str) -> Number | None:
    """The number in `12`, `1,234`, `-0.5`, `1/2` or `\\frac{1}{2}`; None for any other text."""
    text = text.strip()
    if match := PLAIN.fullmatch(text):
        places, value = len(match[2].partition(".")[2]), fraction(*match.groups())
        return None if value is None else Number(value, half=Fraction(1, 2 * 10**places) if places else Fraction(0))
    if match := RATIO.fullmatch(text) or FRAC.fullmatch(text):
        value = fraction(*match.groups())
        return None if value is None else Number(value)
    return None


def number(text: str) -> Number | None:
    """The rational number, or the rational multiple of pi, of a normalised text; None for any other text."""
    if (result := rational(text)) or not (pi := PI.search(text)):
        return result
    before, after = text[:pi.start()], text[pi.end():]
    if re.match(r"[\d.]", after):  # 2 pi 5 is not 25 pi
        return None
    around = f"{before}1{after}" if before.strip() in ("", "+", "-") or before.rstrip().endswith("{") else before + after
    result = rational(around)
    return result and Number(result.value, power=1)


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two numbers are equal, exactly or within the rounding of a decimal gold."""
    if (gold.value, gold.power) == (answer.value, answer.power) or gold.value == answer.value == 0:
        return True
    if not gold.half:
        return False
    away = abs(answer.value * Fraction(math.pi) ** answer.power - gold.value * Fraction(math.pi) ** gold.power)
    return away <= min(gold.half, abs(gold.value) / 100)


ACTIONS = {"up": "U", "down": "D", "left": "L", "right": "R", "上": "U", "下": "D", "左": "L", "右": "R"}
LETTER = re.compile(r"\(?([A-Ja-j])[).:]?")


def letter(text: str) -> str | None:
    """The letter of a choice: `B`, `b`, `(B)`, `B.` -> "B"; None for any other text."""
    match = LETTER.fullmatch(text)
    return match and match[1].upper()


def actions(text: str) -> str | None:
    """The initials of a list of actions: `up, left`, `U L`, `UL`, `上左` -> "UL". A single initial is not a list."""
    words = re.split(r"[\s,;]+|->|→", text.lower())
    if len(words) == 1 and re.fullmatch(r"[UDLR]{2,}|[上下左右]+", text):
        words = list(text.lower())
    initials = {**ACTIONS, "u": "U", "d": "D", "l": "L", "r": "R"}
    words = [word for word in words if word]
    listed = [initials[word] for word in words if word in initials]
    return "".join(listed) if listed and len(listed) == len(words) and (len(listed) > 1 or words[0] in ACTIONS) else None


def plain(text: str) -> str:
    """A text in lower case with single spaces, for comparison."""
    return " ".join(text.casefold().split())


OPERATORS = ("*", "^", "+", "/", "×", "·", "÷", "=", "\\cdot", "\\times", "\\div", "\\frac", "\\sqrt", "-")
LATEX = re.compile(r"\\[a-zA-Z]+|[\^_=]|\d\s*[+*]\s*\d|[{}]")


@dataclass(frozen=True)
class Gold:
    """A gold answer that was understood: how it is compared (number, letter, actions, latex or text), and its value."""

    kind: str
    value: Number | str

    def matches(self, body: str) -> bool:
        """Whether a final answer is right. Never raises, for any text."""
        if len(body) > MAX_LETTERS:
            return False
        answer = normal(body)
        if isinstance(self.value, Number):
            value = number(answer)
            return value is not None and same_number(self.value, value)
        if self.kind == "latex":
            return plain(answer) == plain(self.value) or verified(self.value, answer)
        return {"letter": letter, "actions": actions, "text": plain}[self.kind](answer) == self.value


def gold(text: str | None) -> Gold:
    """The comparison for a gold answer. ValueError, when data is loaded, for a gold that no answer could ever match.

    A reward that always or never paid for such a row would be noise that looks like a signal.
    """
    normalised = normal(text or "")
    if not normalised or not re.search(r"\w", normalised):
        raise ValueError(f"the gold answer is {text!r}: nothing can match it; write the right answer, or remove the row")
    for kind, read in (("number", number), ("letter", letter), ("actions", actions)):
        if (value := read(normalised)) is not None:
            return Gold(kind, value)
    if not LATEX.search(normalised):
        return Gold("text", plain(normalised))
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the gold answer {text!r} is LaTeX that only math-verify can compare: pip install math-verify, write "
                         f"it as a number or a text, or remove the row")
    if not any(not isinstance(part, str) for part in as_math(normalised)):  # text alone: it was not understood
        raise ValueError(f"the gold answer {text!r} is LaTeX that even math-verify cannot read: repair or remove the row")
    return Gold("latex", normalised)


def as_math(text: str) -> list:
    """The expressions that math-verify (0.9.0) reads in a text.

    The text is put into $...$: 25\\pi alone is read as 25. Only LaTeX is read, because plain expressions go through an evaluator.
    There is no timeout, because it raises in threads.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


COMMAND = re.compile(r"\\[a-zA-Z]+")
POWER = re.compile(r"\^(?:\{-?\w{1,2}\}|\w(?!\^))")  # of one or two characters; a tower of powers does not match


def is_small(gold: str, answer: str) -> bool:
    """Whether an answer costs math-verify no more work than the gold answer does.

    math-verify evaluates what it reads, and 9^{9^{9}} or 99!!! would never end. So an answer may not have a command that the
    gold lacks, a factorial, or more powers than the gold; its powers are short or occur in the gold.
    """
    answer, gold = re.sub(r"\s", "", answer), re.sub(r"\s", "", gold)
    powers = re.findall(r"\^(?:\{[^{}^]*\}|\w)", gold)
    rest = POWER.sub("", answer)
    for power in powers:
        rest = rest.replace(power, "")
    groups = [len(re.findall(r"[})\]]\^", text)) for text in (answer, gold)]
    return (set(COMMAND.findall(answer)) <= {*COMMAND.findall(gold), "\\left", "\\right", "\\pi"} and "!" not in answer
            and "^" not in rest and answer.count("^") <= gold.count("^") and groups[0] <= groups[1])


def verified(gold: str, answer: str) -> bool:
    """math-verify's verdict on two normalised texts, after a check of the operators.

    It calls 3*4 equal to 12, so an operator that the gold lacks is refused: the calculation is the task. It takes the last of
    several numbers, so commas and words of choice are refused, too.
    """
    if any(sign in answer and sign not in gold for sign in OPERATORS) or not is_small(gold, answer):
        return False
    if re.search(r",|;|\$|\bor\b|\band\b|或|和|[^\x20-\x7eπ°]", answer) and not re.search(r",|;", gold):
        return False
    from math_verify import verify

    return bool(verify(as_math(gold), as_math(answer), timeout_seconds=None))
