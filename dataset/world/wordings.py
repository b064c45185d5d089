"""Wordings: the many ways in which people ask the same thing, from a small grammar in English and Chinese.

In:  a kind of question, a language, what it is about, a split, a random generator.  Out: the question as somebody types it.

A wording is a phrase in a frame: "Could you tell me [where the bus is in this photo]?" The phrases of a kind are put as

    question   "where is the bus"            as it stands, or after "Hi,"
    command    "locate the bus"              after "please" or "can you"
    clause     "where the bus is"            after "tell me" or "I want to know"
    noun       "the position of the bus"     after "what is" or "give me", or alone
    keyword    "bus position"                alone

phrases.py lists them. The words that carry a request are all trained. Held out of every stage of training, by a hash, are a tenth
of the pieces around them (frames, words for the picture) and a tenth of all wordings; the benchmark `world_words` asks those.

    python -m dataset.world.wordings where          some wordings of a kind, trained and held out
"""
from __future__ import annotations

import functools
import hashlib
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dataset.world.openmoji import LANGUAGES, categories
from dataset.world.phrases import AROUND, FRAMES, PHRASES, REQUEST

SPLITS = {"test": 0.1, "val": 0.15, "train": 1.0}  # a text is in the first split whose bound is above its hash
PUT = {"question": 5, "command": 2, "clause": 2, "noun": 2, "keyword": 2}  # how often phrases are put in each way
PLAIN = 0.3  # share of the trained questions in the plainest wording
INVENTED = 0.15  # share of the trained words for the picture that are invented
INSERTED = 0.25  # share of the others with words that do not matter
SYLLABLE = (tuple("b c d f g k l m n p r s t v sk st tr sp br cl".split()), tuple("aeiou"),
            ("", "n", "r", "l", "t", "ck", "tch", "m", "sh"))  # of invented English words: beginning, vowel, end


@dataclass(frozen=True)
class Wording:
    """A question in somebody's words. `held_out` is what keeps it out of training: a piece, "the whole", or "" for nothing."""

    text: str
    held_out: str = ""


@functools.cache
def split_of(text: str) -> str:
    """The split of a piece or of a whole wording."""
    position = int.from_bytes(hashlib.sha256(f"wording {text}".encode()).digest()[:4], "big") / 2**32
    return next(split for split, bound in SPLITS.items() if position < bound)


MARKS = " ?.!,？。！，"


@functools.cache
def uncommon_frames(language: str) -> frozenset[str]:
    """The frames that can be held out: they say something, and stand only once in their list."""
    common = {frame for put in FRAMES[language].values() for frame in put if put.count(frame) > 1}
    return frozenset(frame for put in FRAMES[language].values() for frame in put
                     if frame not in common and any(around(frame)))


def around(frame: str) -> tuple[str, str]:
    """What stands before and behind the phrase of a frame, without marks."""
    before, behind = frame.split("_")
    return before, behind.strip(MARKS)


