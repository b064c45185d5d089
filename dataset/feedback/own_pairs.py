"""Pairs of a run's own model for DPO: the pipeline makes what the flags of 3-rl_vlm.py describe, unless it exists already.

In:  the flags, and the model as functions.  Out: a source of preferences, OUT/feedback/HASH/pairs.jsonl.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dataset.bad_rows import BadRows
from dataset.feedback.claims import Divider, Item
from dataset.feedback.labels import TRUTH, Labeler, by_judge
from dataset.feedback.pipeline import SampleAnswers, Sampling, items_digest, make_preferences, own_items, world_items
from dataset.judge import make_judge
from dataset.mixture import Mixture, load
from dataset.preferences import OwnPreferences
from dataset.protocols import Run, Source
from model.registry import DIVIDERS, UserError


class Flags(Protocol):
    """The flags of 3-rl_vlm.py that are read here."""

    data: tuple[str, ...]
    pairs: str
    pairs_only: bool
    iterations: int
    batch_size: int
    accumulate: int
    divider: str
    labeler: str
    judge: str
    questions: Path | None
    scenes: int
    group_size: int
    temperature: float


@dataclass(frozen=True)
class OwnModel:
    """The model whose answers are compared.

    fingerprint   identifies its weights
    answers       (prompts, N) -> N sampled answers to each
    label         "self" or the folder of another checkpoint -> a labeler
    """

    fingerprint: str
    answers: SampleAnswers
    label: Callable[[str], Labeler]


OWN_PAIR_FLAGS = ("scenes", "questions", "group_size", "max_new_tokens", "temperature", "divider", "labeler", "judge")


def check_flags(flags: Flags) -> None:
    """UserError for flags that contradict each other, before anything is loaded."""
    if flags.pairs != "stored":
        raise UserError(f"--pairs is stored or policy, not {flags.pairs!r}")
    for name in ("group_size", "batch_size", "accumulate"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is at least 1, not {getattr(flags, name)}")
    if flags.pairs_only and (flags.data or flags.iterations > 1):
        raise UserError("--pairs_only makes the pairs of one iteration: leave out --data and --iterations")
    defaults = type(flags)()
    if flags.data and (useless := [name for name in OWN_PAIR_FLAGS if getattr(flags, name) != getattr(defaults, name)]):
        raise UserError(f"--data has its pairs: leave out --{', --'.join(useless)}")
    if not flags.data:
        divider_and_labeler(flags)


def divider_and_labeler(flags: Flags) -> tuple[Divider, Labeler | None]:
    """The divider and the labeler of the flags; None for a labeler that is a model, which the caller loads.

    UserError for unknown words, and for flags that contradict each other.
    """
    labeler = flags.labeler
    if labeler not in ("truth", "self", "judge") and not (Path(labeler) / "config.json").is_file():
        raise UserError(f"--labeler is truth, self, judge or the folder of a checkpoint, not {labeler!r}")
    if flags.questions and labeler == "truth":
        raise UserError("--labeler truth knows the embedded world alone: with --questions, take self, judge or a checkpoint")
    if labeler == "judge" and not flags.judge:
        raise UserError("--labeler judge is a model at an address: add --judge http://localhost:8000/v1,model=NAME")
    if flags.judge and labeler == "truth":
        raise UserError("--labeler truth cannot label what --judge divides: leave out --judge, or add --labeler judge")
    if flags.judge and flags.divider.startswith("whole") and labeler != "judge":
        raise UserError("--divider whole leaves --judge nothing to do: add --labeler judge, or leave it out")
    judge = make_judge(flags.judge) if flags.judge else None
    known = {"truth": TRUTH, **({"judge": by_judge(judge)} if judge else {})}
    return DIVIDERS.make(flags.divider, judge=judge), known.get(labeler)


def items_to_ask(flags: Flags, run: Run, categories: str) -> list[Item]:
    """Scenes of the world with these categories, or rows of --questions."""
    if not flags.questions:
        return world_items(flags.scenes, run.config.seed, categories)
    rows = load(flags.questions, run.config.image_folder, run.config.allow_urls, need_answer=False)
    listed = run.out / "bad_questions.jsonl"
    if run.is_main:
        listed.unlink(missing_ok=True)  # all bad rows are listed anew, also in a resumed run
    return own_items(rows, flags.scenes, run.config.seed, BadRows(listed, len(rows), run.config.max_bad, run.is_main))


def own_pairs(flags: Flags, run: Run, model: OwnModel) -> Source:
    """The preferences from the model's own answers, made by the first rank alone. Those about --questions are rows of a mixture,
    of which a share is held out.
    """
    divider, labeler = divider_and_labeler(flags)
    labeler = labeler or model.label(flags.labeler)
    sampling = Sampling(model.fingerprint, flags.group_size, flags.temperature, run.config.seed)
    items = items_to_ask(flags, run, divider.categories)
    facts = "|".join([labeler.name, divider.name, items_digest(items), repr(sampling)])
    folder = run.out / "feedback" / hashlib.sha256(facts.encode()).hexdigest()[:12]
    if run.is_main:
        make_preferences(items, model.answers, folder, divider, labeler, sampling, run.print0)
    run.barrier()
    pairs = OwnPreferences(folder / "pairs.jsonl")
    run.print0(f"{len(pairs):,} pairs in {pairs.path}")
    return Mixture([(pairs, 1)]) if flags.questions else pairs
