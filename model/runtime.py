"""The mechanics that every training script shares: processes, precision, learning rate, log, curves.

In:  a script's Config.  Out: a `Run`, of which one process on one CPU is the ordinary case.

    python 1-pretrain_vlm.py                                   one process
    torchrun --nproc_per_node 2 1-pretrain_vlm.py              two; the effective batch is twice as large

No GradScaler: bf16 where the GPU has it, fp32 elsewhere (on a CPU bf16 autocast was measured 17 times slower).
"""

import contextlib
import ctypes
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.distributed import all_gather_object, all_reduce, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import checkpoint, sharding
from model.optimizer import Together

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.05) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then a cosine down to `floor` x peak at step `total` (arXiv 1608.03983).

    ValueError for a floor that is no share of the peak.
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"the last learning rate is a share of the peak, 0 to 1, not {floor} (--lr_end)")
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm of `max_norm` at most; returns the norm before. An infinite one is an error."""
    norm = sharding.clip_grad_norm([p for p in model.parameters() if p.grad is not None], max_norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: lower --lr, or look at the data with --check_data")
    return norm


def keep_freed_memory() -> None:
    """Let glibc keep what a tensor frees for the next one (Linux; elsewhere nothing happens).

    By default every block above some megabytes goes back to the system and comes anew, a page fault for each 4 kB: 5 to 15 %
    of the time of a nano step on a CPU.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not in musl
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


