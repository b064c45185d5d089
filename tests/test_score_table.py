"""Several checkpoints in one table: whose numbers stand where, and what is said beside them."""

import json

import pytest
from PIL import Image

from dataset.score_table import PUBLISHED, write_table


@pytest.fixture
def folders(tmp_path):
    scores = {
        "sft": {"world/exact": 0.9, "world/blank": 0.25, "world/n": 100, "pope/f1": 0.5, "pope/accuracy": 0.4, "pope/n": 9000},
        "dpo": {"world/exact": 0.95, "world/n": 60, "mme/perception": 750.0, "mme/n": 2374},
    }  # fmt: skip
    for name, of in scores.items():
        (tmp_path / name).mkdir()
        timed = {f"{metric.partition('/')[0]}/seconds": 1.0 for metric in of}
        (tmp_path / name / "scores.json").write_text(json.dumps({**of, **timed, "held_out/loss": 2.0}))
    return [tmp_path / name for name in scores]


def table(page):
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(head[1:], [*row[1:], *[""] * len(head)])) for row in rows}


def test_the_table_has_a_column_for_each_checkpoint_and_says_where_fewer_questions_were_asked(folders):
    page = write_table(folders, ["world"])
    assert page == folders[0].parent / "benchmarks.md"
    assert table(page) == {
        "world/exact": {"questions": "100", "sft": "90.0 %", "dpo": "95.0 % (n = 60)"},
        "world/blank": {"questions": "100", "sft": "25.0 %", "dpo": ""},
    }
    assert "Published" not in page.read_text()
    with Image.open(page.with_suffix(".png")) as chart:
        assert chart.format == "PNG" and "![](benchmarks.png)" in page.read_text()


def test_published_numbers_stand_where_the_score_is_the_same(folders):
    page = write_table(folders, ["pope", "mme"])
    rows = table(page)
    assert rows["pope/f1"]["LLaVA-1.5-7B"] == "85.9 %" and rows["pope/accuracy"]["LLaVA-1.5-7B"] == ""
    assert rows["pope/accuracy"]["Phi-2 + SigLIP"] == "87.2 %" and rows["mme/perception"]["Qwen2-0.5B + SigLIP"] == "1153"
    assert rows["mme/perception"]["dpo"] == "750" and "RLAIF-V 7B" not in rows["pope/f1"]
    assert "TinyLLaVA Factory's README" in page.read_text()
    assert not [metric for of in PUBLISHED.values() for metric in of if metric.startswith("vqav2")]  # test-dev is another set


def test_a_task_of_ones_own_shows_its_accuracy_or_all_that_it_has(folders):
    file = folders[0] / "scores.json"
    own = {"mine/accuracy": 0.5, "mine/n": 4, "mine/seconds": 1, "other/left": 0.1, "other/n": 4, "other/seconds": 1}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    assert set(table(write_table(folders, ["mine", "other"]))) == {"mine/accuracy", "other/left"}


def test_two_checkpoints_of_the_same_name_are_told_apart(folders, tmp_path):
    again = tmp_path / "more" / "sft"
    again.mkdir(parents=True)
    (again / "scores.json").write_text((folders[1] / "scores.json").read_text())
    rows = table(write_table([folders[0], again], ["world"]))
    assert set(rows["world/exact"]) == {"questions", folders[0].as_posix(), again.as_posix()}
