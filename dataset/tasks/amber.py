"""AMBER (arXiv 2311.07397): hallucination without a judge, in descriptions and in 14,216 yes/no questions.

    python 4-eval_chat.py --bench amber:path=AMBER/data,images=AMBER/image

path       the folder `data` of github.com/junyangwang0410/AMBER: query/, annotations.json, relation.json, safe_words.txt
images     its pictures AMBER_1.jpg ...
query      a file of query/: query_all.json, query_generative.json, query_discriminative-existence.json, ...
spacy      en_core_web_lg: near-synonyms count as in the official code (pip install spacy, then
           python -m spacy download en_core_web_lg); default: only AMBER's lists of associated words count (`near_synonyms` 0)

Metrics follow AMBER's code: chair = mentions of absent objects / mentions; cover = objects named / objects present;
hal = share of answers with an absent object; cog = likely hallucinations named / all likely ones (the paper divides by the
objects mentioned).  Yes/no questions: "no" is the positive class.  amber = (1 - chair + f1) / 2.
Two differences: nouns are the words of AMBER's vocabulary (there: those that NLTK tags as nouns), and f1 has no 0.0001 added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.formats.official import checked, existing, picture, rows
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.chair import binary, share, yes_or_no
from model.registry import TASKS, UserError

SOURCE = "the folder data of github.com/junyangwang0410/AMBER"
PARTS = {  # official type of a question -> its groups; every other type is a relation
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
}


class Counts(NamedTuple):
    """The counts of one description."""

    wrong: int  # mentions of absent objects
    mentions: int
    covered: int  # objects present and named
    present: int
    expected: int  # likely hallucinations that were named
    likely: int


IRREGULAR = {"people": "people", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
SELDOM_NOUNS = {"can", "watch", "fish", "drink", "drinks", "hot"}  # "can be seen": nouns only right after one of DETERMINERS
DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "some", "his", "her", "its", "their", "one", "two", "three"}


def nouns(text: str, vocabulary: set[str]) -> list[str]:
    """The words of a text that are in the vocabulary, in the singular; the official code tags parts of speech (NLTK)."""
    result, previous = [], ""
    for word in re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower()):
        forms = (word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word), re.sub("ves$", "fe", word),
                 re.sub("ves$", "f", word), re.sub("ves$", "ve", word), IRREGULAR.get(word, word))  # fmt: skip
        matches = [form for form in forms if form in vocabulary]
        if matches and (word not in SELDOM_NOUNS or previous in DETERMINERS):
            result.append(matches[0])
        previous = word
    return result


def described(named: Sequence[str], truth: Sequence[str], likely: Sequence[str], related: Mapping[str, Sequence[str]],
              safe: set[str], similar: Callable[[str, str], bool]) -> Counts:  # fmt: skip
    """The counts of one description, as AMBER's inference.py takes them.

    named      the nouns of the description, with repetitions
    truth      the objects present;  likely: objects that models tend to invent in this picture
    related    object -> words that may stand for it;  safe: words that never count as wrong
    similar    whether two words are near-synonyms; called only for a noun that no list holds

    A noun stands for the first object that it matches; the related words of all objects are compared before the objects.
    """

    def words(objects: Sequence[str]) -> list[tuple[str, int]]:
        """(word, index of the object it stands for), in the order of comparison."""
        return [(word, k) for k, obj in enumerate(objects) for word in related.get(obj, ())] + [
            (obj, k) for k, obj in enumerate(objects)
        ]

    def first(fits: Callable[[str], bool], candidates: list[tuple[str, int]]) -> set[int]:
        return {next((k for word, k in candidates if fits(word)), -1)} - {-1}

    true_words, likely_words = words(truth), words(likely)
    wrong, covered, expected = 0, set(), set()
    for noun in named:
        if noun in safe:
            continue
        if exact := first(noun.__eq__, true_words):
            covered |= exact
            continue
        expected |= first(noun.__eq__, likely_words) | first(partial(similar, noun), likely_words)
        near = first(partial(similar, noun), true_words)
        covered |= near
        wrong += not near
    return Counts(wrong, len(named), len(covered), len(truth), len(expected), len(likely))


def generative(counts: Sequence[Counts]) -> dict[str, float]:
    """chair, cover, hal and cog, pooled over all descriptions."""
    wrong, mentions, covered, present, expected, likely = map(sum, zip(*counts))
    hallucinated = sum(count.wrong > 0 for count in counts)
    return {"chair": share(wrong, mentions), "cover": share(covered, present), "hal": hallucinated / len(counts),
            "cog": share(expected, likely)}  # fmt: skip


def discriminative(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """accuracy, precision, recall, f1 and the share of yes, of all questions and of each group; "no" is the positive class."""
    metrics = {}
    for part in ("", "existence", "attribute", "state", "number", "action", "relation"):
        pairs = [(yes_or_no(a), e.answer) for e, a in zip(examples, answers, strict=True) if not part or part in e.tags]
        if pairs:
            values = binary([answer for answer, _ in pairs], [truth for _, truth in pairs], positive="no")
            metrics.update({f"{part}_{name}".lstrip("_"): value for name, value in values.items()})
    return metrics


def near_synonyms(package: str) -> Callable[[str, str], bool]:
    """A function: whether the cosine of two words' spaCy vectors is above 0.8, as in the official code."""
    try:
        import spacy
    except ImportError as error:
        raise UserError(f"amber: spacy={package} needs the library: pip install spacy") from error
    try:
        language = spacy.load(package)
    except OSError as error:
        raise UserError(f"amber: spaCy has no {package}: python -m spacy download {package}") from error
    parsed: dict[str, Any] = {}

    def similar(a: str, b: str) -> bool:
        for word in {a, b} - parsed.keys():
            parsed[word] = language(word)
        return parsed[a].similarity(parsed[b]) > 0.8

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
        """The first n queries; the answer lists the objects present, a tag the likely hallucinations."""
        for name in ("relation.json", "safe_words.txt"):  # fails now, and not after an hour of answers
            self.file(name)
        noted, asked = self.file("annotations.json"), self.file(f"query/{self.query}")
        annotations = checked(rows(noted), {"id": int, "type": str, "truth": (str, [str])}, noted, SOURCE)
        notes = {row["id"]: row for row in annotations}
        examples = []
        for row in checked(rows(asked), {"id": int, "image": str, "query": str}, asked, SOURCE)[:n]:
            note = notes.get(row["id"])
            if note is None:
                raise UserError(f"amber: no annotation for query {row['id']}; path= needs {SOURCE}, all files of one version")
            image = picture(row, [row["image"]], self.images, "the pictures of AMBER, linked in its README")
            prompt = dialogue(f"amber/{row['id']}", [image], [(row["query"], "")])
            if note["type"] == "generative":
                examples.append(Example(prompt, ", ".join(note["truth"]), "generative", (", ".join(note["hallu"]),)))
            else:
                examples.append(Example(prompt, note["truth"], "discriminative", PARTS.get(note["type"], ("relation",))))
        return examples

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """The metrics of descriptions, of yes/no questions, and `amber` where there are both; near_synonyms 0 or 1.

        A description scores 1 if it names no absent object, a yes/no question 1 for the right answer.
        """
        related = json.loads(self.file("relation.json").read_text(encoding="utf-8").lower())  # "TV": nouns are in lower case
        safe = set(self.file("safe_words.txt").read_text(encoding="utf-8").split())
        vocabulary = set(related) | {word for words in related.values() for word in words}
        counts, yes_no, yes_no_answers, scores = [], [], [], []
        for example, answer in zip(examples, answers, strict=True):
            if example.kind == "generative":
                truth, likely = ([word for word in text.split(", ") if word] for text in (example.answer, example.tags[0]))
                counts.append(described(nouns(answer, vocabulary), truth, likely, related, safe, self.similar))
                scores.append(float(counts[-1].wrong == 0))
            else:
                yes_no.append(example)
                yes_no_answers.append(answer)
                scores.append(float(yes_or_no(answer) == example.answer))
        metrics = {**(generative(counts) if counts else {}), **(discriminative(yes_no_answers, yes_no) if yes_no else {})}
        if counts and yes_no:
            metrics["amber"] = (1 - metrics["chair"] + metrics["f1"]) / 2
        return scores, {**metrics, "near_synonyms": int(self.by_vectors)}
