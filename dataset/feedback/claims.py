"""Answers to claims: each thing that an answer states, as a question whose answer is yes where it is true.

In:  an `Item` (a prompt, its language, the scene that it shows if that is known) and an answer to it.
Out: `Claim`s from a `Divider`: `by_rule` for sentences of the world, else by a language model; `whole` divides nothing.

This is the "divide" step of RLAIF-V (arXiv 2405.17220). Even a good model finds it hard to say whether a full description is
right, and easy to say whether there is a bus.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dataset.chat import Conversation
from dataset.judge import Failure, Judge
from dataset.world.openmoji import Category, plural, with_article
from dataset.world.phrases import PLACE_PHRASES
from dataset.world.questions import names
from dataset.world.scenes import Scene
from dataset.world.wordings import plain
from dataset.world.words import NUMBERS, PLACES, mention_pattern, mentions
from model.registry import DIVIDERS, UserError


@dataclass(frozen=True)
class Item:
    """A prompt to be answered; `scene` is its truth, where it is known."""

    prompt: Conversation
    language: str
    scene: Scene | None = None


@dataclass(frozen=True)
class Claim:
    """Something that an answer states, and the question whose answer is yes where it is true.

    objects     (a category's English name, its cell or None): what must be in the scene; () where only a model can tell
    malformed   not a correct sentence of its language: rejected by every labeler without a question
    """

    text: str
    question: str
    objects: tuple[tuple[str, int | None], ...] = ()
    malformed: bool = False


@dataclass(frozen=True)
class Divider:
    """A way to turn answers into claims.

    name         written beside the files made with it
    categories   "nano" or "all": what it knows the names of, and what the scenes to describe show
    """

    name: str
    divide: Callable[[Sequence[tuple[Item, str]]], list[list[Claim] | Failure]]
    categories: str = "nano"


# ---------------------------------------------------------------- dividing by rule

STOPS = {"en": r"[.!?]+(?=\s|$)|\n+", "zh": r"[。！？!?]+|\n+"}
FILLERS = {  # words allowed around names: with any other ("no", "behind", "blue") a sentence says more than the rule can read
    "en": {"there", "is", "are", "a", "an", "the", "at", "and", "in", "picture", "one", *NUMBERS["en"][1:],
           *" ".join(PLACES["en"]).split()},
    "zh": set("图里中有和一个" + "".join(NUMBERS["zh"][1:]) + "".join(PLACES["zh"])),
}
WHOLE = {"en": "Is this description of the picture entirely right? {}", "zh": "下面对图片的描述完全正确吗？{}"}


def sentences(text: str, language: str, which: str) -> list[str]:
    """The sentences of a text. A stop inside a name ("St. Lucia") does not end one."""
    names = [name.span() for name in re.finditer(mention_pattern(which, language)[0].pattern, text, re.IGNORECASE)]
    stops = [stop.end() for stop in re.finditer(STOPS[language], text)
             if not any(start <= stop.start() < end for start, end in names)]
    parts = [text[start:end].strip() for start, end in zip([0, *stops], [*stops, len(text)])]
    return [part for part in parts if part]


def exists_question(category: Category, language: str, cell: int | None = None) -> str:
    """"Is there a bus?", or "Is there a bus at the top left?", in the plainest words of the instruction data."""
    if cell is None:
        return plain("exists", language, names(category, language))
    return plain("exists_at", language, {**names(category, language), "at": PLACE_PHRASES[language][cell]})


def is_malformed(sentence: str, language: str, which: str) -> bool:
    """Whether a sentence mixes languages, or in English names a thing without its article: "a蚂蚁", "a ant"."""
    if language == "zh":
        return bool(mentions(sentence, "en", which))
    if re.search(r"[A-Za-z]", sentence) and re.search(r"[\u4e00-\u9fff]", sentence):
        return True
    text = sentence.lower()
    pattern, forms = mention_pattern(which, "en")
    for match in pattern.finditer(text):
        name = forms[match[0]].en
        singular = match[0] == name.lower() != plural(name).lower()
        before = re.search(r"([a-z]+) $", text[:match.start()])
        fitting = {"the", "one", with_article(name).split()[0]}
        wrong = FILLERS["en"] - fitting  # any other word may say more than the rule can read
        if singular and before and before[1] in wrong:
            return True
    return False


def claims_of_sentence(sentence: str, language: str, which: str, places: bool) -> list[Claim] | Failure:
    """One claim for each thing that a sentence names; with `places` a second one where it names one thing at one place.

    An incorrect sentence, "There is a ant.", is one malformed claim.
    """
    if is_malformed(sentence, language, which):
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
    places_named = re.findall("|".join(longest_first), rest)
    if places and len(named) == len(places_named) == 1:
        cell = PLACES[language].index(places_named[0])
        claims.append(Claim(sentence, exists_question(named[0], language, cell), ((named[0].en, cell),)))
    return claims


def claims_by_rule(answer: str, language: str, which: str, places: bool = True) -> list[Claim] | Failure:
    """One claim per sentence and named thing, counts aside. Failure where a sentence says more, which no claim would cover."""
    claims = []
    for sentence in sentences(answer, language, which):
        new = claims_of_sentence(sentence, language, which, places)
        if isinstance(new, Failure):
            return new
        claims += new
    return claims or Failure("the answer says nothing")


@DIVIDERS.register("claims")
def by_rule(judge: Judge | None, places: bool = True, categories: str = "nano") -> Divider:
    """Each thing that an answer names, with its place where the sentence has one: sentences of the world, by rule.

    places=false asks for the things alone, as CHAIR counts them.

    What the rule cannot divide goes to `judge`, if there is one; otherwise it is a failure.
    """

    def divide(answered: Sequence[tuple[Item, str]]) -> list[list[Claim] | Failure]:
        results = [claims_by_rule(answer, item.language, categories, places) for item, answer in answered]
        hard = [k for k, claims in enumerate(results) if isinstance(claims, Failure) and answered[k][1].strip()]
        if judge and hard:
            for k, claims in zip(hard, claims_by_judge(judge, [answered[k] for k in hard]), strict=True):
                results[k] = claims
        return results

    return Divider(f"rule:{categories},places={places},speech" + (f" or {judge.model}" if judge else ""), divide, categories)


@DIVIDERS.register("whole")
def whole(judge: Judge | None, categories: str = "nano") -> Divider:
    """The full answer as one claim: RLAIF-V's baseline. A model can label all of them, the truth those that the rule divides."""

    def divide(answered: Sequence[tuple[Item, str]]) -> list[list[Claim] | Failure]:
        results: list[list[Claim] | Failure] = []
        for item, answer in answered:
            parts = claims_by_rule(answer, item.language, categories)
            objects = () if isinstance(parts, Failure) else tuple(obj for part in parts for obj in part.objects)
            claim = Claim(answer, WHOLE[item.language].format(answer.strip()), objects)
            results.append([claim] if answer.strip() else Failure("the answer says nothing"))
        return results

    return Divider(f"whole:{categories}", divide, categories)


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
    """The claims of each answer: its facts, and a question for each distinct fact. If one fails, the answer stays undivided."""
    replies = ask_judge(judge, [FACTS.format(item.prompt.messages[-1].text, answer) for item, answer in answered])
    facts = [reply if isinstance(reply, Failure) else facts_of(reply) for reply in replies]
    distinct = list(dict.fromkeys(fact for part in facts if not isinstance(part, Failure) for fact in part))
    replies = ask_judge(judge, [AS_QUESTION.format(fact) for fact in distinct])
    claims = {fact: as_claim(fact, reply) for fact, reply in zip(distinct, replies, strict=True)}
    return [part if isinstance(part, Failure) else all_or_failure([claims[fact] for fact in part]) for part in facts]


def all_or_failure(claims: Sequence[Claim | Failure]) -> list[Claim] | Failure:
    """The claims, or the first failure among them."""
    failed = [claim for claim in claims if isinstance(claim, Failure)]
    return failed[0] if failed else [claim for claim in claims if isinstance(claim, Claim)]


def ask_judge(judge: Judge, texts: Sequence[str]) -> list[str | Failure]:
    """A reply to each text. UserError where several texts get no reply at all: the endpoint is down."""
    replies = judge.ask([[{"role": "user", "content": text}] for text in texts]) if texts else []
    failed = [reply for reply in replies if isinstance(reply, Failure)]
    if len(replies) > 1 and len(failed) == len(replies):
        raise UserError(f"the judge {judge.model} answered none of {len(replies)} requests: {failed[0].reason}")
    return replies


def facts_of(reply: str) -> list[str] | Failure:
    """The facts in a judge's reply: "- There is a bus.\\n- It rains." -> two facts."""
    facts = [fact.strip() for fact in re.findall(r"^\s*(?:[-*•]|\d+[.)])\s*(\S.*)$", reply, re.MULTILINE)]
    return facts or Failure(f"no fact in the reply {reply[:200]!r}")


def as_claim(fact: str, reply: str | Failure) -> Claim | Failure:
    """A fact with the question that the judge wrote for it."""
    if isinstance(reply, Failure):
        return reply
    question = reply.strip()
    if not re.fullmatch(r"[^\n]+[?？]", question):
        return Failure(f"no question in the reply {reply[:200]!r}")
    return Claim(fact, question)
