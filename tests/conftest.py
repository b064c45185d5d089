"""What several test files share: runs of the scripts, each done once, and small files in every official format."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: these models are too small for two threads

from model.stopping import STOPPING
from tests import miniatures

ROOT = Path(__file__).parents[1]
ENCODER = "clip_random:size=96,patch=16,width=32,layers=1,heads=2"
TINY = ("--encoder", ENCODER, "--device", "cpu", "--batch_size", "4", "--log_every", "1", "--val_share", "0", "--bench", "")
MIXED_SEED = 24  # of the runs on `mixed`: in some steps one process of two has pictures, and the other has none
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled", "COLUMNS": "120"}


@dataclass(frozen=True)
class Done:
    """A process that ended: its exit status (negative: a signal), and what it wrote."""

    status: int | None
    out: str
    err: str


@dataclass(frozen=True)
class Started:
    pid: int
    streams: dict[str, Path]


class Launcher:
    """The forking process of tests/launcher.py."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher"], cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def request(self, request: dict):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, script: str | Path, *arguments, cwd: Path, stdin: str = "", env: dict | None = None, die_at_step=None,
              fresh: bool = False, dies_by: int = signal.SIGKILL, die_at_write: int | None = None,
              file_limit: int | None = None) -> Started:
        self.runs += 1
        streams = {name: self.folder / f"{self.runs}.{name}" for name in ("stdin", "stdout", "stderr")}
        streams["stdin"].write_text(stdin)
        pid = self.request({"start": {
            "argv": [str(ROOT / script), *map(str, arguments)], "cwd": str(cwd), "env": env or {}, "die_at_step": die_at_step,
            "fresh": fresh, "dies_by": dies_by, "die_at_write": die_at_write, "file_limit": file_limit,
            **{name: str(file) for name, file in streams.items()}}})  # fmt: skip
        return Started(pid, streams)

    def wait(self, started: Started, timeout: float = 300) -> Done:
        status = self.request({"wait": started.pid, "timeout": timeout})
        return Done(status, started.streams["stdout"].read_text(), started.streams["stderr"].read_text())


@pytest.fixture(autouse=True)
def signals_as_before():
    """What a script says in this process about signals ends with its test: forked processes would only remember SIGTERM."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Runs inside this process draw none: they take a second or two, and test_figures.py tests them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dataset.figures.draw.figures_section", lambda folder, name, inspect: [])
        yield


@pytest.fixture(scope="session")
def launcher(tmp_path_factory) -> Launcher:
    made = Launcher(tmp_path_factory.mktemp("launcher"))
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture(scope="session")
def run_script(launcher) -> Callable[..., Done]:
    """`run_script("2-sft_vlm.py", "--lr", 1e-3, cwd=folder, expect=0)`: a finished run; expect=None: any exit status."""

    def run_script(script: str, *arguments, expect: int | None = 0, **options) -> Done:
        done = launcher.wait(launcher.start(script, *arguments, **options))
        assert expect is None or done.status == expect, f"{script} {arguments}: {done.status}\n{done.out}\n{done.err[-3000:]}"
        return done

    return run_script


@pytest.fixture(scope="session")
def run_ranks(launcher) -> Callable[..., list[Done]]:
    """`run_ranks("2-sft_vlm.py", "--lr", 1e-3, cwd=folder)`: a finished run of two ranks, started as torchrun does."""

    def run_ranks(script: str, *arguments, cwd: Path) -> list[Done]:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [launcher.start(script, *arguments, cwd=cwd, env={"RANK": rank, "LOCAL_RANK": rank, **common}) for rank in "01"]
        done = [launcher.wait(rank) for rank in ranks]
        assert [rank.status for rank in done] == [0, 0], f"{script} {arguments}: {done[0].err[-3000:]}\n{done[1].err[-3000:]}"
        return done

    return run_ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def samples(tmp_path_factory) -> Path:
    """A folder with a file in every official format, and their pictures."""
    return miniatures.write_all(tmp_path_factory.mktemp("samples"))


# ---------------------------------------------------------------- runs that several tests look at


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """32 captions of pictures and 32 shorter texts: some micro-batches hold no picture, none as many tokens as another."""
    return miniatures.write_mixed(tmp_path_factory.mktemp("mixed"), pictures=32, texts=32)


def mixed_arguments(mixed: Path) -> tuple:
    """Five steps on `mixed`, two conversations a micro-batch; in fp32, whose rounding hides nothing."""
    return (*TINY, "--dtype", "fp32", "--data", mixed, "--max_steps", 5, "--batch_size", 2, "--save_every", 2, "--lr", 1e-3,
            "--warmup", 2, "--seed", MIXED_SEED)


@pytest.fixture(scope="session")
def one_process(run_script, mixed, tmp_path_factory) -> Path:
    """The checkpoint of one process that accumulates two micro-batches a step."""
    folder = tmp_path_factory.mktemp("one")
    run_script("1-pretrain_vlm.py", *mixed_arguments(mixed), "--accumulate", 2, cwd=folder)
    return folder / "out" / "pretrain"


@pytest.fixture(scope="session")
def two_processes(mixed, tmp_path_factory, one_process) -> Path:
    """The checkpoint of two processes under torchrun, a micro-batch each."""
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, "1-pretrain_vlm.py", *mixed_arguments(mixed), cwd=folder)
    return folder / "out" / "pretrain"


def torchrun(processes: int, script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node PROCESSES SCRIPT ARGUMENTS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with subprocess.Popen([*command, str(ROOT / script), *map(str, arguments)], cwd=cwd, env={**os.environ, **ENVIRONMENT},
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, f"{out}\n{err[-3000:]}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory) -> tuple[Path, Done]:
    """(folder, how it ended): script 1 on the world, by a fresh Python in another folder, listing every module it imports."""
    folder = tmp_path_factory.mktemp("workplace")
    arguments = ("--data", "world:rows=12", "--max_steps", "3", *TINY[:-1], "world", "--eval_examples", "1")
    done = subprocess.run([sys.executable, "-X", "importtime", str(ROOT / "1-pretrain_vlm.py"), *arguments], cwd=folder,
                          env={**os.environ, **ENVIRONMENT}, text=True, capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def stage_two(stage_one, run_script) -> tuple[Path, Done]:
    """(folder, how it ended): script 2 on all four tasks, after script 1."""
    folder, _ = stage_one
    data = ("world:rows=6", "easy_vqa:0.002", "arithmetic:rows=6", "text:rows=6")
    done = run_script("2-sft_vlm.py", "--data", *data, "--max_steps", 3, "--batch_size", 4, "--log_every", 1, "--device", "cpu",
                      "--eval_examples", 1, "--eval_every", 2, cwd=folder)  # fmt: skip
    return folder, done
