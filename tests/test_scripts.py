"""The scripts as people run them: three steps of each, in a folder of their own, with what they write and what they refuse."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dataset.images import from_file
from dataset.predictions import solved
from dataset.processor import Processor
from dataset.tasks import Example, dialogue
from dataset.tokenizer import SentencePieceTokenizer
from dataset.vision.image_processor import OneRank
from model import checkpoint, cli
from model.generate import generate
from tests.conftest import ROOT, TINY

LOGGED = {"step", "seconds", "loss", "lr", "gradient_norm", "tokens_per_second"}


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------- the three stages


def test_pretraining_writes_a_checkpoint_a_log_curves_scores_and_its_part_of_the_report(stage_one):
    folder, done = stage_one
    out = folder / "out" / "pretrain"
    assert [row["step"] for row in log_of(out)] == [0, 1, 2, 3]
    assert all(set(row) == LOGGED and row["loss"] > 0 for row in log_of(out)[:3])
    assert {"world/caption", "world/n"} <= set(log_of(out)[3])
    scores = json.loads((out / "scores.json").read_text())
    assert {"world/caption", "world/n"} <= set(scores) and 0 <= scores["world/caption"] <= 1
    with Image.open(out / "curves.png") as curves:
        assert curves.format == "PNG"
    report = (folder / "out" / "report.md").read_text()
    assert report.startswith("# Report\n\n| | pretrain |") and "![](pretrain/curves.png)" in report
    assert "- [Pretraining](#pretraining)\n- [Figures of pretrain](#figures-of-pretrain)\n" in report
    assert {"pretrain/figures/tokens.png", "pretrain/figures/row.png"} < set(re.findall(r"!\[.*\]\((.+)\)", report))
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", report):
        assert (folder / "out" / picture).is_file()
    assert checkpoint.load(out).config.template == "pupil"
    assert re.search(r"llm [\d,]+ \([\d,]+ trained\)\n12 rows, 3 steps of 4 on 1 x cpu\n", done.out)
    assert re.search(r"wrote out/pretrain in \d+ s\. Next: python 2-sft_vlm\.py --init out/pretrain\n$", done.out)


def test_a_run_from_another_folder_writes_into_that_folder(stage_one):
    folder, _ = stage_one
    assert ROOT not in folder.parents
    assert [path.name for path in folder.iterdir()] == ["out"]


def test_fine_tuning_goes_on_from_pretraining_and_finds_it_by_itself(stage_two):
    folder, done = stage_two
    out = folder / "out" / "sft"
    assert [row["step"] for row in log_of(out)] == [0, 1, 2, 2, 3]  # checked after step 2 as well
    scores = json.loads((out / "scores.json").read_text())
    assert {"world/exact", "easy_vqa/accuracy", "arithmetic/accuracy"} <= set(scores)
    report = (folder / "out" / "report.md").read_text()
    assert [line for line in report.splitlines() if line.startswith("## ")] == [
        "## Pretraining", "## Figures of pretrain", "## Supervised fine-tuning"]  # fmt: skip
    for picture in re.findall(r"!\[\]\(([^)]+)\)", report):
        assert (folder / "out" / picture).is_file()
    assert (out / "curves.png").is_file()
    assert "Next: python 4-eval_chat.py --model out/sft, " in done.out
    before, after = (load_file(folder / "out" / name / "model.safetensors") for name in ("pretrain", "sft"))
    assert before.keys() == after.keys()
    assert (before["connector.proj.weight"] - after["connector.proj.weight"]).abs().max() < 0.1  # from there, not from scratch


@pytest.fixture(scope="session")
def measured(stage_two, run_script):
    folder, _ = stage_two
    return folder, run_script("4-eval_chat.py", "--bench", "world,easy_vqa,arithmetic,text", "--examples", 3, "--controls", 1,
                              "--max_new_tokens", 3, "--device", "cpu", cwd=folder)  # fmt: skip


def test_a_benchmark_writes_scores_with_controls_predictions_and_its_part_of_the_report(measured):
    folder, done = measured
    scores = json.loads((folder / "out" / "sft" / "scores.json").read_text())
    for name in ("world", "easy_vqa", "arithmetic", "text"):
        rows = [json.loads(line) for line in (folder / "out" / "sft" / f"predictions-{name}.jsonl").read_text().splitlines()]
        assert len(rows) == scores[f"{name}/n"] > 0
        assert set(rows[0]) == {"id", "kind", "question", "truth", "answer", "truncated", "score"}
        assert scores[f"{name}/seconds"] >= 0
    assert {"world/blank", "world/shuffled", "world/guessing", "easy_vqa/blank", "arithmetic/shuffled"} <= set(scores)
    assert all(0 <= value <= 1 for name, value in scores.items() if not name.endswith(("/n", "/seconds")))
    report = (folder / "out" / "report.md").read_text()
    assert "## Test scores of sft" in report and "### easy_vqa" in report
    for picture in re.findall(r"!\[\]\(([^)]+)\)", report):
        assert (folder / "out" / picture).is_file()
    assert "Next: python web_demo.py" in done.out


def answered(folder: Path) -> dict:
    """What a run has left in a folder, without the seconds that it took."""
    scores = json.loads((folder / "scores.json").read_text())
    files = [file for file in folder.glob("*.jsonl*") if file.is_file()]
    return {"scores": {name: value for name, value in scores.items() if not name.endswith("/seconds")},
            **{file.name: file.read_text() for file in files}}  # fmt: skip


def test_two_processes_answer_and_score_as_one_and_several_checkpoints_make_a_table(stage_two, samples, run_script, run_ranks,
                                                                                    tmp_path):  # fmt: skip
    """What is sampled is the same, too: chunks of questions are seeded, not processes."""
    given = ("4-eval_chat.py", "--max_new_tokens", 4, "--temperature", 1, "--batch_size", 8, "--device", "cpu")
    bench, data = ("--bench", "world,text", "--examples", 2), ("--data", samples / "eureka.jsonl")
    for name in ("one", "two"):
        shutil.copytree(stage_two[0] / "out" / "sft", tmp_path / name / "sft")
        shutil.copytree(stage_two[0] / "out" / "sft", tmp_path / name / "dpo")
    models = ("--model", "sft", "dpo")
    done = run_script(*given, *bench, *models, cwd=tmp_path / "one")
    assert "wrote benchmarks.md" in done.out
    page = (tmp_path / "one" / "benchmarks.md").read_text()
    assert "| score | questions | sft | dpo |" in page and "| world/exact |" in page and "| text/" in page
    ranks = run_ranks(*given, *bench, *models, cwd=tmp_path / "two")
    assert "wrote benchmarks.md" in ranks[0].out and not ranks[1].out
    run_script(*given, *data, *models[:2], cwd=tmp_path / "one")
    run_ranks(*given, *data, *models[:2], cwd=tmp_path / "two")
    for model in ("sft", "dpo"):
        first, second = (answered(tmp_path / name / model) for name in ("one", "two"))
        assert first == second and "predictions-world.jsonl" in first and not [name for name in first if "partial" in name]
    refused = run_script(*given, *data, *models, cwd=tmp_path / "one", expect=1)
    assert "--model takes several checkpoints for --bench alone: name one" in refused.err


def test_a_question_about_a_picture_is_answered_as_the_model_answers_it(stage_two, samples, run_script):
    folder, _ = stage_two
    out = folder / "out" / "sft"
    files = [samples / "red.png", samples / "green.png"]
    done = run_script("4-eval_chat.py", "--image", *files, "--prompt", "What is it?", "--max_new_tokens", 12, cwd=folder)
    model, tokenizer = checkpoint.load(out), SentencePieceTokenizer(out / "tokenizer.model")
    processor = Processor.of(model, tokenizer, OneRank())
    document = processor.prompt(dialogue("", [from_file(file) for file in files], [("What is it?", "")]))
    (answer,) = generate(model, processor.padded([document]), max_new_tokens=12, stop_ids={tokenizer.end},
                         temperature=0.0, banned=(tokenizer.image, tokenizer.pad, tokenizer.bos))  # fmt: skip
    assert done.out == tokenizer.decode(answer.tokens).rstrip("\N{REPLACEMENT CHARACTER}") + "\n"


def test_a_chat_reads_messages_pictures_and_commands_until_the_input_ends(stage_two, samples, run_script):
    folder, _ = stage_two
    lines = ["Hello!", f"/image {samples / 'red.png'}", "What?", "/image nowhere.png", "/new", "", "And now?", "/quit", "no"]
    done = run_script("4-eval_chat.py", "--max_new_tokens", 3, cwd=folder, stdin="\n".join(lines))
    assert done.out.count("> ") == len(lines) - 1
    assert "image file missing: nowhere.png" in done.out
    ended = run_script("4-eval_chat.py", "--max_new_tokens", 3, cwd=folder, stdin="Hello!\n")
    assert ended.out.count("> ") == 2


def test_a_file_of_questions_gets_one_prediction_a_row(stage_two, samples, run_script, tmp_path):
    folder, _ = stage_two
    rows = [json.loads(line) for line in (samples / "eureka.jsonl").read_text().splitlines()]
    for row in rows:
        row["conversations"] = row["conversations"][:1]  # as published: the question, and the gold answer apart
    rows[2]["image_urls"] = [f"file://{samples}/missing.png"]
    rows.append({"id": "long", "conversations": [{"role": "user", "content": "so many words " * 1000}], "answer": "4"})
    data = samples / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    try:
        done = run_script("4-eval_chat.py", "--data", data, "--save", tmp_path / "deep" / "predictions.jsonl",
                          "--max_new_tokens", 3, "--batch_size", 2, cwd=folder)  # fmt: skip
    finally:
        data.unlink()
    found = [json.loads(line) for line in (tmp_path / "deep" / "predictions.jsonl").read_text().splitlines()]
    assert [record.get("id") for record in found] == ["e0", "e1", f"{data}:3", "e3", f"{data}:5", f"{data}:6"]
    assert [("prediction" in record, "error" in record) for record in found] == [
        (True, False), (True, False), (False, True), (True, False), (False, True), (False, True)]  # fmt: skip
    assert "lower --max_new_tokens" in found[4]["error"]
    assert set(found[1]) == {"id", "conversations", "answer", "image_urls", "prediction", "reasoning", "predicted_answer"}
    assert found[1]["conversations"] == [{"role": "user", "content": "<image>How many?"}]
    assert (found[1]["answer"], found[1]["image_urls"], found[0]["image_urls"]) == ("4", [f"file://{samples}/red.png"], [])
    assert "3 predictions, 3 bad rows" in done.out and "model: out/sft" in done.err


def test_a_pass_rate_is_the_share_that_the_rule_of_rl_calls_right():
    said = [f"<think>x</think><answer>{body}</answer>" for body in ("8", "9", "8.0")] + ["8"]
    asked = dialogue("row", [], [("3+5?", "")])
    assert solved(Example(asked, "8", "file"), said) == {"predictions": said, "pass_rate": 0.5}
    assert solved(Example(asked, "", "file"), said) == {"predictions": said}, "nobody knows"


def test_several_answers_to_each_row_tell_its_pass_rate_and_rl_takes_rows_by_that(stage_two, samples, run_script, tmp_path):
    folder, _ = stage_two
    given = ("--data", samples / "eureka.jsonl", "--save", tmp_path / "rated.jsonl", "--max_new_tokens", 3)
    run_script("4-eval_chat.py", *given, "--samples", 3, "--temperature", 1, cwd=folder)
    rows = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert [len(row["predictions"]) for row in rows] == [3] * 4 and {row["pass_rate"] for row in rows} == {0.0}
    assert all(row["prediction"] == row["predictions"][0] for row in rows)
    rows[1]["pass_rate"] = 0.5
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_script("3-rl_vlm.py", "--data", tmp_path / "rated.jsonl", "--image_folder", samples, "--pass_rates", 0.1, 0.9,
                      "--val_share", 0, "--dry_run", "--prompts", 2, "--group_size", 2, "--max_new_tokens", 3,
                      "--init", folder / "out" / "sft", "--device", "cpu", cwd=tmp_path)  # fmt: skip
    assert "1 problems, " in done.out
    for more, message in ((("--samples", 3), "--samples answers each row of --data several times"),
                          (("--samples", 0, "--temperature", 1), "--samples is at least 1, not 0")):  # fmt: skip
        assert message in run_script("4-eval_chat.py", *given, *more, cwd=folder, expect=1).err


# ---------------------------------------------------------------- several processes


def test_two_processes_fine_tune_together(stage_one, samples, run_ranks, tmp_path):
    folder, _ = stage_one
    first, second = run_ranks(
        "2-sft_vlm.py", "--init", folder / "out" / "pretrain", "--data", samples / "llava.json", samples / "text.jsonl",
        "--batch_size", 2, "--max_steps", 3, "--log_every", 1, "--device", "cpu", "--bench", "world", "--eval_examples", 1,
        "--val_share", 0, cwd=tmp_path)  # fmt: skip
    assert "8 rows, 3 steps of 4 on 2 x cpu" in first.out
    assert second.out == ""  # one voice
    assert [row["step"] for row in log_of(tmp_path / "out" / "sft")] == [0, 1, 2, 3]
    assert {"random-0.pt", "random-1.pt"} <= {path.name for path in (tmp_path / "out/sft/resume/000003").iterdir()}
    assert checkpoint.load(tmp_path / "out" / "sft")


def test_torchrun_says_each_thing_once_and_writes_one_checkpoint(two_processes):
    assert [row["step"] for row in log_of(two_processes)] == [0, 1, 2, 3, 4, 5]
    assert (two_processes.parent / "report.md").read_text().count("## Pretraining") == 1
    assert {"random-0.pt", "random-1.pt"} <= {path.name for path in (two_processes / "resume" / "000005").iterdir()}


# ---------------------------------------------------------------- official formats

FORMATS = ("llava.json", "llava.jsonl", "minimind.parquet", "messages.jsonl", "eureka.jsonl", "lmm_r1.jsonl", "text.jsonl")


def test_every_official_format_trains_and_a_bad_row_is_named(stage_one, samples, run_script, tmp_path):
    folder, _ = stage_one
    bad = samples / "bad.jsonl"
    bad.write_text(json.dumps({"image": "gone.png", "conversations": [
        {"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "No."}]}) + "\n")  # fmt: skip
    try:
        done = run_script("2-sft_vlm.py", "--init", folder / "out" / "pretrain",
                          "--data", *(samples / name for name in FORMATS), bad, "--batch_size", 10, "--epochs", 1,
                          "--log_every", 1, "--device", "cpu", "--bench", "", "--max_bad", 0.1, "--feature_cache_gb", 0,
                          "--val_share", 0,
                          cwd=tmp_path)  # fmt: skip
    finally:
        bad.unlink()
    assert "29 rows, 3 steps of 10" in done.out  # an epoch: every row of every file
    assert "the encoder runs at every step" in done.out
    rows = [json.loads(line) for line in (tmp_path / "out" / "sft" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["row"], "image file missing" in row["reason"]) for row in rows] == [(f"{bad}:1", True)]
    assert f"skipped {bad}:1" in done.err
    assert [row["step"] for row in log_of(tmp_path / "out" / "sft")] == [0, 1, 2, 3]


def test_text_alone_pretrains_the_language_model(samples, run_script, tmp_path):
    run_script("1-pretrain_vlm.py", *TINY, "--data", samples / "text.jsonl", "--max_steps", 3, cwd=tmp_path)
    rows = log_of(tmp_path / "out" / "pretrain")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["loss"] < rows[0]["loss"]
    assert not list(tmp_path.rglob("*.npy"))  # no picture, no features


def test_too_many_bad_rows_stop_the_run_and_say_where(samples, run_script, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "fine"}\n' * 3 + "{broken\n" * 2)
    done = run_script("1-pretrain_vlm.py", *TINY, "--data", data, "--max_steps", 3, cwd=tmp_path, expect=1)
    assert re.search(r"2 bad rows among \d seen, more than --max_bad 0.01 allows", done.err)
    assert f"{data}:4" in done.err and f"{data}:5" in done.err


# ---------------------------------------------------------------- what is trained


def test_only_what_is_asked_for_moves(stage_one, samples, run_script, tmp_path):
    folder, _ = stage_one
    run_script("2-sft_vlm.py", "--init", folder / "out" / "pretrain", "--data", samples / "llava.json", "--max_steps", 2,
               "--batch_size", 4, "--device", "cpu", "--bench", "", "--val_share", 0, "--train.llm", "freeze",
               "--train.encoder", "partial:1",
               "--template", "pretrain", cwd=tmp_path)  # fmt: skip
    before, after = (load_file(path / "model.safetensors") for path in (folder / "out" / "pretrain", tmp_path / "out" / "sft"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {name for name in before if name.startswith("encoder.transformer.resblocks.0.")}
    count = {f"connector.similarity_count.{name}.weight" for name in ("proj", "one", "both")}
    assert moved == {"connector.proj.weight", "connector.index.weight", "connector.difference.weight", *count, *blocks}
    assert json.loads((tmp_path / "out" / "sft" / "config.json").read_text())["template"] == "pretrain"
    assert not list(tmp_path.rglob("*.npy"))  # an encoder that learns has no features to keep


# ---------------------------------------------------------------- what is refused, or only looked at


def plain(text: str) -> str:
    """Without the frames that tyro draws around its messages, and their line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"[^\x20-\x7e\n]|\x1b\[[\d;]*m", " ", text))


