"""Runs side by side: seeds of one run go together, and a missing score names its file."""

import json

import pytest

from dataset.studies.compare import Config, by_run, draw, main, markdown, mean_and_spread

METRICS = ("h/chair_s", "h/cover")


def folders(path, **scores):
    for name, (wrong, cover) in scores.items():
        folder = path / name.replace("_", "-")
        folder.mkdir()
        (folder / "scores.json").write_text(json.dumps({"h/chair_s": wrong, "h/cover": cover, "h/n": 100}))
    return [path / name.replace("_", "-") for name in scores]


def test_seeds_of_a_run_share_a_row_with_their_mean_and_spread(tmp_path):
    runs = by_run(folders(tmp_path, sft=(0.4, 0.9), dpo_0=(0.02, 0.9), dpo_1=(0.04, 0.92)), METRICS)
    assert runs == {"sft": [[0.4, 0.9]], "dpo": [[0.02, 0.9], [0.04, 0.92]]}
    assert markdown(runs, METRICS).splitlines()[2:] == [
        "| sft | 1 | 40.0 % | 90.0 % |", "| dpo | 2 | 3.0 ± 1.4 % | 91.0 ± 1.4 % |"]  # fmt: skip


def test_one_value_has_no_spread():
    assert mean_and_spread("world/exact", [0.5]) == "50.0 %"
    assert mean_and_spread("world/exact", [0.5, 0.5]) == "50.0 ± 0.0 %"
    assert mean_and_spread("hallucination/length", [14.0, 15.0]) == "14.5 ± 0.7"
    assert mean_and_spread("mmhal/score", [3.1]) == "3.1"


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    found = folders(tmp_path, sft=(0.4, 0.9))
    with pytest.raises(ValueError, match=r"has no h/f1; it has h/chair_s, h/cover, h/n"):
        by_run(found, ("h/f1",))
    with pytest.raises(ValueError, match=r"scores.json is missing: python 4-eval_chat.py --model .*gone --bench h"):
        by_run([tmp_path / "gone"], METRICS)
    with pytest.raises(SystemExit, match="two axes"):
        main(Config(tuple(found), ("h/cover",), tmp_path / "runs.png"))


def test_the_picture_has_a_point_for_every_folder(tmp_path, monkeypatch):
    import matplotlib.axes

    drawn, scatter = [], matplotlib.axes.Axes.scatter

    def watched(self, x, y, **options):
        drawn.append((x, y, options["label"]))
        return scatter(self, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "scatter", watched)
    draw(by_run(folders(tmp_path, dpo_0=(0.02, 0.9), dpo_1=(0.04, 0.92)), METRICS), METRICS, tmp_path / "runs.png")
    assert drawn == [([2.0, 4.0], [90.0, 92.0], "dpo")] and (tmp_path / "runs.png").stat().st_size > 1000
