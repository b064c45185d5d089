"""Preference pairs from a model's own answers, as RLAIF-V makes them (arXiv 2405.17220): sample, divide, label, pair.

In:  prompts, a model to answer them, a labeler.  Out: a list of `Preference`, and a folder of readable files, a line a prompt:

    answers.jsonl   N answers to each prompt, same model, same decoding: what differs between them is chance alone
    claims.jsonl    what each answer says, as yes/no questions; why an answer could not be divided
    labels.jsonl    question -> margin (above 0: accepted; null: failed, and why); each asked once about a picture
    pairs.jsonl     two answers to a prompt, the better one first, and where its picture is (pictures/)
    pairs.parquet   the same with the pictures inside, in the columns of RLAIF-V-Dataset
    summary.json    how many of everything, and how often the labeler agrees with the truth where that is known

A run that was stopped goes on where it was and ends with the same bytes. Beside each file, NAME.made_from.json says what it was
made from: with other options, or another file before it, going on is refused.
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
from pathlib import Path

import torch
from tqdm import tqdm

from dataset.feedback.claims import Claim, Divider, Failed, Item, by_rule, claims_by_rule, whole
from dataset.feedback.labels import TRUTH, Asked, Labeler, by_judge, untrue
from dataset.feedback.pairs import Margins, balanced, pair_rows, picture_and_question, score, words, write_parquet, write_pictures
from dataset.formats.conversations import BadRows
from dataset.images import BadRow, Picture
from dataset.judge import judge_from
from dataset.preferences import Preference
from dataset.tasks import Cut, dialogue
from dataset.tasks.world import picture
from dataset.vision.feature_cache import replacing
from dataset.world.openmoji import LANGUAGES
from dataset.world.questions import ASK_DESCRIPTION
from dataset.world.scenes import sample_scene

Ask = Callable[..., list[list[str]]]  # ask(prompts, answers=N, temperature=T): N texts for each prompt

# ---------------------------------------------------------------- steps that can be stopped


def step(file: Path, made_from: dict, total: int, chunk: int, work: Callable[[int, int], list[dict]]) -> list[dict]:
    """The `total` rows of a file; `work(start, stop)` makes those that are not there yet, `chunk` at a time."""
    require_same(file, made_from)
    rows = whole_rows(file, total, chunk)
    with file.open("ab") as out, tqdm(total=total, initial=len(rows), desc=file.stem, disable=len(rows) == total) as bar:
        for start in range(len(rows), total, chunk):
            lines = [as_line(row) for row in work(start, min(start + chunk, total))]
            out.write(b"".join(lines))
            out.flush()
            os.fsync(out.fileno())
            rows += map(json.loads, lines)  # as a later run would read them
            bar.update(len(lines))
    return rows


def as_line(row: dict) -> bytes:
    """A row of a jsonl file; half a character, which an endpoint may send, becomes a question mark."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def require_same(file: Path, made_from: dict) -> None:
    """Write down what a file is made from, or compare; ValueError where an existing file was made from something else."""
    note = file.with_suffix(".made_from.json")
    if not note.is_file():
        if file.is_file():
            raise ValueError(f"{file} does not say what it was made from ({note.name} is missing): delete it, or write elsewhere")
        with replacing(note) as out:
            out.write(json.dumps(made_from, indent=1, ensure_ascii=False).encode())
        return
    known = json.loads(note.read_text(encoding="utf-8"))
    if other := [f"{key} {known.get(key)!r}, now {made_from.get(key)!r}" for key in {**known, **made_from}
                 if known.get(key) != made_from.get(key)]:
        raise ValueError(f"{file} was made with {'; '.join(other)}: use the same options, another folder, or delete {file.name} "
                         f"and {note.name} to make it again")


