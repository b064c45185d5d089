"""Figures of a run: drawn from its own files, with the numbers that the model gives; what cannot be drawn says why."""

import json
import shutil

import pytest
import torch
from PIL import Image

from dataset.figures import __main__ as program
from dataset.figures import attention, row, stage_three, training
from dataset.figures.draw import FIGURES, draw_all, figures_section
from dataset.figures.stage import LEARNED, CannotDraw, Stage
from dataset.tasks import Example, dialogue
from dataset.world.scenes import sample_scene
from model import checkpoint
from model.inspection import Inspector
from tests import tiny


def texts(figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts] + [text.get_text() for text in figure.texts]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run of four stages: each trains the language model, the first two the connector as well."""
    root = tmp_path_factory.mktemp("run") / "out"
    model, tokenizer = tiny.nano(), tiny.processor().tokenizer
    for name in ("pretrain", "sft", "dpo", "grpo"):
        parts = (model.llm, model.connector) if name in ("pretrain", "sft") else (model.llm,)
        with torch.no_grad():
            for weight in [weight for part in parts for weight in part.parameters()]:
                weight.add_(1e-3 * torch.randn_like(weight))
        checkpoint.save(root / name, model, tokenizer.file)
        log = [{"step": 0, "loss": 8.0, "world/what": 0.25}, {"step": 9, "loss": 2.0, "world/what": 0.75}]
        (root / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    folder = root / "dpo" / "feedback" / "abc"
    folder.mkdir(parents=True)
    Image.new("RGB", (96, 96), "red").save(folder / "a.png")
    rows = [{"question": "Describe it.", "image_path": "a.png", "chosen": f"There is {k} bus.", "rejected": f"There is {k} cat."}
            for k in range(3)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return root


def stage(out, name: str) -> Stage:
    return Stage.of(out / name, name, Inspector)


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "grpo"])
def test_every_figure_of_a_stage_is_drawn_or_says_why_not(out, tmp_path, name):
    drawn, missing = draw_all(stage(out, name), tmp_path)
    expected = {figure for figure, kind in FIGURES.items() if name in kind.stages} - {"group"}
    assert {file.stem for file in drawn.values()} == {file.stem for file in tmp_path.iterdir()} == expected
    assert missing == ([] if name != "grpo" else [
        f"left out group.png: the model of {out / 'sft'} gave no group of 8 answers that differ in reward"])
    for file in drawn.values():
        with Image.open(file) as image:
            assert image.mode == "RGBA" and image.getpixel((image.width - 1, 0))[3] == 0  # no background: any page shows through


def test_a_section_of_the_report_shows_the_figures_and_what_is_left_out(out, tmp_path):
    root = tmp_path / "out"
    shutil.copytree(out / "dpo", root / "dpo")
    missing = figures_section(root / "dpo", "dpo", Inspector)
    page = (root / "report.md").read_text()
    assert "## Figures of dpo" in page and "![Which part" not in page and all(line in page for line in missing)
    assert missing == [f"left out pair.png: no checkpoint in {root / 'sft'}",
                       "left out frozen.png: no stage has a checkpoint beside the one that it began with"]


def test_where_it_looks_are_the_weights_of_the_last_block_on_the_picture(out):
    trained, scene = stage(out, "sft").trained(), sample_scene("test", 1)
    prompt, right = attention.asked(scene, scene.objects[0], "en")
    (shares,) = attention.looks(trained, [prompt], [right])
    assert shares.shape == (3, 3) and float(shares.sum()) == pytest.approx(1)
    document = trained.processor.with_answer(prompt, right, 1000)
    (weights,) = trained.inspector.attention(trained.processor.batch([document]))
    is_image = torch.tensor(document.input_ids) == trained.processor.tokenizer.image
    candidates = [weights.mean(0)[k][is_image] for k in range(len(document)) if k + 1 < len(document) and document.learn[k + 1]]
    assert any(torch.allclose(shares.flatten(), one / one.sum()) for one in candidates)
    assert sum(attention.on_object(shares, obj) for obj in scene.objects) <= 1.0001


def test_the_share_of_an_object_is_that_of_its_cell(out):
    scene = sample_scene("test", 1)
    shares = torch.zeros(6, 6)
    line, column = divmod(scene.objects[0].cell, 3)
    shares[2 * line:2 * line + 2, 2 * column:2 * column + 2] = 0.25
    assert attention.on_object(shares, scene.objects[0]) == pytest.approx(1)
    with pytest.raises(CannotDraw, match="5 x 5 squares do not fit"):
        attention.on_object(torch.zeros(5, 5), scene.objects[0])


def test_the_strip_marks_what_is_learned(out):
    one = stage(out, "sft")
    _, document = row.example(one)
    colours = [colour for _, colour in row.pieces(one.trained(), document)]
    assert [colour == LEARNED for colour in colours] == document.learn
    assert [text for text, _ in row.pieces(one.trained(), document)].count("image") == 9
    said = f"One training row of sft: {len(document)} tokens, of which {sum(document.learn)} are learned"
    assert said in texts(row.tokens(one))


def test_the_way_of_a_row_has_the_shapes_of_the_model(out):
    one = stage(out, "sft")
    _, document = row.example(one)
    said = texts(row.way(one))
    for shape in ("(3, S, S) = 3 x 96 x 96", "(P, D) = 37 x 32", "(tokens, C) = 9 x 64", f"(T, C) = {len(document)} x 64",
                  f"(L, V) = {sum(document.learn)} x 6,400", "model/encoder/\nclip.py"):  # fmt: skip
        assert shape in said, said


def test_a_part_is_frozen_where_its_weights_are_those_of_the_start(out):
    before_and_after = training.sizes(out / "dpo", out / "sft")
    assert before_and_after["connector"][0] == 0 < before_and_after["connector"][1]
    assert before_and_after["llm"][0] == before_and_after["llm"][1] > 0
    assert training.sizes(out / "pretrain", None)["llm"][0] > 0 == training.sizes(out / "pretrain", None, ["llm"])["llm"][0]
    assert all(changed > 0 for part, (changed, _) in training.sizes(out / "sft", out / "pretrain").items() if part != "encoder")


def test_skills_are_drawn_over_the_steps_where_they_were_checked_along_the_way(out, tmp_path):
    assert training.scores_by_kind(stage(out, "sft")) == {"what": [(0, 0.25), (9, 0.75)]}
    assert training.skills(stage(out, "sft")).axes[0].get_title() == "what  75 %"
    once = Stage.of(tmp_path, "sft", Inspector)
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 8.0}\n{"step": 9, "loss": 2.0, "world/what": 0.75}\n')
    assert [axis.get_title() for axis in training.skills(once).axes][1] == "right answers after the last step, by kind"
    (tmp_path / "log.jsonl").write_text('{"step": 0, "loss": 8.0}\n')
    with pytest.raises(CannotDraw, match="--bench world"):
        training.skills(once)


def test_a_group_shows_each_reward_minus_the_mean(out):
    scene = sample_scene("test", 1)
    example = Example(attention.asked(scene, scene.objects[0], "en")[0], "8", "image")
    before, after = [("a", 1.1), ("b", 0.1), ("c", 1.1), ("d", 1.1)], [("e", 1.1)]
    said = texts(stage_three.draw_group(example, {"before": before, "after": after}))
    assert said.count("+0.25") == 3 and said.count("-0.75") == 1 and said.count("0") == 1
    assert "before training: mean reward 0.85" in said and "right: 8" in said[said.index("before training: mean reward 0.85") - 1]


def test_a_pair_shows_its_log_probabilities_under_both_models(out):
    one = stage(out, "dpo")
    (pair,) = [pair for pair in stage_three.preferences(one) if pair.chosen == "There is 1 bus."]
    logps = [trained.inspector.answer_logps(trained.processor.pair_batch([trained.processor.pair(pair, 1000)]))[0]
             for trained in (one.before(), one.trained())]  # fmt: skip
    said = texts(stage_three.draw_pair(pair, *logps, beta=0.5))
    change = 0.5 * (logps[1] - logps[0])
    assert f"before {float(logps[0][0]):.1f}" in said and f"after {float(logps[1][1]):.1f}" in said
    assert f"= {float(change[0] - change[1]):+.3f}" in said[-1]


def test_the_program_draws_into_a_folder_and_names_the_command_that_is_missing(out, tmp_path, capsys):
    root = tmp_path / "out"
    shutil.copytree(out / "sft", root / "sft")
    program.main(root, tmp_path / "figures")
    said = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"tokens.png", "row.png", "attention.png", "skills.png"}
    command = "python 3-rl_vlm.py --algo dpo"
    assert f"left out pair.png, frozen.png of {root / 'dpo'}: there is no such run; `{command}` makes it" in said
    assert "left out frozen.png: no stage has a checkpoint beside the one that it began with" in said
    assert not (root / "report.md").exists() and not (root / "sft" / "figures").exists()


def test_rows_without_a_picture_are_no_example(out, monkeypatch):
    monkeypatch.setattr(row, "mixture", lambda *given: [dialogue("a", [], [("Hello", "Good day.")])])
    with pytest.raises(CannotDraw, match="none of the first 60 rows has one picture"):
        row.example(stage(out, "sft"))