@pytest.mark.parametrize(("script", "flag", "nearest"), [
    ("1-pretrain_vlm.py", "--max_step", "--max_steps"), ("2-sft_vlm.py", "--batchsize", "--batch_size"),
    ("2-sft_vlm.py", "--train.lm", "--train.llm"), ("4-eval_chat.py", "--temprature", "--temperature"),
])  # fmt: skip
def test_an_unknown_flag_is_an_error_that_names_the_nearest(script, flag, nearest, run_script, tmp_path):
    done = run_script(script, flag, "3", cwd=tmp_path, expect=2)
    assert done.err.startswith(f"unknown flag or value {flag}; perhaps you meant {nearest}. ")
    assert len(done.err.splitlines()) == 1 and done.out == "" and written(tmp_path) == []


def test_a_switch_takes_no_word_so_false_is_never_true(run_script, tmp_path):
    done = run_script("1-pretrain_vlm.py", "--compile", "False", "--dry_run", cwd=tmp_path, expect=2)
    assert done.err.startswith("unknown flag or value False") and len(done.err.splitlines()) == 1


RULES = ("cispo", "cpgd", "gspo", "grpo", "ppo", "reinforce++", "reinforce++_baseline", "rloo")
PREFERENCES = ("apo_zero", "bco", "dpo", "hinge", "ipo", "mpo", "robust", "sft_chosen", "simpo")


