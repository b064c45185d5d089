"""What the README says is so: its links, its line counts, its flags, and its commands, each of which is run in a short form."""

import ast
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

from dataset.mixture import name_and_weight
from model import cli
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, TASKS, split_options
from tests import miniatures, test_adding_a_part, test_native
from tests.conftest import ENCODER, ROOT
from tests.test_structure import CONFIGS, SCRIPTS, TREES, config_class

README = (ROOT / "README.md").read_text(encoding="utf-8")


def line_counts(text: str) -> list[tuple[str, int]]:
    """(path, lines) of each table row `| [path](path) | N |`, with other cells anywhere."""
    return [(path, int(number.replace(",", ""))) for path, number in
            re.findall(r"^\|.*\[`?([^\]`]+)`?\]\(\1\) *\| *([\d,]+) *\|", text, re.MULTILINE)]  # fmt: skip


def test_line_counts_are_found_in_a_table():
    text = "| [a.py](a.py) | 12 |\n| 1 | [`b/c.py`](b/c.py) | 1,200 | what |\n| [d](e.py) | 3 |\n| plain | 7 |"
    assert line_counts(text) == [("a.py", 12), ("b/c.py", 1200)]


def test_line_counts_in_the_readme_are_right():
    stated = line_counts(README)
    assert dict(stated) == {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path, _ in stated}


def test_links_in_the_readme_lead_to_files():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", README)
    assert not [link for link in links if not (ROOT / link).exists()]


def test_nothing_in_the_readme_is_left_to_fill_in():
    assert not re.findall(r"\{[A-Z_]+\}|TODO|TBD|XXX", README)


def commands(text: str) -> list[tuple[str, dict[str, list[str]]]]:
    """(script, {flag: values}) of every `python SCRIPT --flag` or torchrun in a text, those joined with && apart."""
    found = []
    for line in re.split(r"\n|&&|`", text.replace("\\\n", " ")):
        if match := re.search(r"(?:python|torchrun(?: --\w+ \d+)*) ([\w-]+\.py)(.*)", line):
            flags: dict[str, list[str]] = {}
            for name, values in re.findall(r"--([\w.]+)((?: +(?!--)\S+)*)", re.split(r" # |  +\S", match[2])[0]):
                flags[name] = values.split()
            found.append((match[1], flags))
    return found


def test_commands_are_found_in_a_text():
    text = ("python 1-a.py --lr 1e-3 && python 2-b.py\n`torchrun --nproc_per_node 2 1-a.py --train.llm freeze`\n"
            "python -m x --no\n    python 1-a.py --data a b:2 --seed 1         what it does --lr")  # fmt: skip
    assert commands(text) == [("1-a.py", {"lr": ["1e-3"]}), ("2-b.py", {}), ("1-a.py", {"train.llm": ["freeze"]}),
                              ("1-a.py", {"data": ["a", "b:2"], "seed": ["1"]})]  # fmt: skip


def config_of(script: str, flags: dict[str, list[str]]) -> type:
    """The class of flags that a command of a script is parsed by."""
    names = [name for known, name in CONFIGS if known == script]
    assert names, f"{script} does not exist"
    if len(names) == 1:
        return config_class(script, names[0])
    (algo,) = flags.get("algo", ["grpo"])
    by_rules = algo.partition(":")[0] in ALGORITHMS.names()
    return config_class(script, "GRPO" if by_rules else "OnlineDPO" if flags.get("pairs") == ["policy"] else "DPO")


def test_commands_in_the_readme_exist_with_their_flags():
    check_commands(README)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_commands_in_the_head_of_a_script_exist_with_their_flags(script):
    text = ast.get_docstring(TREES[script])
    assert commands(text)
    check_commands(text)


def check_commands(text: str) -> None:
    """Every flag is one of its script's, and the algorithms and tasks that values name have the options that are given."""
    for script, flags in commands(text):
        known = {*cli.flag_names(config_of(script, flags)()), "config", "help"}
        assert set(flags) <= known, f"{script} has no {set(flags) - known}"
        for algo in flags.get("algo", []):
            (ALGORITHMS if algo.partition(":")[0] in ALGORITHMS.names() else PREFERENCE_LOSSES).make(algo)
        for spec in (*flags.get("data", []), *flags.get("bench", [])):
            for name in re.split(r",(?!\w+=)", name_and_weight(spec)[0]):
                task, _, options = name.partition(":")
                if task in TASKS.names():
                    assert {option.partition("=")[0] for option in split_options(options)} <= set(TASKS.parameters(task)), spec


def test_a_command_that_does_not_exist_is_noticed():
    for command in ("python 5-more.py", "python 3-rl_vlm.py --beta 0.1", "python 3-rl_vlm.py --algo dpo --prompts 4",
                    "python 3-rl_vlm.py --algo dpo:kl=1", "python 2-sft_vlm.py --data text sokoban:brief=1:2"):  # fmt: skip
        with pytest.raises((AssertionError, ValueError)):
            check_commands(command)


def test_every_flag_that_the_readme_names_is_one_of_a_script():
    text = re.sub(r"(?:python -m|pip install|torchrun) [^`\n]*?(?=[\w-]+\.py|`|\n)", "", README)  # of other programs
    known = {name for config in CONFIGS for name in cli.flag_names(config_class(*config)())}
    known |= {"config", "help", "train", "ladder"}  # the flags --train.PART; tests/speed.py --ladder
    assert not set(re.findall(r"--([a-z][\w.]*\w)", text)) - known


