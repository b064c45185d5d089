"""The section "Adding a part" of model/README.md: its four files, as they stand there, in a copy of the packages."""

import json
import re
import shutil

import pytest

from tests.conftest import ROOT

SECTION = re.search(r"\n## Adding a part\n(.*?)\n## ", (ROOT / "model" / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
FILES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", SECTION, re.DOTALL))
COMMANDS = [line.split()[1:] for line in SECTION.splitlines() if line.startswith("python ")]

RUN = """
import json, runpy, sys
runpy.run_path("model/registry.py", run_name="__main__")
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_there_is_one_short_file_for_each_kind_of_part():
    folders = [file.rpartition("/")[0] for file in FILES]
    assert folders == ["model/connector", "model/encoder", "model/llm", "dataset/tasks"]
    for file, text in FILES.items():
        assert not (ROOT / file).exists()  # it is new
        assert len([line for line in text.splitlines() if line.strip()]) < 25, file


@pytest.fixture(scope="module")
def copy(run_script, tmp_path_factory):
    """(a copy of the packages and scripts with the four files in it, what the commands of the page printed there)."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("model", "dataset"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("[0-9]-*.py"):
        shutil.copy(script, folder)
    for file, text in FILES.items():
        (folder / file).write_text(text, encoding="utf-8")
    three_steps = ("--max_steps", "3", "--batch_size", "8", "--eval_examples", "4")
    quick = {"1": three_steps, "2": three_steps, "4": ("--examples", "8", "--max_new_tokens", "4")}
    runs = [[argument.strip('"') for argument in command] + [*quick[command[0][0]], "--device", "cpu"] for command in COMMANDS]
    (folder / "run.py").write_text(RUN)
    return folder, run_script(folder / "run.py", json.dumps(runs), cwd=folder, fresh=True).out


def test_each_file_is_found_by_its_name(copy):
    for kind, name in (("connector", "mean"), ("encoder", "pixels"), ("llm", "parallel"), ("task", "brightness")):
        assert re.search(rf"^{kind} +{name} +\S", copy[1], re.MULTILINE), name


def test_a_model_of_these_parts_trains_and_is_measured_by_the_commands_of_the_page(copy):
    folder, _ = copy
    config = json.loads((folder / "out" / "mine" / "sft" / "config.json").read_text())
    assert (config["encoder"], config["connector"], config["llm_name"]) == ("pixels", "mean", "parallel")
    for stage in ("pretrain", "sft"):
        assert json.loads((folder / "out" / "mine" / stage / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    scores = json.loads((folder / "out" / "mine" / "sft" / "scores.json").read_text())
    assert scores["brightness/n"] == 8 and 0 <= scores["brightness/accuracy"] <= 1
    lines = (folder / "out" / "mine" / "sft" / "predictions-brightness.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["truth"] for row in rows} == {"light", "dark"}
