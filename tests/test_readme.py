"""What the pages say is so: their links, line counts and flags, and their commands, each of which is run in a short form.

The pages are the README and those of the two packages. The README is also held to a length, and to short sentences.
"""

import ast
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

from dataset.mixture import load, name_and_weight
from model import cli
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, TASKS, split_options
from tests import miniatures, test_native
from tests.conftest import ENCODER, ROOT
from tests.speed.__main__ import Config as SpeedConfig
from tests.test_structure import CONFIGS, SCRIPTS, TREES, config_class

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "model/README.md", "dataset/README.md")
         if (ROOT / name).is_file()}  # fmt: skip
README = PAGES["README.md"]
of_every_page = pytest.mark.parametrize("page", PAGES)


def line_counts(text: str) -> list[tuple[str, int]]:
    """(path, lines) of each table row `| [path](path) | N |`, with other cells anywhere."""
    return [(path, int(number.replace(",", ""))) for path, number in
            re.findall(r"^\|.*\[`?([^\]`]+)`?\]\(\1\) *\| *([\d,]+) *\|", text, re.MULTILINE)]  # fmt: skip


def test_line_counts_are_found_in_a_table():
    text = "| [a.py](a.py) | 12 |\n| 1 | [`b/c.py`](b/c.py) | 1,200 | what |\n| [d](e.py) | 3 |\n| plain | 7 |"
    assert line_counts(text) == [("a.py", 12), ("b/c.py", 1200)]


@of_every_page
def test_line_counts_in_the_readme_are_right(page):
    stated = line_counts(PAGES[page])
    assert dict(stated) == {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path, _ in stated}