@pytest.mark.parametrize(("arguments", "status", "start", "known"), [
    (("--algo", "dpoo"), 1, "unknown --algo dpoo; perhaps you meant dpo. ", (*RULES, *PREFERENCES)),
    (("--algo", "dpo", "--clip_high", "0.3"), 2, "unknown flag or value --clip_high",
     ("--algo dpo:beta=", "beta, smoothing", "clip_high is an option of cispo, cpgd, grpo, gspo, ppo", "--help")),
    (("--algo", "gspo:clip=1"), 1, "RL algorithm 'gspo' has no option 'clip=1'. ", ("clip_low", "clip_high", "kl", "advantage")),
    (("--algo", "simpo:beta=0"), 1, "beta is above 0, not 0", ()),
    (("--algo", "simpo:beta=much"), 1, "preference loss 'simpo': 'beta=much' is not of type float", ()),
    (("--smoothing", "0.1"), 2, "unknown flag or value --smoothing", ("smoothing is an option of dpo, mpo, robust",)),
    (("--algo", "dpo", "--answers", "4"), 2, "unknown flag or value --answers", ()),
    (("--scenes", "4"), 2, "unknown flag or value --scenes", ("Options of grpo",)),
    (("--algo", "dpo", "--pairs", "policy", "--epochs", "1"), 2, "unknown flag or value --epochs", ()),
])  # fmt: skip
def test_a_mistake_about_the_algorithm_is_one_line_that_says_what_is_known(arguments, status, start, known, run_script, tmp_path):
    done = run_script("3-rl_vlm.py", *arguments, cwd=tmp_path, expect=status)
    assert done.err.startswith(start) and all(name in done.err for name in known), done.err
    assert len(done.err.splitlines()) == 1 and done.out == "" and written(tmp_path) == []


