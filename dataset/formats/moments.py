"""Times of day and dates, in English and Chinese.

In:  "3:30 PM", "15:30", "下午3点半"; "2024-03-05", "March 5, 2024", "3月5日".  Out: numbers to compare, or None.
"""

from __future__ import annotations

import re

CLOCK = re.compile(r"([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?\s*([ap]\.?m\.?)?", re.IGNORECASE)
HOUR = re.compile(r"(1[0-2]|[1-9])\s*(?:([ap]\.?m\.?)|o'?\s?clock)", re.IGNORECASE)
CHINESE_CLOCK = re.compile(r"(上午|早上|凌晨|下午|晚上|傍晚)?\s*(\d{1,2})\s*[点时]\s*(?:(半)|(一刻)|(\d{1,2})分?|整|钟)?")
MONTHS = "january february march april may june july august september october november december".split()
NAME = rf"({'|'.join(f'{month[:3]}(?:{month[3:]})?' for month in MONTHS)})\.?"
DATES = [re.compile(pattern, re.IGNORECASE) for pattern in [
    r"(?P<y>\d{4})\s*[-/.年]\s*(?P<m>\d{1,2})\s*[-/.月]\s*(?P<d>\d{1,2})[日号]?", r"(?P<m>\d{1,2})月(?P<d>\d{1,2})[日号]?",
    rf"(?P<name>{NAME})\s+(?P<d>\d{{1,2}})(?:st|nd|rd|th)?(?:\s*,?\s*(?P<y>\d{{4}}))?",
    rf"(?P<d>\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?(?P<name>{NAME})(?:\s*,?\s*(?P<y>\d{{4}}))?"]]  # fmt: skip

Moment = tuple[int | None, ...]


def time_of_day(text: str) -> Moment | None:
    """(half of the day or None, hour, minute, second) of a time; hours above 12 tell their half."""
    half, minute, second = None, "0", "0"
    if match := CLOCK.fullmatch(text):
        hour, minute, second, half = match[1], match[2], match[3] or "0", match[4]
    elif match := HOUR.fullmatch(text):
        hour, half = match.groups()
    elif (match := CHINESE_CLOCK.fullmatch(text)) and int(match[2]) <= 24:
        hour, half = match[2], match[1] and ("am" if match[1] in ("上午", "早上", "凌晨") else "pm")
        minute = "30" if match[3] else "15" if match[4] else match[5] or "0"
    else:
        return None
    later = half.lower().startswith("p") if half else True if int(hour) > 12 else None
    return later, int(hour) % 12, int(minute), int(second)


def date(text: str) -> Moment | None:
    """(year or None, month, day) of a date whose order of numbers is certain: not 3/5/2024."""
    for pattern in DATES:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            name = (found.get("name") or "").lower()[:3]
            month = [month[:3] for month in MONTHS].index(name) + 1 if name else int(found["m"])
            return (int(found["y"]) if found["y"] else None) if "y" in found else None, month, int(found["d"])
    return None


def same_moment(gold: Moment, answer: Moment) -> bool:
    """Whether two agree in everything that both tell."""
    return all(a is None or b is None or a == b for a, b in zip(gold, answer, strict=True))
