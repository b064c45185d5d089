"""Preference pairs from a model's own answers, as in RLAIF-V (arXiv 2405.17220): sample, divide, label, pair.

In:  prompts, a model to answer them, a labeler.  Out: a list of `Preference`, and a folder of readable files, a line per prompt:

    answers.jsonl   N answers to each prompt, all from one model with the same decoding, so that they differ by chance alone
    claims.jsonl    the claims of each answer, as yes/no questions, or why it could not be divided
    labels.jsonl    question -> margin (above 0: accepted; null: failed, and why); a question is asked once about a picture
    pairs.jsonl     two answers to a prompt, the better one first, and the path of its picture (pictures/)
    pairs.parquet   the same with the pictures inside, in the columns of RLAIF-V-Dataset
    summary.json    counts of everything, and how often the labeler agrees with the truth where that is known

An interrupted run continues where it stopped and ends with the same bytes. Beside each file, NAME.made_from.json records its
sources: a run with other options, or with another file before it, is refused.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.bad_rows import BadRow, BadRows
from dataset.chat import Conversation, Preference
from dataset.feedback.claims import Claim, Divider, Item, claims_by_rule
from dataset.feedback.labels import ClaimQuestion, Labeler, untrue
from dataset.feedback.pairs import (
    Margins,
    Score,
    pair_rows,
    picture_and_question,
    score,
    words,
    write_parquet,
    write_pictures,
)
from dataset.images import Picture
from dataset.judge import Failure
from dataset.protocols import Source
from dataset.tasks import Truncated, dialogue
from dataset.tasks.world import picture
from dataset.world.openmoji import LANGUAGES
from dataset.world.questions import account
from dataset.world.scenes import sample_scene
from dataset.writing import naming, replacing
from model.registry import UserError

CHUNK = 32  # prompts between two writes, and the most that a crash can lose
PAIRS_PER_PROMPT = 2  # as RLAIF-V

SampleAnswers = Callable[[Sequence[Conversation], int], list[list[str]]]  # (prompts, N) -> N answers to each prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    model         fingerprint of the weights that answer: other weights give other answers
    group_size    N, answers per prompt (RLAIF-V: 10)
    temperature   of the sampling (RLAIF-V: 0.7)
    """

    model: str
    group_size: int
    temperature: float
    seed: int


# ---------------------------------------------------------------- steps that can be stopped


def step(file: Path, made_from: dict, total: int, work: Callable[[int, int], list[dict]]) -> list[dict]:
    """The `total` rows of a file. `work(start, stop)` makes the missing ones, a chunk at a time."""
    require_same(file, made_from)
    rows = complete_rows(file, total)
    with file.open("ab") as out, tqdm(total=total, initial=len(rows), desc=file.stem, disable=len(rows) == total) as bar:
        for start in range(len(rows), total, CHUNK):
            lines = [as_line(row) for row in work(start, min(start + CHUNK, total))]
            with naming(file):
                out.write(b"".join(lines))
                out.flush()
                os.fsync(out.fileno())
            rows += map(json.loads, lines)  # the same values that a resumed run reads
            bar.update(len(lines))
    return rows


def as_line(row: dict) -> bytes:
    """A row as a line of a jsonl file. Half a surrogate pair, which an endpoint may send, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def require_same(file: Path, made_from: dict) -> None:
    """Record the sources of a file, or compare them. UserError where an existing file was made from others."""
    note = file.with_suffix(".made_from.json")
    if not note.is_file():
        if file.is_file():
            raise UserError(f"{file} does not say what it was made from ({note.name} is missing): delete it, or write elsewhere")
        with replacing(note) as out:
            out.write(json.dumps(made_from, indent=1, ensure_ascii=False).encode())
        return
    known = json.loads(note.read_text(encoding="utf-8"))
    if other := [f"{key} {known.get(key)!r}, now {made_from.get(key)!r}" for key in {**known, **made_from}
                 if known.get(key) != made_from.get(key)]:
        raise UserError(f"{file} was made with {'; '.join(other)}: use the same options, another folder, or delete {file.name} "
                        f"and {note.name} to make it again")


def complete_rows(file: Path, total: int) -> list[dict]:
    """The rows of a file up to its last complete chunk. What a crash left after that is removed."""
    data = file.read_bytes() if file.is_file() else b""
    lines = data.split(b"\n")[:-1]  # the last line break is followed by nothing, or by an incomplete line
    if len(lines) < total:
        lines = lines[:len(lines) // CHUNK * CHUNK]  # sampling is seeded per chunk: half a chunk would get other answers
    size = sum(len(line) + 1 for line in lines)
    if size < len(data):
        os.truncate(file, size)
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}): delete it to make it again") from error


def digest(*files: Path) -> str:
    """A hash of the contents of files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def items_digest(items: Sequence[Item]) -> str:
    """A hash of the prompts, their pictures and their truth."""
    facts = [(item.prompt.id, item.language, item.scene and item.scene.key,
              [(message.role, [part.key if isinstance(part, Picture) else part for part in message.parts])
               for message in item.prompt.messages]) for item in items]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- sample, divide, label


