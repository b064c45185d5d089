"""Which checkpoint of a run is kept: the best one on the validation split.

In:  scores of the checks.  Out: OUT/best while the run goes, and in the end its files in OUT.
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


def chair_and_cover(scores: dict[str, float]) -> float | None:
    """(1 - CHAIR_s) x Cover: nothing that is not there, and all that is. Either alone is won by silence or by chatter."""
    found = {name.rpartition("/")[2]: value for name, value in scores.items() if name.startswith("hallucination")}
    return round((1 - found["chair_s"]) * found["cover"], 4) if found else None


def mean_accuracy(scores: dict[str, float]) -> float | None:
    """The mean over tasks of the share of right answers, by whatever name the task has for it."""
    found = [value for name, value in scores.items()
             if "/" in name and name.rpartition("/")[2] in ("accuracy", "solved", "exact")]  # without: of training, in the log
    return round(sum(found) / len(found), 4) if found else None


MEASURES: dict[str, Callable[[dict[str, float]], float | None]] = {
    "(1 - CHAIR_s) x Cover": chair_and_cover, "accuracy": mean_accuracy,
}  # fmt: skip


class BestCheckpoint:
    """The best checkpoint of a run on the validation split, the start included, in OUT/best; the first of equals.

    Where the measure finds nothing in scores, the last. What a resumed run has seen of it stands in its log.
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
        """Keep this one if it is the best so far; returns whether it is."""
        value = self.quality(scores)
        if value is None or value <= self.value:
            return False
        self.value, self.scores = value, {"step": step, **scores}
        checkpoint.save(self.folder, model, tokenizer_file)
        return True

    def keep(self) -> dict[str, float]:
        """Put the best one into OUT; returns its scores, {} where there was no choice."""
        if self.folder.is_dir():
            copy_checkpoint(self.folder, self.run.out)
            self.run.print0(f"step {self.scores['step']} is kept: {self.measure} = {self.value:.3f}")
        best = self.value if self.folder.is_dir() else 0.0
        (self.run.out / "best.json").write_text(json.dumps({"quality": best}))
        return {name: value for name, value in self.scores.items() if "/" in name}


def best_run(folders: Sequence[Path]) -> Path:
    """The run of the best checkpoint; the last one of equals, and where nothing was measured."""
    return max(reversed(folders), key=lambda folder: json.loads((folder / "best.json").read_text())["quality"])


def copy_checkpoint(source: Path, target: Path) -> None:
    """The files of a checkpoint, each replaced in one move; of adapters too, where it has them."""
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.copy_tokenizer(checkpoint.tokenizer_file(source), target)
    (target / "adapter.safetensors").unlink(missing_ok=True)
    for name in ("model.safetensors", "config.json", "adapter.safetensors"):
        if (source / name).is_file() or name != "adapter.safetensors":
            checkpoint.write(target / name, partial(shutil.copyfile, source / name))
