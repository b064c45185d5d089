"""Studies of stage 3: arms that differ in one thing, with several seeds each; a table, a picture, a verdict.

In:  the name of a study (STUDIES, below), and the checkpoint that its arms start from.
Out: out/studies/NAME/: table.md (also printed), figure.png, and ARM-SEED/ with the files of each run. Table, picture and
     verdict are added to out/report.md.

    python -m dataset.studies.arms stages                        LMM-R1: reasoning in words first, then on pictures
    python -m dataset.studies.arms preferences                   RLAIF-V: who labels, what is labelled, what is trained
    python -m dataset.studies.arms efficiency --jobs 2           two runs at a time, one thread each
    python -m dataset.studies.arms arithmetic --seeds 1 --steps 10 --examples 50

Each arm runs the numbered scripts as processes, and each result is measured on the test split. A finished run with the same
settings and start weights is reused; with another --examples it is only measured again. Changed defaults of the scripts are not
noticed: after such a change use another --out.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from dataset.report import section
from dataset.studies import compare
from dataset.studies.scripts import ScriptError, markdown, start

# ---------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Arm:
    """A sequence of runs (script, flags), each of which starts from the checkpoint of the one before it.

    --init, --out, --seed and, if the flags lack it, --max_steps are added. In the flags {steps} stands for the steps of the
    study, {words} for three fifths of them, and {pictures} for the rest.
    """

    name: str
    steps: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Study:
    """Arms to compare.

    init_flag     the flag that names the checkpoint they start from
    benchmarks    (tasks, pictures of their test sets; None: --examples) for each result
    metrics       columns of the table and panels of the picture
    comparisons   pairs (arm, arm or start) for the verdict
    steps         of each arm; None: the script's default
    plot          bars: one per arm | lines: over the number in the arms' names, NAME-NUMBER | points: the first metric against
                  the second, one per run
    """

    arms: tuple[Arm, ...]
    init_flag: str
    benchmarks: tuple[tuple[str, int | None], ...]
    metrics: tuple[str, ...]
    comparisons: tuple[tuple[str, str], ...]
    steps: int | None = 20
    seeds: int = 3
    plot: str = "bars"


START = "start"  # the row of the checkpoint that all arms start from
COUNTS = {"sokoban/moves"}  # metrics that are counts, not shares
INIT_COMMANDS = {  # flag -> the commands that train its checkpoint
    "init": "python 2-sft_vlm.py --out {}",
    "geometry_init": "python 2-sft_vlm.py --init out/sft --out {} --data geometry:rows=24000,direct=0.7 "
                     "arithmetic:text=true,rows=0,lists=1000 world:0.08 --lr 6e-3",
    "perception_init": "python 2-sft_vlm.py --init out/sft --out out/sft-counting --data perception:text=true,rows=28000 "
                       "perception:text=false,rows=14000 world:0.08 --lr 6e-3 && "
                       "python 2-sft_vlm.py --init out/sft-counting --out {} --data perception:text=false,first=20000,rows=3000,"
                       "direct=0.8 perception:text=true,first=30000,rows=1500 world:0.08 --lr 2e-3",
    "sokoban_init": "python 2-sft_vlm.py --init out/sft --out {} --data sokoban:rows=36000,plays=5000,direct=0.5 world:0.08 "
                    "--lr 6e-3",
}  # fmt: skip
SFT, RL = "2-sft_vlm.py", "3-rl_vlm.py"
KEEP_BEST = "--eval_every 20 --bench"  # with a task: keep the checkpoint with the best validation score, the start included
KEEP_LAST = '--bench ""'  # no validation: keep the last checkpoint
SUM_METRICS = ("arithmetic/image", "arithmetic/text")
HALLUCINATION = (("hallucination", 1000), ("world_pope", 200), ("world", 100))
HALLUCINATION_METRICS = ("hallucination/false", "hallucination/cover", "hallucination/chair_s", "hallucination/chair_i",
                         "hallucination/malformed", "world_pope/accuracy", "world/exact")
NEVER_SEEN = "first=100000"  # problems that no earlier stage learned from
PROBLEMS = (64, 256, 1024)


def rl(name: str, *runs: str) -> Arm:
    """An arm of RL runs, given by their flags, one after another."""
    return Arm(name, tuple((RL, flags) for flags in runs))


STUDIES = {
    # RLAIF-V: who labels, what is labelled, what is trained? The control learns from the chosen answers alone.
    "preferences": Study(
        arms=(rl("dpo", "--algo dpo"), rl("lora", "--algo dpo --train.llm lora:8 --lr 2e-4"),
              rl("self", "--algo dpo --labeler self"), rl("whole", "--algo dpo --labeler self --divider whole"),
              rl("control", "--algo sft_chosen")),
        comparisons=(("dpo", START), ("dpo", "control"), ("self", "whole")), init_flag="init", steps=None,
        benchmarks=HALLUCINATION, metrics=HALLUCINATION_METRICS, plot="points"),
    "iterations": Study(
        arms=(rl("iterations", "--algo dpo --iterations 4"),), comparisons=(("iterations", START),), init_flag="init", steps=None,
        seeds=1, benchmarks=HALLUCINATION, metrics=HALLUCINATION_METRICS, plot="points"),
    # What does the default gain, and does it lose anything?
    "arithmetic": Study(
        arms=(rl("rules", ""),), comparisons=(("rules", START),), init_flag="init", steps=None,
        benchmarks=(("arithmetic", None), ("world,easy_vqa,text", 100)),
        metrics=(*SUM_METRICS, "world/exact", "easy_vqa/accuracy", "text/translation")),
    # What does a shaped reward lead to? Its arm keeps the last checkpoint: validation by solved levels would hide the effect.
    "sokoban": Study(
        arms=(rl("solved", f"--data sokoban:{NEVER_SEEN} --resample_rounds 1 {KEEP_BEST} sokoban"),
              rl("hackable", f"--data sokoban:reward=hackable,{NEVER_SEEN} --resample_rounds 1 {KEEP_LAST}")),
        comparisons=(("solved", START), ("hackable", "solved")), init_flag="sokoban_init", benchmarks=(("sokoban", None),),
        metrics=("sokoban/image", "sokoban/text", "sokoban/untouched", "sokoban/moves")),
    # Two more tasks, each from a start of its own (INIT_COMMANDS) that answers most picture questions without steps.
    "geometry": Study(
        arms=(rl("rules", f"--data geometry:{NEVER_SEEN} --resample_rounds 1 {KEEP_BEST} geometry"),),
        comparisons=(("rules", START),), init_flag="geometry_init", benchmarks=(("geometry", 3000),),
        metrics=("geometry/image", "geometry/text", "geometry/held_out")),
    "perception": Study(
        arms=(rl("rules", f"--data perception:{NEVER_SEEN} --resample_rounds 1 {KEEP_BEST} perception"),),
        comparisons=(("rules", START),), init_flag="perception_init", benchmarks=(("perception", 3000),),
        metrics=("perception/image", "perception/text", "perception/held_out")),
    # MM-EUREKA: what do the same few problems teach by RL on answers, by SFT on answers, and by SFT on worked solutions?
    "efficiency": Study(
        arms=(*(rl(f"rl-{k}", f"--data arithmetic:{NEVER_SEEN},rows=0 --problems {k} {KEEP_LAST}") for k in PROBLEMS),
              *(Arm(f"sft_{what}-{k}", ((SFT, f"--data arithmetic:{NEVER_SEEN},rows={k},direct={direct} --lr 1e-3 {KEEP_LAST}"),))
                for what, direct in (("answers", 1), ("worked", 0)) for k in PROBLEMS)),
        comparisons=tuple((f"rl-{k}", f"sft_{what}-{k}") for k in PROBLEMS for what in ("answers", "worked")), init_flag="init",
        steps=40, benchmarks=(("arithmetic", None),), metrics=SUM_METRICS, plot="lines"),
    # LMM-R1: reasoning in words first. All arms but `fewer_images` have equally many rollouts.
    "stages": Study(
        arms=(rl("text_image", f"--data arithmetic:text=true --max_steps {{words}} {KEEP_LAST}",
                 f"--data arithmetic:text=false --max_steps {{pictures}} {KEEP_LAST}"),
              rl("image", f"--data arithmetic:text=false {KEEP_LAST}"),
              rl("fewer_images", f"--data arithmetic:text=false --max_steps {{pictures}} {KEEP_LAST}"),
              rl("text", f"--data arithmetic:text=true {KEEP_LAST}"),
              rl("mixed", f"--data arithmetic {KEEP_LAST}")),
        comparisons=(("text_image", "image"), ("text_image", "fewer_images"), ("text_image", START)), init_flag="init",
        seeds=5, benchmarks=(("arithmetic", None),), metrics=SUM_METRICS),
    "ablations": Study(
        arms=(rl("default", f"--data arithmetic {KEEP_LAST}"), rl("kl", f"--algo grpo:kl=0.01 {KEEP_LAST}"),
              rl("no_filter", f"--keep_zero_variance {KEEP_LAST}"), rl("grpo", f"--algo grpo:advantage=grpo {KEEP_LAST}")),
        comparisons=(("kl", "default"), ("no_filter", "default"), ("grpo", "default")), init_flag="init",
        benchmarks=(("arithmetic", None),), metrics=SUM_METRICS),
}  # fmt: skip


# ---------------------------------------------------------------- runs


@dataclass
class Config:
    study: Positional[str]  # preferences | iterations | arithmetic | sokoban | geometry | perception | efficiency | ... (STUDIES)
    seeds: int | None = None  # seeds of each arm, counted from 0; default: the study's own, 3 for most
    steps: int | None = None  # training steps of each arm; default: the study's own
    examples: int = 1500  # test problems of benchmarks without a number of their own; of sums a third is in words
    init: Path = Path("out/sft")  # the checkpoint to start from
    geometry_init: Path = Path("out/sft-geometry")  # the checkpoint to start from in the study geometry
    perception_init: Path = Path("out/sft-perception")  # ... in the study perception
    sokoban_init: Path = Path("out/sft-sokoban")  # ... in the study sokoban
    out: Path = Path("out/studies")  # folder of the results
    jobs: int = 1  # runs at a time; with several, each has one thread


def commands(arm: Arm, steps: int | None) -> list[tuple[str, list[str]]]:
    """(script, flags) of each run of an arm, without the flags that depend on the seed."""
    words = (steps or 0) * 3 // 5
    counts = {"steps": steps, "words": words, "pictures": (steps or 0) - words}
    result = []
    for script, text in arm.steps:
        flags = ["" if flag == '""' else flag for flag in text.format(**counts).split()]
        result.append((script, flags + ["--max_steps", str(steps)] * bool(steps and "--max_steps" not in flags)))
    return result


def fingerprint(checkpoint: Path) -> str:
    """A hash of the weights of a checkpoint."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