@functools.cache
def frames_by_start(language: str) -> dict[str, list[tuple[str, str, str]]]:
    """The first letter, or "" where the phrase comes first -> the uncommon frames with it, and what is around their phrase."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for frame in sorted(uncommon_frames(language)):
        found.setdefault(frame.split("_")[0][:1], []).append((frame, *around(frame)))
    return found


def splits_of(kind: str, whole: str, pieces: Sequence[str], language: str) -> dict[str, str]:
    """What a wording is made of -> the split that it belongs to: pieces, frames that it has, however it was made, "the whole"."""
    bare, by_start = whole.strip(MARKS), frames_by_start(language)
    frames = sorted(frame for start in ("", bare[:1]) for frame, before, behind in by_start.get(start, ())
                    if bare.startswith(before) and bare.endswith(behind))
    return {**{part: split_of(part) for part in (*pieces, *frames)}, "the whole": split_of(f"{kind}: {bare}")}


def expand(text: str, language: str, choose: Callable[[Sequence[str]], str], pieces: list[str]) -> str:
    """A text in which every (a|b) and every <piece> is chosen. Pieces that can be held out are added to `pieces`."""
    while choice := re.search(r"\(([^()]*)\)", text):
        text = text[:choice.start()] + choose(choice[1].split("|")) + text[choice.end():]
    while slot := re.search(r"<(\w+)>", text):
        options = REQUEST[language].get(slot[1], ()) or AROUND[language][slot[1]]
        piece = choose(options)
        if slot[1] in AROUND[language] and options.count(piece) == 1:  # what is common is always trained
            pieces.append(piece)
        text = text[:slot.start()] + piece + text[slot.end():]
    return text


def fill(text: str, language: str, names: Mapping[str, str], choose: Callable[[Sequence[str]], str]) -> str:
    """A wording with its names, and its capitals in English."""
    if language == "en":
        text = re.sub(r"\bi\b", "I", text[0].upper() + text[1:])
    written = {key: expand(name, language, choose, []) if "|" in name else name for key, name in names.items()}
    text = re.sub(r"\{(\w+)\}", lambda match: written[match[1]], text)
    return text[0].upper() + text[1:]


def plain(kind: str, language: str, names: Mapping[str, str]) -> str:
    """The plainest wording of a kind: "Where is the bus?"."""
    def first(options):
        return options[0]

    put, phrases = next(iter(PHRASES[language][kind].items()))
    whole = expand(FRAMES[language][put][0].replace("_", phrases[0]), language, first, [])
    return fill(whole, language, names, first)


def typed(text: str, language: str, rng: random.Random) -> str:
    """A text as people type: at times in lower case, without the last mark, or with a blank behind it."""
    if language == "en" and rng.random() < 0.25:
        text = text.lower()
    if rng.random() < 0.3:
        text = text.rstrip("?.？。")
    elif language == "zh" and rng.random() < 0.15:
        text = text.replace("？", "?").replace("，", ",").replace("。", ".")
    return text + " " * (rng.random() < 0.06)


def invented(language: str, rng: random.Random) -> str:
    """A word that nobody knows, "splorfen". People use words that were never trained: those around a request must not matter."""
    if language == "zh":
        made = "".join(rng.choices(unrelated_characters(), k=2))
    else:
        made = "".join(rng.choice(sounds) for _ in range(rng.randint(1, 3)) for sounds in SYLLABLE)
    return invented(language, rng) if made in AROUND[language]["noun"] else made  # "sk-e-tch" is held out


@functools.cache
def unrelated_characters() -> tuple[str, ...]:
    """The Chinese characters in the names of all emoji."""
    return tuple(sorted({character for category in categories("all") for character in category.zh if "一" <= character <= "龥"}))


@functools.cache
def strange_words(language: str) -> tuple[str, ...]:
    """Short names of what `nano` does not know: those of the other emoji, without the words that mean the picture."""
    known, longest = categories("nano"), 12 if language == "en" else 3
    names = {getattr(other, language) for other in categories("all") if other not in known and split_of(other.en) == "train"}
    return tuple(sorted(name for name in names if name.isalpha() and len(name) <= longest
                        and not any(noun in name for noun in AROUND[language]["noun"])))


def with_insertions(text: str, language: str, rng: random.Random) -> str:
    """A wording with up to three words that do not matter, before, behind or within it: "Guitar splorfen: where is {it}?".

    Random insertion, an operation of EDA (Wei and Zou, arXiv 1901.11196), shows which words carry a request. Without it a model
    learns that a strange word anywhere means that the question is about something unknown.
    """
    added = [rng.choice(strange_words(language)) if rng.random() < 0.5 else invented(language, rng)
             for _ in range(rng.randint(1, 3))]
    between = " " if language == "en" else ""
    words = re.findall(r"\S+" if language == "en" else r"\{\w+\}|.", text)
    at = rng.choice((0, len(words), rng.randint(0, len(words))))
    comma = rng.choice((",", ":", ".", "") if language == "en" else ("，", "：", "。", ""))
    if at == 0:
        added[-1] += comma
    elif at == len(words):
        mark = words[-1][-1] if words[-1][-1] in MARKS else ""
        words[-1] = words[-1].rstrip(MARKS) + comma
        added[-1] += mark
    return between.join((*words[:at], *added, *words[at:]))


def word(kind: str, language: str, names: Mapping[str, str], split: str, rng: random.Random) -> Wording:
    """A wording of a kind: of "train" a trained one, of "val" or "test" one that no stage trains.

    names   what the question is about, such as {"it": "the bus"}; it may hold choices: {"at": "(at|in) the center"}
    """
    if split == "train" and rng.random() < PLAIN:
        return Wording(plain(kind, language, names))
    phrases = PHRASES[language][kind]

    def choose(options: Sequence[str]) -> str:
        if split == "train" and options is AROUND[language]["noun"] and rng.random() < INVENTED:
            return invented(language, rng)
        return rng.choice(options)

    while True:
        put = rng.choices(tuple(phrases), [PUT[put] for put in phrases])[0]
        frame = rng.choice(FRAMES[language][put])
        pieces: list[str] = []
        whole = expand(frame.replace("_", rng.choice(phrases[put])), language, choose, pieces)
        parts = splits_of(kind, whole, pieces, language)
        strictest = next(name for name in SPLITS if name in parts.values())  # one held-out piece holds the wording out
        if strictest == split:
            held_out = next(part for part, belongs in parts.items() if belongs == split) if split != "train" else ""
            if split == "train" and rng.random() < INSERTED:
                whole = with_insertions(whole, language, rng)
            text = fill(whole, language, names, rng.choice)
            return Wording(typed(text, language, rng), held_out)


@functools.cache
def openings(language: str, split: str) -> tuple[str, ...]:
    """What may stand before a whole question, "please tell me: ", in a split. What is common is trained."""
    frames = [frame for frame in FRAMES[language]["question"] if frame[-2] == "_" and len(frame) > 2 and "<" not in frame]
    return tuple(frame[:-2] for frame in frames if (split_of(frame) if frame in uncommon_frames(language) else "train") == split)


def opened(text: str, language: str, split: str, rng: random.Random) -> str:
    """A question that has words of its own, as somebody types it: of "train" with a trained opening, else with a held-out one."""
    if split == "train" and rng.random() < PLAIN:
        return text
    return typed(rng.choice(openings(language, split)) + text, language, rng)


if __name__ == "__main__":
    names = {"it": "the bus", "its": "the bus's", "one": "a bus", "many": "buses", "name": "bus", "others": "keys",
             "other": "the key", "side": "left of", "at": "at the top left"}  # fmt: skip
    for language in LANGUAGES:
        for split in SPLITS:
            for k in range(8):
                wording = word(sys.argv[1], language, names, split, random.Random(f"{split}{k}"))
                print(f"{split:6}{wording.text:70}{wording.held_out}")
