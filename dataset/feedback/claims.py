"""Answers to claims: each thing that an answer says, as a question whose answer is yes where it is true.

In:  an `Item` (a prompt, its language, the scene it shows if that is known) and an answer to it.
Out: `Claim`s from a `Divider`: `by_rule` for the world's sentences, others with a language model; `whole` divides nothing.

The "divide" of RLAIF-V (arXiv 2405.17220): whether a whole description is right is a hard question even for a good model;
whether there is a bus is an easy one.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation
from dataset.judge import Failure, Judge
from dataset.world.openmoji import Category, plural, with_article
from dataset.world.scenes import Scene
from dataset.world.words import NUMBERS, PLACES, mention_pattern, mentions
from model.registry import DIVIDERS, UserError


@dataclass(frozen=True)
class Item:
    """A prompt to be answered; `scene` is its truth, where that is known."""

    prompt: Conversation
    language: str
    scene: Scene | None = None


@dataclass(frozen=True)
class Claim:
    """Something that an answer says, and the question whose answer is yes where it is true.

    objects     (a category's English name, its cell or None): what must be in the scene; () where only a model can tell
    malformed   it is no sentence of its language: rejected whoever labels, and nobody is asked
    """

    text: str
    question: str
    objects: tuple[tuple[str, int | None], ...] = ()
    malformed: bool = False


@dataclass(frozen=True)
class Divider:
    """How answers become claims; `name` is written beside the files made with it."""

    name: str
    divide: Callable[[Sequence[tuple[Item, str]]], list[list[Claim] | Failure]]


# ---------------------------------------------------------------- dividing by rule

STOPS = {"en": r"[.!?]+(?=\s|$)|\n+", "zh": r"[。！？!?]+|\n+"}
FILLERS = {  # what may stand around names: with another word ("no", "behind", "blue") a sentence says more than the rule sees
    "en": {"there", "is", "are", "a", "an", "the", "at", "and", "in", "picture", "one", *NUMBERS["en"][1:],
           *" ".join(PLACES["en"]).split()},
    "zh": set("图里中有和一个" + "".join(NUMBERS["zh"][1:]) + "".join(PLACES["zh"])),
}
WHOLE = {"en": "Is this description of the picture entirely right? {}", "zh": "下面对图片的描述完全正确吗？{}"}


def sentences(text: str, language: str, which: str) -> list[str]:
    """The sentences of a text; the stop inside a name ("St. Lucia") ends none."""
    names = [name.span() for name in re.finditer(mention_pattern(which, language)[0].pattern, text, re.IGNORECASE)]
    stops = [stop.end() for stop in re.finditer(STOPS[language], text)
             if not any(start <= stop.start() < end for start, end in names)]
    parts = [text[start:end].strip() for start, end in zip([0, *stops], [*stops, len(text)])]
    return [part for part in parts if part]


def exists_question(category: Category, language: str, cell: int | None = None) -> str:
    """"Is there a bus?" as the instructions ask it, or "Is there a bus at the top left?"."""
    if language == "zh":
        return f"{'' if cell is None else PLACES['zh'][cell]}有{category.zh}吗？"
    return f"Is there {with_article(category.en)}{'' if cell is None else ' at the ' + PLACES['en'][cell]}?"


def misspoken(sentence: str, language: str, which: str) -> bool:
    """Whether a sentence goes on in the other language, or in English names a thing without its article: "a蚂蚁", "a ant"."""
    if language == "zh":
        return bool(mentions(sentence, "en", which))
    if re.search(r"[A-Za-z]", sentence) and re.search(r"[\u4e00-\u9fff]", sentence):
        return True
    text = sentence.lower()
    pattern, forms = mention_pattern(which, "en")
    for found in pattern.finditer(text):
        name = forms[found[0]].en
        singular = found[0] == name.lower() != plural(name).lower()
        before = re.search(r"([a-z]+) $", text[:found.start()])
        fitting = {"the", "one", with_article(name).split()[0]}
        wrong = FILLERS["en"] - fitting  # another word may say more than the rule sees
        if singular and before and before[1] in wrong:
            return True
    return False


def claims_of_sentence(sentence: str, language: str, which: str, places: bool) -> list[Claim] | Failure:
    """One claim for each thing that a sentence names, and with `places` one more where it names one thing at one place.

    A sentence that is none, "There is a ant.", is one malformed claim.
    """
    if misspoken(sentence, language, which):
        return [Claim(sentence, "", malformed=True)]
    named = [category for category in dict.fromkeys(mentions(sentence, language, which))
             if category.name(language) not in FILLERS[language]]  # "有" (there is) is the name of a button too
    if not named:
        return Failure(f"the rule knows nothing that is named in {sentence!r}")
    rest = mention_pattern(which, language)[0].sub(" ", sentence.lower())
    words = re.findall(r"[^\W_]+", rest) if language == "en" else re.findall(r"[^\W_]", rest)
    if unknown := [word for word in words if word not in FILLERS[language]]:
        return Failure(f"the rule does not know {unknown[0]!r} in {sentence!r}")
    claims = [Claim(sentence, exists_question(category, language), ((category.en, None),)) for category in named]
    longest_first = sorted(PLACES[language], key=len, reverse=True)
    found = re.findall("|".join(longest_first), rest)
    if places and len(named) == len(found) == 1:
        cell = PLACES[language].index(found[0])
        claims.append(Claim(sentence, exists_question(named[0], language, cell), ((named[0].en, cell),)))
    return claims


def claims_by_rule(answer: str, language: str, which: str, places: bool = False) -> list[Claim] | Failure:
    """The claims of a description or caption of the world: one for each named thing and sentence. How many there are of a
    thing is not claimed. Failed where a sentence says anything else: its claims would not be all that it says."""
    claims = []
    for sentence in sentences(answer, language, which):
        found = claims_of_sentence(sentence, language, which, places)
        if isinstance(found, Failure):
            return found
        claims += found
    return claims or Failure("the answer says nothing")


@DIVIDERS.register("claims")
def by_rule(judge: Judge | None, places: bool = False, categories: str = "nano") -> Divider:
    """Each object that an answer names, and with places=true where it says the object is: the world's sentences by rule.

    What the rule cannot divide goes to `judge`, if there is one; else it is a failure.
    """

    def divide(answered: Sequence[tuple[Item, str]]) -> list[list[Claim] | Failure]:
        found = [claims_by_rule(answer, item.language, categories, places) for item, answer in answered]
        hard = [k for k, claims in enumerate(found) if isinstance(claims, Failure) and answered[k][1].strip()]
        if judge and hard:
            for k, claims in zip(hard, claims_by_judge(judge, [answered[k] for k in hard]), strict=True):
                found[k] = claims
        return found

    return Divider(f"rule:{categories},places={places},speech" + (f" or {judge.model}" if judge else ""), divide)


@DIVIDERS.register("whole")
def whole(judge: Judge | None, categories: str = "nano") -> Divider:
    """The whole answer as one claim: what RLAIF-V compares with. A model can label any, the truth those that the rule divides."""

    def divide(answered: Sequence[tuple[Item, str]]) -> list[list[Claim] | Failure]:
        found = []
        for item, answer in answered:
            parts = claims_by_rule(answer, item.language, categories)
            objects = () if isinstance(parts, Failure) else tuple(obj for part in parts for obj in part.objects)
            claim = Claim(answer, WHOLE[item.language].format(answer.strip()), objects)
            found.append([claim] if answer.strip() else Failure("the answer says nothing"))
        return found

    return Divider(f"whole:{categories}", divide)


# ---------------------------------------------------------------- dividing by a language model

FACTS = """Below are a question about a picture and an answer to it. List the facts that the answer states about the picture, \
each on a line of its own that begins with "- ". A fact is one short sentence, in the language of the answer, that states one \
thing only and is understood alone: no "it", no "they". Leave out opinions and guesses. Where the answer states no fact, write \
NONE.

Question: {}
Answer: {}"""
AS_QUESTION = """Turn this statement about a picture into a question to which "yes" means that the statement is true. Keep its \
language. Write the question alone.

Statement: {}"""


def claims_by_judge(judge: Judge, answered: Sequence[tuple[Item, str]]) -> list[list[Claim] | Failure]:
    """Facts of each answer, then a question of each different fact; one that fails leaves its whole answer undivided."""
    replies = ask_judge(judge, [FACTS.format(item.prompt.messages[-1].text, answer) for item, answer in answered])
    facts = [reply if isinstance(reply, Failure) else facts_of(reply) for reply in replies]
    different = list(dict.fromkeys(fact for found in facts if not isinstance(found, Failure) for fact in found))
    replies = ask_judge(judge, [AS_QUESTION.format(fact) for fact in different])
    claims = {fact: as_claim(fact, reply) for fact, reply in zip(different, replies, strict=True)}
    return [found if isinstance(found, Failure) else all_or_failure([claims[fact] for fact in found]) for found in facts]


def all_or_failure(claims: Sequence[Claim | Failure]) -> list[Claim] | Failure:
    """The claims, or the first of them that could not be made."""
    failed = [claim for claim in claims if isinstance(claim, Failure)]
    return failed[0] if failed else [claim for claim in claims if isinstance(claim, Claim)]


def ask_judge(judge: Judge, texts: Sequence[str]) -> list[str | Failure]:
    """A reply to each text. UserError where several get none at all: an endpoint that is down, and no claims to keep."""
    replies = judge.ask([[{"role": "user", "content": text}] for text in texts]) if texts else []
    failed = [reply for reply in replies if isinstance(reply, Failure)]
    if len(replies) > 1 and len(failed) == len(replies):
        raise UserError(f"the judge {judge.model} answered none of {len(replies)} requests: {failed[0].reason}")
    return replies


def facts_of(reply: str) -> list[str] | Failure:
    """"- There is a bus.\\n- It rains." -> the two."""
    facts = [fact.strip() for fact in re.findall(r"^\s*(?:[-*•]|\d+[.)])\s*(\S.*)$", reply, re.MULTILINE)]
    return facts or Failure(f"no fact in the reply {reply[:200]!r}")


def as_claim(fact: str, reply: str | Failure) -> Claim | Failure:
    """A fact with the question that a judge made of it."""
    if isinstance(reply, Failure):
        return reply
    question = reply.strip()
    if not re.fullmatch(r"[^\n]+[?？]", question):
        return Failure(f"no question in the reply {reply[:200]!r}")
    return Claim(fact, question)
