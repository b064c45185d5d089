"""Several checkpoints in one table and one chart, beside the published numbers of others where the set is the same.

In:  folders with scores.json, as 4-eval_chat.py --model A B C --bench ... writes them.
Out: benchmarks.md with a row for each score and a column for each checkpoint, and benchmarks.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.report import bench_scores, is_share
from dataset.writing import write_text

HEADLINES = {  # task -> the scores that the table shows; of any other task: accuracy
    "world": ("exact", "blank"),
    "world_words": ("exact",),
    "world_unknown": ("name", "drawing"),
    "world_clips": ("exact", "single_frame"),
    "world_pope": ("f1", "accuracy"),
    "hallucination": ("false", "chair_s", "cover"),
    "reflection": ("recovery", "swap", "swap_old"),
    "sokoban": ("solved",),
    "text": ("translation", "small_talk"),
    "scienceqa": ("image_accuracy",),
    "pope": ("f1", "accuracy"),
    "mme": ("perception", "cognition"),
    "mmvet": ("total",),
    "object_halbench": ("rsp", "men"),
    "mmhal": ("score", "hallucination_rate"),
    "refomb": ("win_rate",),
    "amber": ("amber", "chair", "cover"),
}
LOWER_IS_BETTER = {"false", "chair_s", "swap_old", "rsp", "men", "hallucination_rate", "chair"}
COLUMNS = ("gqa/accuracy", "scienceqa/image_accuracy", "textvqa/accuracy", "mmvet/total", "pope/accuracy", "mme/perception",
           "mmmu/accuracy")  # fmt: skip
TINYLLAVA = {  # github.com/TinyLLaVA/TinyLLaVA_Factory, README
    "OpenELM-450M + SigLIP": (0.539, 0.541, 0.440, 0.200, 0.854, 1118.8, 0.240),
    "Qwen2-0.5B + SigLIP": (0.558, 0.601, 0.452, 0.195, 0.866, 1153.0, 0.297),
    "Phi-2 + SigLIP": (0.621, 0.730, 0.603, 0.375, 0.872, 1466.4, 0.384),
}
PUBLISHED: dict[str, dict[str, float]] = {
    **{model: dict(zip(COLUMNS, values, strict=True)) for model, values in TINYLLAVA.items()},
    "LLaVA-1.5-7B": {"gqa/accuracy": 0.620, "scienceqa/image_accuracy": 0.668, "textvqa/accuracy": 0.582, "mmvet/total": 0.305,
                     "pope/f1": 0.859, "mme/perception": 1510.7,  # its model card
                     "object_halbench/rsp": 0.545, "object_halbench/men": 0.278},  # arXiv 2405.17220
    "RLAIF-V 7B": {"object_halbench/rsp": 0.105, "object_halbench/men": 0.052},
    "RLAIF-V 12B": {"object_halbench/rsp": 0.045, "object_halbench/men": 0.029},
}  # fmt: skip
NOTES = {  # task -> what a reader must know before comparing with the published numbers
    "textvqa": "TextVQA: the published numbers are with OCR tokens in the prompt (textvqa:ocr=true).",
    "mmvet": "MM-Vet: the published numbers were graded by gpt-4-0613; those of another judge do not compare.",
    "object_halbench": "Object HalBench: the published numbers are by GPT-3.5 as extractor; those by a rule do not compare.",
    "vqav2": "VQAv2: the published numbers are of test-dev, another set than val, so none stands here.",
}

Scores = dict[str, dict[str, float]]  # by the name of a column


def names(folders: Sequence[Path]) -> list[str]:
    """What the columns are called: the folders' names, or their paths where two have the same name."""
    short = [folder.name for folder in folders]
    return short if len(set(short)) == len(short) else [folder.as_posix() for folder in folders]


def rows_of(tasks: Iterable[str], scores: Scores) -> list[str]:
    """The scores to show, "task/metric", that a checkpoint has; all of a task that has none of its headlines."""
    known = sorted({metric for of in scores.values() for metric in of})
    rows = []
    for task in tasks:
        wanted = [f"{task}/{metric}" for metric in HEADLINES.get(task, ("accuracy",))]
        every = [one for one in known if one.startswith(f"{task}/") and one.rpartition("/")[2] not in ("n", "seconds")]
        rows += [one for one in wanted if one in known] or every
    return rows


def shown(metric: str, of: dict[str, float], questions: float) -> str:
    """A cell: the score, and how many questions it is of where that is fewer than in another column."""
    if metric not in of:
        return ""
    value = f"{100 * of[metric]:.1f} %" if is_share(metric) else f"{of[metric]:g}"
    asked = of.get(f"{metric.rpartition('/')[0]}/n", questions)  # of published numbers: the full set
    return value if asked == questions else f"{value} (n = {asked:g})"


def markdown(metrics: Sequence[str], ours: Scores, others: Scores) -> str:
    """The table."""
    columns = {**ours, **others}
    lines = [["score", "questions", *columns], ["---"] * (2 + len(columns))]
    for metric in metrics:
        questions = max(of.get(f"{metric.rpartition('/')[0]}/n", 0) for of in ours.values())
        lower = " (lower is better)" if metric.rpartition("/")[2] in LOWER_IS_BETTER else ""
        lines.append([metric + lower, f"{questions:g}", *(shown(metric, of, questions) for of in columns.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(metrics: Sequence[str], columns: Scores, file: Path) -> None:
    """A small bar chart for each score, a bar for each column that has it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    across = min(4, len(metrics))
    down = -(-len(metrics) // across)
    figure, axes = plt.subplots(down, across, figsize=(3.2 * across, 2.4 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    for axis, metric in zip(axes.flat, metrics):
        bars = [(k, name, of[metric] * (100 if is_share(metric) else 1)) for k, (name, of) in enumerate(columns.items())
                if metric in of]  # fmt: skip
        drawn = axis.bar([name for _, name, _ in bars], [value for *_, value in bars], color=[f"C{k % 10}" for k, *_ in bars])
        axis.bar_label(drawn, fmt="%.3g", fontsize=7)
        axis.set_title(metric + (" (%)" if is_share(metric) else ""), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.tick_params(axis="x", rotation=30 if len(bars) > 4 else 0)
        axis.margins(y=0.15)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_table(folders: Sequence[Path], tasks: Iterable[str]) -> Path:
    """Write benchmarks.md and benchmarks.png beside the first checkpoint. Returns the page."""
    asked, page = list(tasks), folders[0].parent / "benchmarks.md"
    ours = {name: bench_scores(folder) for name, folder in zip(names(folders), folders)}
    metrics = rows_of(asked, ours)
    others = {name: of for name, of in PUBLISHED.items() if set(of) & set(metrics)}
    notes = [f"- {NOTES[task]}" for task in asked if task in NOTES]
    sources = ["- Published: TinyLLaVA Factory's README, LLaVA-1.5's model card, RLAIF-V (arXiv 2405.17220)."] if others else []
    text = ["# Benchmarks", markdown(metrics, ours, others), f"![]({page.stem}.png)", "\n".join([*sources, *notes])]
    write_text(page, "\n\n".join(filter(None, text)) + "\n")
    draw(metrics, {**ours, **others}, page.with_suffix(".png"))
    return page
