"""A run is hours of somebody's only GPU: signals, damage, steps that are not finite, full disks, ranks that differ."""

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from dataset.tokenizer import MODEL_FILE
from model import checkpoint, durable, resume, run_folder, run_log
from model.flags import RunFlags
from model.optimizer import make_optimizer
from model.ranks import Ranks, flag_facts
from model.registry import ENCODERS, TASKS, UserError
from model.runtime import Run
from model.stopping import Stopped, StopSignals
from tests import soak, tiny
from tests.soak import Soak


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), launcher)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(("stage", "ranks", "number", "saved"), [
    ("pretraining", 1, signal.SIGINT, 4), ("pretraining", 2, signal.SIGTERM, 5), ("GRPO", 1, signal.SIGTERM, 4),
])  # fmt: skip
def test_a_signal_saves_the_step_and_the_run_goes_on_to_the_same_weights(stage, ranks, number, saved, runs):
    whole, out = f"whole-{stage}-{ranks}", f"stopped-{stage}-{ranks}"
    done = runs.run(stage, out, ranks=ranks, die_at_step=3, dies_by=number)  # ranks agree on it in the step after that
    assert [one.status for one in done] == [128 + number] * ranks, done[0].err
    assert f"saved at step {saved}; go on with --resume" in done[0].out and "Traceback" not in done[0].err
    assert resume.saved_steps(runs.folder / out)[-1].name == f"{saved:06d}"
    assert all(one.status == 0 for one in runs.run(stage, out, ranks=ranks))
    assert all(one.status == 0 for one in runs.run(stage, whole, ranks=ranks))
    ends = [checkpoint.tensor_file.read(runs.folder / name / "model.safetensors") for name in (whole, out)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_first_signal_is_remembered_and_the_second_ends_at_once(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopSignals(several=False) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGTERM
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) == before
    assert "finishing this step, then saving; a second signal ends at once" in capfd.readouterr().err


def test_a_rank_takes_the_echo_of_torchrun_for_no_second_signal(capfd):
    with StopSignals(several=True) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signals.came -= 10
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_run_is_saved_when_it_is_due_and_where_a_signal_asks_for_it(tmp_path):
    run = a_run(tmp_path, save_every=4)
    run.first = 4
    assert [step for step in range(4, 13) if run.save_due(step)] == [8, 12]
    run.signals.number = signal.SIGTERM
    assert run.save_due(4) and run.save_due(5) and not run.save_due(5, multiple_of=2) and run.save_due(6, multiple_of=2)


# ---------------------------------------------------------------- steps that are not finite


def a_run(out: Path, **changes) -> Run:
    return Run(RunFlags(out, "", 0, 0, **{"save_every": 1, "log_every": 1, "device": "cpu", **changes}), "test")


BATCH = [{"ids": [f"rows.jsonl:{k}" for k in range(10)], "input_ids": torch.ones(2, 3)}]


@pytest.mark.parametrize(("loss", "norm", "said"), [
    (math.nan, 1.0, "the loss is nan"), (math.inf, math.nan, "the loss is inf"),
    (2.5, math.inf, "the gradient's norm is inf, with a loss of 2.5"),
])  # fmt: skip
def test_a_step_that_is_not_finite_is_named_kept_and_left_out(loss, norm, said, tmp_path, capsys):
    run = a_run(tmp_path)
    assert run.is_finite(11, BATCH, 1.0, 1.0) and not run.is_finite(12, BATCH, loss, norm)
    out = capsys.readouterr().out
    assert out.startswith(f"step 12 is left out (1; --max_bad_steps 10): {said}. Rows: rows.jsonl:0, rows.jsonl:1, ")
    assert "rows.jsonl:7 and 2 more; " in out
    (stored,) = torch.load(tmp_path / "bad_steps" / "000012-0.pt", weights_only=True)
    assert torch.equal(stored["input_ids"], BATCH[0]["input_ids"]) and stored["ids"] == BATCH[0]["ids"]


def test_too_many_such_steps_end_the_run_and_the_last_good_state_stays(tmp_path):
    run, model = a_run(tmp_path, max_bad_steps=2), tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    for step in run.steps(0, 9):
        run.save(model, optimizer, MODEL_FILE, step, step)
        if step == 4:
            break
        assert run.is_finite(step, BATCH, 1.0, 1.0)
    assert not run.is_finite(4, BATCH, math.nan, 1.0)
    run.save(model, optimizer, MODEL_FILE, 5, 5)  # not saved: no step was good with these weights
    assert [state.name for state in resume.saved_steps(tmp_path)] == ["000003", "000004"]
    assert not run.is_finite(5, BATCH, 1.0, math.nan)
    with pytest.raises(FloatingPointError, match="3 steps were .*at step 6. Lower --lr and go on from step 3 with --resume"):
        run.is_finite(6, BATCH, math.nan, math.nan)
    assert [state.name for state in resume.saved_steps(tmp_path)] == ["000003"]


def test_weights_that_are_not_finite_are_not_saved_over_others(tmp_path):
    model = tiny.vlm()
    checkpoint.save(tmp_path, model, MODEL_FILE)
    with torch.no_grad():
        model.connector.proj.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="connector.proj.weight has values that are not finite, so it is not saved"):
        checkpoint.save(tmp_path, model, MODEL_FILE)
    assert checkpoint.load(tmp_path) and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("stage", ["pretraining", "SFT", "DPO", "GRPO"])
