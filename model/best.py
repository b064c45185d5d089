"""Keep the checkpoint of a run that is best on the validation split.

In:  the scores of each check.  Out: OUT/best during the run; at the end its files are copied into OUT.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from model import checkpoint
from model.runtime import Run
from model.vlm import VLM


def truth_and_cover(scores: dict[str, float]) -> float | None:
    """(1 - false) x Cover: nothing false, and all that is there. Silence would win the first factor, a long list the second."""
    values = {name.rpartition("/")[2]: value for name, value in scores.items() if name.startswith("hallucination")}
    return round((1 - values["false"]) * values["cover"], 4) if values else None


def mean_accuracy(scores: dict[str, float]) -> float | None:
    """The mean over tasks of their share of right answers: `accuracy`, `solved` or `exact`."""
    shares = [value for name, value in scores.items()
              if "/" in name and name.rpartition("/")[2] in ("accuracy", "solved", "exact")]  # names without / are of training
    return round(sum(shares) / len(shares), 4) if shares else None


MEASURES: dict[str, Callable[[dict[str, float]], float | None]] = {
    "(1 - false) x Cover": truth_and_cover, "accuracy": mean_accuracy,
}  # fmt: skip


class BestCheckpoint:
    """Keeps the best checkpoint of a run on the validation split in OUT/best, the start included; of equals the first.

    If no scores have the measure, the last checkpoint stays. A resumed run reads its earlier scores from its log.
    """

    def __init__(self, run: Run, measure: str):
        self.run, self.folder, self.measure, self.quality = run, run.out / "best", measure, MEASURES[measure]
        self.value, self.scores = -math.inf, {}
        for row in run.history:
            if (value := self.quality(row)) is not None and value > self.value:
                self.value, self.scores = value, row
        if run.is_main and not self.scores:
            shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, model: VLM, tokenizer_file: Path, step: int, scores: dict[str, float]) -> bool:
        """Save the model if its scores are the best so far; returns whether they are."""
        value = self.quality(scores)
        if value is None or value <= self.value:
            return False
        self.value, self.scores = value, {"step": step, **scores}
        checkpoint.save(self.folder, model, tokenizer_file)
        return True

    def keep(self) -> dict[str, float]:
        """Copy the best checkpoint into OUT; returns its scores, or {} if nothing was measured."""
        if self.folder.is_dir():
            copy_checkpoint(self.folder, self.run.out)
            self.run.print0(f"step {self.scores['step']} is kept: {self.measure} = {self.value:.3f}")
        best = self.value if self.folder.is_dir() else 0.0
        (self.run.out / "best.json").write_text(json.dumps({"quality": best}))
        return {name: value for name, value in self.scores.items() if "/" in name}


def best_run(folders: Sequence[Path]) -> Path:
    """The folder of the run with the best checkpoint; of equals, or if nothing was measured, the last."""
    return max(reversed(folders), key=lambda folder: json.loads((folder / "best.json").read_text())["quality"])


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint, its adapters included; each file is replaced in one move."""
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_tokenizer(checkpoint.tokenizer_file(source), target)
    (target / "adapter.safetensors").unlink(missing_ok=True)
    for name in ("model.safetensors", "config.json", "adapter.safetensors"):
        if (source / name).is_file() or name != "adapter.safetensors":
            checkpoint.write(target / name, partial(shutil.copyfile, source / name))
