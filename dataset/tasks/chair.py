"""What hallucination is measured by: CHAIR and Cover of descriptions, precision and recall of yes/no answers.

In:  what each answer named and what is there; or answers and truths.  Out: {"metric": share in 0..1}. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Sequence


def share(part: float, whole: float) -> float:
    """part / whole, and 0 where there is nothing to take a part of."""
    return part / whole if whole else 0.0


def chair(named: Sequence[Sequence[Hashable]], present: Sequence[Collection[Hashable]]) -> dict[str, float]:
    """CHAIR (arXiv 1809.02156, section 2.1) and Cover, pooled over all answers.

    named     the objects that each answer names, as often as it names them
    present   the objects that are there, each counted once
    chair_i   = mentions of objects that are not there / all mentions
    chair_s   = answers with at least one such mention / answers
    cover     = objects that are there and were named / objects that are there

    An answer that names nothing hallucinates nothing: low CHAIR alone may be silence, so read it beside Cover.
    """
    if len(named) != len(present) or not named:
        raise ValueError(f"CHAIR compares answers with their truths, one to one: {len(named)} and {len(present)}")
    wrong = [sum(obj not in there for obj in said) for said, there in zip(named, present)]
    covered = sum(len(set(said) & set(there)) for said, there in zip(named, present))
    return {
        "chair_s": sum(count > 0 for count in wrong) / len(wrong),
        "chair_i": share(sum(wrong), sum(map(len, named))),
        "cover": share(covered, sum(len(set(there)) for there in present)),
    }


def f1(precision: float, recall: float) -> float:
    """The harmonic mean."""
    return share(2 * precision * recall, precision + recall)


def agreement(named: Collection[Hashable], present: Collection[Hashable]) -> float:
    """F1 of one answer's set of objects: 1 where it names all that is there and nothing else; silence gets 0."""
    right = len(set(named) & set(present))
    return f1(share(right, len(set(named))), share(right, len(set(present))))


YES_OR_NO = {"yes": "yes", "no": "no", "是": "yes", "否": "no"}


def yes_or_no(answer: str) -> str | None:
    """The first word where it is yes or no, in English or Chinese; None for anything else, which is wrong either way.

    POPE's own parser takes every answer without a "no" or "not" for a yes, the empty one too.
    """
    first = re.match(r"\W*(yes\b|no\b|是|否)", answer.lower())
    return YES_OR_NO[first[1]] if first else None


def binary(predicted: Sequence[str | None], truth: Sequence[str], positive: str) -> dict[str, float]:
    """Yes/no answers: precision and recall are those of the `positive` class; `yes` is the share of answers that say yes.

    An answer that is neither (None) is wrong, says nothing positive, and is counted in `unparsed`.
    """
    if len(predicted) != len(truth) or not truth:
        raise ValueError(f"answers are compared with their truths, one to one: {len(predicted)} and {len(truth)}")
    hits = sum(said == positive == true for said, true in zip(predicted, truth))
    precision, recall = share(hits, predicted.count(positive)), share(hits, truth.count(positive))
    return {
        "accuracy": sum(said == true for said, true in zip(predicted, truth)) / len(truth),
        "precision": precision,
        "recall": recall,
        "f1": f1(precision, recall),
        "yes": predicted.count("yes") / len(truth),
        "unparsed": predicted.count(None) / len(truth),
    }
