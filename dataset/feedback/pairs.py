"""Labelled answers to pairs: which of two answers to a prompt is better, and the files of these pairs.

In:  answers, their claims, the claims' margins.  Out: rows of pairs.jsonl; the same as parquet in RLAIF-V-Dataset's columns.

This is the "combine" step of RLAIF-V (arXiv 2405.17220): the answer with fewer rejected claims is better. Where as many are
rejected, the one with more accepted claims is better: else a model learns to stop before it has told everything.
"""
from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from tqdm import tqdm

from dataset.chat import Conversation
from dataset.feedback.claims import Claim, Item
from dataset.formats.files import GROUP_ROWS
from dataset.images import Picture, png
from dataset.judge import Failure
from dataset.writing import replacing

Margins = dict[tuple, float | None]  # (pictures, question) -> yes minus no; None where the labeler failed
Score = tuple[int, int]  # (-rejected claims, accepted claims) of an answer: the larger tuple is the better answer


def score(claims: Sequence[Claim] | Failure, pictures: tuple[Picture, ...], margins: Margins) -> Score | None:
    """The score of an answer, in counts and not in shares, as in RLAIF-V; None where the claims or one label failed.

    A malformed claim is rejected, and so is a claim repeated in the same words: the form of an answer counts as well.
    """
    if isinstance(claims, Failure):
        return None
    distinct = set(claims)
    labels = [margins[pictures, claim.question] for claim in distinct if not claim.malformed]
    known = [margin for margin in labels if margin is not None]
    if len(known) < len(labels):
        return None
    accepted = sum(margin > 0 for margin in known)  # a tie rejects
    return accepted - len(claims), accepted


def ranked(answers: Sequence[str], scores: Sequence[Score | None], rng: random.Random, most: int) -> list[tuple[int, int]]:
    """At most `most` random pairs (better, worse) of indices; scores and texts differ, and no pair of texts comes twice."""
    known = [(k, value) for k, value in enumerate(scores) if value is not None]
    pairs = [(a, b) for (a, better), (b, worse) in permutations(known, 2)
             if better > worse and answers[a].strip() != answers[b].strip()]
    rng.shuffle(pairs)
    distinct: dict[tuple[str, str], tuple[int, int]] = {}
    for a, b in pairs:
        distinct.setdefault((answers[a].strip(), answers[b].strip()), (a, b))
    return list(distinct.values())[:most]


def words(text: str) -> int:
    """The number of words, separated by spaces; each Chinese character begins a word."""
    return len(re.sub(r"([\u4e00-\u9fff])", r" \1", text).split())


def pair_rows(items: Sequence[Item], answers: Sequence[Sequence[str]], scores: Sequence[Sequence[Score | None]], most: int,
              seed: int) -> list[dict]:
    """The lines of pairs.jsonl. The random choice for a prompt depends on the seed and the prompt's id alone."""
    rows = []
    for index, (item, texts, values) in enumerate(zip(items, answers, scores, strict=True)):
        pairs = ranked(texts, values, random.Random(f"feedback/{seed}/{item.prompt.id}"), most)
        rows += [{"id": f"{item.prompt.id}/{k}", "image_path": f"pictures/{index:06d}.png",
                  "question": item.prompt.messages[-1].text, "chosen": texts[a], "rejected": texts[b],
                  "scores": [values[a], values[b]], "answers": [a, b], "prompt_id": item.prompt.id}
                 for k, (a, b) in enumerate(pairs)]
    return rows


# ---------------------------------------------------------------- files


def picture_and_question(prompt: Conversation) -> tuple[Picture, str]:
    """The picture and the question of a prompt, as the columns of RLAIF-V hold them; ValueError for any other prompt."""
    if len(prompt.messages) == 1 and len(prompt.messages[0].parts) == 2:
        picture, question = prompt.messages[0].parts
        if isinstance(picture, Picture) and isinstance(question, str):
            return picture, question
    raise ValueError(f"{prompt.id}: a prompt is one picture and then one question, as the columns of RLAIF-V hold them")


def write_pictures(rows: Sequence[dict], prompts: dict[str, Conversation], folder: Path) -> None:
    """Write the pictures that the pairs name, as PNG files under `folder`."""
    named = {row["image_path"]: prompts[row["prompt_id"]] for row in rows}
    for path, prompt in tqdm(named.items(), desc="pictures", unit="image"):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as out:
            out.write(png(picture_and_question(prompt)[0]))


def write_parquet(rows: Sequence[dict], folder: Path, file: Path) -> None:
    """Write pairs in the columns of RLAIF-V-Dataset, with the picture files under `folder` inside; `origin_split` is JSON."""
    import pyarrow
    from pyarrow import parquet

    text, image = pyarrow.string(), pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    columns = {"ds_name": text, "image": image, "question": text, "chosen": text, "rejected": text, "origin_dataset": text,
               "origin_split": text, "idx": pyarrow.int64(), "image_path": text}
    schema = pyarrow.schema(list(columns.items()))
    with replacing(file) as out, parquet.ParquetWriter(out, schema) as writer:
        for start in range(0, len(rows), GROUP_ROWS):
            writer.write_table(pyarrow.Table.from_pylist([{
                "ds_name": "pupil", "image": {"bytes": (folder / row["image_path"]).read_bytes(), "path": row["image_path"]},
                "question": row["question"], "chosen": row["chosen"], "rejected": row["rejected"], "origin_dataset": "pupil",
                "origin_split": json.dumps({"id": row["id"], "scores": row["scores"]}), "idx": i, "image_path": row["image_path"],
            } for i, row in enumerate(rows[start:start + GROUP_ROWS], start)], schema))
