"""The accuracy of VQA (arXiv 1505.00468) to the official digit: an answer against those of ten people.

In:  an answer and the ten.  Out: its accuracy in 0..1; 0, 1, 2, 3 or more people who agree with it give 0, 0.3, 0.6, 0.9, 1.

Two evaluations are in use. VQAv2's normalises answers only where the ten are not all equal; TextVQA's (m4c) normalises always,
and treats "," "?" and "'s" before. Both have oddities that count: only the first 32 full stops of an answer go, and "'" and
":" stay. Neither is mended here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from model.registry import UserError

SHORT = "\nAnswer the question using a single word or phrase."  # what LLaVA adds to questions with a short answer
LETTER = "\nAnswer with the option's letter from the given choices directly."  # and to those with options

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COUNTED = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(COUNTED)}}
ARTICLES = {"a", "an", "the"}
# Words as the official list has them in lower case: each is also recognised with one of its apostrophes left out.
CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll
they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
you're you've""".split()
CONTRACTIONS = {word[:k] + word[k + 1 :]: word for word in CONTRACTED for k, letter in enumerate(word) if letter == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the other way round in the official list


def without_punctuation(text: str, number: str) -> str:
    """A text without punctuation. `number`: a pattern of digits around a comma, which lets every sign go without a blank."""
    comma = re.search(number, text) is not None
    result = text
    for sign in PUNCTUATION:
        result = result.replace(sign, "" if comma or f"{sign} " in text or f" {sign}" in text else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def plain_words(text: str) -> str:
    """A text in lower case, without articles, with digits for number words and apostrophes in contractions."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(1 << 18)
def vqa_normal(text: str) -> str:
    """An answer as VQAv2's evaluation compares it, where people disagree."""
    return plain_words(without_punctuation(one_line(text), r"\d,\d"))


@functools.lru_cache(1 << 18)
def m4c_normal(text: str) -> str:
    """An answer as TextVQA's evaluation compares it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(without_punctuation(one_line(text), r"(?<=\d),+(?=\d)"))


def require_ten(rows: Iterable[dict], file: Path, source: str) -> None:
    """UserError for a question without exactly ten answers: its accuracy would be another measure."""
    for row in rows:
        if (count := len(row["answers"])) != 10:
            raise UserError(f"{file}: question {row['question_id']} has {count} answers, not ten: it is not {source}")


def leave_one_out(answer: str, people: Sequence[str]) -> float:
    """The mean over all people of min(1, others who gave the same answer / 3), texts compared as they are."""
    agree = people.count(answer)
    return sum(min(1.0, (agree - (person == answer)) / 3) for person in people) / len(people)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The accuracy of one answer in VQAv2."""
    answer, people = one_line(answer), [one_line(person) for person in people]
    if len(set(people)) > 1:
        answer, people = vqa_normal(answer), [vqa_normal(person) for person in people]
    return leave_one_out(answer, people)


def m4c_accuracy(answer: str, people: Sequence[str]) -> float:
    """The accuracy of one answer in TextVQA."""
    return leave_one_out(m4c_normal(answer), [m4c_normal(person) for person in people])


def answer_habits(answers: Sequence[str], yes_no: Sequence[bool]) -> dict[str, float]:
    """What an accuracy hides, of answers as they are compared: `empty` of all; of those to yes/no questions the share of `yes`,
    and `unparsed`, which are neither yes nor no.
    """
    binary = [answer for answer, asked in zip(answers, yes_no, strict=True) if asked]
    habits = {"empty": sum(not answer for answer in answers) / len(answers)}
    if binary:
        habits["yes"] = binary.count("yes") / len(binary)
        habits["unparsed"] = sum(answer not in ("yes", "no") for answer in binary) / len(binary)
    return habits
