"""The text of an answer without its wrapping, and the parts of it that may stand alone.

In:  "The answer is: **$\\boxed{x = 3}$**."      Out: "x = 3", whose parts are the name "x" and the value "3".

Nothing here knows what is right: the same rules apply to a gold answer and to a model's.
"""

from __future__ import annotations

import re
import unicodedata

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
ALIKE = str.maketrans(dict(zip("−–—﹣。∶：º⁄∕’′“”「」⩽≦⩾≧⋅∙", "----.::°//''\"\"\"\"≤≤≥≥··")))  # signs that look alike
COMMANDS = [(re.compile(pattern), text) for pattern, text in [
    (r"(?<![\w*])\*\*([^*]+)\*\*(?![\w*])", r"\1"),  # bold type in Markdown
    (r"\$([^$]+)\$(?!\d)", r"\1"),  # mathematics, but not "$5 and $6"
    (r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathbb|operatorname|mbox|rm)\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle|[bB]ig[lr]?)(?![a-z])|\\!", ""), (r"\\q?quad(?![a-z])|\\[,;: ]", " "), (r"\{,\}", ","),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\w)", r"\1{\2}"), (r"\^\s*\{?\s*\\circ\s*\}?|\\circ(?![a-z])|\\degree", "°"), (r"\\%", "%"),
    (r"\\(?:leq?|leqslant)(?![a-z])|<=", "≤"), (r"\\(?:geq?|geqslant)(?![a-z])|>=", "≥"), (r"\\neq?(?![a-z])|!=", "≠"),
    (r"\\lt(?![a-z])", "<"), (r"\\gt(?![a-z])", ">"), (r"\+?\\infty|\+∞", "∞"), (r"\\in(?![a-z])", "∈"),
    (r"\\cup(?![a-z])|(?<=[)\]])\s*[Uu]\s*(?=[(\[])", "∪"), (r"\\pm(?![a-z])|\+/-", "±"), (r"\\(?:varnothing|emptyset)", "∅"),
    (r"\\angle(?![a-z])", "∠"),
]]  # fmt: skip
PAIRS = [re.compile(pattern, re.DOTALL) for pattern in [
    r"<answer>(.*)</answer>", r"\$+([^$]+)\$+", r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r"\\(?:boxed|fbox)\s*\{(.*)\}", r"`+([^`]*)`+",
    r"\*{1,3}([^*]*)\*{1,3}", r"__([^_]*)__", r'"([^"]*)"', r"'([^']*)'"]]  # fmt: skip
LEAD = re.compile("|".join([  # what announces an answer, without a doubt in it
    r"#{1,6}\s*|[:,=]\s*", r"(?:it\s+is|it's|there\s+(?:is|are))\s+", r"这是|它是|[一总]?共有?(?=\s*[\d一二两三四五六七八九十])",
    r"(?:(?:so|therefore|thus|hence|and)\b,?\s*)?(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|result|solution|ans)\s*"
    r"(?:\bis\b\s*:?|:|=)\s*",
    r"(?:所以|因此|故|则)?,?(?:本题|正确|最终|最后)?的?(?:答案|结果)\s*[是为]?\s*:?\s*",
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)(?:\s+is)?|i\s+(?:choose|pick)|所以|因此|"
    r"(?:本题|我|正确)?[应故]?选择?项?是?)\s*:?\s*(?=\W{0,3}[A-Ja-j](?![A-Za-z]))"]), re.IGNORECASE)  # fmt: skip


def narrow(text: str) -> str:
    """One character for what is written in several: full width, signs that look alike, LaTeX commands of layout."""
    if not text.isascii():
        text = re.sub(r"[⁰¹²³⁴-⁹⁻⁺]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
        text = re.sub(r"[₀-₉]+", lambda match: f"_{{{match[0].translate(SUBSCRIPTS)}}}", text)
        text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text)  # 1½ is 1 1/2
        text = "".join(char for char in unicodedata.normalize("NFKC", text.translate(ALIKE)).translate(ALIKE)
                       if unicodedata.category(char) != "Cf")  # fmt: skip
    if not text.isalnum():
        for pattern, replacement in COMMANDS:
            text = pattern.sub(replacement, text)
    return " ".join(text.split())


def is_closed(text: str) -> bool:
    """Whether every bracket of a text is closed inside it: "a)(b" is not what (a)(b) wraps."""
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The pieces of a text between the separators that stand outside of all brackets."""
    pieces, start = [], 0
    for match in separator.finditer(text):
        before = text[:match.start()]
        if sum(map(before.count, "([{")) == sum(map(before.count, ")]}")):
            pieces.append(text[start:match.start()].strip())
            start = match.end()
    return [*pieces, text[start:].strip()]


def normal(text: str) -> str:
    """A text without what is put around an answer: tags, $, \\boxed, quotes, bold type, "The answer is", a final stop."""
    text, before = narrow(text), None
    while text != before and not (text.isascii() and text.isalnum()):
        before = text
        for pair in PAIRS:
            if (match := pair.fullmatch(text)) and is_closed(match[1]):
                text = match[1].strip()
        if BRACKETED.fullmatch(text) and is_closed(text[1:-1]) and len(split(text[1:-1], LIST)) == 1:
            text = text[1:-1].strip()  # (x + 1), but not (3, 4)
        if match := LEAD.match(text):
            text = text[match.end():] or text
        if re.search(r"[^.]\.$|[,;:、]$|\\\\$", text):
            text = text.rstrip(".,;:、\\").strip()
    return text


BRACKETED = re.compile(r"\(.*\)|\{.*\}|\[.*\]")
LIST = re.compile(r"\s*(?:[,;、∪]|\b(?:and|or)\b|[和与及或])\s*")
POINT = re.compile(r"[A-Z]'?\s*(\([^()]*,[^()]*\))")
NAME = re.compile(r"((?:[∠△]\s*)?[A-Za-zα-ω\u4e00-\u9fff][\w'{}\u4e00-\u9fff]{0,12}(?:\s?\([a-z]\))?)\s*(?:=|∈)\s*([^=]+)")
CHOICE = re.compile(r"(?:\(([A-Ja-j])\)\s*|([A-Ja-j])\s*[).:、]\s*)(.+)")
OTHER = re.compile(r"(?:\bor\b|\band\b|[,;、或和])\s*\(?[A-J]\b|\b[A-J][).:、]\s")  # B. 30 or C. 40
LETTER = re.compile(r"\(?([A-Ja-j])\s?[).:]?(?:\s*选?项)?")


def name_and_value(text: str) -> tuple[str, str]:
    """("x", "3") of "x = 3"; ("", text) where nothing is named. An equation with an operator on its left has no name."""
    if match := POINT.fullmatch(text):  # A(3, 4)
        return "", match[1]
    match = NAME.fullmatch(text)
    return (re.sub(r"[\s{}_]", "", match[1]).lower(), match[2].strip()) if match else ("", text)


def letter(text: str) -> str:
    """The letter of a choice: `B`, `b`, `(B)`, `B.` -> "B"; "" for any other text."""
    match = LETTER.fullmatch(text)
    return match[1].upper() if match else ""


def choice(text: str) -> tuple[str, str]:
    """(letter, text) of a choice: "B. 30" -> ("B", "30"), "B" -> ("B", ""), "30" -> ("", "30"). Two are none."""
    if alone := letter(text):
        return alone, ""
    match = CHOICE.fullmatch(text)
    if not match or letter(match[3]) or CHOICE.fullmatch(match[3]) or OTHER.search(match[3]):
        return "", text
    return (match[1] or match[2]).upper(), normal(match[3])
