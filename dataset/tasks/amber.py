"""AMBER (arXiv 2311.07397): hallucination without a judge, in descriptions and in 14,216 yes/no questions.

    python 4-eval_chat.py --bench amber:path=AMBER/data,images=AMBER/image

path       the folder `data` of github.com/junyangwang0410/AMBER: query/, annotations.json, relation.json, safe_words.txt
images     its pictures AMBER_1.jpg ...
query      which file of query/: query_all.json, query_generative.json, query_discriminative-existence.json, ...
spacy      en_core_web_lg: near-synonyms count as the official code counts them (pip install spacy, then
           python -m spacy download en_core_web_lg); without it only AMBER's own lists of associated words (`near_synonyms` 0)

Numbers are those of AMBER's code: chair = mentions of absent objects / mentions; cover = objects named / objects there;
hal = answers with an absent object; cog = expected hallucinations that were named / all that were expected (the paper divides
by the objects mentioned).  The yes/no questions take "no" for the positive class.  amber = (1 - chair + f1) / 2.
Not as there: nouns are the words of AMBER's vocabulary (theirs: those that NLTK tags as nouns), and f1 has no 0.0001 added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.formats.official import existing, picture, rows
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.chair import binary, share, yes_or_no
from model.registry import TASKS, UserError

SOURCE = "the folder data of github.com/junyangwang0410/AMBER"
PARTS = {  # the official type of a question -> what it counts for; the types of relations are several, and go by the rest
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
}


class Counts(NamedTuple):
    """What is counted in one description."""

    wrong: int  # mentions of absent objects
    mentions: int
    covered: int  # of the objects that are there
    there: int
    expected: int  # of the likely hallucinations, those that were named
    likely: int


IRREGULAR = {"people": "people", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
SELDOM_NOUNS = {"can", "watch", "fish", "drink", "drinks", "hot"}  # "can be seen": things right behind one of DETERMINERS alone
DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "his", "her", "its", "their", "one", "two", "three"}


def nouns(text: str, vocabulary: set[str]) -> list[str]:
    """The words of a text that AMBER knows, plurals in the singular; the official code tags parts of speech (NLTK)."""
    found, before = [], ""
    for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower()):
        forms = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word), re.sub("ves$", "fe", word),
                 re.sub("ves$", "f", word), re.sub("ves$", "ve", word), IRREGULAR.get(word, word))  # fmt: skip
        known = [form for form in forms if form in vocabulary]
        if known and (word not in SELDOM_NOUNS or before in DETERMINERS):
            found.append(known[0])
        before = word
    return found


def described(named: Sequence[str], truth: Sequence[str], likely: Sequence[str], related: Mapping[str, Sequence[str]],
              safe: set[str], similar: Callable[[str, str], bool]) -> Counts:  # fmt: skip
    """AMBER's inference.py for one description.

    named      its nouns, as often as they stand there
    truth      the objects that are there;  likely: those that models tend to invent here
    related    object -> the words that may stand for it;  safe: words that never count as wrong
    similar    whether two words are near-synonyms; asked only where no list holds the noun

    A noun stands for the first object that it fits: the related words of all objects come before the objects themselves.
    """

    def words(objects: Sequence[str]) -> list[tuple[str, int]]:
        """(word, number of the thing it stands for), in the order in which a noun is compared with them."""
        return [(word, k) for k, obj in enumerate(objects) for word in related.get(obj, ())] + [
            (obj, k) for k, obj in enumerate(objects)
        ]

    def first(fits: Callable[[str], bool], candidates: list[tuple[str, int]]) -> set[int]:
        return {next((k for word, k in candidates if fits(word)), -1)} - {-1}

    good, bad = words(truth), words(likely)
    wrong, covered, expected = 0, set(), set()
    for noun in named:
        if noun in safe:
            continue
        if exact := first(noun.__eq__, good):
            covered |= exact
            continue
        expected |= first(noun.__eq__, bad) | first(partial(similar, noun), bad)
        near = first(partial(similar, noun), good)
        covered |= near
        wrong += not near
    return Counts(wrong, len(named), len(covered), len(truth), len(expected), len(likely))


def generative(counts: Sequence[Counts]) -> dict[str, float]:
    """chair, cover, hal and cog, pooled over all descriptions."""
    wrong, mentions, covered, there, expected, likely = map(sum, zip(*counts))
    hallucinated = sum(count.wrong > 0 for count in counts)
    return {"chair": share(wrong, mentions), "cover": share(covered, there), "hal": hallucinated / len(counts),
            "cog": share(expected, likely)}  # fmt: skip


def discriminative(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """accuracy, precision, recall, f1 with "no" as the positive class, share of yes: of all, and of each part."""
    metrics = {}
    for part in ("", "existence", "attribute", "state", "number", "action", "relation"):
        chosen = [(yes_or_no(a), e.answer) for e, a in zip(examples, answers, strict=True) if not part or part in e.tags]
        if chosen:
            numbers = binary([said for said, _ in chosen], [true for _, true in chosen], positive="no")
            metrics.update({f"{part}_{name}".lstrip("_"): value for name, value in numbers.items()})
    return metrics


def near_synonyms(package: str) -> Callable[[str, str], bool]:
    """Whether two words' vectors in a spaCy package are nearer than 0.8, as the official code has it."""
    try:
        import spacy
    except ImportError as error:
        raise UserError(f"amber: spacy={package} wants the library: pip install spacy") from error
    try:
        language = spacy.load(package)
    except OSError as error:
        raise UserError(f"amber: spaCy has no {package}: python -m spacy download {package}") from error
    seen: dict[str, Any] = {}

    def similar(a: str, b: str) -> bool:
        for word in {a, b} - seen.keys():
            seen[word] = language(word)
        return seen[a].similarity(seen[b]) > 0.8

    return similar