def sample(items: Sequence[Item], answers_to: SampleAnswers, file: Path, sampling: Sampling) -> list[list[str]]:
    """`group_size` answers to each prompt. The random numbers depend on the seed and the first prompt of the chunk alone."""

    def work(start: int, stop: int) -> list[dict]:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(zlib.crc32(f"feedback/{sampling.seed}/{start}".encode()))
            answers = answers_to([item.prompt for item in items[start:stop]], sampling.group_size)
        if [len(texts) for texts in answers] != [sampling.group_size] * (stop - start):
            raise ValueError(f"{stop - start} prompts got {[len(texts) for texts in answers]} answers, "
                             f"not {sampling.group_size} each")
        return [{"id": item.prompt.id, "question": item.prompt.messages[-1].text, "answers": texts, **truncated(texts)}
                for item, texts in zip(items[start:stop], answers, strict=True)]

    rows = step(file, {"prompts": items_digest(items), **dataclasses.asdict(sampling)}, len(items), work)
    return [[Truncated(text) if k in row.get("truncated", ()) else text for k, text in enumerate(row["answers"])] for row in rows]


def truncated(texts: Sequence[str]) -> dict[str, list[int]]:
    """{"truncated": indices of the answers that the token limit ended}; {} where there are none."""
    indices = [k for k, text in enumerate(texts) if isinstance(text, Truncated)]
    return {"truncated": indices} if indices else {}


def divide(items: Sequence[Item], answers: Sequence[Sequence[str]], divider: Divider, file: Path,
           made_from: dict) -> list[list[list[Claim] | Failure]]:
    """The claims of every answer to every prompt, or why there are none.

    A truncated answer has none, because no model should learn to end there.
    """

    def work(start: int, stop: int) -> list[dict]:
        answered = [(item, text) for item, texts in zip(items[start:stop], answers[start:stop]) for text in texts]
        divided = iter(divider.divide([(item, text) for item, text in answered if not isinstance(text, Truncated)]))
        cut = Failure("--max_new_tokens ended the answer")
        return [{"id": item.prompt.id,
                 "claims": [as_json(cut if isinstance(text, Truncated) else next(divided)) for text in texts]}
                for item, texts in zip(items[start:stop], answers[start:stop])]

    rows = step(file, {**made_from, "divider": divider.name}, len(items), work)
    return [[from_json(claims) for claims in row["claims"]] for row in rows]


def as_json(claims: list[Claim] | Failure) -> list[dict] | dict:
    return dataclasses.asdict(claims) if isinstance(claims, Failure) else [dataclasses.asdict(claim) for claim in claims]


def from_json(row: list[dict] | dict) -> list[Claim] | Failure:
    if isinstance(row, dict):
        return Failure(row["reason"])
    return [Claim(claim["text"], claim["question"], tuple(map(tuple, claim["objects"])), claim["malformed"]) for claim in row]


