"""When there is no point in going on with RL.

In:  the log of a run, a dict for each update.  Out: the reason to stop, and what to do; None as long as there is a point.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

PATIENCE = 20  # updates


def early_stop_reason(history: Sequence[dict], entropy_floor: float, updates: int = PATIENCE) -> str | None:
    """Why there is no point in going on, and what to do, by the log of the last updates; None as long as there is a point.

    Groups whose answers are paid differently teach, also where a reward of one's own calls none of them right, or all.
    """
    rows = [row for row in history if "all_wrong" in row][-updates:]
    if len(rows) < updates:
        return None
    names = ("all_wrong", "all_right", "zero_variance", "entropy")
    share = {name: fmean([row.get(name, math.inf) for row in rows]) for name in names}
    if min(share["all_wrong"], share["zero_variance"]) > 0.8:
        return (f"{share['all_wrong']:.0%} of the groups hold no right answer: RL makes likelier what is already said at times. "
                f"Fine-tune longer on such problems (2-sft_vlm.py), or begin with easier ones")
    if min(share["all_right"], share["zero_variance"]) > 0.8:
        return f"{share['all_right']:.0%} of the groups are all right: there is little left to learn here. Take harder problems"
    if share["entropy"] < entropy_floor:
        return (f"the entropy is {share['entropy']:.2g} nats a token: all answers to a problem are the same, and nothing new is "
                f"tried. Lower --lr, raise clip_high, or fine-tune for fewer steps before")
    return None