def anchors(file: Path) -> set[str]:
    """The addresses of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@of_every_page
def test_links_in_the_readme_lead_to_files(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?[^)]*\)", PAGES[page])
    assert not [link for link, _ in links if not (folder / link).exists()]
    headings = [(folder / (link or Path(page).name), anchor) for link, anchor in links if anchor and not link.endswith(".py")]
    assert not [f"{file.name}#{anchor}" for file, anchor in headings if anchor not in anchors(file)]


def lines_of(symbol: str, source: str) -> set[tuple[int, int]]:
    """The (first, last) lines of every function or class of this name: `VLM.splice`, `splice` or `VLM`."""
    found = set()

    def look(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{path}.{child.name}"
                if name.endswith(f".{symbol}"):
                    found.add((child.lineno, child.end_lineno or child.lineno))
                look(child, name)

    look(ast.parse(source), "")
    return found


def test_the_lines_of_a_symbol_are_found():
    source = "class A:\n    def f(self):\n        return 1\n\n@wrap\ndef f():\n    pass\n"
    assert lines_of("A", source) == {(1, 3)} and lines_of("A.f", source) == {(2, 3)}
    assert lines_of("f", source) == {(2, 3), (6, 7)} and not lines_of("g", source)


@of_every_page
def test_a_link_to_lines_names_what_is_defined_there(page):
    """Where it fails, it says which lines the link should have."""
    links = re.findall(r"\[`?([^\]`]+)`?\]\(([^)#]+\.py)#([^)]*)\)", PAGES[page])
    wrong = {}
    for symbol, file, fragment in links:
        places = {f"L{first}-L{last}" for first, last in
                  lines_of(symbol, ((ROOT / page).parent / file).read_text(encoding="utf-8"))}
        if fragment not in places:
            wrong[f"[{symbol}]({file}#{fragment})"] = " or ".join(sorted(places)) or "no such name"
    assert not wrong


@of_every_page
def test_nothing_in_the_readme_is_left_to_fill_in(page):
    assert not re.findall(r"\{[A-Z_]+\}|@@|TODO|TBD|XXX", PAGES[page])


# ---------------------------------------------------------------- how the front page reads


def prose(text: str) -> list[str]:
    """The paragraphs and list items of a page, without code blocks, tables and pictures; a link is its words, code one word."""
    text = re.sub(r"^(?:\||    |#).*$", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)
    text = re.sub(r"`[^`]+`", "code", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)))
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text) if part.strip()]


def sentences(text: str) -> list[str]:
    return [sentence for part in prose(text) for sentence in re.split(r"(?<=[.?!])[\"*)]*\s+", part)]


def test_the_sentences_of_a_text_are_found():
    text = "# Title\nOne [two](three four). *Five `six seven`?*\n\n```\nno. no\n```\n| no. |\n- eight\n  nine\n- ten\n"
    assert sentences(text) == ["One two.", "*Five code?*", "- eight nine", "- ten"]


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 300 and len(re.findall(r"\S*\w\S*", README)) <= 3300


def test_no_sentence_of_the_front_page_is_long():
    assert not [sentence for sentence in sentences(README) if len(sentence.split()) > 30]


def test_percentages_of_the_front_page_stand_in_tables():
    assert sum(line.count("%") for line in README.splitlines() if not line.startswith("|")) <= 20


# ---------------------------------------------------------------- commands


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


@of_every_page
def test_commands_in_the_readme_exist_with_their_flags(page):
    check_commands(PAGES[page])


DEFAULT_WAY = {("1-pretrain_vlm.py", ()), ("2-sft_vlm.py", ()), ("3-rl_vlm.py", ()), ("3-rl_vlm.py", ("algo", "dpo"))}
TRAINED = {"out/pretrain", "out/sft", "out/dpo", "out/grpo"}  # what the default way made


def replaced(text: str) -> list[str]:
    """The commands of a text that train into a folder of the default way and are not that way themselves."""
    found = []
    for script, flags in commands(re.sub(r"^```text\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)):  # what is printed
        harmless = not re.match("[123]-", script) or {"dry_run", "check_data", "resume", "help"} & set(flags)
        way = (script, tuple(word for name, values in flags.items() for word in (name, *values)))
        if not harmless and way not in DEFAULT_WAY and flags.get("out", ["out/sft"])[0] in TRAINED:
            found.append(f"{script} {flags}")
    return found


def test_a_command_that_replaces_a_trained_model_is_noticed():
    assert not replaced("python 2-sft_vlm.py\npython 3-rl_vlm.py --algo dpo\npython 2-sft_vlm.py --lr 1 --out out/x --seed 1\n"
                        "python 1-pretrain_vlm.py --lr 1 --dry_run\npython 4-eval_chat.py --bench world")  # fmt: skip
    for command in ("2-sft_vlm.py --lr 1", "3-rl_vlm.py --algo ipo", "1-pretrain_vlm.py --out out/sft"):
        assert len(replaced(f"python {command}")) == 1


def test_no_command_of_the_front_page_replaces_a_model_that_the_reader_trained():
    """Those of the reference pages may: what lies in their place is kept as NAME.previous."""
    assert not replaced(README)


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


@of_every_page
def test_every_flag_that_the_readme_names_is_one_of_a_script(page):
    others = r"(?:python -m|pip install|torchrun|transformers serve|vllm serve) [^`\n]*?(?=[\w-]+\.py|`|\n)"
    text = re.sub(others, "", PAGES[page])
    known = {name for config in CONFIGS for name in cli.flag_names(config_class(*config)())}
    known |= {"config", "help", "train", *cli.flag_names(SpeedConfig())}  # the flags --train.PART; those of the benchmark
    assert not set(re.findall(r"--(?:no-)?([a-z][\w.]*\w)", text)) - known


# ---------------------------------------------------------------- each command runs

MODULES = {  # commands that are run in a short form elsewhere
    "dataset.studies.arms": "test_studies::test_a_study_runs_the_scripts_and_what_is_there_is_not_made_again",
    "dataset.studies.recipes": "test_recipes_table::test_every_row_is_a_run_of_all_three_scripts_and_is_not_made_twice",
    "dataset.studies.probe": "test_probe::test_the_command_prints_a_row_for_each_kind_of_drawing",
    "dataset.studies.train_clip": "test_clip::test_a_few_steps_of_training_write_a_whole_clip_and_an_encoder_that_can_be_loaded",
    "dataset.figures": "test_figures::test_the_program_draws_into_a_folder_and_names_the_command_that_is_missing",
    "model.export": "test_export::test_the_program_prints_the_parity_of_a_checkpoint_and_the_way_back_is_a_program_too",
    "model.from_llava": "test_export::test_the_program_prints_the_parity_of_a_checkpoint_and_the_way_back_is_a_program_too",
    "model.llm.gguf": "test_pretrained::test_smollm2_goes_on_with_a_text_as_transformers_does",
    "model.registry": "test_parts::test_the_list_of_parts_gives_sizes_and_imports_no_library_that_it_does_not_need",
    "tests.fuzz": "test_fuzz::test_every_damaged_row_is_read_or_refused_with_a_reason",
    "tests.soak": "test_reliability::test_what_the_table_says_follows",
    "tests.speed": "test_speed::test_the_command_prints_both_speeds_and_their_ratio",
    "tests.speed.growth": "test_speed_legs::test_growth_is_drawn_with_a_point_for_every_value_of_every_axis",
    "tests.speed.loading": "test_speed_legs::test_pictures_are_counted_for_a_thread_and_for_processes",
    "tests.speed.rollouts": "test_speed_legs::test_both_are_timed_in_every_job_and_round",
    "tests.speed.startup": "test_speed_legs::test_a_run_is_measured_up_to_its_first_step",
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


ELSEWHERE = re.compile(r"hf:|http|/data/|--bench (?:all|mme)")  # needs the network or files of others: its flags are checked


def runs(text: str) -> list[str]:
    """Every command of a text that starts python or torchrun, without its comment."""
    text = re.sub(r"^## Adding a part\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)  # test_adding_a_part runs it
    blocks_and_code = re.findall(r"^```\n(.*?)^```|^```.*?^```|`([^`\n]+)`", text, re.DOTALL | re.MULTILINE)
    lines = [re.split(r" # |  +", line)[0].strip() for parts in blocks_and_code
             for line in re.split(r"\n|&&", "".join(parts))]
    return [line for line in lines if re.match(r"(python|torchrun) ", line) and "pytest" not in line
            and not ELSEWHERE.search(line)]  # fmt: skip


RUNS = {page: runs(text) for page, text in PAGES.items()}
ALL_RUNS = [command for of_page in RUNS.values() for command in of_page]


def test_the_commands_of_a_text_are_found():
    text = ("```\npip install x\npython a.py && python b.py --c   # d\n```\nor `python -m e`, `f`, `python -m pytest`.\n"
            "```python\nx\n```\n## Adding a part\n`python g.py`\n## More\n`python h.py --data hf:x`\n`python i.py    what`\n")
    assert runs(text) == ["python a.py", "python b.py --c", "python -m e", "python i.py"]


@pytest.mark.parametrize("name", MODULES)
def test_a_command_that_is_run_elsewhere_is_run_there(name):
    assert any(name in command for command in ALL_RUNS)
    file, _, function = MODULES[name].partition("::")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command in ALL_RUNS
                                     if "python -m dataset.studies" in command and "rescore" not in command])
def test_the_flags_of_a_study_are_known(command):
    words = shlex.split(command)
    tyro.cli(importlib.import_module(words[2]).Config, args=words[3:])


def files_in(text: str) -> dict[str, str]:
    """The Python files that a page prints in full, by the name in their first line, and none of "Adding a part"."""
    return dict(re.findall(r"^```python\n# (\w+\.py)\b.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def workplace(samples, tmp_path_factory) -> Path:
    """What a reader has beside the scripts: pictures, rows, a pretrained language model, and what DPO made of a checkpoint."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / ".assets", folder / ".assets")
    shutil.copy(samples / "red.png", folder / "picture.png")
    for images in ("images", "pictures", "FOLDER"):
        shutil.copytree(samples, folder / images)
        shutil.copy(folder / "picture.png", folder / images)
    shutil.copy(samples / "llava.json", folder / "pretrain.json")
    for name in ("pretrain.parquet", "sft.parquet"):
        shutil.copy(samples / "minimind.parquet", folder / name)
    for name in ("rows.jsonl", "my_rows.jsonl"):
        miniatures.lines(folder / name, [{"conversations": miniatures.talk("<image>How many?", "2", miniatures.OPENAI),
                                          "answer": "2", "image_urls": ["picture.png"]}] * 4)  # fmt: skip
    miniatures.lines(folder / "preferences.jsonl", [{"prompt": f"What is {k}?", "chosen": "A number.", "rejected": "Red."}
                                                    for k in range(4)])  # fmt: skip
    (folder / "my_file.py").write_text("def function(example, answer):\n    return len(answer)\n")
    for name, text in (files for page in PAGES.values() for files in files_in(page).items()):
        (folder / name).write_text(text, encoding="utf-8")
    test_native.save_qwen3(folder / "out" / "smollm2")
    return folder


