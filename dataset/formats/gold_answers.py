"""Gold answers: is a final answer the right one, whatever the form in which a file writes it?

In:  a gold answer and the final answer of a model, texts.  Out: `gold(text).matches(answer)`.

What a model writes must match *in full*: "8 or 9" is not 8, and the last of several numbers is not taken, because hedging would
pay. Text of a model is compared, never evaluated.

    gold            what is right besides the same text
    42, -7, 1/2     the same number, as integer, fraction or finite decimal: 0.5 is 1/2, 33.33 is not 100/3
    3.14            decimals were rounded by who wrote them: also what lies within half a unit of the last place, and within 1 %
    25\\pi, pi/4     the same multiple of pi; 78.54 is not 25 pi
    B               the same letter: b, (B), B.
    up, left, U     the same list of actions in English, Chinese or initials
    other LaTeX     what math-verify finds equal, which must be installed for such golds
Signs around it do not matter: $...$, \\boxed{...}, blanks, degrees, units, a final stop.
"""
from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LETTERS = 200  # of a final answer; longer ones are wrong

WIDE = str.maketrans({**{chr(0xFF01 + k): chr(0x21 + k) for k in range(94)}, "　": " ", "−": "-", "–": "-", "。": ".", "、": ","})
UNITS = re.compile(
    r"(?<=[\d}πi)])\s*(\\?%|°|\^\{?\\circ\}?|\\circ|\\degree|degrees?|度|"
    r"(square\s+)?(units?|cm|mm|km|dm|m|in|ft|inches|feet|meters?|metres?|centimeters?|centimetres?|厘米|毫米|平方厘米|平方米|米|个|"
    r"minutes?|min|seconds?|s|hours?|h|kg|g|元|岁)(\s*(\^\{?[23]\}?|²|³))?)$")  # fmt: skip
WRAPPED = (re.compile(r"\$+(.*?)\$+"), re.compile(r"\\\((.*)\\\)"), re.compile(r"\\\[(.*)\\\]"),
           re.compile(r"\\(?:boxed|text|mathrm|textbf|mathbf)\s*\{(.*)\}"))  # fmt: skip


def normal(text: str) -> str:
    """A final answer without what does not matter: wide signs, $, \\boxed, \\text, outer blanks, units, degrees, a final stop."""
    text, before = text.translate(WIDE).strip(), None
    while text != before:
        before = text
        for wrapping in WRAPPED:
            if (found := wrapping.fullmatch(text)) and balanced(found[1]):
                text = found[1].strip()
        text = text.replace("\\left", "").replace("\\right", "").replace("\\,", " ").replace("\\!", "").strip()
        if re.search(r"[^.]\.$", text):
            text = text[:-1].strip()
        text = UNITS.sub("", re.sub(r"\\(?:text|mathrm)\s*\{([^{}]*)\}$", r"\1", text)).strip()
    return text


def balanced(text: str) -> bool:
    """Whether every bracket of a text is closed inside it: "a}{b" is not what \\boxed{a}{b} wraps."""
    depth = 0
    for sign in text:
        depth += (sign == "{") - (sign == "}")
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
    """value x pi^power, exactly; `half` is half a unit of the last decimal, 0 for what is no decimal."""

    value: Fraction
    power: int = 0
    half: Fraction = Fraction(0)


def fraction(sign: str, top: str, bottom: str = "1") -> Fraction | None:
    """The number that matched digits mean; None for a division by 0."""
    above, below = Fraction(top.replace(",", "")), Fraction(bottom.replace(",", ""))
    return None if below == 0 else -above / below if sign == "-" else above / below


def rational(text: str) -> Number | None:
    """`12`, `1,234`, `-0.5`, `1/2`, `\\frac{1}{2}`, and nothing else."""
    text = text.strip()
    if found := PLAIN.fullmatch(text):
        places, value = len(found[2].partition(".")[2]), fraction(*found.groups())
        return None if value is None else Number(value, half=Fraction(1, 2 * 10**places) if places else Fraction(0))
    if found := RATIO.fullmatch(text) or FRAC.fullmatch(text):
        value = fraction(*found.groups())
        return None if value is None else Number(value)
    return None


def number(text: str) -> Number | None:
    """A normalised text as a rational number or a rational multiple of pi, else None."""
    if (found := rational(text)) or not (pi := PI.search(text)):
        return found
    before, after = text[:pi.start()], text[pi.end():]
    if re.match(r"[\d.]", after):  # 2 pi 5 is not 25 pi
        return None
    around = f"{before}1{after}" if before.strip() in ("", "+", "-") or before.rstrip().endswith("{") else before + after
    found = rational(around)
    return found and Number(found.value, power=1)


def same_number(gold: Number, said: Number) -> bool:
    """Exactly equal, or within what a decimal gold left open by rounding."""
    if (gold.value, gold.power) == (said.value, said.power) or gold.value == said.value == 0:
        return True
    if not gold.half:
        return False
    away = abs(said.value * Fraction(math.pi) ** said.power - gold.value * Fraction(math.pi) ** gold.power)
    return away <= min(gold.half, abs(gold.value) / 100)


