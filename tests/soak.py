"""What happens when: runs that are killed, stopped, starved of space, started in another way, and fed with what is damaged.

    python -m tests.soak            half an hour: every stage, many times
    python -m tests.soak --short    minutes: each fault once or twice, as tests/test_reliability.py does
    python -m tests.soak killed     one row, by the name of its function
    python -m tests.soak --write    put what was tried into the table of model/README.md, too

It prints one table, and ends with status 1 where something else happened than it says. Each of its rows is a function below.
Runs on Linux, whose /proc says how much memory a process holds.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dataset.tokenizer import MODEL_FILE, load_tokenizer
from model import checkpoint, resume, run_folder, run_log
from model.optimizer import make_optimizer
from model.registry import UserError
from tests import miniatures, tiny
from tests.conftest import ENCODER, ENVIRONMENT, ROOT, Done, Launcher, Started, free_port

COMMON = ("--device", "cpu", "--bench", "", "--save_every", 2, "--log_every", 1, "--lr", 1e-3, "--warmup", 1, "--val_share", 0)
RL = ("--init", "start", "--data", "arithmetic:rows=0", "--problems", 8, "--prompts", 4, "--group_size", 4, "--batch_size", 8,
      "--reward", "even.py:even", "--max_new_tokens", 4, "--max_steps", 6)  # fmt: skip
SFT = ("2-sft_vlm.py", "--init", "start", "--data", "mixed.jsonl", "--batch_size", 4, "--max_steps", 6)
STAGES: dict[str, tuple] = {
    "pretraining": ("1-pretrain_vlm.py", "--encoder", ENCODER, "--data", "mixed.jsonl", "--batch_size", 4, "--max_steps", 6),
    "SFT": SFT,
    "LoRA": (*SFT, "--train.llm", "lora:2"),
    "DPO": ("3-rl_vlm.py", "--algo", "dpo", "--init", "start", "--data", "pairs.jsonl", "--batch_size", 2, "--max_steps", 6),
    "GRPO": ("3-rl_vlm.py", *RL),
    "PPO": ("3-rl_vlm.py", "--algo", "ppo", *RL),
}


def write_inputs(folder: Path) -> None:
    """What the runs read."""
    model = tiny.nano()
    for weight in model.llm.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # so that it answers each question in another way
    checkpoint.save(folder / "start", model, MODEL_FILE)
    miniatures.write_mixed(folder, pictures=8, texts=8)
    rows = [{"question": f"What is {k}?", "chosen": f"It is {k}.", "rejected": "I see nothing at all."} for k in range(12)]
    miniatures.lines(folder / "pairs.jsonl", rows)
    (folder / "even.py").write_text("def even(example, answer):\n    return float(len(answer) % 2 == 0)\n")


class Soak:
    """Runs of the stages, with faults, in one folder."""

    def __init__(self, folder: Path, launcher: Launcher, seed: int = 0):
        self.folder, self.launcher, self.dice = folder, launcher, random.Random(seed)
        self.names = iter(range(10**6))
        write_inputs(folder)

    def new(self, name: str = "run") -> str:
        """The name of a folder that no other run has."""
        return f"{name}-{next(self.names)}"

    def start(self, stage: str, out: str, *more, cwd: Path | None = None, **options) -> Started:
        return self.launcher.start(*STAGES[stage], *COMMON, "--out", out, *more, cwd=cwd or self.folder, **options)

    def start_ranks(self, stage: str, out: str, *more: tuple, cwd: list[Path] | None = None, **options) -> list[Started]:
        """A rank for each tuple of further arguments, as torchrun starts them."""
        common = {"WORLD_SIZE": str(len(more)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [self.start(stage, out, *arguments, cwd=cwd[rank] if cwd else None, **options,
                           env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank, arguments in enumerate(more)]

    def wait(self, started: list[Started]) -> list[Done]:
        return [self.launcher.wait(one, timeout=1200) for one in started]

    def run(self, stage: str, out: str, *more, ranks: int = 1, **options) -> list[Done]:
        """All ranks of a run, when they have ended. It resumes where there is something to resume."""
        if (self.folder / out / "resume").is_dir() and resume.saved_steps(self.folder / out):
            more = (*more, "--resume")
        return self.wait(self.start_ranks(stage, out, *[more] * ranks, **options) if ranks > 1 else
                         [self.start(stage, out, *more, **options)])  # fmt: skip

    def weights(self, stage: str, out: str, ranks: int = 1, *more) -> dict[str, torch.Tensor]:
        """What a run ends with; a whole run is made once."""
        if not (self.folder / out / "run.json").is_file() or not run_folder.ended(self.folder / out):
            for done in self.run(stage, out, *more, ranks=ranks):
                assert done.status == 0, done.err[-2000:]
        return load_file(self.folder / out / "model.safetensors")

    def same_end(self, stage: str, ranks: int, fault: dict, statuses: tuple[int, ...] = (), *more) -> bool:
        """Whether a run with a fault, resumed, ends with the weights of one without, bit for bit.

        statuses   with which the run with the fault may end, if given
        """
        whole, broken = f"whole-{stage}-{ranks}", self.new("broken")
        for done in self.run(stage, broken, *more, ranks=ranks, **fault):
            assert done.status in statuses or not statuses, f"{stage}, {fault}: status {done.status}: {done.err[-2000:]}"
        if "dies_by" in fault:
            assert int(resume.saved_steps(self.folder / broken)[-1].name) > fault["die_at_step"], f"{stage}, {fault}: not saved"
        return same(self.weights(stage, whole, ranks), self.weights(stage, broken, ranks, *more))

    def chains(self, count: int, fault: Callable[[], tuple[dict, tuple[int, ...]]]) -> str:
        """`count` runs with a fault each, over all stages, every fifth with two ranks, each compared with one without."""
        other = []
        for k in range(count):
            stage, ranks, (options, statuses) = list(STAGES)[5 * k % len(STAGES)], 2 if k % 5 == 1 else 1, fault()
            other += [] if self.same_end(stage, ranks, options, statuses) else [f"{stage} with {ranks} ranks, {options}"]
        assert not other, f"other weights at the end: {other}"
        return f"{count} of {count}, {sum(k % 5 == 1 for k in range(count))} of them with 2 ranks"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last_line(done: Done) -> str:
    """The last line that a process wrote to stderr, without the bar before it."""
    return done.err.splitlines()[-1].rpartition("]")[2]


def until(true: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def saved(folder: Path) -> bool:
    return (folder / "resume").is_dir() and bool(resume.saved_steps(folder))


# ---------------------------------------------------------------- damaged files


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 9 // 10] ^= 1
    file.write_bytes(data)


def change(value: float | torch.dtype) -> Callable[[Path], None]:
    """Put a value into a tensor, or all of them into a precision."""

    def changed(file: Path) -> None:
        facts = checkpoint.tensor_file.facts(file)
        tensors = load_file(file)
        if isinstance(value, torch.dtype):
            tensors = {name: tensor.to(value) for name, tensor in tensors.items()}
        else:
            next(iter(tensors.values())).view(-1)[0] = value
        save_file(tensors, file, facts)

    return changed


def text(content: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(content)


DAMAGES: dict[str, Callable[[Path], object]] = {"half": half, "empty": text(""), "missing": Path.unlink, "a flipped bit": flip}
MODEL_DAMAGES = {"NaN": change(float("nan")), "infinite": change(float("inf")), "fp16": change(torch.float16),
                 "of text": text("weights")}  # fmt: skip
CONFIG_DAMAGES = {"half": half, "empty": text(""), "a list": text("[]"), "of another kind": text('{"model_type": "llama"}'),
                  "missing": Path.unlink}  # fmt: skip
DAMAGED = [("model.safetensors", name) for name in (*DAMAGES, *MODEL_DAMAGES)] + \
          [("config.json", name) for name in CONFIG_DAMAGES] + \
          [("tokenizer.model", name) for name in ("half", "empty", "missing")] + \
          [(f"resume/000004/{file}", name) for name in DAMAGES
           for file in ("model.safetensors", "optimizer.pt", "random-0.pt", "state.json", "SHA256SUMS")]  # fmt: skip


def checkpoint_with_states(folder: Path) -> Path:
    """A checkpoint with two states."""
    model = tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    checkpoint.save(folder, model, MODEL_FILE)
    for step in (2, 4):
        resume.save_resume(folder, model, optimizer, {"step": step}, rank=0, world_size=1, keep=2)
    return folder


def load_all(folder: Path) -> None:
    """Read a checkpoint and its newest state."""
    model = checkpoint.load(folder)
    load_tokenizer(checkpoint.tokenizer_file(folder))
    resume.load_resume(folder, model, make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0), rank=0, world_size=1)


def message_about(source: Path, name: str, damage: str, folder: Path) -> str:
    """The one line about a damaged file of a copy of a checkpoint."""
    copy = shutil.copytree(source, folder)
    {**DAMAGES, **MODEL_DAMAGES, **(CONFIG_DAMAGES if name == "config.json" else {})}[damage](copy / name)
    try:
        load_all(copy)
    except (UserError, FileNotFoundError) as error:
        return str(error)
    return "nothing was noticed"


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Case:
    """A row of the table.

    tries   (soak, whether the short form is asked for) -> what was tried; AssertionError where something else follows
    """

    what: str
    then: str
    tries: Callable[[Soak, bool], str]


CASES: list[Case] = []


def case(what: str, then: str) -> Callable[[Callable[[Soak, bool], str]], Callable[[Soak, bool], str]]:
    """Put a function into the table."""

    def put(tries: Callable[[Soak, bool], str]) -> Callable[[Soak, bool], str]:
        CASES.append(Case(what, then, tries))
        return tries

    return put


@case("Ctrl-C, SIGTERM, or a closed terminal", "the step is finished and saved, and the exit status is 130, 143 or 129. A second "
      "signal ends at once. `--resume` goes on to the same weights, bit for bit")
def stopped(soak: Soak, short: bool) -> str:
    def signal_at_a_step() -> tuple[dict, tuple[int, ...]]:
        number = soak.dice.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
        return {"die_at_step": soak.dice.randint(0, 5), "dies_by": number}, (128 + number,)

    return soak.chains(2 if short else 20, signal_at_a_step)


@case("the same, with torchrun", "all ranks save. torchrun itself ends with status 1 and a traceback of its own, and kills a "
      "step that takes more than 30 seconds")
def stopped_with_torchrun(soak: Soak, short: bool) -> str:
    numbers = [signal.SIGTERM] if short else [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    for number in numbers:
        out, (script, *arguments) = soak.new(), STAGES["pretraining"]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / script,
                   *arguments, *COMMON, "--out", out, "--max_steps", 10_000]  # fmt: skip
        with subprocess.Popen(list(map(str, command)), cwd=soak.folder, env={**os.environ, **ENVIRONMENT}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
            until(lambda folder=soak.folder / out: saved(folder))
            os.killpg(process.pid, number)
            said, _ = process.communicate(timeout=60)
        step = int(resume.saved_steps(soak.folder / out)[-1].name)
        assert process.returncode == 1 and f"saved at step {step}; go on with --resume" in said, said
    return ", ".join(number.name for number in numbers)


@case("kill -9, or a power cut", "the last save is whole, and half a line of a log is dropped. `--resume` goes on to the same "
      "weights, bit for bit")
def killed(soak: Soak, short: bool) -> str:
    def kill() -> tuple[dict, tuple[int, ...]]:
        return soak.dice.choice([{"die_at_step": soak.dice.randint(0, 5)}, {"die_at_write": soak.dice.randint(2, 55)}]), ()

    return soak.chains(2 if short else 40, kill)


@case("a kill outside the steps", "kept are features by shards of 2,048 pictures, preferences by 32 prompts, and answers of "
      "benchmarks by batches. The same command goes on to the same results")
def killed_outside_the_steps(soak: Soak, short: bool) -> str:
    assert soak.same_end("pretraining", 1, {"die_at_write": 1}, (-signal.SIGKILL,), "--feature_cache", soak.new("features"))
    answers, writes = [], (None, 2, 4, 6)[: 2 if short else 4]
    for write in writes:
        out = soak.new()
        command = ("3-rl_vlm.py", "--algo", "dpo", "--init", "start", "--scenes", 40, "--group_size", 2, "--max_new_tokens", 8,
                   "--pairs_only", "--device", "cpu", "--out", out)  # fmt: skip
        for die in (write, None) if write else (None,):
            done = soak.launcher.wait(soak.launcher.start(*command, cwd=soak.folder, die_at_write=die))
            assert done.status == (-signal.SIGKILL if die else 1), done.err[-2000:]
        assert "no pair: no two answers to a prompt differ in score" in done.err  # of a model that was never trained
        answers.append(next((soak.folder / out / "feedback").glob("*/answers.jsonl")).read_bytes())
    assert len(set(answers)) == 1
    for kills in (False, True):
        folder = shutil.copytree(soak.folder / "start", soak.folder / soak.new() / "start")
        command = ("4-eval_chat.py", "--model", folder, "--bench", "world", "--examples", 40 if short else 100, "--device", "cpu")
        if kills:
            started = soak.launcher.start(*command, cwd=soak.folder)
            until(lambda folder=folder: any(part.stat().st_size for part in folder.glob("*.partial")))
            os.kill(started.pid, signal.SIGKILL)
            soak.launcher.wait(started)
        (done,) = soak.wait([soak.launcher.start(*command, cwd=soak.folder)])
        assert done.status == 0, done.err[-2000:]
        answers.append((folder / "predictions-world.jsonl").read_bytes())
    assert answers[-2] == answers[-1]
    return f"features, preferences {len(writes) - 1} times, a benchmark"


@case("`--out` is on a full disk", "it is noticed before the first step, or in a save, which leaves what was saved before. The "
      "message names the file")
def full(soak: Soak, short: bool) -> str:
    for limit, message in [(200_000, "model.safetensors could not be written: the disk is full"),
                           (3000, ".npy: No space left on device. Free some space")]:  # fmt: skip
        (done,) = soak.run("pretraining", out := soak.new(), "--feature_cache", f"{out}/features", file_limit=limit)
        assert done.status == 1 and message in last_line(done) and "Traceback" not in done.err, done.err[-2000:]
        assert not list((soak.folder / out).rglob("*.tmp"))
    return "in a save, in features"


@case("`--out` cannot be written, is moved during the run, or belongs to a run that goes on", "one line names the file or folder")
def lost(soak: Soak, short: bool) -> str:
    def moved(out: str) -> None:
        until(lambda: saved(soak.folder / out))
        (soak.folder / out).rename(soak.folder / soak.new("moved"))

    held = run_folder.lock(soak.folder / "taken")
    for out, then, message in [("/proc/out", None, "/proc/out could not be written"), (soak.new(), moved, "moved or deleted"),
                               ("taken", None, f"another run is writing into {(soak.folder / 'taken').resolve()}")]:
        started = soak.start("pretraining", out, "--max_steps", 10_000)
        if then:
            then(out)
        (done,) = soak.wait([started])
        assert done.status == 1 and message in last_line(done) and "Traceback" not in done.err, done.err[-2000:]
    run_folder.unlock(held)
    return "3 ways"


@case("a file of a checkpoint is damaged", "loading names the file and the remedy. Each tensor has a checksum, and each state a "
      "file `SHA256SUMS`")
def damaged(soak: Soak, short: bool) -> str:
    if not (source := soak.folder / "sound").is_dir():
        checkpoint_with_states(source)
    for name, damage in DAMAGED:
        folder = soak.folder / soak.new("damaged")
        message = message_about(source, name, damage, folder)
        assert name in message or message.startswith("no checkpoint in"), f"{name}, {damage}: {message}"
        if name.startswith("resume"):
            assert message.endswith(f"remove {folder}/resume/000004, and --resume goes on at step 2"), message
        shutil.rmtree(folder)
    return f"{len(DAMAGED)} kinds"


@case("a loss or gradient is not finite", "the step is left out: step and rows are named, and its batch is kept in `bad_steps/`. "
      "More than `--max_bad_steps` (10) end the run, and the last good state stays")
def not_finite(soak: Soak, short: bool) -> str:
    stages = ["GRPO"] if short else list(STAGES)
    for stage in stages:
        (done,) = soak.run(stage, out := soak.new(), "--lr", 1e30, "--max_bad_steps", 1)
        assert done.status == 1 and "ower --lr" in last_line(done) and "Traceback" not in done.err, done.err[-2000:]
        assert not (soak.folder / out / "model.safetensors").is_file() or checkpoint.load(soak.folder / out)
    return f"`--lr 1e30` in {', '.join(stages)}"


@case("a rank has other flags, code, data or weights", "all ranks end at the start, with the name of the flag")
def other_ranks(soak: Soak, short: bool) -> str:
    elsewhere = soak.folder / "elsewhere"
    if not elsewhere.is_dir():
        shutil.copytree(soak.folder / "start", elsewhere / "start")
        miniatures.write_mixed(elsewhere, pictures=8, texts=9)
    for flag, other in [("batch_size", 5), ("data", elsewhere), ("seed", 3), ("max_steps", 5)][: 2 if short else 4]:
        began = time.monotonic()
        folders = [soak.folder, elsewhere if flag == "data" else soak.folder]
        ranks = soak.wait(soak.start_ranks("pretraining", soak.new(), (), () if flag == "data" else (f"--{flag}", other),
                                           cwd=folders))  # fmt: skip
        assert [one.status for one in ranks] == [1, 1] and time.monotonic() - began < 60
        assert last_line(ranks[0]).startswith(f"rank 1 was started with --{flag}"), ranks[0].err[-2000:]
    return "data, batch size" if short else "data, batch size, seed, steps"


@case("a rank dies", "the others end within a minute (torchrun ends them at once); `--resume` goes on")
def dead_rank(soak: Soak, short: bool) -> str:
    ranks, began = soak.start_ranks("pretraining", out := soak.new(), *[("--max_steps", 10_000)] * 2), time.monotonic()
    until(lambda: saved(soak.folder / out))
    os.kill(ranks[1].pid, signal.SIGKILL)
    done = soak.wait(ranks)
    assert done[0].status and time.monotonic() - began < 60, done[0].err[-2000:]
    step = int(resume.saved_steps(soak.folder / out)[-1].name)
    assert f"resuming {out} at step {step}" in soak.run("pretraining", out, "--max_steps", step, ranks=2)[0].out
    return "with kill -9"


@case("rows, pictures or videos are damaged", "each is read, or left out with a reason, within 5 seconds and 1 GB")
def fuzzed(soak: Soak, short: bool) -> str:
    rows, pictures = (480, 80) if short else (25_000, 5000)
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", "--rows", str(rows), "--pictures", str(pictures)], cwd=ROOT,
                          env={**os.environ, **ENVIRONMENT}, text=True, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stdout
    return f"{rows:,} rows in 6 kinds of files, {pictures:,} pictures and videos in every format"


@case("many people use the page at once", "each gets the answer to their own question")
def crowd(soak: Soak, short: bool) -> str:
    from gradio_client import Client, handle_file

    many, port = 5 if short else 50, free_port()
    page = soak.launcher.start("web_demo.py", "--model", "start", "--port", port, "--temperature", 0, "--max_new_tokens", 12,
                               "--device", "cpu", cwd=soak.folder)  # fmt: skip

    def ask(client: Client, k: int) -> str:
        message = {"text": f"What is {7 * k} to {k}, and what do you see?", "files": [handle_file(soak.folder / f"{k % 8}.png")]}
        history, _ = client.predict(message, [], api_name="/send")
        return client.predict(history, api_name="/answer")[-1]["content"][-1]["text"]

    until(lambda: page.streams["stdout"].is_file() and "unning on" in page.streams["stdout"].read_text())
    try:
        clients = [Client(f"http://127.0.0.1:{port}", verbose=False, download_files=False, httpx_kwargs={"timeout": 300})
                   for _ in range(many)]
        alone = [ask(client, k) for k, client in enumerate(clients)]
        with ThreadPoolExecutor(many) as threads:
            at_once = list(threads.map(ask, clients, range(many)))
    finally:
        os.kill(page.pid, signal.SIGTERM)
    assert soak.wait([page])[0].status == 143
    assert at_once == alone and len(set(alone)) > many / 2, (alone, at_once)
    return f"{many} clients, {len(set(alone))} different answers"


@case("a run takes long", "its memory stays the same")
def long(soak: Soak, short: bool) -> str:
    found = []
    for stage, steps, what in [("SFT", 40 if short else 2000, "steps"), ("GRPO", 12 if short else 300, "rollouts")]:
        out, used = soak.new(), {}
        run = soak.start(stage, out, "--max_steps", steps, "--save_every", steps // 4, "--entropy_floor" if stage == "GRPO" else
                         "--clip", 0 if stage == "GRPO" else 1)  # fmt: skip
        for step in range(steps // 4, steps + 1, steps // 4):
            until(lambda file=soak.folder / out / "log.jsonl", at=step - 1: len(run_log.read(file)[0]) > at, seconds=1200)
            used[step] = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        assert soak.wait([run])[0].status == 0
        assert max(used.values()) - used[steps // 4] < 16, f"{stage}: MB by step: {used}"
        found.append(f"{stage}, {what}: " + ", ".join(f"{mb:.0f} MB at {step:,}" for step, mb in used.items()))
    return "; ".join(found)


@case("the same seed twice", "the same weights, bit for bit, on one kind of processor")
def again(soak: Soak, short: bool) -> str:
    stages = ["GRPO"] if short else list(STAGES)
    for stage in stages:
        assert same(soak.weights(stage, f"whole-{stage}-1"), soak.weights(stage, soak.new())), f"{stage}: other weights"
    return ", ".join(stages)


def table(tried: dict[str, str]) -> str:
    """The rows that were tried: what happens -> what was tried."""
    rows = [(one.what, one.then, tried[one.what]) for one in CASES if one.what in tried]
    return "".join(f"| {' | '.join(row)} |\n" for row in [("what happens", "what follows", "tried"), ("---",) * 3, *rows])


def cells(text: str) -> list[tuple[str, str]]:
    """(what happens, what was tried) of the rows of a table."""
    return [(row.split(" | ")[0][2:], row.split(" | ")[-1][:-2]) for row in text.splitlines()[2:]]


PAGE, SECTION = ROOT / "model" / "README.md", re.compile(r"(?<=^## What happens when\n\n)(?:\|.*\n)+", re.MULTILINE)


def main() -> int:
    short, failed = "--short" in sys.argv, 0
    tried: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "streams").mkdir()
        launcher = Launcher(Path(folder) / "streams")
        soak = Soak(Path(folder), launcher)
        try:
            for one in [one for one in CASES if one.tries.__name__ in sys.argv] or CASES:
                began = time.monotonic()
                try:
                    tried[one.what] = one.tries(soak, short)
                except AssertionError as error:
                    tried[one.what] = f"NO: {error}"
                    failed = 1
                print(f"{time.monotonic() - began:5.0f} s  {one.what}: {tried[one.what]}", file=sys.stderr, flush=True)
        finally:
            launcher.process.kill()
            launcher.process.communicate()
    print(table(tried), end="")
    if "--write" in sys.argv and not failed:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(SECTION.sub(lambda found: table({**dict(cells(found[0])), **tried}), page), encoding="utf-8")
    return failed


if __name__ == "__main__":
    sys.exit(main())
