"""The run that figures are drawn of: its folder, flags, log and checkpoints; and the colours that all figures share.

In:  a folder, and `Inspector` (model/inspection.py).  Out: a `Stage`, which every figure is a function of.
"""
from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from dataset.checkpoints import Trained
from dataset.report import fonts

INK, READ, LEARNED, IMAGE, GOOD, BAD = "#7d8791", "#a3acb5", "#e8923c", "#5b9bd5", "#4fa66a", "#d4605a"
STYLE = {  # no background and text of a middle tone: readable on a white page and on a dark one
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK, "axes.titlesize": 10,
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
STARTS = {"sft": "pretrain", "dpo": "sft", "grpo": "sft"}  # stage -> the stage that its --init is by default


class CannotDraw(Exception):
    """Why a run does not have a figure."""


@dataclass(eq=False)
class Stage:
    """The run in a folder.

    name      pretrain, sft, dpo or grpo: the stage that it is
    inspect   the folder of a checkpoint -> Inspector
    flags     those of the run, where it has a run.json
    """

    folder: Path
    name: str
    inspect: Callable[[Path], Any]
    flags: dict[str, Any] = field(default_factory=dict)
    opened: dict[Path, Trained] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, name: str, inspect: Callable[[Path], Any]) -> Stage:
        file = folder / "run.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return cls(folder, name, inspect, record.get("flags", {}))

    @property
    def start(self) -> Path | None:
        """The checkpoint that the run began with; None for random weights."""
        default = self.folder.parent / STARTS[self.name] if self.name in STARTS else None
        given = self.flags.get("init")
        return Path(given) if given else default

    @property
    def log(self) -> list[dict]:
        """The lines of its log.jsonl."""
        file = self.folder / "log.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def trained(self, folder: Path | None = None) -> Trained:
        """The checkpoint in a folder, by default the run's own; CannotDraw without one."""
        folder = folder or self.folder
        if not (folder / "config.json").is_file():
            raise CannotDraw(f"no checkpoint in {folder}")
        if folder not in self.opened:
            self.opened[folder] = Trained.of(self.inspect(folder))
        return self.opened[folder]

    def before(self) -> Trained:
        """The checkpoint that the run began with; CannotDraw where it is gone."""
        if not self.start:
            raise CannotDraw("the run began with random weights")
        return self.trained(self.start)


@functools.cache
def chinese_font() -> str | None:
    """The name under which matplotlib knows the system's Chinese font; None where there is none."""
    found = fonts(10)[1]
    path = getattr(found, "path", None)
    if not isinstance(path, str):
        return None
    fontManager.addfont(path)
    return next(entry.name for entry in fontManager.ttflist if entry.fname == path)


def blank(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height))


def canvas(figure: Figure) -> Any:
    """One axis over the whole figure, whose units are inches from the top left corner."""
    axis = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches()
    axis.set(xlim=(0, width), ylim=(height, 0))
    axis.set_axis_off()
    return axis