@TASKS.register("amber")
class Amber(Task):
    """AMBER from its official files: CHAIR, Cover, Hal and Cog of descriptions, and yes/no questions."""

    size = 15_220

    def __init__(self, path: str = "", images: str = "", query: str = "query_all.json", spacy: str = ""):
        self.path, self.images, self.query = path, images, query
        self.similar = near_synonyms(spacy) if spacy else lambda a, b: False
        self.by_vectors = bool(spacy)

    def file(self, name: str) -> Path:
        folder = existing(self.path, "path", SOURCE)
        return existing(folder / name, "path", f"{name} of {SOURCE}")

    def examples(self, split: str, n: int) -> list[Example]:
        """The first n queries, found by their ids; what is there is the answer, what is likely to be invented a tag."""
        for needed in ("relation.json", "safe_words.txt"):  # missed now, and not after an hour of answers
            self.file(needed)
        notes = {row["id"]: row for row in rows(self.file("annotations.json"))}
        found = []
        for row in rows(self.file(f"query/{self.query}"))[:n]:
            note = notes.get(row["id"])
            if note is None:
                raise UserError(f"amber: no annotation for query {row['id']}; path= wants {SOURCE}, all of one version")
            shown = picture(row, [row["image"]], self.images, "the pictures of AMBER, linked in its README")
            prompt = dialogue(f"amber/{row['id']}", [shown], [(row["query"], "")])
            if note["type"] == "generative":
                found.append(Example(prompt, ", ".join(note["truth"]), "generative", (", ".join(note["hallu"]),)))
            else:
                found.append(Example(prompt, note["truth"], "discriminative", PARTS.get(note["type"], ("relation",))))
        return found

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """The numbers of descriptions, of yes/no questions, and `amber` where both were asked; near_synonyms 0 or 1.

        The score of a description is 1 without an absent object; that of a question is 1 for the right answer.
        """
        related = json.loads(self.file("relation.json").read_text(encoding="utf-8").lower())  # as nouns are: "TV"
        safe = set(self.file("safe_words.txt").read_text(encoding="utf-8").split())
        vocabulary = set(related) | {word for words in related.values() for word in words}
        counts, asked, said, scores = [], [], [], []
        for example, answer in zip(examples, answers, strict=True):
            if example.kind == "generative":
                truth, likely = ([word for word in text.split(", ") if word] for text in (example.answer, example.tags[0]))
                counts.append(described(nouns(answer, vocabulary), truth, likely, related, safe, self.similar))
                scores.append(float(counts[-1].wrong == 0))
            else:
                asked.append(example)
                said.append(answer)
                scores.append(float(yes_or_no(answer) == example.answer))
        metrics = {**(generative(counts) if counts else {}), **(discriminative(said, asked) if asked else {})}
        if counts and asked:
            metrics["amber"] = (1 - metrics["chair"] + metrics["f1"]) / 2
        return scores, {**metrics, "near_synonyms": int(self.by_vectors)}
