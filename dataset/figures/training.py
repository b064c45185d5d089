"""What training did: the parts that each stage changed, and the skills that stage 2 brought.

In:  the checkpoints of the stages, and log.jsonl.  Out: two figures.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from safetensors.numpy import load_file

from dataset.figures.row import box, title
from dataset.figures.stage import IMAGE, INK, LEARNED, READ, STARTS, CannotDraw, Stage, blank, canvas

PARTS = ("encoder", "connector", "llm")


def sizes(folder: Path, start: Path | None, fixed: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """Part -> (parameters in tensors that the run changed, parameters); (0, 0) of a frozen encoder, which is not stored.

    fixed   parts that stay as they were before training, of a run that began with weights from elsewhere
    """
    now = load_file(folder / "model.safetensors")
    before = load_file(start / "model.safetensors") if start else {}
    found = dict.fromkeys(PARTS, (0, 0))
    for name, tensor in now.items():
        part = name.partition(".")[0]
        old = before.get(name)
        new = part not in fixed if old is None else old.shape != tensor.shape or bool((old != tensor).any())
        changed = tensor.size if new else 0
        found[part] = (found[part][0] + changed, found[part][1] + tensor.size)
    return found


def frozen(stage: Stage) -> Figure:
    """Stages x parts: trained where the weights differ from those that the stage began with, else frozen."""
    root, rows = stage.folder.parent, {}
    for name in ("pretrain", *STARTS):
        one = stage if name == stage.name else Stage.of(root / name, name, stage.inspect)
        start, modes = one.start, one.flags.get("train", {})
        fixed = [part for part in PARTS if modes.get(part) == "freeze"]
        if (one.folder / "model.safetensors").is_file() and (not start or (start / "model.safetensors").is_file()):
            rows[name if one is not stage else stage.folder.name] = sizes(one.folder, start, fixed)
    if not rows:
        raise CannotDraw("no stage has a checkpoint beside the one that it began with")
    total = sum(weight.numel() for weight in stage.trained().inspector.model.encoder.parameters())
    figure = blank(6.6, 0.95 + 0.55 * len(rows))
    axis = canvas(figure)
    title(axis, "What each stage trains, and how many parameters")
    for column, part in enumerate(PARTS):
        axis.text(2.2 + 1.75 * column, 0.65, {"llm": "language model"}.get(part, part), ha="center", va="center")
    for line, (name, parts) in enumerate(rows.items()):
        y = 0.85 + 0.55 * line
        axis.text(0.1, y + 0.22, name, va="center", fontweight="bold")
        for column, part in enumerate(PARTS):
            changed, size = parts[part]
            size = size or total
            box(axis, 1.4 + 1.75 * column, y, 1.6, 0.45, LEARNED if changed else IMAGE)
            axis.text(2.2 + 1.75 * column, y + 0.22, f"{'trained' if changed else 'frozen'}  {(changed or size) / 1e6:.2f} M",
                      ha="center", va="center", color="black", fontsize=9.5)
    return figure


# ---------------------------------------------------------------- skills


def scores_by_kind(stage: Stage) -> dict[str, list[tuple[int, float]]]:
    """Kind of question about the world -> (step, share of right answers), of the checks on held-out scenes."""
    from dataset.world.questions import KINDS, PAIR_KINDS

    kinds = ("caption", "list", *KINDS, *PAIR_KINDS)
    found: dict[str, list[tuple[int, float]]] = {}
    for line in stage.log:
        for metric, value in line.items():
            task, _, kind = metric.partition("/")
            if (task == "world" and kind in kinds) or (task in ("easy_vqa", "arithmetic") and kind == "accuracy"):
                found.setdefault(kind if task == "world" else task.replace("_", " "), []).append((line["step"], value))
    return dict(sorted(found.items(), key=lambda item: -item[1][-1][1]))


def skills(stage: Stage) -> Figure:
    """The share of right answers by kind: over the steps where it was checked along the way, else at the end beside the loss."""
    scores = scores_by_kind(stage)
    if not scores:
        raise CannotDraw("its log.jsonl has no check by kind of question: --bench world checks them")
    return over_steps(scores) if any(len(points) > 1 for points in scores.values()) else at_end(scores, stage)


def over_steps(scores: dict[str, list[tuple[int, float]]]) -> Figure:
    """A small panel for each kind."""
    columns = 5
    rows = math.ceil(len(scores) / columns)
    figure = blank(9, 1.45 * rows + 0.8)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axis, (kind, points) in zip(axes, scores.items()):
        steps, shares = zip(*points)
        axis.plot(steps, [100 * share for share in shares], color=LEARNED, linewidth=2, marker="o", markersize=3)
        axis.set_title(f"{kind.replace('_', ' ')}  {100 * shares[-1]:.0f} %", fontsize=9)
        axis.set(ylim=(0, 103), yticks=(0, 50, 100))
        axis.grid(axis="y", color=READ, alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in axes[len(scores):]:
        axis.set_axis_off()
    height = figure.get_figheight()
    figure.suptitle("What it learns when: right answers (%) over the steps", fontsize=12, fontweight="bold",
                    y=1 - 0.12 / height)
    figure.supxlabel("step", fontsize=9)
    figure.subplots_adjust(left=0.055, right=0.99, top=1 - 0.65 / height, bottom=0.5 / height, hspace=0.42, wspace=0.12)
    return figure


def at_end(scores: dict[str, list[tuple[int, float]]], stage: Stage) -> Figure:
    """The loss over the steps, and the share of each kind after the last."""
    losses = [(line["step"], line["loss"]) for line in stage.log if "loss" in line]
    figure = blank(9, 0.9 + 0.23 * len(scores))
    left, right = figure.subplots(1, 2, gridspec_kw=dict(width_ratios=(1, 1.25)))
    left.plot(*zip(*losses), color=LEARNED, linewidth=2)
    left.set(title="loss (nats per learned token)", xlabel="step", yscale="log")
    names = [kind.replace("_", " ") for kind in scores]
    shares = [100 * points[-1][1] for points in scores.values()]
    right.barh(names, shares, color=IMAGE, height=0.7)
    for place, share in enumerate(shares):
        right.text(share - 1.5, place, f"{share:.0f} %", va="center", ha="right", fontsize=8, color="black")
    right.set(title="right answers after the last step, by kind", xlim=(0, 100))
    right.invert_yaxis()
    for axis in (left, right):
        axis.tick_params(labelsize=8, colors=INK)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.9, bottom=0.12, wspace=0.32)
    return figure