# ---------------------------------------------------------------- each command runs

MODULES = {  # commands that are run in a short form elsewhere
    "dataset.studies.arms": "test_studies::test_a_study_runs_the_scripts_and_what_is_there_is_not_made_again",
    "dataset.studies.recipes": "test_recipes_table::test_every_row_is_a_run_of_all_three_scripts_and_is_not_made_twice",
    "dataset.studies.probe": "test_probe::test_the_command_prints_a_row_for_each_kind_of_drawing",
    "dataset.studies.train_clip": "test_clip::test_a_few_steps_of_training_write_a_whole_clip_and_an_encoder_that_can_be_loaded",
    "model.llm.gguf": "test_pretrained::test_smollm2_goes_on_with_a_text_as_transformers_does",
    "model.registry": "test_parts::test_the_list_of_parts_gives_sizes_and_imports_no_library_that_it_does_not_need",
    "tests.speed": "test_speed::test_the_command_prints_both_speeds_and_their_ratio",
    "web_demo.py": "test_web_demo::test_the_script_answers_with_a_checkpoint_and_refuses_huge_files",
}
ONE_STEP = ("--max_steps", "1", "--batch_size", "2", "--bench", "")
SHORT = {  # added to a command of a script
    "1-pretrain_vlm.py": ONE_STEP,
    "2-sft_vlm.py": ONE_STEP,
    "3-rl_vlm.py": (*ONE_STEP, "--problems", "4", "--prompts", "2", "--group_size", "2", "--max_new_tokens", "6"),
    "3-rl_vlm.py --algo dpo": (*ONE_STEP, "--data", "preferences.jsonl"),
    "4-eval_chat.py": ("--max_new_tokens", "6"),
}


def runs(text: str) -> list[str]:
    """Every command of a text that starts python or torchrun, without its comment."""
    without_parts = text.replace(test_adding_a_part.SECTION, "")  # whose commands that test runs
    blocks_and_code = re.findall(r"^```\n(.*?)^```|^```.*?^```|`([^`\n]+)`", without_parts, re.DOTALL | re.MULTILINE)
    lines = [line.partition(" # ")[0].strip() for parts in blocks_and_code
             for line in re.split(r"\n|&&", "".join(parts))]
    return [line for line in lines if re.match(r"(python|torchrun) ", line) and "pytest" not in line]


RUNS = runs(README)


def test_the_commands_of_a_text_are_found():
    text = ("```\npip install x\npython a.py && python b.py --c   # d\n```\nor `python -m e`, `f`, `python -m pytest`.\n"
            "```python\nx\n```\n")
    assert runs(text) == ["python a.py", "python b.py --c", "python -m e"]


@pytest.mark.parametrize("name", MODULES)
def test_a_command_that_is_run_elsewhere_is_run_there(name):
    assert any(name in command for command in RUNS)
    file, _, function = MODULES[name].partition("::")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in RUNS if "python -m dataset.studies" in command])
def test_the_flags_of_a_study_are_known(command):
    words = shlex.split(command)
    tyro.cli(importlib.import_module(words[2]).Config, args=words[3:])


@pytest.fixture(scope="module")
def workplace(samples, tmp_path_factory) -> Path:
    """What a reader has beside the scripts: pictures, rows, a pretrained language model, and what DPO made of a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copy(samples / "red.png", folder / "picture.png")
    for images in ("images", "FOLDER"):
        shutil.copytree(samples, folder / images)
        shutil.copy(folder / "picture.png", folder / images)
    shutil.copy(samples / "llava.json", folder / "pretrain.json")
    for name in ("pretrain.parquet", "sft.parquet"):
        shutil.copy(samples / "minimind.parquet", folder / name)
    miniatures.lines(folder / "rows.jsonl", [{"conversations": miniatures.talk("<image>How many?", "2", miniatures.OPENAI),
                                              "answer": "2", "image_urls": ["picture.png"]}] * 4)  # fmt: skip
    miniatures.lines(folder / "preferences.jsonl", [{"prompt": f"What is {k}?", "chosen": "A number.", "rejected": "Red."}
                                                    for k in range(4)])  # fmt: skip
    test_native.save_qwen3(folder / "out" / "smollm2")
    return folder


def test_every_command_runs(workplace, run_script, run_ranks):
    """In the order of the page, because each goes on from what those before it made."""
    for command in RUNS:
        words = shlex.split(command)
        if words[1] == "-m" or words[1] in MODULES:
            assert (words[2] if words[1] == "-m" else words[1]) in MODULES, command
            continue
        script = next(word for word in words if word.endswith(".py"))
        given = words[words.index(script) + 1:]
        short = SHORT[f"{script} --algo dpo" if "dpo" in given else script]
        if script == "4-eval_chat.py" and "--bench" in given:
            short = (*short, "--examples", "2")
        if "--preset" in given:  # its encoder would be fetched
            short = (*short, "--encoder", ENCODER)
        if words[0] == "torchrun":
            run_ranks(script, *given, *short, "--dry_run", "--device", "cpu", cwd=workplace)
        else:
            run_script(script, *given, *short, "--device", "cpu", cwd=workplace)
        if "rated.jsonl" in given and script == "4-eval_chat.py":  # a model of one step solves no row
            rated = (workplace / "rated.jsonl").read_text()
            assert rated.count('"pass_rate": 0.0') == 4
            (workplace / "rated.jsonl").write_text(rated.replace('"pass_rate": 0.0', '"pass_rate": 0.5'))