def test_help_explains_every_flag(run_script, tmp_path):
    for script, flag, text in (("1-pretrain_vlm.py", "--max_length", "tokens of a row"),
                               ("2-sft_vlm.py", "--train.llm", "the last K blocks"),
                               ("4-eval_chat.py", "--controls", "a blank and a shuffled picture")):  # fmt: skip
        out = plain(run_script(script, "--help", cwd=tmp_path).out)
        assert flag in out and text in out


@pytest.mark.parametrize("switch", ["--dry_run", "--check_data"])
@pytest.mark.parametrize("script", ["1-pretrain_vlm.py", "2-sft_vlm.py"])
def test_looking_writes_nothing(script, switch, stage_one, run_script, tmp_path):
    source = ("--encoder", TINY[1]) if script.startswith("1") else ("--init", stage_one[0] / "out" / "pretrain")
    done = run_script(script, *source, "--data", "world:rows=12", "--batch_size", 4, "--epochs", 1, switch, cwd=tmp_path)
    assert "12 rows, 3 steps of 4 on 1 x" in done.out
    assert ("【" in done.out and "[image]" in done.out) == (switch == "--check_data")
    assert written(tmp_path) == []


def test_rows_of_every_part_of_the_data_are_looked_at_and_a_bad_one_is_told(run_script, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "alone"}\n{"image": "nowhere.png"}\n')
    done = run_script("1-pretrain_vlm.py", *TINY, "--data", "world:rows=9", "rows.jsonl", "--check_data", cwd=tmp_path)
    assert done.out.count("[image]") >= 3 and "【alone<|end|>】" in done.out
    assert re.search(r"bad row: rows\.jsonl:2: ", done.out)


