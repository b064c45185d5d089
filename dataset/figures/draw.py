"""Figures of a run: what a newcomer wants to see of each stage, drawn from the run's own checkpoint and log.

In:  the folder of a run, and `Inspector`, which opens a checkpoint (model/inspection.py).
Out: FOLDER/figures/NAME.png and a section of out/report.md. What cannot be drawn is left out, with its reason.

To add a figure, write a function of a `Stage` that returns a matplotlib figure, and name it in FIGURES.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dataset.bad_rows import BadRow
from dataset.figures import attention, row, stage_three, training
from dataset.figures.stage import STYLE, CannotDraw, Stage, chinese_font
from dataset.report import section
from model.registry import UserError


@dataclass(frozen=True)
class Kind:
    """A figure: the stages that have it, what it shows, and the function that draws it."""

    stages: tuple[str, ...]
    caption: str
    draw: Callable[[Stage], Figure]


FIGURES = {
    "tokens": Kind(("pretrain", "sft"), "A training row as the model reads it", row.tokens),
    "row": Kind(("pretrain", "sft"), "The way of this row, from pixels to its loss", row.way),
    "attention": Kind(("sft",), "Where the model looks while it answers", attention.draw),
    "skills": Kind(("sft",), "What it can do, by kind of question", training.skills),
    "pair": Kind(("dpo",), "One preference pair, before and after training", stage_three.pair),
    "group": Kind(("grpo",), "One group of answers, before and after training", stage_three.group),
    "frozen": Kind(("sft", "dpo", "grpo"), "Which part each stage has changed", training.frozen),
}


def draw(stage: Stage, name: str, file: Path) -> None:
    """Draw one figure of a run into a file; CannotDraw says why there is none."""
    chinese = chinese_font()
    style: Any = {**STYLE, "font.family": ["DejaVu Sans", *([chinese] if chinese else [])]}
    with rc_context(style):
        try:
            figure = FIGURES[name].draw(stage)
        except (UserError, BadRow) as error:
            raise CannotDraw(str(error)) from error
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110)


def draw_all(stage: Stage, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Draw what the run has into a folder: (caption -> file, a line for each figure that is left out)."""
    drawn, missing = {}, []
    for name, kind in FIGURES.items():
        if stage.name in kind.stages:
            try:
                draw(stage, name, folder / f"{name}.png")
                drawn[kind.caption] = folder / f"{name}.png"
            except CannotDraw as reason:
                (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier run
                missing.append(f"left out {name}.png: {reason}")
    return drawn, missing


def figures_section(folder: Path, name: str, inspect: Callable[[Path], Any]) -> list[str]:
    """Draw the figures of a run into FOLDER/figures, with a section of the report; returns a line for each that is left out."""
    drawn, missing = draw_all(Stage.of(folder, name, inspect), folder / "figures")
    page = folder.parent / "report.md"
    shown = [f"**{caption}**\n\n![{caption}]({file.relative_to(page.parent).as_posix()})" for caption, file in drawn.items()]
    section(page, f"Figures of {folder.name}", "\n\n".join([*shown, *missing]))
    return missing