def test_an_absurd_learning_rate_ends_in_a_line(stage, runs):
    (done,) = runs.run(stage, f"hot-{stage}", "--lr", 1e30, "--max_bad_steps", 1)
    assert done.status == 1 and "ower --lr" in done.err.splitlines()[-1] and "Traceback" not in done.err, done.err[-2000:]


# ---------------------------------------------------------------- what a crash leaves


@pytest.mark.parametrize("end", ['{"step": 3, "lo', "\0\0\0\n", "[]\n", '{"loss": 1}\n'])
def test_a_log_that_ends_in_the_middle_of_a_line_is_read_up_to_there(end, tmp_path):
    run_log.write(tmp_path / "log.jsonl", [{"step": 1}, {"step": 2}])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(end)
    assert run_log.read(tmp_path / "log.jsonl") == ([{"step": 1}, {"step": 2}], 1)


def test_a_row_of_the_log_holds_no_number_that_json_has_not():
    assert run_log.as_row(3, 1.234, {"loss": math.nan, "lr": 1.23456789e-3}) == {"step": 3, "seconds": 1.23, "lr": 0.00123457}


def test_temporary_files_of_dead_processes_go_and_the_lock_too(tmp_path):
    out = tmp_path / "sft"
    for path in ("model.safetensors.77.tmp", "best/config.json.77.tmp", "resume/000002.tmp/state.json", "model.safetensors"):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("half")
    fresh = tmp_path / "features" / "encoder" / "a.npy.77.tmp"
    fresh.parent.mkdir(parents=True)
    fresh.write_text("another run is writing")
    held = run_folder.lock(out)
    run_folder.remove_temporary(out, tmp_path / "features")
    assert sorted(path.name for path in out.rglob("*")) == ["best", "model.safetensors", "resume"] and fresh.is_file()
    run_folder.unlock(held)
    assert not list(tmp_path.glob(".*.lock"))


def test_a_kill_inside_a_save_leaves_the_state_before(runs):
    assert runs.same_end("SFT", 1, [{"die_at_write": 30}]) == ""


# ---------------------------------------------------------------- damage, space


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return soak.checkpoint_with_states(tmp_path_factory.mktemp("sound"))