@pytest.mark.parametrize(("more", "message"), [
    (("--init", "START", "--connector", "linear", "--preset", "base"), "has its own: leave out --preset, --connector, or --init"),
    (("--bench", "world,easy_vqa"), "--bench easy_vqa: captions are all that this stage is asked for, and it has none"),
    (("--log_every", 0), "--log_every is at least 1, not 0"),
])  # fmt: skip
def test_what_pretraining_would_not_use_is_refused_before_anything_is_done(more, message, stage_one, run_script, tmp_path):
    given = [stage_one[0] / "out" / "pretrain" if flag == "START" else flag for flag in more]
    done = run_script("1-pretrain_vlm.py", "--data", "world:rows=12", *given, cwd=tmp_path, expect=1)
    assert message in done.err and written(tmp_path) == []


@pytest.mark.parametrize(("more", "message"), [
    (("--data", "world:rows=12", "--batch_size", 2),
     "was started with --batch_size 4, now 2: --resume would go on with other rows. Give the same flags and the same files"),
    (("--data", "world:rows=12", "--batch_size", 4, "--max_steps", 1), "was saved at step 3, and this run ends at 1"),
])
def test_a_run_is_resumed_with_the_flags_it_was_started_with(more, message, stage_one, run_script, tmp_path):
    shutil.copytree(stage_one[0] / "out", tmp_path / "out")
    given = ("--encoder", TINY[1], "--device", "cpu", "--log_every", 1, "--bench", "", "--val_share", 0,
             "--epochs", 1, *more)  # fmt: skip
    done = run_script("1-pretrain_vlm.py", *given, "--resume", cwd=tmp_path, expect=1)
    assert message in done.err and "Traceback" not in done.err


