"""Keep the checkpoint of a run that is best on the validation split, or on held-out rows of one's own.

In:  the scores of each check.  Out: OUT/best during the run; at the end its files are copied into OUT.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from model import checkpoint, durable, sharding
from model.generate import evaluating
from model.losses import score
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
    "held_out/loss": lambda scores: -scores["held_out/loss"] if "held_out/loss" in scores else None,  # the lowest is the best
    "held_out/accuracy": lambda scores: scores.get("held_out/accuracy"),
    "held_out/reward": lambda scores: scores.get("held_out/reward"),
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
        if run.is_main and not self.scores and not run.preview_only:
            shutil.rmtree(self.folder, ignore_errors=True)

    def offer(self, model: VLM, tokenizer_file: Path, step: int, scores: dict[str, float]) -> bool:
        """Save the model if its scores are the best so far; returns whether they are."""
        value = self.quality(scores)
        if value is None or not value > self.value:  # neither is NaN better
            return False
        self.value, self.scores = value, {"step": step, **scores}
        if self.run.is_main:
            checkpoint.save(self.folder, model, tokenizer_file)
        return True

    def keep(self) -> dict[str, float]:
        """Copy the best checkpoint into OUT; returns all scores of its step, or {} if nothing was measured."""
        if self.folder.is_dir():
            copy_checkpoint(self.folder, self.run.out)
            value = self.scores.get(self.measure, self.value)
            self.run.print0(f"step {self.scores['step']} is kept: {self.measure} = {value:.3f}")
        best = self.value if self.folder.is_dir() else 0.0
        durable.write(self.run.out / "best.json", lambda file: file.write_text(json.dumps({"quality": best})))
        logged = [row for row in self.run.history if self.scores and row["step"] == self.scores["step"]]
        return {name: value for row in (*logged, self.scores) for name, value in row.items() if "/" in name}


class HeldOutRows(Protocol):
    """Held-out rows of files (dataset/held_out.py)."""

    chooses: bool

    def __bool__(self) -> bool: ...

    def batches(self) -> Iterator[dict]: ...


class HeldOutCheck:
    """Measures a model on held-out rows before training, ten times during it, and at the end; without rows it does nothing.

    measure   micro-batches -> {"held_out/...": value}, on the first rank alone
    best      what keeps the best checkpoint, where these rows choose it
    """

    def __init__(self, run: Run, rows: HeldOutRows | None, steps: int, measure: Callable[[Iterable[dict]], dict[str, float]],
                 best: BestCheckpoint):
        self.run, self.rows, self.measure, self.best = run, rows, measure, best
        self.every = max(1, steps // 10)
        if run.config.eval_every:
            self.every = min(self.every, run.config.eval_every)
        self.scores: dict[str, float] = {}

    def check(self, model: VLM, tokenizer_file: Path, step: int, last: bool) -> bool:
        """Measure, log and keep the model if it is time; returns whether it is the best so far. Every rank calls this."""
        if not self.rows or not (last or step % self.every == 0):
            return False
        self.run.gather()
        self.scores = self.run.all_gather(self.measure(self.rows.batches()) if self.run.is_main else {})
        self.run.log(step, **self.scores)
        if not self.rows.chooses:
            return False
        with sharding.unsharded(model):
            return self.best.offer(model, tokenizer_file, step, self.scores)

    def keep(self, model: VLM) -> VLM:
        """The model that --out holds at the end: the best one where these rows choose it, with its `scores`; else the last."""
        if not self.rows or not self.rows.chooses:
            return model
        if self.run.is_main:
            self.scores = self.best.keep() or self.scores
        self.run.barrier()
        return checkpoint.load(self.run.out, self.run.device)


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
            durable.write(target / name, partial(shutil.copyfile, source / name))


@torch.no_grad()
def mean_loss(model: VLM, run: Run, batches: Iterable[dict]) -> dict[str, float]:
    """The loss per learned token of held-out rows, in nats; {} where no row is good."""
    loss, tokens, rows = 0.0, 0, 0
    for batch in batches:
        with evaluating(model), run.autocast():
            logps = score(model, run.move(batch)).logps
        loss, tokens, rows = loss - float(logps.sum()), tokens + len(logps), rows + len(batch["ids"])
    return {"held_out/loss": loss / tokens, "held_out/n": rows} if tokens else {}
