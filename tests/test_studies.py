"""The studies of stage 3: what each arm runs, what is not run again, and what is told of numbers worked out by hand."""

import dataclasses
import functools
import json
import re
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dataset import problems
from dataset.mixture import name_and_weight
from dataset.studies import arms as studies
from dataset.studies.arms import INIT_COMMANDS, RL, SFT, START, STUDIES, Arm, Config, Study
from dataset.studies.scripts import ScriptError
from model import cli
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, TASKS, specs
from tests.conftest import ENVIRONMENT, ROOT
from tests.test_dpo import start  # noqa: F401  (a fixture)

TASK_NAMES = ("arithmetic", "geometry", "perception", "sokoban")

# ---------------------------------------------------------------- the options that the studies need


@pytest.mark.parametrize("name", TASK_NAMES)
def test_text_says_how_much_is_in_words_and_changes_nothing_else(name):
    def pictures(spec: str) -> list[int]:
        return [len(example.prompt.pictures) for example in TASKS.make(spec).examples("train", 9)]

    assert pictures(name) == [1, 1, 0] * 3
    assert pictures(f"{name}:text=true") == [0] * 9 and pictures(f"{name}:text=false") == [1] * 9
    mixed, shown = (TASKS.make(spec).examples("val", 9) for spec in (name, f"{name}:text=false"))
    assert [example.answer for example in mixed] == [example.answer for example in shown]
    assert all(mixed[k] == shown[k] for k in (0, 1, 3, 4, 6, 7))


@pytest.mark.parametrize("name", TASK_NAMES)
def test_what_is_tuned_on_from_a_number_on_is_what_rl_asks_from_there(name):
    tuned = TASKS.make(f"{name}:first=10000,rows=6").train("sft")
    asked = problems.of_task(TASKS.make(f"{name}:first=10000,rows=0"), 6, None)
    assert [item.prompt.id for item in asked] == [f"{name}/train/{10000 + k}" for k in range(6)]
    for row, item in zip([tuned[k] for k in range(len(tuned))], asked, strict=True):
        assert row.id == item.prompt.id and row.messages[0] == item.prompt.messages[0]  # the same pictures and words
        assert item.reward(item.example, row.messages[-1].text).total == 1.1


@pytest.mark.parametrize("name", TASK_NAMES)
def test_rl_begins_behind_the_rows_wherever_the_numbers_begin_and_only_train_is_moved(name):
    moved = TASKS.make(f"{name}:first=100,rows=5")
    assert [item.prompt.id for item in problems.of_task(moved, 2, None)] == [f"{name}/train/105", f"{name}/train/106"]
    assert moved.examples("test", 3) == TASKS.make(name).examples("test", 3)
    assert moved.train("sft")[4] == TASKS.make(name).train("sft")[104]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_direct_is_the_share_of_demonstrations_about_pictures_that_say_the_right_answer_at_once(name):
    whole, direct = (TASKS.make(f"{name}:rows=300{more}").train("sft") for more in ("", ",direct=0.6"))
    asked = problems.of_task(TASKS.make(f"{name}:rows=0"), 300, None)
    short = [k for k in range(300) if direct[k] != whole[k]]
    assert all(whole[k].pictures for k in short) and 0.5 < len(short) / sum(bool(whole[k].pictures) for k in range(300)) < 0.7
    for k in short:
        told, in_full = direct[k].messages[-1].text, whole[k].messages[-1].text
        assert told.partition("</think>")[2] == in_full.partition("</think>")[2]
        assert len(told) < len(in_full)
        assert asked[k].reward(asked[k].example, told).total == 1.1


def test_rows_of_other_kinds_stand_behind_the_sums_wherever_these_begin():
    here, there = (TASKS.make(f"arithmetic:rows=2,read=1,lists=1,first={first}").train("sft") for first in (0, 50))
    assert [row.id for row in there] == [f"arithmetic/{name}" for name in ("train/50", "train/51", "reading/0", "adding/0")]
    assert here[2] == there[2] and here[3] == there[3]