@pytest.mark.parametrize(("script", "arguments", "message"), [
    ("2-sft_vlm.py", ("--data", "text"), "no checkpoint in out/pretrain: run `python 1-pretrain_vlm.py`"),
    ("2-sft_vlm.py", ("--init", "elsewhere"), "no checkpoint in elsewhere: run `python 1-pretrain_vlm.py`"),
    ("4-eval_chat.py", (), "no trained model in out/: run `python 1-pretrain_vlm.py`, then `python 2-sft_vlm.py`"),
    ("4-eval_chat.py", ("--model", "out/sft"), "no checkpoint in out/sft: run `python 2-sft_vlm.py`"),
    ("1-pretrain_vlm.py", ("--data", "nowhere.jsonl", *TINY), "no data at nowhere.jsonl"),
    ("1-pretrain_vlm.py", ("--data", "world:rows=8", "--resume", *TINY), "nothing to resume in out/pretrain"),
])  # fmt: skip
def test_what_is_missing_is_said_in_a_line_with_the_command_that_makes_it(script, arguments, message, run_script, tmp_path):
    done = run_script(script, *arguments, cwd=tmp_path, expect=1)
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "elsewhere").exists() and not (tmp_path / "out" / "sft").exists()


# ---------------------------------------------------------------- a file of flags