class Run:
    """One process of a run: which device and rank it is, how it computes, where it writes.

    config needs: out, device, dtype, seed, wandb, resume.
    """

    def __init__(self, config, name: str):
        self.config, self.name, self.out = config, name, Path(config.out)
        for name in ("log_every", "save_every"):
            if getattr(config, name, 1) < 1:
                raise ValueError(f"--{name} is at least 1, not {getattr(config, name)}")
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.first = self.rank == 0
        keep_freed_memory()
        self.device = self.pick_device(config.device)
        self.dtype = self.pick_dtype(config.dtype)
        if self.world > 1:
            # The first process checks and labels alone while the others wait: a day, where ten minutes would end the run.
            init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        torch.manual_seed(config.seed)  # the same weights everywhere ...
        self.started = time.time()
        self.history: list[dict] = []
        self.state: dict = {}  # what a resumed run was saved with
        self.bar: tqdm | None = None
        self.tokens, self.counted_from = 0, time.time()
        self.wandb = None  # nothing is started or written before training: --dry_run leaves no trace

    @classmethod
    def inference(cls, out: Path, device: str, dtype: str, seed: int) -> "Run":
        """A run that trains nothing: the device and the precision alone."""
        return cls(SimpleNamespace(out=out, device=device, dtype=dtype, seed=seed, wandb=False, resume=False), "inference")

    def pick_device(self, wanted: str) -> torch.device:
        kind = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch sees no GPU: use --device cpu, or install torch with CUDA")
        if kind != "cuda":
            return torch.device(kind)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device

    def pick_dtype(self, wanted: str) -> torch.dtype:
        if wanted == "auto":
            return torch.bfloat16 if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
        if wanted not in DTYPES:
            raise ValueError(f"--dtype is auto, {' or '.join(DTYPES)}, not {wanted!r}")
        return DTYPES[wanted]

    def start_wandb(self):
        import wandb

        return wandb.init(project="pupil", name=self.name, config=vars(self.config), dir=self.out)

    def say(self, text: str) -> None:
        """Print once, however many processes there are, without breaking the progress bar."""
        if self.first:
            tqdm.write(text, file=sys.stdout)

    # ------------------------------------------------------------ computing

    def wrap(self, model: nn.Module, compile: bool, shard: str = "ddp") -> nn.Module:
        """The module to call in training. Always this one: a call of the bare model would not average gradients.

        shard: ddp, the whole model on every process | zero2 | zero3 (model/sharding.py). Of a divided model the optimizer is made
        after this.
        """
        torch.manual_seed(self.config.seed + self.rank)  # ... and other random numbers on each rank
        if shard != "ddp" and compile:
            raise ValueError(f"--compile and --shard {shard} do not go together: leave one of them out")
        if shard != "ddp":
            return sharding.apply(model, shard, self.device)
        wrapped = torch.compile(model, dynamic=True) if compile else model
        of_llm = [p for name, p in model.named_parameters() if name.removeprefix("model.").startswith("llm.")]
        if of_llm and not any(p.requires_grad for p in of_llm):
            return sharding.Averaged(wrapped, [p for p in model.parameters() if p.requires_grad])
        if self.world == 1:
            return wrapped
        # A rank whose rows hold no image uses no connector: find_unused_parameters lets the others go on without it.
        return DistributedDataParallel(wrapped, find_unused_parameters=True)

    def gather(self, model: nn.Module) -> None:
        """Make a model that is divided among the processes whole on each until the next step; all of them call this."""
        sharding.gather(model)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where it is used; training, references and evaluation all run inside it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, batch: dict) -> dict:
        return {name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for name, value in batch.items()}

    def generator(self, generate: Callable, model: nn.Module, **options) -> Callable[..., list]:
        """`generate(model, batch, **options)` of a batch, and of options still to come, on this run's device and precision."""

        def of_batch(batch: dict, **more) -> list:
            with self.autocast():
                return generate(model, self.to_device(batch), **options, **more)

        return of_batch

    def wait(self) -> None:
        """Until every process is here."""
        checkpoint.barrier(self.world)

    def sum(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        all_reduce(total)
        return total.item()

    def max(self, value: float) -> float:
        """The largest of a number over all processes."""
        return max(self.union({self.rank: value}).values())

    def union(self, found: dict) -> dict:
        """What all processes found, in one dict."""
        if self.world == 1:
            return found
        parts = [{}] * self.world
        all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    # ------------------------------------------------------------ saving

    def save(self, model: nn.Module, optimizer: Together, tokenizer_file: Path, step: int, position: int,
             **more: float | str) -> None:
        """The model for anyone, and everything that resuming needs; `more` comes back in `self.state`."""
        state = {"step": step, "position": position, "seconds": self.seconds, "data": self.data_settings(), **more}
        with sharding.whole(model):
            if self.first:
                checkpoint.save(self.out, model, tokenizer_file)
            checkpoint.save_resume(self.out, model, optimizer, state, self.rank, self.world)

    def data_settings(self) -> dict:
        """The flags that say which row comes when, as they are saved."""
        names = ("data", "batch_size", "accumulate", "seed", "max_length", "problems", "pass_rates", "prompts", "rounds",
                 "answers", "max_new_tokens", "temperature", "scenes", "questions", "labeler", "divider", "balance")
        flags = {name: getattr(self.config, name) for name in names if hasattr(self.config, name)}
        return json.loads(json.dumps(flags, default=str))

    def resume(self, model: nn.Module, optimizer: Together) -> tuple[int, int]:
        """(step, data position) to go on from; (0, 0) without --resume. The log loses what came after that step."""
        log = self.out / "log.jsonl"
        if not self.config.resume:
            if self.first:
                self.out.mkdir(parents=True, exist_ok=True)
                for old in (log, *(self.out / name for name in ("bad_rows.jsonl", "scores.json"))):  # of an earlier run
                    old.unlink(missing_ok=True)
                shutil.rmtree(self.out / "resume", ignore_errors=True)
            return 0, 0
        with sharding.whole(model, write=True):
            self.state = state = checkpoint.load_resume(self.out, model, optimizer, self.rank, self.world)
        then, now = state.pop("data", None), self.data_settings()
        if then not in (None, now):
            raise ValueError(f"{self.out} was started with {then}, and --resume with {now} would go on with other rows: give the "
                             f"same flags")
        lines = log.read_text().splitlines() if log.is_file() else []
        self.history = [row for row in map(json.loads, lines) if row["step"] < state["step"]]
        checkpoint.barrier(self.world)
        if self.first:
            log.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        self.started = time.time() - state["seconds"]
        self.say(f"resuming {self.out} at step {state['step']}")
        return state["step"], state["position"]

    # ------------------------------------------------------------ telling

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, those before a resume included."""
        return time.time() - self.started

    def progress(self, step: int, total: int) -> None:
        """Start the bar, the clock of the speed, and wandb where it is asked for; ValueError for a step behind the last."""
        if step > total:
            raise ValueError(f"{self.out} was saved at step {step}, and this run ends at {total}: resume with the same flags")
        if self.config.wandb and self.first:
            self.wandb = self.start_wandb()
        self.counted_from = time.time()
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not self.first, dynamic_ncols=True)

    def count(self, tokens: int) -> None:
        """Count the tokens of a step for the speed."""
        self.tokens += tokens

    def tokens_per_second(self) -> float:
        """Tokens counted, on all processes, per second since this was last asked."""
        speed = self.sum(self.tokens) / max(1e-9, time.time() - self.counted_from)
        self.tokens, self.counted_from = 0, time.time()
        return speed

    def log(self, step: int, **metrics: float) -> None:
        """One line of log.jsonl, and the end of the bar."""
        row = {"step": step, "seconds": round(self.seconds, 2), **{k: float(f"{v:.6g}") for k, v in metrics.items()}}
        self.history.append(row)
        if self.first:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(metrics, step=step)
            shown = {name: metrics[name] for name in ("loss", "lr", "tokens_per_second") if name in metrics}
            if self.bar is not None and shown:
                self.bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in shown.items()))

    def finish(self, wrote: str, then: str) -> None:
        """Close everything and tell what was written and what to run next."""
        if self.bar is not None:
            self.bar.close()
        if self.first:
            draw_curves(self.history, self.out / "curves.png")
        if self.wandb:
            self.wandb.finish()
        self.say(f"{wrote} in {self.seconds:.0f} s. Next: {then}")
        if self.world > 1:
            destroy_process_group()


def draw_curves(history: list[dict], file: Path) -> None:
    """A PNG with one small plot for every metric that was logged more than once; for all, if none was."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = Counter(key for row in history for key in row if key not in ("step", "seconds"))
    names = [name for name, times in logged.items() if times > 1] or list(logged)
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.6 * rows), squeeze=False)
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in history if name in row]
        axis.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes.flat[len(names):]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)