def result(study: Study, arm: Arm, seed: int, init: Path, folder: Path, config: Config) -> dict:
    """The scores of an arm and its seconds of training, from FOLDER/result.json if its settings agree, else from new runs."""
    benchmarks = [[tasks, examples or config.examples] for tasks, examples in study.benchmarks]
    steps = [[script, *flags] for script, flags in commands(arm, config.steps)]
    settings = {"start": fingerprint(init), "steps": steps, "seed": seed, "judged": benchmarks}
    file = folder / "result.json"
    saved = json.loads(file.read_text()) if file.is_file() else {"settings": {}}
    if saved["settings"] == settings and set(study.metrics) <= saved["scores"].keys():
        return saved
    model = folder / (f"step-{len(steps)}" if steps else "model")
    threads = 1 if config.jobs > 1 else None
    if {**saved["settings"], "judged": benchmarks} == settings and (model / "config.json").is_file():
        seconds = saved["seconds"]  # trained already, but measured on other questions
    else:
        shutil.rmtree(folder, ignore_errors=True)
        seconds = train(steps, seed, init, folder, threads)
    (model / "scores.json").unlink(missing_ok=True)  # of more questions than are asked now: script 4 would keep them
    for tasks, examples in benchmarks:
        start("4-eval_chat.py", "--model", model, "--bench", tasks, "--examples", examples, "--controls", 0, threads=threads)
    scores = json.loads((model / "scores.json").read_text())
    facts = {"settings": settings, "seconds": seconds, "scores": {metric: scores[metric] for metric in study.metrics}}
    file.write_text(json.dumps(facts, indent=1))
    return facts


