"""What a person at the keyboard meets: help at once, one line for a mistake, bounds, consoles, interrupted and repeated runs."""

import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from dataset.mixture import mixture
from dataset.tokenizer import MODEL_FILE, load_tokenizer
from model import checkpoint, cli
from model.flags import Bounds, Share, outside
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, UserError
from model.runtime import duration
from model.stopping import Stopped
from tests import tiny
from tests.conftest import ENVIRONMENT, ROOT, TINY

SCRIPTS = ("1-pretrain_vlm.py", "2-sft_vlm.py", "3-rl_vlm.py", "4-eval_chat.py", "web_demo.py")


def python(*arguments, env: dict | None = None, cwd=ROOT, stdin: str = "") -> subprocess.CompletedProcess:
    """A fresh Python, whose output is bytes read as UTF-8."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, env={**os.environ, **ENVIRONMENT, **(env or {})},
                          input=stdin.encode(), capture_output=True, timeout=120)  # fmt: skip


# ---------------------------------------------------------------- flags are read before torch

WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(f"ended with {end.code!r}; torch:", "torch" in sys.modules)
"""


@pytest.mark.parametrize(("arguments", "status"), [
    *(((script, "--help"), "0") for script in SCRIPTS), (("3-rl_vlm.py", "--algo", "dpo", "--help"), "0"),
    (("3-rl_vlm.py", "--algo", "dpo", "--pairs", "policy", "--help"), "0"), (("1-pretrain_vlm.py", "--lr", "fast"), "2"),
    (("2-sft_vlm.py", "--epochs", "0"), "'--epochs is above 0, not 0'"),
    (("3-rl_vlm.py", "--algo", "grop"), "'unknown --algo grop; perhaps you meant grpo. "),
])  # fmt: skip
def test_help_and_mistakes_are_answered_without_torch_in_little_time(arguments, status):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = python("-c", WITHOUT_TORCH, *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert re.search(rf"ended with {re.escape(status)}.*; torch: False\n$", done.stdout.decode()), done
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # seconds of processor time


@pytest.mark.parametrize("registry", [ALGORITHMS, PREFERENCE_LOSSES], ids=lambda registry: registry.kind)
def test_the_names_that_the_source_declares_are_those_that_are_registered(registry):
    assert registry.declared() == registry.names()


def test_help_names_the_file_of_flags_and_every_flag():
    out = python("2-sft_vlm.py", "--help", env={"NO_COLOR": "1"}).stdout.decode()
    assert "--config run.yaml" in out and "--batch_size" in out and "--check_data" in out


# ---------------------------------------------------------------- values


@dataclass
class Config:
    """Flags of a test."""

    steps: cli.Count = 1  # a number
    pair: tuple[Share, Share] = (0.0, 1.0)  # two shares
    seed: cli.Seed = 0  # of nothing
    top_p: cli.PositiveShare = 1.0  # a share
    train: cli.Train = field(default_factory=cli.Train)
    optim: cli.SharedOptimizerFlags = cli.optim("muon", lr=1e-2, warmup=2)


@pytest.mark.parametrize(("arguments", "message"), [
    ("--steps 0", "--steps is at least 1, not 0"), ("--steps=-3", "--steps is at least 1, not -3"),
    ("--lr -1", "--lr is above 0, not -1"), ("--lr 0", "--lr is above 0, not 0"), ("--lr nan", "--lr is above 0, not nan"),
    ("--lr inf", "--lr is above 0, not inf"), ("--warmup -1", "--warmup is at least 0, not -1"),
    ("--pair 0.1 1.5", "--pair is 0 to 1, not 0.1 1.5"), ("--seed -1", "--seed is 0 to 4294967295, not -1"),
    ("--top_p 0", "--top_p is above 0 and at most 1, not 0"), ("--clip 0", "--clip is above 0, not 0"),
    ("--train.llm half", "a --train flag is freeze, full, partial:K or lora:R"),
])  # fmt: skip
def test_a_value_out_of_range_is_refused_with_the_range(arguments, message):
    with pytest.raises(SystemExit, match=f"^{re.escape(message)}"):
        cli.parse(Config, arguments.split())


def test_a_value_of_the_file_of_flags_is_held_to_the_same_range(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: 0\n")
    with pytest.raises(SystemExit, match="^--steps is at least 1, not 0$"):
        cli.parse(Config, [f"--config={tmp_path}/run.yaml"])
    assert cli.parse(Config, [f"--config={tmp_path}/run.yaml", "--steps", "2"]).steps == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--steps", "many"], "--steps is a whole number, not 'many'"), (["--steps", "1.5"], "--steps is a whole number, not '1.5'"),
    (["--lr", "fast"], "--lr is a number, not 'fast'"), (["--steps"], "Missing value for argument '--steps'. Expected 1 values."),
    (["--stepps", "3"], "unknown flag or value --stepps; perhaps you meant --steps. --help lists the flags"),
    (["more"], "unknown flag or value more. --help lists the flags"),
])  # fmt: skip
def test_what_does_not_fit_a_flag_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Config, arguments)
    assert (end.value.code, capsys.readouterr().err) == (2, f"{message}\n")


@pytest.mark.parametrize(("content", "message"), [
    (b"steps: [1", "is not a yaml file: while parsing"), (b"\xff\xfe\x00s", "is not a yaml file: 'utf-8' codec can't decode"),
    (b"just words", "a mapping of flags is expected, not str"),
])  # fmt: skip
def test_a_damaged_file_of_flags_is_named_in_one_line(content, message, tmp_path):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(SystemExit, match=re.escape(message)) as end:
        cli.parse(Config, ["--config", str(tmp_path / "run.yaml")])
    assert "run.yaml" in str(end.value) and len(str(end.value).splitlines()) == 1


