"""The folder of a run: who may write there, what becomes of an earlier run, and what run.json says."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset.formats import folders
from dataset.formats.folders import READERS
from dataset.tokenizer import MODEL_FILE
from model import checkpoint, resume, run_data, run_folder
from model.config import PRESETS
from model.devices import pick_dtype
from model.flag_file import as_mapping, from_mapping
from model.flags import RunFlags
from model.registry import UserError
from model.run_data import fingerprint
from model.runtime import Run
from tests import tiny
from tests.conftest import ENVIRONMENT, ROOT, TINY
from tests.test_structure import CONFIGS, config_class

SHORT = (*TINY, "--data", "world:rows=8", "--save_every", 2)


def run_in(folder: Path, *, ended: bool | None = None, saved: bool = False, weights: bool = True) -> Path:
    """A folder as a run leaves it."""
    folder.mkdir(parents=True)
    if weights:
        (folder / "model.safetensors").write_text("weights")
    if saved:
        (folder / "resume" / "000002").mkdir(parents=True)
    if ended is not None:
        (folder / "run.json").write_text(json.dumps({"ended": ended}))
    return folder


@pytest.mark.parametrize(("left", "is_interrupted", "is_occupied"), [
    (dict(ended=False, saved=True), True, True), (dict(ended=True, saved=True), False, True), (dict(saved=True), False, True),
    (dict(), False, True), (dict(ended=False, weights=False), False, False), (dict(ended=False), False, True),
])  # fmt: skip
def test_a_run_is_interrupted_if_it_saved_a_step_and_did_not_end(left, is_interrupted, is_occupied, tmp_path):
    out = run_in(tmp_path / "sft", **left)
    assert (run_folder.interrupted(out), run_folder.occupied(out)) == (is_interrupted, is_occupied)


def test_iterations_are_interrupted_together(tmp_path):
    out = run_in(tmp_path / "dpo", ended=False, weights=False)
    run_in(out / "iteration-1", ended=True, saved=True)
    assert run_folder.interrupted(out)


def test_a_damaged_record_is_named(tmp_path):
    (run_in(tmp_path / "sft") / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is damaged"):
        run_folder.interrupted(tmp_path / "sft")


def test_an_ended_run_is_moved_and_what_was_made_for_the_new_one_stays(tmp_path):
    out = run_in(tmp_path / "dpo", ended=True, saved=True)
    (out / "feedback" / "abc").mkdir(parents=True)
    (out / "features").mkdir()
    assert run_folder.make_room(out, out / "features") == "moved the earlier run to dpo.previous"
    assert sorted(path.name for path in out.iterdir()) == ["features", "feedback"]
    assert (tmp_path / "dpo.previous" / "model.safetensors").is_file()
    (out / "model.safetensors").write_text("newer")
    assert "where an earlier one was deleted" in run_folder.make_room(out, tmp_path)
    assert (tmp_path / "dpo.previous" / "model.safetensors").read_text() == "newer"


def test_an_interrupted_run_is_deleted_and_the_one_before_it_is_not(tmp_path):
    out, previous = run_in(tmp_path / "sft", ended=False, saved=True), run_in(tmp_path / "sft.previous", ended=True)
    assert run_folder.make_room(out, tmp_path) == "deleted the interrupted run"
    assert not out.exists() and previous.is_dir() and sorted(tmp_path.iterdir()) == [previous]


def test_a_link_to_a_folder_takes_one_run_after_another(tmp_path):
    out, link = run_in(tmp_path / "disk é", ended=True), tmp_path / "link to it"
    link.symlink_to(out)
    Run(RunFlags(link, "", 0, 0, save_every=1, log_every=1, device="cpu"), "test").resume(tiny.vlm(), OPTIMIZER)
    assert link.is_symlink() and list(out.iterdir()) == [] and (tmp_path / "disk é.previous" / "model.safetensors").is_file()


def test_a_folder_without_a_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows.jsonl").write_text("{}")
    assert run_folder.make_room(tmp_path / "mine", tmp_path) == "" and (tmp_path / "mine" / "rows.jsonl").is_file()


@pytest.mark.parametrize(("flag", "value"), [
    ("init", "sft"), ("data", ("sft/rows.jsonl:2",)), ("adapter", "sft/adapter.safetensors"),
])  # fmt: skip
def test_a_run_does_not_move_away_what_it_reads(flag, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_in(Path("sft"), ended=True)
    (out / "rows.jsonl").write_text("{}")
    config = config_class("2-sft_vlm.py", "Config")(**{flag: Path(value) if isinstance(value, str) else value})
    with pytest.raises(UserError, match=f"^--{flag} sft.* is of an earlier run into sft, .* name another --out"):
        run_folder.require_free(out, config, overwrite=False)
    (out / "feedback").mkdir()
    (out / "rows.jsonl").rename(out / "feedback" / "pairs.jsonl")
    run_folder.require_free(out, config_class("3-rl_vlm.py", "DPO")(data=("sft/feedback/pairs.jsonl",)), overwrite=False)
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="this folder"):
        run_folder.require_free(Path("."), config_class("2-sft_vlm.py", "Config")(), overwrite=False)


HOLD = "import sys; from pathlib import Path; from model import run_folder; held = run_folder.lock(Path(sys.argv[1])); " \
       "print('held', flush=True); sys.stdin.read()"  # fmt: skip


def test_a_second_run_is_refused_until_the_first_one_ends_or_dies(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out" / "sft")], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **ENVIRONMENT}) as first:  # fmt: skip
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run is writing into .*/out/sft: wait for its end, or name another --out"):
            run_folder.lock(tmp_path / "out" / "sft")
        run_folder.lock(tmp_path / "out" / "dpo")
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert run_folder.lock(tmp_path / "out" / "sft").is_locked


@pytest.mark.parametrize(("script", "name"), [config for config in CONFIGS if config[0] < "4"])
def test_the_flags_of_run_json_are_a_file_of_flags(script, name):
    kind = config_class(script, name)
    written = json.loads(json.dumps(as_mapping(kind())))
    assert from_mapping(kind(), written, "run.json") == kind()
    assert {"lr", "seed", "train", "data"} <= written.keys()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_of_a_checkpoint_are_read_by_whom_the_umask_lets(umask, mode, tmp_path):
    model, before = tiny.vlm(), os.umask(umask)
    try:
        checkpoint.save(tmp_path / "out", model, MODEL_FILE)
        resume.save_resume(tmp_path / "out", model, OPTIMIZER, {"step": 1}, 0, 1)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 6 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "a.json", "data/rows.parquet", "train/a.jsonl", "0.txt"])
def test_a_folder_with_other_rows_has_another_fingerprint(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / "0.png").write_bytes(b"picture")
    before = fingerprint(tmp_path)
    (tmp_path / name).write_text("question,answer")
    first = fingerprint(tmp_path)
    (tmp_path / name).write_text("question,Answer")
    second = fingerprint(f"{tmp_path}:2")
    (tmp_path / "1.png").write_bytes(b"picture")
    assert len({before, first, second, fingerprint(tmp_path)}) == 4 and fingerprint("world:rows=5") is None


def test_every_file_of_rows_that_is_read_is_in_the_fingerprint():
    assert set(READERS) <= set(run_data.HASHED) and folders.ROW_FOLDERS == run_data.ROW_FOLDERS


def test_a_data_set_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint("hf:owner/name") is None, "not downloaded yet"
    refs = tmp_path / "datasets--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0123abcd\n")
    assert {fingerprint(f"hf:owner/name{more}") for more in ("", ":2", "/train.parquet")} == {"0123abcd"}


class Empty:
    def state_dict(self) -> dict:
        return {}


OPTIMIZER = Empty()

# ---------------------------------------------------------------- scripts


@pytest.fixture(scope="module")
def killed(run_script, tmp_path_factory) -> Path:
    """A folder in which script 1 ended once, and was killed at the third step of its second run."""
    folder = tmp_path_factory.mktemp("killed")
    first = run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 1, cwd=folder)
    assert "previous" not in first.out
    again = run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 4, cwd=folder, die_at_step=3, expect=-signal.SIGKILL)
    assert "out/pretrain: moved the earlier run to pretrain.previous" in again.out
    return folder


def test_a_run_says_in_run_json_how_it_was_made(killed):
    record = json.loads((killed / "out" / "pretrain.previous" / "run.json").read_text())
    assert record["ended"] is True and record["seconds"] > 0 and record["seed"] == 0 and record["processes"] == 1
    assert re.fullmatch(r"python \S*1-pretrain_vlm.py --encoder .* --data world:rows=8 .* --max_steps 1", record["command"])
    assert record["flags"]["data"] == ["world:rows=8"] and record["flags"]["train"]["llm"] == "full"
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {"python", "numpy", "open_clip_torch"} <= record["versions"].keys()
    assert record["device"] == f"cpu, {pick_dtype('auto', torch.device('cpu'), PRESETS['nano'].llm.hidden_size)}"
    assert record["data"]["data"] == ["world:rows=8"]
    assert record["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["commit"])


def test_an_interrupted_run_is_resumed_or_deleted_only_when_asked(killed, run_script):
    run = killed / "out" / "pretrain"
    assert json.loads((run / "run.json").read_text())["ended"] is False
    lines = (run / "log.jsonl").read_text()
    refused = run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 4, cwd=killed, expect=1)
    assert refused.err == ("out/pretrain holds a run that was interrupted: add --resume to go on with it, or --overwrite to "
                           "delete it\n")
    assert (run / "log.jsonl").read_text() == lines
    run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 4, "--dry_run", cwd=killed)
    run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 4, "--resume", cwd=killed)
    assert json.loads((run / "run.json").read_text())["ended"] is True


def test_overwrite_deletes_an_interrupted_run_and_keeps_the_one_that_ended_before(run_script, tmp_path):
    out = run_in(tmp_path / "out" / "pretrain", ended=False, saved=True)
    run_in(tmp_path / "out" / "pretrain.previous", ended=True)
    done = run_script("1-pretrain_vlm.py", *SHORT, "--max_steps", 1, "--overwrite", cwd=tmp_path)
    assert "out/pretrain: deleted the interrupted run" in done.out
    assert (tmp_path / "out" / "pretrain.previous" / "model.safetensors").read_text() == "weights" and checkpoint.load(out)


def test_two_ranks_move_an_earlier_run_once(run_ranks, tmp_path):
    run_in(tmp_path / "out" / "pretrain", ended=True)
    first, second = run_ranks("1-pretrain_vlm.py", *SHORT, "--max_steps", 1, "--batch_size", 2, cwd=tmp_path)
    assert first.out.count("moved the earlier run to pretrain.previous") == 1 and second.out == ""
    assert json.loads((tmp_path / "out" / "pretrain" / "run.json").read_text())["processes"] == 2
    assert (tmp_path / "out" / "pretrain.previous" / "model.safetensors").read_text() == "weights"