@pytest.mark.parametrize(("name", "damage"), soak.DAMAGED)
def test_a_damaged_file_is_named_with_the_remedy(name, damage, sound, tmp_path):
    message = soak.message_about(sound, name, damage, tmp_path / "copy")
    assert soak.names_its_file(name, message), message
    if name.startswith("resume"):
        assert message.endswith("remove " + str(tmp_path / "copy/resume/000004") + ", and --resume goes on at step 2"), message


def test_a_full_disk_is_said_with_the_file_and_the_remedy(runs):
    (done,) = runs.run("pretraining", "full", file_limit=200_000)
    assert done.status == 1 and "Traceback" not in done.err
    assert "full/model.safetensors could not be written: the disk is full" in done.err.splitlines()[-1]
    assert not list((runs.folder / "full").rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file/out/sft could not be written: Not a directory.*name another --out"):
        run_folder.lock(tmp_path / "file" / "out" / "sft")


def test_a_disk_with_too_little_space_is_noticed_before(tmp_path):
    durable.require_space(tmp_path / "new" / "out", 1.0, "lower --keep")
    with pytest.raises(UserError, match="out: the disk has .* GB left, and this run saves up to 1e\\+09 GB: .*or lower --keep"):
        durable.require_space(tmp_path / "new" / "out", 1e18, "lower --keep")


# ---------------------------------------------------------------- ranks, options


def test_ranks_that_differ_end_at_once_with_the_name_of_the_flag(runs):
    began = time.time()
    done = [runs.launcher.wait(one) for one in [
        runs.launcher.start(*soak.STAGES["pretraining"], *soak.COMMON, "--out", "ranks", "--batch_size", 4 + int(rank),
                            cwd=runs.folder, env={"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                                                  "MASTER_PORT": PORT}) for rank in "01"]]  # fmt: skip
    assert [one.status for one in done] == [1, 1] and time.time() - began < 60
    assert done[0].err.splitlines()[-1].startswith("rank 1 was started with --batch_size 5, rank 0 with 4: start every rank with")


PORT = str(soak.free_port())


def test_facts_of_ranks_are_named_by_their_flags(monkeypatch):
    ranks = Ranks()
    ranks.require_same({"--seed": "1"})
    ranks.world_size = 2
    monkeypatch.setattr("model.ranks.all_gather_object", lambda found, mine: found.__setitem__(1, {**mine, "weights llm": "2"}))
    with pytest.raises(UserError, match="rank 1 was started with weights llm 2, rank 0 with 1"):
        ranks.require_same({"--seed": "1", "weights llm": "1"})
    assert flag_facts({"lr": 0.1, "train": {"llm": "full"}}) == {"--lr": "0.1", "--train.llm": "full"}


@pytest.mark.parametrize(("registry", "spec", "message"), [
    (TASKS, "world:rows=-3", "task 'world': rows is a number from 0 to .*, not -3"),
    (TASKS, "world:scenes=0", "world:scenes=0: name one or more"), (TASKS, "sokoban:boxes=0", "sokoban:boxes=0,walls=1,most=6: "),
    (TASKS, "arithmetic:direct=inf", "direct is a number"),
    (ENCODERS, "clip_random:size=96,patch=16,width=32,heads=2,layers=-1", "encoder 'clip_random': layers is a number from 0 to"),
])  # fmt: skip
def test_an_option_out_of_range_is_refused_by_its_name(registry, spec, message):
    with pytest.raises(UserError, match=message):
        registry.make(spec)


def test_scenes_hold_two_to_nine_objects():
    with pytest.raises(UserError, match="most=0: a scene has up to 2 to 9 objects"):
        TASKS.make("hallucination:most=0").examples("val", 2)


def test_the_state_counts_the_steps_that_were_left_out(tmp_path):
    run, model = a_run(tmp_path), tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    run.faults.count = 3
    run.save(model, optimizer, MODEL_FILE, 1, 2)
    assert json.loads((tmp_path / "resume" / "000001" / "state.json").read_text())["bad_steps"] == 3