@pytest.mark.parametrize(("spec", "message"), [
    ("arithmetic:text=1", "'text=1' is not of type bool"), ("geometry:text=none", "'text=none' is not of type bool"),
    ("sokoban:first=-1", "sokoban: first is the index of a problem, 0 or more, not -1"),
    ("arithmetic:first=-1", "0 or more, not -1"), ("perception:first=x", "'first=x' is not of type int"),
])  # fmt: skip
def test_what_these_options_cannot_be_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        TASKS.make(spec)


# ---------------------------------------------------------------- what is run


ARMS = [(name, arm) for name, study in STUDIES.items() for arm in study.arms]
EVAL = "4-eval_chat.py"


def parsed(script: str, *flags) -> Any:
    """What a script makes of its command line: its last lines choose the dataclass, and the run itself is left out."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        patch.setattr(cli, "run", lambda main, config: made.append(config))
        runpy.run_path(str(ROOT / script), run_name="__main__")
    (config,) = made
    return config


@functools.cache
def of_arm(name: str, arm: Arm) -> list:
    """The configs of an arm's runs."""
    given = ("--init", "out/sft", "--out", "out/step", "--seed", 1)
    return [parsed(script, *given, *flags) for script, flags in studies.commands(arm, STUDIES[name].steps)]


@functools.cache
def of_starts() -> list:
    """The configs of the commands that make the starts."""
    commands = [command.format("out/start").split() for text in INIT_COMMANDS.values() for command in text.split(" && ")]
    assert all(command[:2] == ["python", SFT] for command in commands)
    return [parsed(SFT, *flags) for _, _, *flags in commands]


@pytest.mark.parametrize(("name", "arm"), ARMS, ids=[f"{name}-{arm.name}" for name, arm in ARMS])
def test_every_command_line_is_accepted(name, arm):
    """By the parser of the script, the registry of its algorithm, and the tasks that it names; a run would only load a model."""
    for config in of_arm(name, arm):
        by_preferences = False
        if hasattr(config, "algo"):
            by_preferences = config.algo.partition(":")[0] in PREFERENCE_LOSSES.names()
            assert (PREFERENCE_LOSSES if by_preferences else ALGORITHMS).make(config.algo)
        assert config.optim.max_steps > 0 or by_preferences  # those learn for epochs
        assert (config.run.seed, config.run.out) == (1, Path("out/step"))
        assert [TASKS.make(spec) for spec in (*config.data, *specs(config.run.bench))]


def test_the_commands_that_make_the_starts_and_ask_the_results_are_accepted():
    for config in of_starts():
        assert config.run.out in (Path("out/start"), Path("out/sft-counting"))
        assert [TASKS.make(name_and_weight(spec)[0]) for spec in config.data]
    for study in STUDIES.values():
        for tasks, _ in study.benchmarks:
            config = parsed(EVAL, "--model", "out/step", "--bench", tasks, "--examples", 5, "--controls", 0)
            assert config.bench == tasks and [TASKS.make(spec) for spec in specs(tasks)]


