"""Steps whose loss or gradient is not finite: they are named, kept for inspection and left out; too many of them end the run.

In:  the loss and the norm of the gradient of each step, which all ranks know alike.  Out: whether to take the step.

    out/sft/bad_steps/000012-0.pt    the micro-batches of step 12 on rank 0, of the first ten such steps; torch.load reads it
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model import durable, resume
from model.ranks import Ranks

NAMED, STORED = 8, 10  # rows that are named in a message; steps whose batches are stored


class StepFaults:
    """Counts the steps that were left out: all of them, those in a row up to now, and which step was the last good one."""

    def __init__(self, ranks: Ranks, out: Path, most: int, count: int = 0):
        self.ranks, self.out, self.most, self.count = ranks, out, most, count
        self.in_a_row, self.last_good, self.reason = 0, -1, ""

    def is_finite(self, step: int, batches: Sequence[dict], loss: float, gradient_norm: float, store: bool) -> bool:
        """Whether a step can be taken. FloatingPointError if more than `most` could not; every rank calls this alike."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.in_a_row, self.last_good = 0, step
            return True
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {gradient_norm}, with a loss of {loss:.4g}"
        self.reason = f"{what} at step {step}"
        rows = self.ranks.all_gather({self.ranks.rank: [str(row) for batch in batches for row in batch.get("ids", ())]})
        ids = [row for rank in sorted(rows) for row in rows[rank]]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        stored = self.store(step, batches) if self.count <= STORED and store else ""
        self.ranks.print0(f"step {step} is left out ({self.count}; --max_bad_steps {self.most}): the {what}. Rows: "
                          f"{', '.join(ids[:NAMED])}{more}{stored}")
        if self.count > self.most:
            raise FloatingPointError(self.verdict())
        return False

    def store(self, step: int, batches: Sequence[dict]) -> str:
        """Write this rank's micro-batches; returns where, for the message."""
        file = self.out / "bad_steps" / f"{step:06d}-{self.ranks.rank}.pt"
        file.parent.mkdir(parents=True, exist_ok=True)
        plain = [{name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()
                  if isinstance(value, Tensor | list)} for batch in batches]
        durable.write(file, lambda path: torch.save(plain, path))
        return f"; {file} holds them"

    def doubtful(self, step: int, last: bool) -> bool:
        """Whether the weights before a step are not to be saved, since no step was good with them.

        At the end of a run one bad row may be the reason, but where two steps were bad the run ends without its goal.
        """
        if last and self.in_a_row > 1:
            raise FloatingPointError(self.verdict())
        if self.in_a_row and not last:
            self.ranks.print0(f"step {step} is not saved: the step before it was left out, and the weights may be the reason")
        return self.in_a_row > 0 and not last

    def verdict(self) -> str:
        """Why the run ends, and how it can go on. States with which no step was good, if there are others, are removed."""
        states = resume.saved_steps(self.out)
        good = [state for state in states if int(state.name) <= self.last_good]
        if self.in_a_row == 1:  # the row is bad, and not the weights
            good = states
        for state in states[len(good):] if good and self.ranks.is_main else []:
            resume.drop(state)
        then = f"go on from step {int(good[-1].name)} with --resume" if good else "start again"
        return (f"{self.count} steps were left out (--max_bad_steps {self.most}), the last one because the {self.reason}. Lower "
                f"--lr and {then}, or look at the rows")