def whole_rows(file: Path, total: int, chunk: int) -> list[dict]:
    """The rows of a file up to its last whole chunk; what a crash left after that is cut off."""
    data = file.read_bytes() if file.is_file() else b""
    lines = data.split(b"\n")[:-1]  # after the last line break stands nothing, or half a line
    if len(lines) < total:
        lines = lines[:len(lines) // chunk * chunk]  # answers are sampled by the chunk: a half would be drawn otherwise
    size = sum(len(line) + 1 for line in lines)
    if size < len(data):
        os.truncate(file, size)
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it to make it again") from error


def digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def items_digest(items: Sequence[Item]) -> str:
    """Names the prompts, their pictures and their truth."""
    facts = [(item.prompt.id, item.language, item.scene and item.scene.key,
              [(message.role, [part.key if isinstance(part, Picture) else part for part in message.parts])
               for message in item.prompt.messages]) for item in items]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- sample, divide, label


def sample(items: Sequence[Item], ask: Ask, file: Path, made_from: dict, chunk: int) -> list[dict]:
    """Answers to each prompt. Random numbers are those of (seed, first prompt of the chunk), whatever was drawn before."""
    answers, temperature = made_from["answers"], made_from["temperature"]

    def work(start: int, stop: int) -> list[dict]:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(zlib.crc32(f"feedback/{made_from['seed']}/{start}".encode()))
            said = ask([item.prompt for item in items[start:stop]], answers=answers, temperature=temperature)
        if [len(texts) for texts in said] != [answers] * (stop - start):
            raise ValueError(f"{stop - start} prompts got {[len(texts) for texts in said]} answers, not {answers} each")
        return [{"id": item.prompt.id, "question": item.prompt.messages[-1].text, "answers": texts, **cuts(texts)}
                for item, texts in zip(items[start:stop], said, strict=True)]

    return step(file, {"prompts": items_digest(items), **made_from, "chunk": chunk}, len(items), chunk, work)


def cuts(texts: Sequence[str]) -> dict[str, list[int]]:
    """Which answers did not end by themselves; nothing where all did."""
    cut = [k for k, text in enumerate(texts) if isinstance(text, Cut)]
    return {"cut": cut} if cut else {}


def divide(items: Sequence[Item], answers: Sequence[Sequence[str]], divider: Divider, file: Path, made_from: dict,
           chunk: int) -> list[list[list[Claim] | Failed]]:
    """The claims of every answer of every prompt, or why there are none. A cut one has none: nobody should learn to end there."""

    def work(start: int, stop: int) -> list[dict]:
        asked = [(item, text) for item, texts in zip(items[start:stop], answers[start:stop]) for text in texts]
        found = iter(divider.divide([(item, text) for item, text in asked if not isinstance(text, Cut)]))
        cut = Failed("--max_new_tokens ended the answer")
        return [{"id": item.prompt.id, "claims": [as_json(cut if isinstance(text, Cut) else next(found)) for text in texts]}
                for item, texts in zip(items[start:stop], answers[start:stop])]

    rows = step(file, {**made_from, "divider": divider.name}, len(items), chunk, work)
    return [[from_json(claims) for claims in row["claims"]] for row in rows]


def as_json(claims: list[Claim] | Failed) -> list[dict] | dict:
    return dataclasses.asdict(claims) if isinstance(claims, Failed) else [dataclasses.asdict(claim) for claim in claims]


def from_json(row: list[dict] | dict) -> list[Claim] | Failed:
    if isinstance(row, dict):
        return Failed(row["reason"])
    return [Claim(claim["text"], claim["question"], tuple(map(tuple, claim["objects"])), claim["malformed"]) for claim in row]


def label(items: Sequence[Item], claims: Sequence[Sequence[list[Claim] | Failed]], labeler: Labeler, file: Path, made_from: dict,
          chunk: int) -> Margins:
    """The margin of every question about every picture; each is asked with the first prompt that raises it, and only there."""
    asked: list[list[Asked]] = []
    seen: set[tuple] = set()
    for item, answers in zip(items, claims, strict=True):
        different = {claim.question: Asked(claim, item) for found in answers if not isinstance(found, Failed)
                     for claim in found if not claim.malformed}
        asked.append([one for question, one in different.items() if (item.prompt.pictures, question) not in seen])
        seen.update((item.prompt.pictures, question) for question in different)

    def work(start: int, stop: int) -> list[dict]:
        wanted = [one for row in asked[start:stop] for one in row]
        found = labeler.margins(wanted) if wanted else []
        if wanted and all(isinstance(margin, Failed) for margin in found):  # an endpoint that is down, and no labels to keep
            raise ValueError(f"the labeler {labeler.name} answered none of {len(wanted)} questions: {found[0].reason}")
        margins = iter(found)
        return [labels(item, {one.claim.question: next(margins) for one in row})
                for item, row in zip(items[start:stop], asked[start:stop])]

    rows = step(file, {**made_from, "labeler": labeler.name}, len(items), chunk, work)
    return {(item.prompt.pictures, question): margin
            for item, row in zip(items, rows, strict=True) for question, margin in row["margins"].items()}


def labels(item: Item, margins: dict[str, float | Failed]) -> dict:
    """A line of labels.jsonl."""
    failed = {question: margin.reason for question, margin in margins.items() if isinstance(margin, Failed)}
    kept = {question: None if question in failed else float(margin) for question, margin in margins.items()}
    if strange := [question for question, margin in kept.items() if margin is not None and not math.isfinite(margin)]:
        raise ValueError(f"the labeler's margin of {strange[0]!r} ({item.prompt.id}) is {kept[strange[0]]}: look at its weights")
    return {"id": item.prompt.id, "margins": kept, "failed": failed}


# ---------------------------------------------------------------- all of it


def divider_and_labeler(divider: str, labeler: str, judge: str, which: str = "nano") -> tuple[Divider, Labeler | None]:
    """What the words of the command line name; None for a labeler that is a model, to be loaded by who can.

    divider   claims: each thing that an answer says, by rule, and by the judge where there is one and no rule | whole: all of it
    labeler   truth | judge | self: the model that answered | the folder of another checkpoint
    judge     "" or `URL,model=NAME`, see `judge_from`
    Raises ValueError for other words, and for those that do not go together.
    """
    if divider not in ("claims", "whole"):
        raise ValueError(f"--divider is claims or whole, not {divider!r}")
    if labeler not in ("truth", "self", "judge") and not (Path(labeler) / "config.json").is_file():
        raise ValueError(f"--labeler is truth, self, judge or the folder of a checkpoint, not {labeler!r}")
    if labeler == "judge" and not judge:
        raise ValueError("--labeler judge is a model at an address: add --judge http://localhost:8000/v1,model=NAME")
    if judge and labeler == "truth":
        raise ValueError("--labeler truth knows only what the rule divides, so --judge is no help to it: add --labeler judge")
    if judge and divider == "whole" and labeler != "judge":
        raise ValueError("--divider whole leaves --judge nothing to do: add --labeler judge, or leave it out")
    endpoint = judge_from(judge) if judge else None
    named = {"truth": TRUTH, **({"judge": by_judge(endpoint)} if endpoint else {})}
    return whole(which) if divider == "whole" else by_rule(which, judge=endpoint), named.get(labeler)


def untruths(text: str, item: Item, which: str) -> int | None:
    """Untrue, malformed and repeated claims of an answer, however it was divided; None where the truth cannot tell."""
    found = claims_by_rule(text, item.language, which)
    if item.scene is None or isinstance(found, Failed):
        return None
    return len(found) - len(set(found)) + sum(untrue(claim, item.scene) for claim in set(found))


def summary(items: Sequence[Item], texts: Sequence[Sequence[str]], claims: Sequence[Sequence[list[Claim] | Failed]],
            margins: Margins, scores: Sequence[Sequence[int | None]], pairs: Sequence[dict], r: float | None, which: str) -> dict:
    """Counts of everything, what was left out too.

    questions_as_the_truth   share of the labels that are right
    pairs_as_the_truth       share of the pairs whose chosen answer really says fewer untrue or repeated things, equally many
                             counting half, as a coin would have it; pairs_alike: how many pairs have equally many
    Both over what the truth can tell, null where that is nothing. RLAIF-V gives the second as people's agreement: 96.7 % with
    claims labelled one by one, 66.7 % with whole answers.
    """
    found = [one for answers in claims for one in answers]
    undivided = sum(isinstance(one, Failed) for one in found)
    named = {(item.prompt.pictures, claim.question): untrue(claim, item.scene) == 0
             for item, answers in zip(items, claims) if item.scene for one in answers if not isinstance(one, Failed)
             for claim in one if claim.objects}
    known = [(margins[key] > 0) == true for key, true in named.items() if margins[key] is not None]
    by_id = {item.prompt.id: (item, answers) for item, answers in zip(items, texts)}
    right = []
    for row in pairs:
        item, answers = by_id[row["prompt_id"]]
        better, worse = (untruths(answers[k], item, which) for k in row["answers"])
        if better is not None and worse is not None:
            right.append(0.5 if better == worse else float(better < worse))
    mean = {side: sum(words(row[side]) for row in pairs) / max(1, len(pairs)) for side in ("chosen", "rejected")}
    return {
        "prompts": len(items), "answers": len(found), "answers_undivided": undivided,
        "answers_unlabelled": sum(value is None for values in scores for value in values) - undivided,
        "questions": len(margins), "questions_failed": sum(margin is None for margin in margins.values()),
        "questions_rejected": sum(margin is not None and not margin > 0 for margin in margins.values()),
        "pairs": len(pairs), "prompts_with_pairs": len({row["prompt_id"] for row in pairs}), "balance": r,
        "words_chosen": round(mean["chosen"], 2), "words_rejected": round(mean["rejected"], 2),
        "questions_as_the_truth": round(sum(known) / len(known), 4) if known else None,
        "pairs_as_the_truth": round(sum(right) / len(right), 4) if right else None, "pairs_alike": right.count(0.5),
    }


def preferences(items: Sequence[Item], ask: Ask, out: Path, divider: Divider, labeler: Labeler, *, model: str, answers: int,
                temperature: float, seed: int, per_prompt: int = 2, balance: bool = False, chunk: int = 32, which: str = "nano",
                say: Callable[[str], None] = print) -> list[Preference]:
    """Pairs for DPO from a model's answers to `items`; stopped at any moment, the same call goes on.

    model       what tells the weights that answer from others (a fingerprint): other weights, other answers
    answers     N a prompt (RLAIF-V: 10), all at one `temperature` (0.7)
    balance     drop pairs by length, see `balanced`
    chunk       prompts between two writes, and so the most that a crash can lose
    which       names that the world's descriptions may hold, for what the truth says of pairs
    Raises ValueError where files of other options are in the way, or no two answers differ in score.
    """
    if len({item.prompt.id for item in items}) < len(items):
        raise ValueError("two prompts have the same id: their pairs could not be told apart")
    for item in items:
        picture_and_question(item.prompt)
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.jsonl" for name in ("answers", "claims", "labels", "pairs")}
    made_from = {"model": model, "answers": answers, "temperature": temperature, "seed": seed}
    texts = [[Cut(text) if k in row.get("cut", ()) else text for k, text in enumerate(row["answers"])]
             for row in sample(items, ask, files["answers"], made_from, chunk)]
    claims = divide(items, texts, divider, files["claims"], {"answers.jsonl": digest(files["answers"])}, chunk)
    margins = label(items, claims, labeler, files["labels"], {"claims.jsonl": digest(files["claims"])}, chunk)
    scores = [[score(one, item.prompt.pictures, margins) for one in found] for item, found in zip(items, claims)]

    require_same(files["pairs"], {**{f"{name}.jsonl": digest(files[name]) for name in ("answers", "claims", "labels")},
                                  "per_prompt": per_prompt, "balance": balance, "seed": seed})
    rows, r = pair_rows(items, texts, scores, per_prompt, seed), None
    if balance and rows:
        rows, r = balanced(rows)
    facts = summary(items, texts, claims, margins, scores, rows, r, which)
    say(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    prompts = {item.prompt.id: item.prompt for item in items}
    if not files["pairs"].is_file():  # written last: where it is, the others are
        with replacing(out / "summary.json") as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode())
        write_pictures(rows, prompts, out)
        write_parquet(rows, out, out / "pairs.parquet")
        with replacing(files["pairs"]) as file:
            file.write(b"".join(map(as_line, rows)))
    if not rows:
        raise ValueError(f"no pair: no two answers to a prompt differ in score (see {out / 'summary.json'}): sample more answers "
                         f"a prompt, at a higher temperature, or of more prompts, into another folder")
    return [Preference(row["id"], prompts[row["prompt_id"]], row["chosen"], row["rejected"]) for row in rows]


def world_items(scenes: int, seed: int, which: str = "nano", most: int = 4) -> list[Item]:
    """Requests for detailed descriptions of scenes of the train split, in alternating languages; other seeds, other scenes."""
    items = []
    for k in range(scenes):
        number, language = seed * scenes + k, LANGUAGES[k % 2]
        scene = sample_scene("train", number, which, most)
        request = random.Random(f"feedback/{number}").choice(ASK_DESCRIPTION[language])
        items.append(Item(dialogue(f"world/feedback/{number}", [picture(scene)], [(request, "")]), language, scene))
    return items


def own_items(source, count: int, seed: int, bad_rows: BadRows, report: bool = True) -> list[Item]:
    """`count` rows of one's own data, a picture and a question each; other seeds, the rows that follow. An answer is left out.

    Their truth is nobody's, their language Chinese where the question has a Chinese character. A row that holds anything else, or
    whose picture does not open, is a bad row; `report`: whether to name it.
    """
    items = []
    for k in range(min(count, len(source))):
        bad_rows.seen += 1
        try:
            row = source[(seed * count + k) % len(source)]
            prompt = dataclasses.replace(row, messages=row.messages[:1], answer=None)
            shown, question = picture_and_question(prompt)
            shown.load()
        except BadRow as bad:
            bad_rows.add(bad, report)
        except ValueError as error:
            bad_rows.add(BadRow(str(error), "write one picture and one question", row.id), report)
        else:
            items.append(Item(prompt, "zh" if re.search("[\u4e00-\u9fff]", question) else "en"))
    return items
