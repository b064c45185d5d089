"""Metrics of hallucination: CHAIR and Cover of descriptions, precision and recall of yes/no answers.

In:  the objects each answer names and those present; or answers and truths.  Out: {"metric": share in 0..1}. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence


def share(part: float, total: float) -> float:
    """part / total, and 0 for a total of 0."""
    return part / total if total else 0.0


def chair(named: Sequence[Sequence[Hashable]], present: Sequence[Collection[Hashable]]) -> dict[str, float]:
    """CHAIR (arXiv 1809.02156, section 2.1) and Cover, pooled over all answers.

    named     the objects that each answer names, with repetitions
    present   the objects in each picture, each counted once
    chair_i   = mentions of absent objects / all mentions
    chair_s   = answers with at least one such mention / answers
    cover     = objects present and named / objects present

    An answer that names nothing hallucinates nothing, so read CHAIR beside Cover: a low CHAIR alone may be silence.
    """
    if len(named) != len(present) or not named:
        raise ValueError(f"CHAIR compares answers with their truths, one to one: {len(named)} and {len(present)}")
    wrong = [sum(obj not in truth for obj in objects) for objects, truth in zip(named, present)]
    covered = sum(len(set(objects) & set(truth)) for objects, truth in zip(named, present))
    return {
        "chair_s": sum(count > 0 for count in wrong) / len(wrong),
        "chair_i": share(sum(wrong), sum(map(len, named))),
        "cover": share(covered, sum(len(set(truth)) for truth in present)),
    }


def f1(precision: float, recall: float) -> float:
    """The harmonic mean."""
    return share(2 * precision * recall, precision + recall)


def agreement(named: Collection[Hashable], present: Collection[Hashable]) -> float:
    """F1 of one answer's set of objects: 1 where it names every object present and no other; silence gets 0."""
    shared = len(set(named) & set(present))
    return f1(share(shared, len(set(named))), share(shared, len(set(present))))


YES_OR_NO = {"yes": "yes", "no": "no", "是": "yes", "否": "no"}


def yes_or_no(answer: str) -> str | None:
    """The first word if it is yes or no, in English or Chinese; None for any other answer, which counts as wrong.

    POPE's own parser reads every answer without "no" or "not" as yes, even an empty one.
    """
    first = re.match(r"\W*(yes\b|no\b|是|否)", answer.lower())
    return YES_OR_NO[first[1]] if first else None


def binary(predicted: Sequence[str | None], truth: Sequence[str], positive: str) -> dict[str, float]:
    """Metrics of yes/no answers: precision and recall of the `positive` class; `yes` is the share of yes among the answers.

    An answer that is neither (None) is wrong and counts in `unparsed`.
    """
    if len(predicted) != len(truth) or not truth:
        raise ValueError(f"answers are compared with their truths, one to one: {len(predicted)} and {len(truth)}")
    hits = sum(answer == positive == right for answer, right in zip(predicted, truth))
    precision, recall = share(hits, predicted.count(positive)), share(hits, truth.count(positive))
    return {
        "accuracy": sum(answer == right for answer, right in zip(predicted, truth)) / len(truth),
        "precision": precision,
        "recall": recall,
        "f1": f1(precision, recall),
        "yes": predicted.count("yes") / len(truth),
        "unparsed": predicted.count(None) / len(truth),
    }
