"""Compare runs: a table of their scores with mean and spread over seeds, and a picture of one score against another.

In:  folders with a scores.json; NAME-SEED folders (out/dpo-0, out/dpo-1) are one run with several seeds. Before script 4 has
     run, scores.json has validation scores of training; do not compare those with test scores.
Out: a Markdown table; with --picture a PNG with a point per folder.

    python -m dataset.studies.compare out/sft out/dpo-* out/lora-* --metrics hallucination/false hallucination/cover \\
        --picture runs.png
"""
from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dataset.report import is_share
from model.registry import UserError


@dataclass
class Config:
    folders: Positional[tuple[Path, ...]]  # folders to compare
    metrics: tuple[str, ...] = ("hallucination/false", "hallucination/cover")  # columns; the first two are the picture's axes
    picture: Path | None = None  # file of the picture, a PNG; default: none


def by_run(folders: Sequence[Path], metrics: Sequence[str]) -> dict[str, list[list[float]]]:
    """Run -> the scores of each seed in the order of `metrics`; ValueError for a missing file or metric."""
    runs = defaultdict(list)
    for folder in folders:
        file = folder / "scores.json"
        if not file.is_file():
            raise UserError(f"{file} is missing: python 4-eval_chat.py --model {folder} --bench {metrics[0].partition('/')[0]}")
        scores = json.loads(file.read_text())
        if missing := [metric for metric in metrics if metric not in scores]:
            raise UserError(f"{file} has no {', '.join(missing)}; it has {', '.join(sorted(scores))}")
        runs[re.sub(r"(?<!^iteration)-\d+$", "", folder.name)].append([scores[metric] for metric in metrics])
    return dict(runs)


def mean_and_spread(metric: str, values: Sequence[float]) -> str:
    """'2.4 %' for one value, '2.4 ± 0.3 %' for several: mean and standard deviation; no percent if the metric is not a share."""
    scale, unit = (1, "") if not is_share(metric) else (100, " %")
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{spread}{unit}"


def markdown(runs: dict[str, list[list[float]]], metrics: Sequence[str]) -> str:
    """The table, one row per run."""
    rows = [["run", "seeds", *(metric.rpartition("/")[2] for metric in metrics)], ["---"] * (2 + len(metrics))]
    rows += [[name, str(len(seeds)), *map(mean_and_spread, metrics, zip(*seeds))] for name, seeds in runs.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(runs: dict[str, list[list[float]]], metrics: Sequence[str], file: Path) -> None:
    """Draw the first metric against the second in percent: a colour per run, a point per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for name, seeds in runs.items():
        axis.scatter([100 * seed[0] for seed in seeds], [100 * seed[1] for seed in seeds], label=name, s=28)
    axis.set_xlabel(f"{metrics[0]} (%)")
    axis.set_ylabel(f"{metrics[1]} (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    if config.picture and len(config.metrics) < 2:
        raise SystemExit("a picture has two axes: give two --metrics")
    try:
        runs = by_run(config.folders, config.metrics)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(markdown(runs, config.metrics))
    if config.picture:
        draw(runs, config.metrics, config.picture)
        print(f"wrote {config.picture}")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))