def label(items: Sequence[Item], claims: Sequence[Sequence[list[Claim] | Failure]], labeler: Labeler, file: Path,
          made_from: dict) -> Margins:
    """The margin of every question about every picture. A question is asked only for the first prompt that raises it."""
    questions: list[list[ClaimQuestion]] = []
    seen: set[tuple] = set()
    for item, answers in zip(items, claims, strict=True):
        distinct = {claim.question: ClaimQuestion(claim, item) for part in answers if not isinstance(part, Failure)
                    for claim in part if not claim.malformed}
        questions.append([value for question, value in distinct.items() if (item.prompt.pictures, question) not in seen])
        seen.update((item.prompt.pictures, question) for question in distinct)

    def work(start: int, stop: int) -> list[dict]:
        batch = [question for row in questions[start:stop] for question in row]
        results = labeler.margins(batch) if batch else []
        failed = [margin for margin in results if isinstance(margin, Failure)]
        if batch and len(failed) == len(results):  # the endpoint is down, and there are no labels to store
            raise UserError(f"the labeler {labeler.name} answered none of {len(batch)} questions: {failed[0].reason}")
        margins = iter(results)
        return [labels(item, {question.claim.question: next(margins) for question in row})
                for item, row in zip(items[start:stop], questions[start:stop])]

    rows = step(file, {**made_from, "labeler": labeler.name}, len(items), work)
    return {(item.prompt.pictures, question): margin
            for item, row in zip(items, rows, strict=True) for question, margin in row["margins"].items()}


def labels(item: Item, margins: dict[str, float | Failure]) -> dict:
    """A line of labels.jsonl. ValueError for a margin that is not a finite number."""
    failed = {question: margin.reason for question, margin in margins.items() if isinstance(margin, Failure)}
    values = {question: None if isinstance(margin, Failure) else float(margin) for question, margin in margins.items()}
    if strange := [question for question, margin in values.items() if margin is not None and not math.isfinite(margin)]:
        raise ValueError(f"the labeler's margin of {strange[0]!r} ({item.prompt.id}) is {values[strange[0]]}: check its weights")
    return {"id": item.prompt.id, "margins": values, "failed": failed}


# ---------------------------------------------------------------- statistics


def true_score(text: str, item: Item, categories: str) -> Score | None:
    """The score of an answer by the truth, untrue names counted one by one; None where the truth cannot tell."""
    claims = claims_by_rule(text, item.language, categories)
    if item.scene is None or isinstance(claims, Failure):
        return None
    wrong = [untrue(claim, item.scene) for claim in set(claims)]
    return len(wrong) - len(claims) - sum(wrong), wrong.count(0)


@dataclass(frozen=True)
class Labelled:
    """The results of a pipeline: for each item its answers, their claims and scores; margins by question; pairs."""

    items: Sequence[Item]
    answers: Sequence[Sequence[str]]
    claims: Sequence[Sequence[list[Claim] | Failure]]
    margins: Margins
    scores: Sequence[Sequence[Score | None]]
    pairs: Sequence[dict]
    categories: str = "nano"

    def right_labels(self) -> list[bool]:
        """For every question whose answer the truth knows: whether the label is right."""
        truth = {(item.prompt.pictures, claim.question): untrue(claim, item.scene) == 0
                 for item, answers in zip(self.items, self.claims) if item.scene
                 for claims in answers if not isinstance(claims, Failure) for claim in claims if claim.objects}
        margins = {key: self.margins[key] for key in truth}
        return [(margin > 0) == truth[key] for key, margin in margins.items() if margin is not None]

    def right_pairs(self) -> list[float]:
        """For every pair that the truth can compare: 1 where its scores are in the same order, 0.5 where they are equal."""
        by_id = {item.prompt.id: (item, answers) for item, answers in zip(self.items, self.answers)}
        right = []
        for row in self.pairs:
            item, answers = by_id[row["prompt_id"]]
            better, worse = (true_score(answers[k], item, self.categories) for k in row["answers"])
            if better is not None and worse is not None:
                right.append(0.5 if better == worse else float(better > worse))
        return right

    def summary(self) -> dict:
        """Counts of everything, also of what was left out.

        questions_as_the_truth   share of the labels that are right
        pairs_as_the_truth       share of the pairs whose chosen answer is better by the truth, too. Equal scores are half right,
                                 as with a coin; pairs_alike: the number of pairs with equal scores
        Both shares are over what the truth knows, null where that is nothing. RLAIF-V gives the second as people's agreement:
        96.7 % with claims labelled one by one, 66.7 % with full answers.
        """
        results = [claims for answers in self.claims for claims in answers]
        undivided = sum(isinstance(claims, Failure) for claims in results)
        labels, pairs = self.right_labels(), self.right_pairs()
        length = {side: sum(words(row[side]) for row in self.pairs) / max(1, len(self.pairs)) for side in ("chosen", "rejected")}
        return {
            "prompts": len(self.items), "answers": len(results), "answers_undivided": undivided,
            "answers_unlabelled": sum(value is None for values in self.scores for value in values) - undivided,
            "questions": len(self.margins), "questions_failed": sum(margin is None for margin in self.margins.values()),
            "questions_rejected": sum(margin is not None and not margin > 0 for margin in self.margins.values()),
            "pairs": len(self.pairs), "prompts_with_pairs": len({row["prompt_id"] for row in self.pairs}),
            "words_chosen": round(length["chosen"], 2), "words_rejected": round(length["rejected"], 2),
            "questions_as_the_truth": round(sum(labels) / len(labels), 4) if labels else None,
            "pairs_as_the_truth": round(sum(pairs) / len(pairs), 4) if pairs else None, "pairs_alike": pairs.count(0.5),
        }