def test_arms_of_equal_rollouts_have_equal_steps():
    for steps in (2, 7, 40):
        of = {arm.name: [int(flags[flags.index("--max_steps") + 1]) for _, flags in studies.commands(arm, steps)]
              for arm in STUDIES["stages"].arms}  # fmt: skip
        assert of["text_image"] == [steps * 3 // 5, steps - steps * 3 // 5] and of["fewer_images"] == of["text_image"][1:]
        assert of["image"] == of["text"] == of["mixed"] == [steps]
    assert studies.commands(STUDIES["arithmetic"].arms[0], None) == [(RL, [])]  # the script as it is


def test_no_problem_that_rules_ask_by_default_or_in_a_study_was_tuned_on_before():
    """Not in stage 2, nor by the commands that make the starts of the other tasks."""
    def of_tasks(configs):
        return [spec for config in configs for spec in config.data if spec.partition(":")[0] in TASK_NAMES]

    tuned_until = dict.fromkeys(TASK_NAMES, 0)
    for spec in of_tasks([parsed(SFT), *of_starts()]):
        name, task = spec.partition(":")[0], TASKS.make(spec)
        assert not task.rows or task.train("sft")[task.rows - 1].id == f"{name}/train/{task.first + task.rows - 1}"
        tuned_until[name] = max(tuned_until[name], task.first + task.rows)
    assert tuned_until == {"arithmetic": 2_600, "geometry": 24_000, "perception": 31_500, "sokoban": 36_000}
    by_default = [parsed(RL), parsed(RL, "--algo", "dpo", "--pairs", "policy")]
    asked = of_tasks([*by_default, *(config for name, arm in ARMS for config in of_arm(name, arm))])
    assert len(asked) == 2 + sum(len(arm.steps) for name, arm in ARMS if name not in ("preferences", "iterations"))
    for spec in asked:
        task = TASKS.make(spec)
        assert task.first + task.rows >= tuned_until[spec.partition(":")[0]]  # where RL begins, as a test above has it


@pytest.mark.parametrize("name", STUDIES)
def test_every_metric_is_one_of_a_task_that_judges_and_what_is_compared_is_an_arm(name):
    study = STUDIES[name]
    for metric in study.metrics:
        task = metric.partition("/")[0]
        assert any(task in specs(tasks) for tasks, _ in study.benchmarks)
        if task in TASK_NAMES:
            made = TASKS.make(task)
            examples = made.examples("test", 40)
            answers = [f"<think>.</think><answer>{example.answer}</answer>" for example in examples]
            assert metric.partition("/")[2] in made.measure(examples, answers)[1]
    assert {arm for pair in study.comparisons for arm in pair} <= {START, *(arm.name for arm in study.arms)}


@pytest.fixture
def small(monkeypatch, start, run_script, tmp_path):  # noqa: F811
    """`stages` of two arms by the forking launcher, in small steps; returns (Config, the scripts that ran)."""
    ran = []
    quick = {RL: ("--problems", 4, "--prompts", 2, "--group_size", 2, "--batch_size", 4, "--max_new_tokens", 6,
                  "--eval_examples", 2),
             "4-eval_chat.py": ("--max_new_tokens", 6)}  # fmt: skip

    def launched(script, *arguments, threads=None):
        ran.append(script)
        done = run_script(script, *arguments, *quick[script], "--device", "cpu", cwd=tmp_path, expect=None,
                          env={**ENVIRONMENT, "COLUMNS": "200"})  # fmt: skip
        if done.status:
            raise ScriptError(done.err.strip().rpartition("\n")[2])
        return done.out

    monkeypatch.setattr(studies, "start", launched)
    arms = tuple(arm for arm in STUDIES["stages"].arms if arm.name in ("text_image", "image"))
    study = dataclasses.replace(STUDIES["stages"], arms=arms, comparisons=(("text_image", "image"),))
    monkeypatch.setitem(STUDIES, "stages", study)
    return Config("stages", seeds=1, steps=2, examples=3, init=start, out=tmp_path / "studies"), ran


def test_a_study_runs_the_scripts_and_what_is_there_is_not_made_again(small, capsys):
    config, ran = small
    before = sorted(file.name for file in config.init.iterdir())
    studies.main(config)
    said = capsys.readouterr().out.strip().splitlines()
    assert ran == ["4-eval_chat.py", RL, RL, "4-eval_chat.py", RL, "4-eval_chat.py"]
    assert said[-1].startswith("Verdict") and "text_image against image: arithmetic/image" in said[-1]
    folder = config.out / "stages"
    page = (folder / "table.md").read_text().splitlines()
    assert page[0] == "|  | seeds | arithmetic/image | arithmetic/text | training |"
    assert [line.split("|")[1].strip() for line in page[2:]] == [START, "text_image", "image"]
    assert (folder / "figure.png").stat().st_size > 1000
    report = (config.out.parent / "report.md").read_text()
    assert "## Study: stages" in report and all(line in report for line in (*page, said[-1]))
    shown = re.search(r"!\[stages\]\((.+)\)", report)[1]
    assert config.out.parent / shown == folder / "figure.png"
    second = json.loads((folder / "text_image-0" / "step-2" / "config.json").read_text())
    assert second == json.loads((config.init / "config.json").read_text())
    assert sorted(file.name for file in config.init.iterdir()) == before  # the start is judged elsewhere
    ran.clear()
    studies.main(config)
    assert ran == [] and (folder / "table.md").read_text().splitlines() == page


# ---------------------------------------------------------------- what is not run, and what fails


def weights(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)
    return folder


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """No script runs: each writes scores; returns (Config, commands, threads of each, arms that are to fail)."""
    commands, threads_of, broken, lock = [], [], set(), threading.Lock()

    def pretend(script, *arguments, threads=None):
        given = dict(zip(arguments[::2], arguments[1::2]))
        with lock:
            commands.append([script, *map(str, arguments)])
            threads_of.append(threads)
        folder = Path(given.get("--out") or given["--model"])
        if folder.parent.name in broken:
            raise ScriptError("out of luck")
        time.sleep(0.02 if threads else 0)  # as long as it takes that another one fails
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").touch()
        (folder / "scores.json").write_text(json.dumps({"arithmetic/image": 0.5, "arithmetic/text": 0.25}))
        return ""

    monkeypatch.setattr(studies, "start", pretend)
    monkeypatch.setattr(studies, "draw", lambda study, found, file: None)  # pictures have tests of their own
    config = Config("ablations", seeds=2, steps=3, init=weights(tmp_path / "init"), out=tmp_path / "out")
    return config, commands, threads_of, broken


def test_every_arm_and_seed_has_a_command_of_its_own(pretended):
    config, commands, threads_of, _ = pretended
    studies.main(config)
    trained = [command for command in commands if command[0] == RL]
    assert len(trained) == 8 and len(commands) == 8 + 9  # the start is only judged
    assert ["--algo", "grpo:kl=0.01"] == trained[1][7:9] and trained[0][1:7] == [
        "--init", str(config.init), "--out", str(config.out / "ablations" / "default-0" / "step-1"), "--seed", "0"]  # fmt: skip
    assert all(command[-2:] == ["--max_steps", "3"] for command in trained)
    assert commands[0][3:] == ["--bench", "arithmetic", "--examples", "1500", "--controls", "0"]
    assert set(threads_of) == {None}


def test_two_jobs_have_a_thread_each(pretended):
    config, _, threads_of, _ = pretended
    studies.main(dataclasses.replace(config, jobs=2))
    assert set(threads_of) == {1}


def test_what_another_start_or_other_settings_make_is_made_again(pretended):
    config, commands, _, _ = pretended
    studies.main(config)
    count = len(commands)
    studies.main(config)
    assert len(commands) == count
    weights(config.init, "other weights")
    studies.main(config)
    assert len(commands) == 2 * count
    studies.main(dataclasses.replace(config, steps=4))
    assert len(commands) == 3 * count - 1  # but for the start, which takes no steps


def test_with_other_examples_what_was_trained_is_only_asked_again(pretended):
    config, commands, _, _ = pretended
    studies.main(config)
    seconds = {file: json.loads(file.read_text())["seconds"] for file in config.out.rglob("result.json")}
    commands.clear()
    studies.main(dataclasses.replace(config, examples=4))
    assert len(commands) == 9 and {command[0] for command in commands} == {"4-eval_chat.py"}
    assert {file: json.loads(file.read_text())["seconds"] for file in config.out.rglob("result.json")} == seconds


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_script_that_fails_ends_the_study_and_what_is_done_is_kept(pretended, jobs):
    config, commands, _, broken = pretended
    broken.add("kl-0")
    with pytest.raises(SystemExit, match="kl-0: out of luck"):
        studies.main(dataclasses.replace(config, jobs=jobs))
    kept = {file.parent.name for file in config.out.rglob("result.json")}
    assert {"start", "default-0"} <= kept and "kl-0" not in kept and "grpo-1" not in kept
    broken.clear()
    commands.clear()
    studies.main(config)
    assert not any("default-0" in part for command in commands for part in command)
    assert (config.out / "ablations" / "table.md").is_file()


def test_what_makes_no_sense_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(SystemExit, match="unknown study 'stage'. Known: preferences, iterations, arithmetic, sokoban, geometry"):
        studies.main(Config("stage"))
    nowhere = tmp_path / "nowhere"
    with pytest.raises(SystemExit, match=r"run `python 2-sft_vlm.py --out .*nowhere` first"):
        studies.main(Config("stages", init=nowhere))
    with pytest.raises(SystemExit, match="--data sokoban:rows=36000,plays=5000,direct=0.5 .* --lr 6e-3` first"):
        studies.main(Config("sokoban", sokoban_init=nowhere))
    for flag, value in (("seeds", 0), ("steps", 1), ("examples", 0), ("jobs", 0)):
        with pytest.raises(SystemExit, match=f"--{flag} is at least"):
            studies.main(Config("stages", **{flag: value}))


# ---------------------------------------------------------------- what is told


def facts(*numbers: tuple[float, float], seconds: float = 10.0) -> list[dict]:
    return [{"seconds": seconds, "scores": {"arithmetic/image": image, "sokoban/moves": moves}} for image, moves in numbers]


STUDY = Study(arms=(Arm("a", ((RL, ""),)), Arm("b", ((RL, ""),))), init_flag="init", benchmarks=(),
              comparisons=(("a", "b"), ("a", START)), metrics=("arithmetic/image", "sokoban/moves"))  # fmt: skip
FOUND = {START: facts((0.5, 4.0)), "a": facts((0.7, 4.0), (0.8, 5.0), (0.9, 6.0)), "b": facts((0.6, 5.0), (0.6, 5.0), (0.9, 5.0))}


def test_the_table_says_mean_and_standard_error():
    assert studies.table(STUDY, FOUND).splitlines() == [
        "|  | seeds | arithmetic/image | sokoban/moves | training |", "| --- | --- | --- | --- | --- |",
        "| start |  | 50.0 % | 4.0 |  |",
        "| a | 3 | 80.0 ± 5.8 % | 5.0 ± 0.6 | 10.0 ± 0.0 s |",  # 10 / sqrt 3
        "| b | 3 | 70.0 ± 10.0 % | 5.0 ± 0.0 | 10.0 ± 0.0 s |",
    ]  # fmt: skip


def test_the_verdict_follows_from_the_numbers():
    said = studies.verdict(STUDY, FOUND)
    assert "a against b: arithmetic/image 10.0 ± 11.5 points higher (not told apart)" in said  # sqrt(5.77^2 + 10^2)
    assert "a against start: arithmetic/image 30.0 ± 5.8 points higher, sokoban/moves 1.0 ± 0.6 higher (not told apart)." in said
    lower = {**FOUND, "b": facts((0.9, 9.0), (0.95, 9.0), (0.97, 9.0))}
    assert "arithmetic/image 14.0 ± 6.1 points lower, sokoban/moves 4.0 ± 0.6 lower" in studies.verdict(STUDY, lower)
    equal = {**FOUND, "a": FOUND["b"]}
    assert "a against b: arithmetic/image 0.0 ± 14.1 points apart (not told apart)" in studies.verdict(STUDY, equal)
    single = {**FOUND, "a": facts((0.7, 4.0))}
    assert "a against start: arithmetic/image 20.0 points higher (one seed: it may be chance)" in studies.verdict(STUDY, single)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", ["efficiency", "stages", "preferences"])
def test_every_kind_of_picture_can_be_drawn(name, seeds, tmp_path):
    study = STUDIES[name]
    one = {"seconds": 1.0, "scores": dict.fromkeys(study.metrics, 0.5)}
    studies.draw(study, {START: [one], **{arm.name: [one] * seeds for arm in study.arms}}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