@pytest.fixture(scope="module")
def trained(workplace, run_script) -> Path:
    """The workplace after the default way, from which the pages of the packages go on."""
    for words in (["1-pretrain_vlm.py"], ["2-sft_vlm.py"], ["3-rl_vlm.py", "--algo", "dpo"], ["3-rl_vlm.py"]):
        run_script(*words, *SHORT[" ".join(words)], "--device", "cpu", cwd=workplace)
    return workplace


@of_every_page
def test_every_command_runs(page, trained, run_script, run_ranks):
    """In the order of the page, because each goes on from what those before it made."""
    for command in RUNS[page]:
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
            run_ranks(script, *given, *short, "--dry_run", "--device", "cpu", cwd=trained)
        else:
            run_script(script, *given, *short, "--device", "cpu", cwd=trained)
        if "rated.jsonl" in given and script == "4-eval_chat.py":  # a model of one step solves no row
            rated = (trained / "rated.jsonl").read_text()
            assert rated.count('"pass_rate": 0.0') == 4
            (trained / "rated.jsonl").write_text(rated.replace('"pass_rate": 0.0', '"pass_rate": 0.5'))


def test_the_rows_of_the_front_page_are_read(tmp_path, samples):
    """Those of each json block, one a line, with any picture in the place of theirs."""
    blocks = re.findall(r"^```json\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert [len(block.splitlines()) for block in blocks] == [1, 3]
    for block in blocks:
        (tmp_path / "rows.jsonl").write_text(block, encoding="utf-8")
        for row in map(json.loads, block.splitlines()):
            shutil.copy(samples / "red.png", tmp_path / row["image"])
        rows = load(tmp_path / "rows.jsonl")
        for row in (rows[k] for k in range(len(rows))):
            assert len(row.pictures) == 1 and row.messages[-1].role == "assistant"


# ---------------------------------------------------------------- exercises

EXERCISES = re.findall(r"^\| (\d+) \| (.*?) \|", README, re.MULTILINE)
CHANGES = {number: re.search(r"in \[[^\]]+\]\(([^)#]+)#L(\d+)-L(\d+)\), change `([^`]+)` to `([^`]+)`", text)
           for number, text in EXERCISES if " change " in text}  # fmt: skip


def test_there_are_ten_exercises_each_with_a_command():
    assert [int(number) for number, _ in EXERCISES] == list(range(1, 11)) and all(runs(text) for _, text in EXERCISES)
    assert len(CHANGES) == 3 and all(CHANGES.values())


@pytest.mark.parametrize("number", CHANGES)
def test_the_changed_line_of_an_exercise_stands_there_once_and_changes_the_loss(number, trained, run_script, tmp_path):
    file, first, last, old, new = CHANGES[number].groups()
    for name in ("model", "dataset"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("[0-9]-*.py"):
        shutil.copy(script, tmp_path)
    shutil.copytree(trained / "out" / "pretrain", tmp_path / "out" / "pretrain")
    lines = (tmp_path / file).read_text(encoding="utf-8").splitlines(keepends=True)
    code = "".join(lines[int(first) - 1:int(last)])
    assert code.count(old) == 1
    lines[int(first) - 1:int(last)] = [code.replace(old, new)]
    (command,) = runs(dict(EXERCISES)[number])
    script, *given = shlex.split(command)[1:]
    given = [*given, "--max_steps", "2", "--batch_size", "8", "--log_every", "1", "--bench", "", "--device", "cpu"]
    losses = []
    for text in (None, "".join(lines)):
        if text:
            (tmp_path / file).write_text(text, encoding="utf-8")
        run_script(tmp_path / script, *given, cwd=tmp_path, fresh=True)
        log = (tmp_path / given[given.index("--out") + 1] / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log[:2]])
    assert losses[0] != losses[1]