def train(steps: Sequence[list[str]], seed: int, init: Path, folder: Path, threads: int | None) -> float:
    """Run the steps of an arm one after another, into FOLDER/step-1, step-2, ...; returns the seconds that they took.

    The start has no steps. It is copied to FOLDER/model, since the original may have scores of other questions beside it.
    """
    model, began = init, time.time()
    for index, (script, *flags) in enumerate(steps, 1):
        out = folder / f"step-{index}"  # the report beside it belongs to this run alone
        start(script, "--init", model, "--out", out, "--seed", seed, *flags, threads=threads)
        model = out
    if not steps:
        (folder / "model").mkdir(parents=True)
        for part in init.glob("*"):
            if part.is_file() and part.name != "scores.json":
                shutil.copy(part, folder / "model")
    return round(time.time() - began, 1)


def results(study: Study, init: Path, config: Config) -> dict[str, list[dict]]:
    """Arm (or start) -> the facts of each seed. ScriptError if a run fails, after those in progress have ended."""
    runs = [(Arm(START, ()), 0), *((arm, seed) for seed in range(config.seeds or study.seeds) for arm in study.arms)]
    failed: list[str] = []

    def run(arm: Arm, seed: int) -> dict | None:
        name = f"{arm.name}-{seed}" if arm.steps else arm.name
        if failed:  # start no other run
            return None
        try:
            facts = result(study, arm, seed, init, config.out / config.study / name, config)
        except ScriptError as error:
            failed.append(f"{name}: {error}")
            return None
        print(f"{name}: {', '.join(f'{metric} {value:.3f}' for metric, value in facts['scores'].items())}", flush=True)
        return facts

    with ThreadPoolExecutor(config.jobs) as pool:
        facts_of_runs = list(pool.map(lambda arm_and_seed: run(*arm_and_seed), runs))
    if failed:
        raise ScriptError("; ".join(failed))
    return {name: [facts for (arm, _), facts in zip(runs, facts_of_runs, strict=True) if facts and arm.name == name]
            for name in (START, *(arm.name for arm in study.arms))}