def test_bounds_hold_their_edges():
    assert [value in Bounds(0, 1) for value in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [value in Bounds(0, above=True) for value in (0, 1e-9)] == [False, True]
    assert outside(tuple[Share, Share], (0.5, 2.0)) == Bounds(0, 1) and outside(int, -1) is None


# ---------------------------------------------------------------- mistakes and bugs


def raising(error: BaseException):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(("error", "line"), [
    (UserError("no"), "no"), (FileNotFoundError("no data"), "no data"),
    (PermissionError(13, "Permission denied", "out/x"), "out/x: Permission denied"),
    (FloatingPointError("the gradient norm is nan"), "the gradient norm is nan"),
    (MemoryError(), "out of memory: lower --batch_size"),
])  # fmt: skip
def test_a_mistake_is_one_line(error, line):
    with pytest.raises(SystemExit, match=f"^{re.escape(line)}"):
        cli.run(raising(error), None)


def noted(error: BaseException) -> BaseException:
    error.add_note("3 of 9 answered")
    return error


@pytest.mark.parametrize(("error", "status", "line"), [
    (KeyboardInterrupt(), 130, "\nstopped by SIGINT\n"), (Stopped(signal.SIGTERM), 143, "\nstopped by SIGTERM\n"),
    (noted(KeyboardInterrupt()), 130, "\n3 of 9 answered\n"), (noted(Stopped(signal.SIGTERM)), 143, "\n3 of 9 answered\n"),
])  # fmt: skip
def test_a_signal_is_one_line_and_the_exit_status_of_shells(error, status, line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(error), None)
    assert end.value.code == status and capsys.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("shape"), KeyError("x"), RuntimeError("mat1 and mat2")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run(raising(error), None)


@pytest.fixture
def waited(monkeypatch) -> list[float]:
    """The process is rank 1; how long it waited for torchrun to end it."""
    times: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("model.cli.time.sleep", times.append)
    monkeypatch.setattr("model.cli.signal.signal", lambda *_: None)
    return times


def test_another_rank_tells_a_mistake_only_where_nobody_ended_it_before(waited, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(raising(UserError("no")), None)
    assert end.value.code == 1 and waited == [cli.ALONE] and capsys.readouterr().err == "rank 1: no\n"


def test_another_rank_waits_with_a_wrong_flag_too(waited, capsys):
    with pytest.raises(SystemExit):
        cli.parse(RunOnly, ["--see", "3"])
    assert waited == [cli.ALONE] and re.fullmatch("rank 1: unknown flag or value --see; .*--seed.*\n", capsys.readouterr().err)


@dataclass
class RunOnly:
    seed: int = 0


# ---------------------------------------------------------------- consoles

CHINESE = "from model import cli\ncli.write_utf8()\nprint(input(), ascii(input()), '\\udcff')\n"
CONSOLES = ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C.UTF-8"})  # fmt: skip


@pytest.mark.parametrize("env", CONSOLES, ids=str)
def test_any_console_reads_and_writes_utf8(env):
    done = python("-c", CHINESE, env=env, stdin="一个苹果\n什么\n")
    assert (done.returncode, done.stdout.decode()) == (0, "一个苹果 '\\u4ec0\\u4e48' \\udcff\n"), done.stderr


OLD = "import sys; sys.version_info = (3, 10, 4); sys.version = '3.10.4 (main)'; import model"


def test_an_older_python_is_told_which_one_is_needed():
    done = python("-c", OLD)
    assert done.returncode == 1
    assert done.stderr.decode() == "Pupil needs Python 3.11 or newer, and this is 3.10.4: start it with that one\n"


# ---------------------------------------------------------------- a look at a run before it runs


@pytest.mark.parametrize(("seconds", "said"), [(7.4, "7 s"), (99, "99 s"), (720, "12 min"), (27000, "7.5 h")])
def test_a_duration_is_told_in_the_unit_that_people_use(seconds, said):
    assert duration(seconds) == said


def test_a_dry_run_tells_time_and_memory_by_two_steps_and_leaves_no_trace(run_script, tmp_path):
    done = run_script("1-pretrain_vlm.py", *TINY, "--data", "world:rows=40", "--epochs", 1, "--save_every", 1, "--eval_every", 1,
                      "--dry_run", cwd=tmp_path)  # fmt: skip
    assert "40 rows, 10 steps of 4 on 1 x cpu" in done.out
    line = r"[\d.]+ s a step with the encoder's part, so 10 steps take about \d+ s, without checks; memory \d\.\d GB"
    assert re.search(line, done.out.splitlines()[-1]) and list(tmp_path.iterdir()) == []


DAMAGED = {
    "config.json": ("{", "config.json is damaged, or not of a checkpoint of Pupil"),
    "model.safetensors": ("xxxxxxxxxxxx", "model.safetensors is damaged"),
    "tokenizer.model": ("x", "tokenizer.model is no sentencepiece model"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_a_checkpoint_is_named(name, tmp_path):
    content, message = DAMAGED[name]
    checkpoint.save(tmp_path, tiny.vlm(), MODEL_FILE)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(checkpoint.tokenizer_file(tmp_path))
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("specs", "message"), [
    ([], "--data  holds no row"), (["text:0"], "--data text:0 holds no row"),
    (["text:-1"], "a weight is a number from 0 on, not -1"),
    (["text:nan"], "a weight is a number from 0 on, not nan"), (["text:inf"], "a weight is a number from 0 on, not inf"),
])  # fmt: skip
def test_data_without_rows_is_refused(specs, message):
    with pytest.raises(UserError, match=message):
        mixture(specs, "sft", None, False)