def test_flags_stand_above_the_file_of_flags(run_script, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"encoder: '{TINY[1]}'\ndata: ['world:rows=20']\nmax_steps: 7\nbatch_size: 5\nlr: 1e-3\ntrain: {{llm: freeze}}\n")
    done = run_script("1-pretrain_vlm.py", "--config", "run.yaml", "--max_steps", 9, "--dry_run", cwd=tmp_path)
    assert "20 rows, 9 steps of 5" in done.out
    assert re.search(r"llm [\d,]+ \(0 trained\)", done.out)
    done = run_script("1-pretrain_vlm.py", "--dry_run", "--config", "run.yaml", "--train.llm", "full", cwd=tmp_path)
    assert "20 rows, 7 steps of 5" in done.out
    assert not re.search(r"llm [\d,]+ \(0 trained\)", done.out)


@dataclass
class Inner:
    llm: str = "full"


@dataclass
class Config:
    out: Path = Path("out")  # a path
    init: Path | None = None  # none, or a path
    data: tuple[str, ...] = ("world",)  # names
    rate: float = 1e-3  # a number
    steps: int = 3  # a count
    again: bool = False  # a switch
    train: Inner = field(default_factory=Inner)
    optim: cli.SharedOptimizerFlags = cli.optim("muon", lr=1e-2, warmup=2)


def parsed(tmp_path, text: str, *flags: str) -> Config:
    (tmp_path / "run.yaml").write_text(text)
    return cli.parse(Config, ["--config", str(tmp_path / "run.yaml"), *flags])


def test_a_file_of_flags_gives_values_of_the_right_types(tmp_path):
    text = "out: here\ninit: there\ndata: [a, b]\nrate: 2e-4\nsteps: 5\nagain: true\ntrain:\n  llm: freeze\n"
    assert parsed(tmp_path, text) == Config(Path("here"), Path("there"), ("a", "b"), 2e-4, 5, True, Inner("freeze"))
    assert parsed(tmp_path, text, "--steps", "6", "--train.llm", "partial:2", "--no-again") == Config(
        Path("here"), Path("there"), ("a", "b"), 2e-4, 6, False, Inner("partial:2"))  # fmt: skip
    assert parsed(tmp_path, "data: a") == Config(data=("a",))
    assert parsed(tmp_path, "") == Config() == cli.parse(Config, [])


def test_flags_that_scripts_share_have_no_prefix_in_the_file_either(tmp_path):
    shared = parsed(tmp_path, "lr: 2e-4\nmax_steps: 7\noptimizer: adamw\n", "--warmup", "9", "--max_steps", "8").optim
    assert shared == cli.OptimizerFlags("adamw", 2e-4, 9, weight_decay=0.01, max_steps=8)
    assert parsed(tmp_path, "", "--lr", "3e-3").optim == cli.OptimizerFlags("muon", 3e-3, 2, weight_decay=0.01)


@pytest.mark.parametrize(("text", "message"), [
    ("step: 3", "unknown key 'step'; perhaps you meant 'steps'"), ("learningrate: 3", "unknown key 'learningrate'"),
    ("warm_up: 3", "unknown key 'warm_up'; perhaps you meant 'warmup'"), ("optim: {lr: 3}", "unknown key 'optim'"),
    ("train: {lm: full}", "train: unknown key 'lm'; perhaps you meant 'llm'"), ("steps: many", "steps: 'many' is not a int"),
    ("lr: high", "lr: 'high' is not a float"),
    ("again: 1", "again: 1 is not of the type of False"), ("steps: true", "steps: True is not of the type of 3"),
    ("- steps", "a mapping of flags is expected, not list"), ("train: full", "train: a mapping of flags is expected"),
])  # fmt: skip
def test_a_wrong_key_or_value_in_the_file_of_flags_is_named(tmp_path, text, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        parsed(tmp_path, text)


def test_a_missing_file_of_flags_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--config: no file"):
        cli.parse(Config, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit, match="--config needs a yaml file"):
        cli.parse(Config, ["--config"])


def test_an_unknown_key_stops_a_script(run_script, tmp_path):
    (tmp_path / "run.yaml").write_text("max_step: 7\n")
    done = run_script("1-pretrain_vlm.py", "--config", "run.yaml", cwd=tmp_path, expect=1)
    assert done.err == "run.yaml: unknown key 'max_step'; perhaps you meant 'max_steps'\n"


def test_a_checkpoint_can_be_moved(stage_one, tmp_path):
    moved = shutil.copytree(stage_one[0] / "out" / "pretrain", tmp_path / "elsewhere")
    assert checkpoint.load(moved).config == checkpoint.load(stage_one[0] / "out" / "pretrain").config