ACTIONS = {"up": "U", "down": "D", "left": "L", "right": "R", "上": "U", "下": "D", "左": "L", "右": "R"}
LETTER = re.compile(r"\(?([A-Ja-j])[).:]?")


def letter(text: str) -> str | None:
    """`B`, `b`, `(B)`, `B.` -> "B"."""
    found = LETTER.fullmatch(text)
    return found and found[1].upper()


def actions(text: str) -> str | None:
    """`up, left`, `U L`, `UL`, `上左` -> "UL"; one lone initial is no list."""
    words = re.split(r"[\s,;]+|->|→", text.lower())
    if len(words) == 1 and re.fullmatch(r"[UDLR]{2,}|[上下左右]+", text):
        words = list(text.lower())
    initials = {**ACTIONS, "u": "U", "d": "D", "l": "L", "r": "R"}
    words = [word for word in words if word]
    found = [initials[word] for word in words if word in initials]
    return "".join(found) if found and len(found) == len(words) and (len(found) > 1 or words[0] in ACTIONS) else None


def plain(text: str) -> str:
    """A text as texts are compared: no case, single blanks."""
    return " ".join(text.casefold().split())


OPERATORS = ("*", "^", "+", "/", "×", "·", "÷", "=", "\\cdot", "\\times", "\\div", "\\frac", "\\sqrt", "-")
LATEX = re.compile(r"\\[a-zA-Z]+|[\^_=]|\d\s*[+*]\s*\d|[{}]")


@dataclass(frozen=True)
class Gold:
    """A gold answer that was understood: how it is compared (number, letter, actions, latex or text), and with what."""

    kind: str
    value: Number | str

    def matches(self, body: str) -> bool:
        """Whether a final answer is right; never raises, whatever stands in it."""
        if len(body) > MAX_LETTERS:
            return False
        answer = normal(body)
        if isinstance(self.value, Number):
            found = number(answer)
            return found is not None and same_number(self.value, found)
        if self.kind == "latex":
            return plain(answer) == plain(self.value) or verified(self.value, answer)
        return {"letter": letter, "actions": actions, "text": plain}[self.kind](answer) == self.value


def gold(text: str | None) -> Gold:
    """How a gold answer is to be compared. ValueError, when data is loaded, for one that nothing could ever match.

    A reward that gave such a row full marks, or none, would be noise that looks like a signal.
    """
    found = normal(text or "")
    if not found or not re.search(r"\w", found):
        raise ValueError(f"the gold answer is {text!r}: nothing can match it; write the right answer, or remove the row")
    for kind, read in (("number", number), ("letter", letter), ("actions", actions)):
        if (value := read(found)) is not None:
            return Gold(kind, value)
    if not LATEX.search(found):
        return Gold("text", plain(found))
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(f"the gold answer {text!r} is LaTeX that only math-verify can compare: pip install math-verify, write "
                         f"it as a number or a text, or remove the row")
    if not any(not isinstance(part, str) for part in as_math(found)):  # text alone: it was not understood
        raise ValueError(f"the gold answer {text!r} is LaTeX that even math-verify cannot read: repair or remove the row")
    return Gold("latex", found)


def as_math(text: str) -> list:
    """What math-verify reads in a text.

    `$...$`, or it reads `25\\pi` as 25; LaTeX alone, as its plain expressions go through an evaluator; no timeouts, which raise
    in threads. math-verify 0.9.0.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(f"${text}$", extraction_config=[LatexExtractionConfig()], parsing_timeout=None)


COMMAND = re.compile(r"\\[a-zA-Z]+")
POWER = re.compile(r"\^(?:\{-?\w{1,2}\}|\w(?!\^))")  # of one or two characters; a tower is none


def small(gold: str, said: str) -> bool:
    """Whether a text asks for no more work than the gold answer does.

    math-verify evaluates what it reads, without end for 9^{9^{9}} or 99!!!: no command that the gold has not, no factorial, and
    powers as many as the gold has at most, short ones or its own.
    """
    said, gold = re.sub(r"\s", "", said), re.sub(r"\s", "", gold)
    own = re.findall(r"\^(?:\{[^{}^]*\}|\w)", gold)
    rest = POWER.sub("", said)
    for power in own:
        rest = rest.replace(power, "")
    groups = [len(re.findall(r"[})\]]\^", text)) for text in (said, gold)]
    return (set(COMMAND.findall(said)) <= {*COMMAND.findall(gold), "\\left", "\\right", "\\pi"} and "!" not in said
            and "^" not in rest and said.count("^") <= gold.count("^") and groups[0] <= groups[1])


def verified(gold: str, said: str) -> bool:
    """math-verify's verdict on two normalised texts, behind a check of the operators.

    It takes 3*4 for 12 and 12^2 for 144, so an operator that the gold has not is refused: to calculate is the task. It takes the
    last of several numbers, so commas and words of choice are refused, too.
    """
    if any(sign in said and sign not in gold for sign in OPERATORS) or not small(gold, said):
        return False
    if re.search(r",|;|\$|\bor\b|\band\b|或|和|[^\x20-\x7eπ°]", said) and not re.search(r",|;", gold):
        return False
    from math_verify import verify

    return bool(verify(as_math(gold), as_math(said), timeout_seconds=None))
