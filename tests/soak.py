"""What happens when: runs that are killed, stopped, starved of space, started with other flags, and checkpoints that are damaged.

    python -m tests.soak            minutes: every stage, several times
    python -m tests.soak --short    a minute: each kind of fault once

It prints one table, and ends with status 1 where something else happened than it says. tests/test_reliability.py asks the same
questions one by one.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dataset.tokenizer import MODEL_FILE, load_tokenizer
from model import checkpoint, resume
from model.optimizer import make_optimizer
from model.registry import UserError
from tests import miniatures, tiny
from tests.conftest import ENCODER, Done, Launcher, free_port

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
    checkpoint.save(folder / "start", tiny.nano(), MODEL_FILE)
    miniatures.write_mixed(folder, pictures=8, texts=8)
    rows = [{"question": f"What is {k}?", "chosen": f"It is {k}.", "rejected": "I see nothing at all."} for k in range(12)]
    miniatures.lines(folder / "pairs.jsonl", rows)
    (folder / "even.py").write_text("def even(example, answer):\n    return float(len(answer) % 2 == 0)\n")


class Soak:
    """Runs of the stages, with faults, in one folder."""

    def __init__(self, folder: Path, launcher: Launcher, seed: int = 0):
        self.folder, self.launcher, self.rng = folder, launcher, random.Random(seed)
        write_inputs(folder)

    def run(self, stage: str, out: str, *more, ranks: int = 1, kill: Callable[[list[int]], None] | None = None,
            **options) -> list[Done]:
        """All ranks of a run, when they have ended; `kill` gets their process ids when they have started."""
        if (self.folder / out / "resume").is_dir() and resume.saved_steps(self.folder / out):
            more = (*more, "--resume")
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
        started = [self.launcher.start(*STAGES[stage], *COMMON, "--out", out, *more, cwd=self.folder, **options, env={
            **common, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if common else {})}) for rank in range(ranks)]
        if kill:
            kill([one.pid for one in started])
        return [self.launcher.wait(one) for one in started]

    def same_end(self, stage: str, ranks: int, faults: list[dict]) -> str:
        """A run with these faults, each in another start, beside one without: "" where their weights are the same bit for bit."""
        whole, broken = f"whole-{stage}-{ranks}", f"broken-{stage}-{ranks}-{self.rng.randrange(10**6)}"
        if not (self.folder / whole).is_dir():
            done = self.run(stage, whole, ranks=ranks)
            if any(one.status for one in done):
                return done[0].err[-300:]
        for fault in faults:
            self.run(stage, broken, ranks=ranks, **fault)
        done = self.run(stage, broken, ranks=ranks)
        if any(one.status for one in done):
            return done[0].err[-300:]
        ends = [load_file(self.folder / out / "model.safetensors") for out in (whole, broken)]
        return "" if all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]) else "other weights at the end"

    def fault(self) -> dict:
        """A random one: kill -9 at a step or inside a save, or a signal at a step."""
        return self.rng.choice([
            {"die_at_step": self.rng.randint(0, 5)}, {"die_at_write": self.rng.randint(2, 40)},
            {"die_at_step": self.rng.randint(0, 5), "dies_by": self.rng.choice([signal.SIGINT, signal.SIGTERM])}])


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


def names_its_file(name: str, message: str) -> bool:
    """Whether a message names the file; without config.json a folder is no checkpoint at all."""
    return name in message or message.startswith("no checkpoint in")


# ---------------------------------------------------------------- the table


def last_line(done: Done) -> str:
    """The last line that a process wrote to stderr, without the bar before it."""
    return done.err.splitlines()[-1].rpartition("]")[2]


def rows(soak: Soak, short: bool) -> Iterator[tuple[str, str, bool]]:
    """(what happens, what follows, whether it did)."""
    times = 1 if short else 7
    for stage in ["pretraining", "GRPO"] if short else STAGES:
        ends = [soak.same_end(stage, 1, [soak.fault(), soak.fault()]) for _ in range(times)]
        yield f"{stage}: kill -9 and signals, some inside a save", f"{ends.count('')} of {times} end bit for bit", not any(ends)
    for stage in ["pretraining"] if short else ["SFT", "DPO", "GRPO"]:
        faults = [{"die_at_step": 3, "dies_by": signal.SIGTERM}, *([] if short else [{"die_at_step": 1}])]
        end = soak.same_end(stage, 2, faults)
        yield f"{stage}, 2 ranks: signals{'' if short else ' and kill -9'}", end or "ends bit for bit", not end
    done = soak.run("pretraining", "full", file_limit=200_000)[0]
    yield "the disk is full inside a save", last_line(done), done.status == 1 and "the disk is full" in done.err
    done = soak.run("pretraining", "/proc/out")[0]
    yield "the output cannot be written", last_line(done), done.status == 1 and "/proc/out could not be written" in done.err
    began = time.time()
    done = soak.run("pretraining", "dead", ranks=2, kill=lambda pids: (time.sleep(4), os.kill(pids[1], signal.SIGKILL)))[0]
    yield "a rank is killed", f"the other one ends in {time.time() - began:.0f} s", bool(done.status) and time.time() - began < 60
    source = checkpoint_with_states(soak.folder / "sound")
    messages = [(name, damage, message_about(source, name, damage, soak.folder / f"damaged-{k}"))
                for k, (name, damage) in enumerate(DAMAGED)]  # fmt: skip
    wrong = [f"{name}, {damage}: {message}" for name, damage, message in messages if not names_its_file(name, message)]
    yield f"{len(DAMAGED)} kinds of damaged checkpoints", "; ".join(wrong) or "each message names the file", not wrong


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "streams").mkdir()
        launcher = Launcher(Path(folder) / "streams")
        try:
            print("| what happens | what follows | as it should |\n| --- | --- | --- |")
            for what, then, right in rows(Soak(Path(folder), launcher), "--short" in sys.argv):
                print(f"| {what} | {then.replace(folder, '')} | {'yes' if right else 'NO'} |", flush=True)
                failed += not right
        finally:
            launcher.process.kill()
            launcher.process.communicate()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
