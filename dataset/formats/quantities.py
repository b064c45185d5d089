"""Quantities: the number in a text, exactly, with its unit.

In:  "1,234", "-1/2", "1 1/2", "1.2 × 10^3", "25\\pi", "三十", "120 km/h", "$5", "50%", "1 h 30 min".
Out: a `Quantity`, or None for any other text. Nothing is calculated: 3*4 and 12^2 are no numbers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from dataset.formats.units import Unit, counted, unit

DIGITS = r"(?:[0-9]{1,3}(?:[, ][0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
SIGNED = rf"([+-]?)\s*({DIGITS})"
DECIMAL = re.compile(SIGNED)
RATIO = re.compile(rf"{SIGNED}\s*/\s*([+-]?)\s*({DIGITS})")
FRAC = re.compile(rf"([+-]?)\s*\\frac\s*\{{\s*{SIGNED}\s*\}}\s*\{{\s*{SIGNED}\s*\}}")
MIXED = re.compile(r"([+-]?)\s*([0-9]+)\s*(\s[0-9]+\s*/\s*[0-9]+|\\frac\s*\{\s*[0-9]+\s*\}\s*\{\s*[0-9]+\s*\})")
POWER = re.compile(rf"(?:{SIGNED}\s*(?:×|·|\*|x|\\times|\\cdot)\s*)?10\s*\^\s*\{{?\s*\(?([+-]?[0-9]{{1,2}})\)?\s*\}}?")
EXPONENT = re.compile(rf"{SIGNED}[eE]([+-]?[0-9]{{1,2}})")
PI = re.compile(r"\s*(?:\*|·|×|\\cdot|\\times)?\s*(?:\\pi|π|pi)(?![a-z])\s*")
WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
         "eighteen nineteen twenty").split()  # fmt: skip
WORD = re.compile(rf"({'|'.join(WORDS)})(?![\w-])", re.IGNORECASE)
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
SCALED = re.compile(rf"({DIGITS})\s*(hundred|thousand|million|billion|[百千万亿])(?![a-z])")
HAN_DIGITS = {**{digit: k for k, digit in enumerate("零一二三四五六七八九")}, "〇": 0, "两": 2}
HAN = re.compile(r"[零〇一二两三四五六七八九十百千万亿]+(?:点[零〇一二两三四五六七八九]+)?")
SIGNS = re.compile(r"(?:[0-9.,/\s{}()^*×·+-]|\\frac|\\pi|π|pi(?![a-z])|\\times|\\cdot|x(?=\s*10)|[eE](?=[+-]?[0-9]))+")
MONEY = re.compile(r"([+-]?)\s*(\\?\$|¥|€|£|US\$|RMB|USD)\s*(?=[\d.])")
PART = re.compile(r"[0-9][0-9.]*\s*[^0-9.\s]+\s*")


@dataclass(frozen=True)
class Quantity:
    """value x pi^power, exactly, with its unit. `half` is half a unit of the last decimal place; 0 for other numbers."""

    value: Fraction
    power: int = 0
    half: Fraction = Fraction(0)
    unit: Unit = Unit()


def fraction(sign: str, top: str, bottom: str = "1") -> Fraction | None:
    """The number of matched digits, top / bottom; None for a division by 0."""
    above, below = (Fraction(re.sub("[, ]", "", digits)) for digits in (top, bottom))
    return None if below == 0 else -above / below if sign == "-" else above / below


def decimal(sign: str, digits: str, exponent: int = 0) -> Quantity:
    """A decimal x 10^exponent, with the rounding of its last place."""
    places, scale = len(digits.partition(".")[2]), Fraction(10) ** exponent
    return Quantity((fraction(sign, digits) or Fraction(0)) * scale, half=scale / (2 * 10**places) if places else Fraction(0))


def rational(text: str) -> Quantity | None:
    """`12`, `1,234`, `-0.5`, `1/2`, `\\frac{1}{2}`, `1 1/2`, `1.2 × 10^3` or `1.2e3`; None for any other text."""
    text = text.strip()
    if match := DECIMAL.fullmatch(text):
        return decimal(match[1], match[2])
    if match := RATIO.fullmatch(text):
        value = fraction(match[1], match[2], match[4])
        return value if value is None else Quantity(-value if match[3] == "-" else value)
    if match := FRAC.fullmatch(text):
        value = fraction(match[2], match[3], match[5])
        return value if value is None else Quantity(value * (-1) ** "".join((match[1], match[4])).count("-"))
    if match := MIXED.fullmatch(text):
        whole, part = Fraction(match[2]), rational(match[3])
        return part and Quantity((whole + part.value) * (-1 if match[1] == "-" else 1)) if part and part.value < 1 else None
    if (match := POWER.fullmatch(text)) or (match := EXPONENT.fullmatch(text)):
        return decimal(match[1] or "", match[2] or "1", int(match[3])) if int(match[3]) else None
    return None


def number(text: str) -> Quantity | None:
    """The rational number, or the rational multiple of pi, of a text without a unit; None for any other text."""
    if (result := rational(text)) or not (pi := PI.search(text)):
        return result
    before, after = text[:pi.start()], text[pi.end():]
    if re.match(r"[\d.]", after):  # 2 pi 5 is not 25 pi
        return None
    around = f"{before}1{after}" if before.strip() in ("", "+", "-") or before.rstrip().endswith("{") else before + after
    result = rational(around)
    return result and replace(result, power=1, half=Fraction(0))


def of_han(text: str) -> str:
    """The digits of a Chinese numeral: 三十五 -> 35, 二〇二四 -> 2024, 三点五 -> 3.5."""
    whole, point, places = text.partition("点")
    if set(whole) <= set(HAN_DIGITS):
        value = int("".join(str(HAN_DIGITS[char]) for char in whole))
    else:
        total = section = digit = 0
        for char in whole:
            if char in HAN_DIGITS:
                digit = HAN_DIGITS[char]
            elif char in "十百千":
                section, digit = section + (digit or 1) * {"十": 10, "百": 100, "千": 1000}[char], 0
            else:  # 万, 亿
                total, section, digit = (total + section + digit or 1) * SCALES[char], 0, 0
        value = total + section + digit
    return str(value) + point.replace("点", ".") + "".join(str(HAN_DIGITS[char]) for char in places)


def in_digits(text: str) -> str:
    """A text whose leading numeral in words is written in digits: three -> 3, 三十 -> 30, 三分之一 -> 1/3, 1.2万 -> 12000."""
    text = re.sub(r"^(?:negative|minus|负)\s*(?=\w)", "-", text, flags=re.IGNORECASE)
    if match := WORD.match(text.lstrip("-")):
        return "-" * text.startswith("-") + f"{WORDS.index(match[1].lower())}{text.lstrip('-')[match.end():]}"
    if text.lstrip("-")[:1] in "零〇一二两三四五六七八九十百":
        if parts := re.fullmatch(rf"({HAN.pattern}|\d+)分之({HAN.pattern}|[\d.]+)", text):
            bottom, top = (of_han(part) if HAN.fullmatch(part) else part for part in parts.groups())
            return f"{top}%" if parts[1] == "百" else f"{top}/{bottom}"
        if match := HAN.match(text.lstrip("-")):
            text = "-" * text.startswith("-") + of_han(match[0]) + text.lstrip("-")[match.end():]
    if match := SCALED.match(text):
        text = f"{decimal('', match[1]).value * SCALES[match[2]]}{text[match.end():]}"
    return text


def quantity(text: str) -> Quantity | None:
    """The number and the unit of a whole text; the unit may be missing. None for any other text, so for two numbers."""
    if not text:
        return None
    if result := number(text):
        return result
    if money := MONEY.match(text):
        result, paid = number(money[1] + text[money.end():]), unit(money[2].replace("\\", "").replace("US$", "$"))
        return replace(result, unit=paid) if result and paid else None
    digits = in_digits(re.sub(r"\s*\(([^()\d]+)\)$", r" \1", text))  # 5 (cm)
    match = SIGNS.match(digits)
    if not match or not (result := number(match[0])):
        return summed(digits)
    rest = digits[match.end(1) if match.lastindex else match.end():]
    if not rest.strip():
        return result
    spaced = " " * match[0].endswith(" ")
    found = unit(rest) or counted(spaced + rest, measured=not text[0].isascii())
    return replace(result, unit=found) if found else summed(digits)


def summed(text: str) -> Quantity | None:
    """The sum of `1 h 30 min` or `2元5角`: units of one dimension, each smaller than the one before; None for any other text."""
    text = re.sub(r"(时\d+)分$", r"\1分钟", text)  # elsewhere 分 is a mark, or a cent
    parts = PART.findall(text)
    if len(parts) < 2 or "".join(parts) != text:
        return None
    found = [quantity(part.strip()) for part in parts]
    if any(part is None or not part.unit.dimension or part.power for part in found):
        return None
    first, *others = [part for part in found if part]
    sizes = [part.unit.size for part in (first, *others)]
    if any(part.unit.dimension != first.unit.dimension for part in others) or sizes != sorted(set(sizes), reverse=True):
        return None
    return Quantity(sum(part.value * part.unit.size for part in (first, *others)) / sizes[0], unit=first.unit)


PERCENT = (("percent", 1),)


def same_quantity(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities are equal, exactly or within the rounding of a decimal gold.

    A missing unit fits every unit; two units must have one dimension. 50% is 0.5, and 50 where the other has no unit.
    """
    units = gold.unit.dimension, answer.unit.dimension
    if PERCENT in units and units[0] != units[1] and () in units:
        hundredth = Fraction(1, 100)
        if units[0] == PERCENT:
            parts = replace(gold, value=gold.value * hundredth, half=gold.half * hundredth, unit=Unit())
            return same_number(gold, answer) or same_number(parts, answer)
        return same_number(gold, answer) or same_number(gold, replace(answer, value=answer.value * hundredth))
    if units[0] and units[1]:
        if units[0] != units[1]:
            return False
        answer = replace(answer, value=answer.value * answer.unit.size / gold.unit.size)
    return same_number(gold, answer)


def same_number(gold: Quantity, answer: Quantity) -> bool:
    """Whether two numbers are equal, exactly or, for a decimal gold, within half a unit of its last place and 1 %."""
    if (gold.value, gold.power) == (answer.value, answer.power) or gold.value == answer.value == 0:
        return True
    if not gold.half:
        return False
    away = abs(answer.value * Fraction(math.pi) ** answer.power - gold.value * Fraction(math.pi) ** gold.power)
    return away <= min(gold.half, abs(gold.value) / 100)
