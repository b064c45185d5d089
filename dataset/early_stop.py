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

    Groups whose answers are paid differently teach, also where the rule calls none of them right, or all.
    """
    rows = [row for row in history if "zero_variance" in row][-updates:]
    if len(rows) < updates:
        return None
    names = ("all_wrong", "all_right", "zero_variance", "entropy")
    share = {name: fmean([row.get(name, math.inf) for row in rows]) for name in names}
    if not math.isfinite(share["all_wrong"]):  # a reward of one's own, which calls no answer right or wrong
        if share["zero_variance"] > 0.8:
            return (f"in {share['zero_variance']:.0%} of the groups all answers have the same reward. Let --reward tell answers "
                    f"apart that are better by degrees, raise --temperature, or take other problems")
    elif min(share["all_wrong"], share["zero_variance"]) > 0.8:
        return (f"{share['all_wrong']:.0%} of the groups hold no right answer: RL makes likelier what is already said at times. "
                f"Fine-tune longer on such problems (2-sft_vlm.py), or begin with easier ones")
    elif min(share["all_right"], share["zero_variance"]) > 0.8:
        return f"{share['all_right']:.0%} of the groups are all right: there is little left to learn here. Take harder problems"
    if share["entropy"] < entropy_floor:
        return (f"the entropy is {share['entropy']:.2g} nats a token: all answers to a problem are the same, and nothing new is "
                f"tried. Lower --lr, raise clip_high, or fine-tune for fewer steps before")
    return None


def no_group_differs(stats: dict[str, float]) -> str:
    """What to tell early in a run none of whose groups has answers with different rewards, by the log of an update."""
    if "accuracy" not in stats:
        why = (f"--reward gives every answer to a problem the same, {stats['reward']:.3g} in the mean: let it tell answers apart "
               f"that are better by degrees")
    elif stats["format"] == 0:
        why = ("no answer has the form <think>...</think><answer>...</answer>, without which the rule pays nothing: fine-tune on "
               "rows in that form (2-sft_vlm.py; --data arithmetic has some), or give a --reward of your own")
    elif stats["accuracy"] == 1:
        why = "every answer is right: take harder problems"
    elif stats["accuracy"] == 0:
        why = "no answer is right: fine-tune longer on such problems (2-sft_vlm.py), or begin with easier ones"
    else:
        why = "all answers to a problem are alike: raise --temperature or --group_size"
    return f"nothing is learned so far: in no group of the first updates do two answers differ in reward. {why}"
