"""Ways of stage 3 compared: arms that differ in one thing, several seeds of each, a table, a picture, a verdict.

In:  the name of a study (STUDIES, below), and the checkpoints that its arms begin from.
Out: out/studies/NAME/table.md, which is also printed, figure.png, and ARM-SEED/ with what the scripts wrote in each run. Table,
     picture and verdict stand in out/report.md, too.

    python -m dataset.studies.arms stages                        LMM-R1: reasoning in words first, then on pictures
    python -m dataset.studies.arms preferences                   RLAIF-V: who labels, what is labelled, what is trained
    python -m dataset.studies.arms efficiency --jobs 2           two runs at a time, a thread each
    python -m dataset.studies.arms arithmetic --seeds 1 --steps 10 --examples 50

The numbered scripts run as processes of their own, and each result is judged on the test split. A run that is there, made with
the same settings from the same weights, is not made again; with other --examples it is only asked again. What flags do not say,
the scripts' own defaults, is not compared: after a change of these, begin in another --out.
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

import tyro
from tyro.conf import Positional

from dataset.report import section
from dataset.studies import compare
from dataset.studies.scripts import ScriptError, markdown, start

# ---------------------------------------------------------------- the studies


@dataclass(frozen=True)
class Arm:
    """A way from the start to a checkpoint: (script, flags) one after another, each from what the one before it made.

    --init, --out, --seed and, where the flags do not say it, --max_steps are added; {steps} is how many the study has, {words}
    three fifths of them, and {pictures} the rest.
    """

    name: str
    steps: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Study:
    """Arms side by side.

    start      the flag that says which checkpoint they begin from
    judged     (tasks, pictures' worth of questions; None: --examples): what each result is asked
    metrics    columns of the table, and panels of the picture
    compared   (arm, arm or start): what the verdict is about
    steps      of each arm; None: the script's own default
    drawn      bars: one for every arm | lines: over the number in the arms' names, NAME-NUMBER | points: the first metric against
               the second, one for every run
    """

    arms: tuple[Arm, ...]
    start: str
    judged: tuple[tuple[str, int | None], ...]
    metrics: tuple[str, ...]
    compared: tuple[tuple[str, str], ...]
    steps: int | None = 20
    seeds: int = 3
    drawn: str = "bars"


START = "start"  # the row of the checkpoint that all arms begin from
COUNTS = {"sokoban/moves"}  # metrics that are no share
MADE_BY = {
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
CHECKED = "--eval_every 20 --bench"  # the best checkpoint of these checks on the validation split is kept, the start among them
LAST = '--bench ""'  # no check: the last checkpoint is kept, whatever it is
SUM_METRICS = ("arithmetic/image", "arithmetic/text")
HALLUCINATION = (("hallucination", 1000), ("world_pope", 200), ("world", 100))
HALLUCINATION_METRICS = ("hallucination/chair_s", "hallucination/cover", "hallucination/chair_i", "hallucination/malformed",
                         "world_pope/accuracy", "world/exact")
NEVER_SEEN = "first=100000"  # problems that no stage before learned from
PROBLEMS = (64, 256, 1024)


def rl(name: str, *flags: str) -> Arm:
    """An arm of as many runs of RL as there are flags, each from the checkpoint before it."""
    return Arm(name, tuple((RL, of_one) for of_one in flags))


STUDIES = {
    # RLAIF-V: who labels, what is labelled, what is trained; the control learns from the chosen answers alone.
    "preferences": Study(
        arms=(rl("dpo", "--algo dpo"), rl("lora", "--algo dpo --train.llm lora:8 --lr 2e-4"),
              rl("self", "--algo dpo --labeler self"), rl("whole", "--algo dpo --labeler self --divider whole"),
              rl("control", "--algo sft_chosen")),
        compared=(("dpo", START), ("dpo", "control"), ("self", "whole")), start="init", steps=None, judged=HALLUCINATION,
        metrics=HALLUCINATION_METRICS, drawn="points"),
    "iterations": Study(
        arms=(rl("iterations", "--algo dpo --iterations 4"),), compared=(("iterations", START),), start="init", steps=None,
        seeds=1, judged=HALLUCINATION, metrics=HALLUCINATION_METRICS, drawn="points"),
    # Does the default gain what it should, and is anything lost?
    "arithmetic": Study(
        arms=(rl("rules", ""),), compared=(("rules", START),), start="init", steps=None,
        judged=(("arithmetic", None), ("world,easy_vqa,text", 100)),
        metrics=(*SUM_METRICS, "world/exact", "easy_vqa/accuracy", "text/translation")),
    # What a shaped reward pays for. Validation, by levels solved, would hide it: what it leads to is the last checkpoint.
    "sokoban": Study(
        arms=(rl("solved", f"--data sokoban:{NEVER_SEEN} --resample_rounds 1 {CHECKED} sokoban"),
              rl("hackable", f"--data sokoban:reward=hackable,{NEVER_SEEN} --resample_rounds 1 {LAST}")),
        compared=(("solved", START), ("hackable", "solved")), start="sokoban_init", judged=(("sokoban", None),),
        metrics=("sokoban/image", "sokoban/text", "sokoban/untouched", "sokoban/moves")),
    # Two more kinds of problems, each from a start of its own (MADE_BY) in which most answers about pictures come at once.
    "geometry": Study(
        arms=(rl("rules", f"--data geometry:{NEVER_SEEN} --resample_rounds 1 {CHECKED} geometry"),),
        compared=(("rules", START),), start="geometry_init", judged=(("geometry", 3000),),
        metrics=("geometry/image", "geometry/text", "geometry/held_out")),
    "perception": Study(
        arms=(rl("rules", f"--data perception:{NEVER_SEEN} --resample_rounds 1 {CHECKED} perception"),),
        compared=(("rules", START),), start="perception_init", judged=(("perception", 3000),),
        metrics=("perception/image", "perception/text", "perception/held_out")),
    # MM-EUREKA: what do the same few problems teach, by their answers and RL, by their answers and SFT, by worked solutions?
    "efficiency": Study(
        arms=(*(rl(f"rl-{k}", f"--data arithmetic:{NEVER_SEEN},rows=0 --problems {k} {LAST}") for k in PROBLEMS),
              *(Arm(f"sft_{what}-{k}", ((SFT, f"--data arithmetic:{NEVER_SEEN},rows={k},direct={direct} --lr 1e-3 {LAST}"),))
                for what, direct in (("answers", 1), ("worked", 0)) for k in PROBLEMS)),
        compared=tuple((f"rl-{k}", f"sft_{what}-{k}") for k in PROBLEMS for what in ("answers", "worked")), start="init",
        steps=40, judged=(("arithmetic", None),), metrics=SUM_METRICS, drawn="lines"),
    # LMM-R1: reasoning in words first. Rollouts are as many in every arm but `fewer_images`.
    "stages": Study(
        arms=(rl("text_image", f"--data arithmetic:text=true --max_steps {{words}} {LAST}",
                 f"--data arithmetic:text=false --max_steps {{pictures}} {LAST}"),
              rl("image", f"--data arithmetic:text=false {LAST}"),
              rl("fewer_images", f"--data arithmetic:text=false --max_steps {{pictures}} {LAST}"),
              rl("text", f"--data arithmetic:text=true {LAST}"),
              rl("mixed", f"--data arithmetic {LAST}")),
        compared=(("text_image", "image"), ("text_image", "fewer_images"), ("text_image", START)), start="init",
        seeds=5, judged=(("arithmetic", None),), metrics=SUM_METRICS),
    "ablations": Study(
        arms=(rl("default", f"--data arithmetic {LAST}"), rl("kl", f"--algo grpo:kl=0.01 {LAST}"),
              rl("no_filter", f"--keep_zero_variance {LAST}"), rl("grpo", f"--algo grpo:advantage=grpo {LAST}")),
        compared=(("kl", "default"), ("no_filter", "default"), ("grpo", "default")), start="init",
        judged=(("arithmetic", None),), metrics=SUM_METRICS),
}  # fmt: skip


# ---------------------------------------------------------------- runs


@dataclass
class Config:
    study: Positional[str]  # preferences | iterations | arithmetic | sokoban | geometry | perception | efficiency | ... (STUDIES)
    seeds: int | None = None  # of each arm, from 0 on; default: the study's own, 3; stages: 5
    steps: int | None = None  # of each arm; default: the study's own
    examples: int = 1500  # test problems, where the study names no number: of sums 1,000 in pictures, 500 in words
    init: Path = Path("out/sft")  # the checkpoint to begin from
    geometry_init: Path = Path("out/sft-geometry")  # those of the other tasks
    perception_init: Path = Path("out/sft-perception")
    sokoban_init: Path = Path("out/sft-sokoban")
    out: Path = Path("out/studies")
    jobs: int = 1  # runs at a time; several have one thread each


def commands(arm: Arm, steps: int | None) -> list[tuple[str, list[str]]]:
    """(script, flags) of each step of an arm, less what depends on the seed."""
    words = (steps or 0) * 3 // 5
    numbers = {"steps": steps, "words": words, "pictures": (steps or 0) - words}
    made = []
    for script, flags in arm.steps:
        given = ["" if flag == '""' else flag for flag in flags.format(**numbers).split()]
        made.append((script, given + ["--max_steps", str(steps)] * bool(steps and "--max_steps" not in given)))
    return made


def fingerprint(checkpoint: Path) -> str:
    """Of the weights: another start, other results."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


def result(study: Study, arm: Arm, seed: int, init: Path, folder: Path, config: Config) -> dict:
    """The scores of an arm and its seconds of training, kept in FOLDER/result.json; made only where they are not there."""
    judged = [[tasks, examples or config.examples] for tasks, examples in study.judged]
    steps = [[script, *flags] for script, flags in commands(arm, config.steps)]
    settings = {"start": fingerprint(init), "steps": steps, "seed": seed, "judged": judged}
    file = folder / "result.json"
    known = json.loads(file.read_text()) if file.is_file() else {"settings": {}}
    if known["settings"] == settings and set(study.metrics) <= known["scores"].keys():
        return known
    model = folder / (f"step-{len(steps)}" if steps else "model")
    threads = 1 if config.jobs > 1 else None
    if {**known["settings"], "judged": judged} == settings and (model / "config.json").is_file():
        seconds = known["seconds"]  # trained already, and asked other questions
    else:
        shutil.rmtree(folder, ignore_errors=True)
        seconds = train(steps, seed, init, folder, threads)
    for tasks, examples in judged:
        start("4-eval_chat.py", "--model", model, "--bench", tasks, "--examples", examples, "--controls", 0, threads=threads)
    scores = json.loads((model / "scores.json").read_text())
    facts = {"settings": settings, "seconds": seconds, "scores": {metric: scores[metric] for metric in study.metrics}}
    file.write_text(json.dumps(facts, indent=1))
    return facts


def train(steps: Sequence[list[str]], seed: int, init: Path, folder: Path, threads: int | None) -> float:
    """Run the steps of an arm one after another, into FOLDER/step-1, step-2, ...; returns the seconds that they took.

    Without a step it is the start that is judged, in a copy, FOLDER/model: beside it stand scores of other questions.
    """
    model, began = init, time.time()
    for number, (script, *flags) in enumerate(steps, 1):
        made = folder / f"step-{number}"  # the scripts write a report beside it, which no other run writes to
        start(script, "--init", model, "--out", made, "--seed", seed, *flags, threads=threads)
        model = made
    if not steps:
        (folder / "model").mkdir(parents=True)
        for part in init.glob("*"):
            if part.is_file() and part.name != "scores.json":
                shutil.copy(part, folder / "model")
    return round(time.time() - began, 1)


def results(study: Study, init: Path, config: Config) -> dict[str, list[dict]]:
    """Of the start and of every arm the facts of each seed. ScriptError where one fails, when those that run are done."""
    runs = [(Arm(START, ()), 0), *((arm, seed) for seed in range(config.seeds or study.seeds) for arm in study.arms)]
    failed: list[str] = []

    def one(arm: Arm, seed: int) -> dict | None:
        name = f"{arm.name}-{seed}" if arm.steps else arm.name
        if failed:  # nothing new is begun
            return None
        try:
            facts = result(study, arm, seed, init, config.out / config.study / name, config)
        except ScriptError as error:
            failed.append(f"{name}: {error}")
            return None
        print(f"{name}: {', '.join(f'{metric} {value:.3f}' for metric, value in facts['scores'].items())}", flush=True)
        return facts

    with ThreadPoolExecutor(config.jobs) as pool:
        found = list(pool.map(lambda run: one(*run), runs))
    if failed:
        raise ScriptError("; ".join(failed))
    return {name: [facts for (arm, _), facts in zip(runs, found, strict=True) if facts and arm.name == name]
            for name in (START, *(arm.name for arm in study.arms))}


# ---------------------------------------------------------------- what came of them


def values(found: dict[str, list[dict]], arm: str, metric: str) -> list[float]:
    """A number for every seed: percent of what is a share."""
    return [facts["scores"][metric] * (1 if metric in COUNTS else 100) for facts in found[arm]]


def standard_error(numbers: Sequence[float]) -> float | None:
    """Of their mean; None of one number."""
    return statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None


def told(numbers: Sequence[float], unit: str = "") -> str:
    """'74.0 ± 1.2 %': mean and standard error."""
    error = standard_error(numbers)
    return f"{statistics.mean(numbers):.1f}{'' if error is None else f' ± {error:.1f}'}{unit}"


def table(study: Study, found: dict[str, list[dict]]) -> str:
    """A row for the start and for every arm."""
    rows = [[arm, str(len(seeds)) if arm != START else "",
             *(told(values(found, arm, metric), "" if metric in COUNTS else " %") for metric in study.metrics),
             told([facts["seconds"] for facts in seeds], " s") if arm != START else ""] for arm, seeds in found.items()]
    return markdown(["", "seeds", *study.metrics, "training"], rows)


def difference(found: dict[str, list[dict]], arm: str, other: str, metric: str) -> str:
    """'arithmetic/text 3.2 ± 1.1 points higher': the difference of two means and its standard error over seeds.

    The start is one checkpoint: it has no seeds, and no error over them.
    """
    a, b = values(found, arm, metric), values(found, other, metric)
    by = statistics.mean(a) - statistics.mean(b)
    errors = [standard_error(numbers) for name, numbers in ((arm, a), (other, b)) if name != START]
    known = [error for error in errors if error is not None]
    way = f"{'' if metric in COUNTS else ' points'} {'higher' if by > 0 else 'lower' if by < 0 else 'apart'}"
    if len(known) < len(errors):
        return f"{metric} {abs(by):.1f}{way} (one seed: it may be chance)"
    error = math.hypot(*known)
    return f"{metric} {abs(by):.1f} ± {error:.1f}{way}{'' if abs(by) > 2 * error else ' (not told apart)'}"


def verdict(study: Study, found: dict[str, list[dict]]) -> str:
    """What the numbers say of the arms that the study compares, whatever it is."""
    said = [f"{arm} against {other}: {', '.join(difference(found, arm, other, metric) for metric in study.metrics)}"
            for arm, other in study.compared]
    return f"Verdict (± standard error over seeds; within two of them, not told apart). {'; '.join(said)}."


def draw(study: Study, found: dict[str, list[dict]], file: Path) -> None:
    """As `study.drawn` says; of bars and lines, with their errors and a dot for every seed, a panel for every metric."""
    if study.drawn == "points":
        runs = {arm: [[facts["scores"][metric] for metric in study.metrics] for facts in seeds] for arm, seeds in found.items()}
        return compare.draw(runs, study.metrics, file)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wide = 1.5 + max(2.5, 0.8 * len(found))
    figure, panels = plt.subplots(1, len(study.metrics), figsize=(wide * len(study.metrics), 4), squeeze=False)
    for axis, metric in zip(panels[0], study.metrics):
        (draw_lines if study.drawn == "lines" else draw_bars)(axis, {arm: values(found, arm, metric) for arm in found})
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
    """NAME-NUMBER: a line for every name over the numbers, on a logarithmic axis; the start is a level."""
    families: dict[str, list[tuple[int, list[float]]]] = {}
    for arm, seeds in numbers.items():
        if arm != START:
            name, _, number = arm.rpartition("-")
            families.setdefault(name, []).append((int(number), seeds))
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
    init: Path = getattr(config, study.start)
    if not (init / "config.json").is_file():
        raise SystemExit(f"no checkpoint in {init}: run `{MADE_BY[study.start].format(init)}` first, or name one by "
                         f"--{study.start}")
    try:
        found = results(study, init, config)
    except ScriptError as failed:
        raise SystemExit(f"{failed}\nWhat is done is kept: the same command goes on from there.") from failed
    folder = config.out / config.study
    page = table(study, found)
    (folder / "table.md").write_text(page + "\n", encoding="utf-8")
    draw(study, found, folder / "figure.png")
    said, report = verdict(study, found), config.out.parent / "report.md"
    shown = f"![{config.study}]({config.out.name}/{config.study}/figure.png)"
    section(report, f"Study: {config.study}", f"{page}\n\n{shown}\n\n{said}")
    print(f"\n{page}\n\nMean and standard error over seeds. Wrote {folder / 'table.md'}, {folder / 'figure.png'} and a section "
          f"of {report}\n{said}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