def make_preferences(items: Sequence[Item], answers_to: SampleAnswers, out: Path, divider: Divider, labeler: Labeler,
                     sampling: Sampling, print0: Callable[[str], None] = print) -> list[Preference]:
    """Pairs for DPO from a model's answers to `items`. After an interruption the same call continues.

    UserError where files of other options are in the way, or no two answers to a prompt differ in score.
    """
    if len({item.prompt.id for item in items}) < len(items):
        raise UserError("two prompts have the same id: their pairs could not be told apart")
    for item in items:
        picture_and_question(item.prompt)
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.jsonl" for name in ("answers", "claims", "labels", "pairs")}
    answers = sample(items, answers_to, files["answers"], sampling)
    claims = divide(items, answers, divider, files["claims"], {"answers.jsonl": digest(files["answers"])})
    margins = label(items, claims, labeler, files["labels"], {"claims.jsonl": digest(files["claims"])})
    scores = [[score(part, item.prompt.pictures, margins) for part in parts] for item, parts in zip(items, claims)]

    require_same(files["pairs"], {**{f"{name}.jsonl": digest(files[name]) for name in ("answers", "claims", "labels")},
                                  "seed": sampling.seed})
    rows = pair_rows(items, answers, scores, PAIRS_PER_PROMPT, sampling.seed)
    facts = Labelled(items, answers, claims, margins, scores, rows, divider.categories).summary()
    print0(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    prompts = {item.prompt.id: item.prompt for item in items}
    if not files["pairs"].is_file():  # written last, so where it exists, the others do
        with replacing(out / "summary.json") as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
        write_pictures(rows, prompts, out)
        write_parquet(rows, out, out / "pairs.parquet")
        with replacing(files["pairs"]) as file:
            file.write(b"".join(map(as_line, rows)))
    if not rows:
        raise UserError(f"no pair: no two answers to a prompt differ in score (see {out / 'summary.json'}): sample more answers "
                        f"per prompt, at a higher temperature, or for more prompts, into another folder")
    return [Preference(row["id"], prompts[row["prompt_id"]], row["chosen"], row["rejected"]) for row in rows]


# ---------------------------------------------------------------- prompts


def world_items(scenes: int, seed: int, categories: str = "nano") -> list[Item]:
    """Requests for detailed descriptions of train scenes, alternately in English and Chinese. Two seeds share no scene."""
    items = []
    for k in range(scenes):
        index, language = seed * scenes + k, LANGUAGES[k % 2]
        scene = sample_scene("train", index, categories)
        request = account("description", scene, language).worded("train", random.Random(f"feedback/{index}")).text
        items.append(Item(dialogue(f"world/feedback/{index}", [picture(scene)], [(request, "")]), language, scene))
    return items


def own_items(source: Source, count: int, seed: int, bad_rows: BadRows) -> list[Item]:
    """`count` rows of the user's data, a picture and a question each; the next seed takes the next rows. Answers are dropped.

    They have no known truth. The language is Chinese where the question has a Chinese character. Any other row, or one whose
    picture does not open, is a bad row.
    """
    items = []
    for k in range(min(count, len(source))):
        bad_rows.seen += 1
        try:
            row = source[(seed * count + k) % len(source)]
            prompt = dataclasses.replace(row, messages=row.messages[:1], answer=None)
            image, question = picture_and_question(prompt)
            image.load()
        except BadRow as bad:
            bad_rows.add(bad)
        except ValueError as error:
            bad_rows.add(BadRow(str(error), "write one picture and one question", row.id))
        else:
            items.append(Item(prompt, "zh" if re.search("[\u4e00-\u9fff]", question) else "en"))
    return items
