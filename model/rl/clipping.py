"""Gradient clipping that knows what is usual: the threshold follows the norm, and a step that is far out is left out.

In:  a model with gradients.  Out: `Clipped`: the norm, the threshold, and whether to take the step.

RL has steps that no other training has: a group in which one of 256 answers was right, or a ratio that exploded. A fixed bound
scales such a step down to the size of an ordinary one and still takes it, in a direction that one answer decided.
"""

import math
from typing import NamedTuple

from torch import nn

DECAY = 0.9  # of the moving average: it forgets in about ten steps
USUAL, ABSURD = 2.0, 10.0  # times the average: what is scaled down, and what is left out
PATIENCE = 20  # steps left out in a row


class Clipped(NamedTuple):
    """The norm before; under a threshold that moves that, and whether the step is to be left out."""

    norm: float
    threshold: float
    skip: bool

    def facts(self) -> dict[str, float]:
        """For the log."""
        return {"gradient_norm": self.norm, "gradient_threshold": self.threshold, "step_left_out": float(self.skip)}


class DynamicClipping:
    """threshold = min(max_norm, 2 x average norm); no step where the norm is not finite or above 10 x the average.

    `average` is an exponential moving one over the steps before, 0 before the first. A finite norm that was left out counts as
    ten times the average, so that the average follows where large norms are the new usual. A norm of 0 (no group differed) counts
    for nothing, and there is no step: momentum alone would make one. Raises FloatingPointError after 20 others left out in a row.
    """

    def __init__(self, max_norm: float, average: float = 0.0, skipped: int = 0):
        self.max_norm, self.average, self.skipped = max_norm, average, skipped

    def threshold(self) -> float:
        return min(self.max_norm, USUAL * self.average) if self.average else self.max_norm

    def judge(self, norm: float) -> Clipped:
        """What to do with gradients of this norm; remembers it."""
        if norm == 0:
            return Clipped(norm, self.threshold(), skip=True)
        threshold, bound = self.threshold(), ABSURD * self.average if self.average else math.inf
        skip = not (math.isfinite(norm) and norm <= bound)
        self.skipped = self.skipped + 1 if skip else 0
        if self.skipped == PATIENCE:
            raise FloatingPointError(f"{PATIENCE} steps in a row were left out, the last for a gradient norm of {norm} where "
                                     f"{self.average:.3g} is usual: lower --lr")
        if math.isfinite(norm):
            seen = min(norm, bound)
            self.average = DECAY * self.average + (1 - DECAY) * seen if self.average else seen
        return Clipped(norm, threshold, skip)

    def __call__(self, model: nn.Module) -> Clipped:
        """Scale the model's gradients down to the threshold; they are not touched where the step is to be left out."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).item()
        clipped = self.judge(norm)
        if not clipped.skip and norm > clipped.threshold:
            for gradient in gradients:
                gradient.mul_(clipped.threshold / norm)
        return clipped

    @property
    def state(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"average": self.average, "skipped": self.skipped}