# ---------------------------------------------------------------- table, verdict and picture


def values(runs: dict[str, list[dict]], arm: str, metric: str) -> list[float]:
    """The metric of each seed, in percent where it is a share."""
    return [facts["scores"][metric] * (1 if metric in COUNTS else 100) for facts in runs[arm]]


def standard_error(numbers: Sequence[float]) -> float | None:
    """The standard error of the mean; None for one value."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None


def mean_and_error(numbers: Sequence[float], unit: str = "") -> str:
    """'74.0 ± 1.2 %': mean and standard error."""
    error = standard_error(numbers)
    return f"{statistics.mean(numbers):.1f}{'' if error is None else f' ± {error:.1f}'}{unit}"


def table(study: Study, runs: dict[str, list[dict]]) -> str:
    """The Markdown table: a row for the start and for each arm."""
    rows = [[arm, str(len(seeds)) if arm != START else "",
             *(mean_and_error(values(runs, arm, metric), "" if metric in COUNTS else " %") for metric in study.metrics),
             mean_and_error([facts["seconds"] for facts in seeds], " s") if arm != START else ""] for arm, seeds in runs.items()]
    return markdown(["", "seeds", *study.metrics, "training"], rows)


def difference(runs: dict[str, list[dict]], arm: str, other: str, metric: str) -> str:
    """'arithmetic/text 3.2 ± 1.1 points higher': the difference of two means and its standard error over seeds.

    The start is one checkpoint, so it has no error over seeds.
    """
    a, b = values(runs, arm, metric), values(runs, other, metric)
    gap = statistics.mean(a) - statistics.mean(b)
    errors = [standard_error(seeds) for name, seeds in ((arm, a), (other, b)) if name != START]
    known_errors = [error for error in errors if error is not None]
    direction = f"{'' if metric in COUNTS else ' points'} {'higher' if gap > 0 else 'lower' if gap < 0 else 'apart'}"
    if len(known_errors) < len(errors):
        return f"{metric} {abs(gap):.1f}{direction} (one seed: it may be chance)"
    error = math.hypot(*known_errors)
    return f"{metric} {abs(gap):.1f} ± {error:.1f}{direction}{'' if abs(gap) > 2 * error else ' (not told apart)'}"


def verdict(study: Study, runs: dict[str, list[dict]]) -> str:
    """The differences of the arms that the study compares, in words."""
    parts = [f"{arm} against {other}: {', '.join(difference(runs, arm, other, metric) for metric in study.metrics)}"
             for arm, other in study.comparisons]
    return f"Verdict (± standard error over seeds; within two of them, not told apart). {'; '.join(parts)}."


def draw(study: Study, runs: dict[str, list[dict]], file: Path) -> None:
    """Draw the picture of `study.plot`; bars and lines have one panel per metric, with errors and a dot per seed."""
    if study.plot == "points":
        points = {arm: [[facts["scores"][metric] for metric in study.metrics] for facts in seeds] for arm, seeds in runs.items()}
        return compare.draw(points, study.metrics, file)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = 1.5 + max(2.5, 0.8 * len(runs))
    figure, panels = plt.subplots(1, len(study.metrics), figsize=(wide * len(study.metrics), 4), squeeze=False)
    for axis, metric in zip(panels[0], study.metrics):
        (draw_lines if study.plot == "lines" else draw_bars)(axis, {arm: values(runs, arm, metric) for arm in runs})
        axis.set_ylabel(metric if metric in COUNTS else f"{metric} (%)")
        axis.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_bars(axis, numbers: dict[str, list[float]]) -> None:
    for place, (arm, seeds) in enumerate(numbers.items()):
        axis.bar(place, statistics.mean(seeds), yerr=standard_error(seeds), capsize=4, width=0.7,
                 color="lightgrey" if arm == START else "tab:blue", alpha=0.7)
        if arm != START:
            axis.scatter([place] * len(seeds), seeds, color="black", s=12, zorder=3)
    axis.set_xticks(range(len(numbers)), numbers, rotation=30, ha="right")


def draw_lines(axis, numbers: dict[str, list[float]]) -> None:
    """For arms NAME-NUMBER: a line per name over the numbers, on a logarithmic axis; the start is a horizontal line."""
    families: dict[str, list[tuple[int, list[float]]]] = {}
    for arm, seeds in numbers.items():
        if arm != START:
            name, _, problems = arm.rpartition("-")
            families.setdefault(name, []).append((int(problems), seeds))
    for name, points in families.items():
        line = axis.errorbar([k for k, _ in points], [statistics.mean(seeds) for _, seeds in points], label=name, capsize=4,
                             yerr=[standard_error(seeds) or 0 for _, seeds in points])
        for k, seeds in points:
            axis.scatter([k] * len(seeds), seeds, color=line[0].get_color(), s=12, zorder=3)
    axis.axhline(numbers[START][0], color="grey", linestyle="--", label=START)
    axis.set_xscale("log", base=2)
    ticks = sorted({k for points in families.values() for k, _ in points})
    axis.set_xticks(ticks, ticks)
    axis.set_xlabel("problems")
    axis.legend(fontsize=8)


def main(config: Config) -> None:
    if config.study not in STUDIES:
        raise SystemExit(f"unknown study {config.study!r}. Known: {', '.join(STUDIES)}")
    study = STUDIES[config.study]
    config = dataclasses.replace(config, seeds=study.seeds if config.seeds is None else config.seeds,
                                 steps=study.steps if config.steps is None else config.steps)
    for name, least in (("seeds", 1), ("steps", 2), ("examples", 1), ("jobs", 1)):
        if (value := getattr(config, name)) is not None and value < least:
            raise SystemExit(f"--{name} is at least {least}, not {value}")
    init: Path = getattr(config, study.init_flag)
    if not (init / "config.json").is_file():
        raise SystemExit(f"no checkpoint in {init}: run `{INIT_COMMANDS[study.init_flag].format(init)}` first, or set "
                         f"--{study.init_flag}")
    try:
        runs = results(study, init, config)
    except ScriptError as failed:
        raise SystemExit(f"{failed}\nFinished runs are kept: the same command continues from there.") from failed
    folder = config.out / config.study
    page = table(study, runs)
    (folder / "table.md").write_text(page + "\n", encoding="utf-8")
    draw(study, runs, folder / "figure.png")
    text, report = verdict(study, runs), config.out.parent / "report.md"
    picture = f"![{config.study}]({config.out.name}/{config.study}/figure.png)"
    section(report, f"Study: {config.study}", f"{page}\n\n{picture}\n\n{text}")
    print(f"\n{page}\n\nMean and standard error over seeds. Wrote {folder / 'table.md'}, {folder / 'figure.png'} and a section "
          f"of {report}\n{text}")


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))
