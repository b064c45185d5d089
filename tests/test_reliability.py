"""A run is hours of somebody's only GPU: signals, damage, steps that are not finite, full disks, ranks that differ."""

import json
import math
import os
import signal
import subprocess
import sys
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
from tests.conftest import ROOT
from tests.soak import Soak


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory) -> Soak:
    return Soak(tmp_path_factory.mktemp("soak"), launcher)


@pytest.mark.parametrize("tries", [case.tries for case in soak.CASES if case.tries is not soak.fuzzed])  # tests/test_fuzz.py is
def test_what_the_table_says_follows(tries, runs):
    assert tries(runs, True)


def test_the_page_holds_the_table_and_what_its_long_form_tried():
    (section,) = soak.SECTION.findall(soak.PAGE.read_text(encoding="utf-8"))
    tried = dict(soak.cells(section))
    assert list(tried) == [case.what for case in soak.CASES] and all(tried.values()) and soak.table(tried) == section
    assert tried["kill -9, or a power cut"].startswith("40 of 40") and not any("NO:" in one for one in tried.values())


# ---------------------------------------------------------------- signals


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


def test_a_closed_terminal_is_one_signal_however_often_it_is_told_and_none_under_nohup(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    with StopSignals(several=False) as signals:
        for _ in range(3):  # by the system, and by the shell
            signal.raise_signal(signal.SIGHUP)
        assert signals.number == signal.SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals(several=False) as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.number == 0


def test_a_run_without_its_terminal_writes_to_nowhere():
    terminal, end = os.openpty()
    with subprocess.Popen([sys.executable, "-c", CLOSED], cwd=ROOT, stdin=end, stdout=end, stderr=subprocess.PIPE) as run:
        os.close(end)
        line = b""
        while not line.endswith(b"\n"):  # a terminal takes the word and the end of its line one after the other
            line += os.read(terminal, 100)
        os.close(terminal)
        run.send_signal(signal.SIGHUP)
        assert run.communicate(timeout=60)[1] == b"" and run.returncode == 129


CLOSED = """
import signal
import time
from model import stopping
signal.signal(signal.SIGHUP, signal.SIG_DFL)
stopping.end_on_signals()
print("open", flush=True)
try:
    time.sleep(60)
finally:
    print("a line for a terminal that is closed", flush=True)
"""


def test_a_run_is_saved_when_it_is_due_and_where_a_signal_asks_for_it(tmp_path):
    run = a_run(tmp_path, save_every=4)
    run.first = 4
    assert [step for step in range(4, 13) if run.save_due(step)] == [8, 12]
    run.signals.number = signal.SIGTERM
    assert run.save_due(4) and run.save_due(5) and not run.save_due(5, multiple_of=2) and run.save_due(6, multiple_of=2)


# ---------------------------------------------------------------- steps that are not finite


def a_run(out: Path, **changes) -> Run:
    return Run(RunFlags(out, "", 0, 0, **{"save_every": 1, "log_every": 1, "device": "cpu", **changes}), "test")


def test_a_clock_that_is_set_back_changes_no_duration(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run.count_tokens([{"input_ids": torch.ones(10)}])
    assert 0 <= run.seconds < 60 and run.tokens_per_second() > 0.1


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


# ---------------------------------------------------------------- damage, space


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file/out/sft could not be written: Not a directory.*name another --out"):
        run_folder.lock(tmp_path / "file" / "out" / "sft")


def test_a_disk_with_too_little_space_is_noticed_before(tmp_path):
    durable.require_space(tmp_path / "new" / "out", 1.0, "lower --keep")
    with pytest.raises(UserError, match="out: the disk has .* GB left, and this run saves up to 1e\\+09 GB: .*or lower --keep"):
        durable.require_space(tmp_path / "new" / "out", 1e18, "lower --keep")


# ---------------------------------------------------------------- ranks, options


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
