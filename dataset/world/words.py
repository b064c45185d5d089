"""Words for the embedded world: captions and descriptions of scenes, and the categories that a text mentions.

In:  a `Scene` and a language, or a text.  Out: English or Chinese text, or categories in the order of the text.
"""
from __future__ import annotations

import functools
import re

from dataset.world.openmoji import Category, categories, plural, with_article
from dataset.world.scenes import Scene

PLACES = {
    "en": ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"),
    "zh": ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
}
NUMBERS = {"en": ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
           "zh": ("没有", "一个", "两个", "三个", "四个", "五个", "六个", "七个", "八个", "九个")}


def phrase(category: Category, count: int, language: str) -> str:
    """'a bus', 'two buses', '两个公交车'."""
    if language == "zh":
        return NUMBERS["zh"][count] + category.zh
    return with_article(category.en) if count == 1 else f"{NUMBERS['en'][count]} {plural(category.en)}"


def join(phrases: list[str], language: str) -> str:
    """'a', 'a and b', 'a, b and c' in either language."""
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]


def caption(scene: Scene, language: str) -> str:
    """Every category with its count, in reading order: 'A bus, two foxes and a key.'"""
    text = join([phrase(category, n, language) for category, n in scene.counts.items()], language)
    return text[0].upper() + text[1:] + "." if language == "en" else text + "。"


def description(scene: Scene, language: str) -> str:
    """Every object with its place: 'At the top left is one bus. At the center is one ant.'

    The place comes first, so that the model can look up the object there and then move on to a later place. 'one' fits every
    name; 'a' or 'an' would have to be chosen before the name.
    """
    places = PLACES[language]
    if language == "zh":
        return "".join(f"{places[obj.cell]}有{phrase(obj.category, 1, 'zh')}。" for obj in scene.objects)
    return " ".join(f"At the {places[obj.cell]} is one {obj.category.en}." for obj in scene.objects)


@functools.cache
def mention_pattern(which: str, language: str) -> tuple[re.Pattern, dict[str, Category]]:
    """(a pattern that matches any name, the longest first, and each name's category)."""
    forms = {}
    for category in categories(which):
        names = (category.en, plural(category.en)) if language == "en" else (category.zh,)
        forms.update({name.lower(): category for name in names})
    longest_first = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    words = rf"(?<!\w)({longest_first})(?!\w)" if language == "en" else f"({longest_first})"  # some names end with a bracket
    return re.compile(words), forms


def mentions(text: str, language: str, which: str = "nano") -> list[Category]:
    """The categories that a text names, in order; the longest matching name counts ('hot dog' is not a dog)."""
    pattern, forms = mention_pattern(which, language)
    return [forms[match] for match in pattern.findall(text.lower())]
