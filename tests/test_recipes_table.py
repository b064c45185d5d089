"""The table of recipes: real runs of the scripts, one row each."""

import json

import pytest

from dataset.studies import recipes
from tests.conftest import ENVIRONMENT


@pytest.fixture
def quick(monkeypatch, run_script, tmp_path):
    """The scripts by the forking launcher, in place of a fresh Python for each, on few rows; returns (Config, scripts run)."""
    ran = []

    def start(script, *arguments):
        ran.append(script)
        quick = ("--max_new_tokens", 6) if script.startswith("4") else ("--data", "world:rows=12")
        done = run_script(script, *arguments, *quick, cwd=tmp_path, expect=None, env={**ENVIRONMENT, "COLUMNS": "200"})
        if done.status:
            raise recipes.ScriptError(done.err.strip().rpartition("\n")[2])
        return done.out

    monkeypatch.setattr(recipes, "start", start)
    return recipes.Config(connectors=("linear", "pixel_shuffle:side=5"), recipes=("freeze/full/lora:2",), steps=3, batch_size=4,
                          examples=1, device="cpu", out=tmp_path / "recipes"), ran


def test_every_row_is_a_run_of_all_three_scripts_and_is_not_made_twice(quick, capsys):
    config, ran = quick
    recipes.main(config)
    table = (config.out / "table.md").read_text().splitlines()
    assert table[0] == "|  | world | easy-VQA | trained parameters | tokens a picture | samples/s |"
    named = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]}
    assert list(named) == ["linear", "pixel_shuffle:side=5", "freeze/full/lora:2"]
    linear, broken, adapted = named.values()
    assert linear[0].endswith(" %") and linear[1].endswith(" %") and linear[3] == "37" and float(linear[4]) > 0
    assert "side=5 needs a square of patches" in broken[0]
    assert adapted[3] == "9" and int(adapted[2].replace(",", "")) < int(linear[2].replace(",", ""))
    assert ran == ["1-pretrain_vlm.py", "2-sft_vlm.py", "4-eval_chat.py", "1-pretrain_vlm.py",
                   "1-pretrain_vlm.py", "2-sft_vlm.py", "4-eval_chat.py"]  # fmt: skip
    scores = json.loads((config.out / "linear" / "row.json").read_text())
    assert f"{100 * scores['world/exact']:.1f} %" == linear[0]
    ran.clear()
    recipes.main(config)
    assert ran == ["1-pretrain_vlm.py"] and (config.out / "table.md").read_text().splitlines() == table  # the one that failed


def test_a_recipe_has_three_parts(quick):
    with pytest.raises(SystemExit, match="ENCODER/CONNECTOR/LLM.*not 'lora:8'"):
        recipes.main(recipes.Config(recipes=("lora:8",)))
