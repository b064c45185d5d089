"""The mechanics that every training script shares: ranks, precision, saving and resuming, the log, the curves.

In:  a script's `RunFlags` (model/cli.py).  Out: a `Run`, of which one process on one CPU is the ordinary case.

    python 1-pretrain_vlm.py                                   one process
    torchrun --nproc_per_node 2 1-pretrain_vlm.py              two; the effective batch is twice as large

No GradScaler: bf16 where the GPU has it, fp32 elsewhere (bf16 autocast is slow on most CPUs).
Nobody needs to read this file to follow the training loops.
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_gather_object, all_reduce, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import checkpoint, context_parallel, losses, recipe, run_folder, sharding
from model.cli import OptimizerFlags, RunFlags
from model.context_parallel import ContextParallel, Shard
from model.losses import Score
from model.optimizer import OptimizerGroup, make_optimizer
from model.recipe import Train
from model.registry import UserError
from model.run_folder import data_settings
from model.vlm import VLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def keep_freed_memory() -> None:
    """Let glibc reuse what a tensor frees for the next one (Linux; elsewhere nothing happens).

    By default every block above some megabytes goes back to the system and comes anew, a page fault for each 4 kB: 5 to 15 %
    of the time of a nano step on a CPU.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not in musl
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


@dataclass(frozen=True)
class DataRanks:
    """The groups of ranks that get different micro-batches, and which of them this rank is in."""

    rank: int
    world_size: int


class Run:
    """One rank of a run: where and how it computes, where it writes.

    config     the flags that every run has
    settings   the script's whole dataclass: what --resume compares, and wandb stores
    """

    def __init__(self, config: RunFlags, name: str, settings: Any = None):
        self.config, self.name, self.out = config, name, Path(config.out)
        if config.image_folder and not config.image_folder.is_dir():
            raise FileNotFoundError(f"--image_folder: no folder {config.image_folder}")
        if config.dry_run:
            config.eval_every = 0  # its two trial steps check nothing
        self.settings = config if settings is None else settings
        for flag in ("log_every", "save_every"):
            if getattr(config, flag) < 1:
                raise UserError(f"--{flag} is at least 1, not {getattr(config, flag)}")
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        keep_freed_memory()
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        if self.world_size > 1:
            # The first rank checks and labels alone while the others wait: a day, where ten minutes would end the run.
            init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(days=1))
        self.ring = context_parallel.make_ring(config.context_parallel, self.rank, self.world_size)
        self.data_ranks = DataRanks(self.rank // config.context_parallel, self.world_size // config.context_parallel)
        self.context: ContextParallel | None = None  # once a model is ready to be trained, and ranks share its sequences
        torch.manual_seed(config.seed)  # the same weights everywhere ...
        self.started = time.time()
        self.history: list[dict] = []
        self.drawn = 0  # rows of it that curves.png shows
        self.state: dict = {}  # what a resumed run was saved with
        self.bar = tqdm(disable=True)
        self.tokens, self.counted_from = 0, time.time()
        self.base, self.anew = self.out, not config.resume  # --out: for iterations, the folder around theirs
        self.lock: Any = None
        self.facts: dict[str, Any] = {}  # what run.json says of this run
        self.sharded: nn.Module | None = None  # a model that is divided among the ranks
        self.wandb: Any = None  # nothing is started or written before training: --dry_run leaves no trace

    @classmethod
    def inference(cls, out: Path, device: str, dtype: str, seed: int) -> "Run":
        """A run that trains nothing: the device and the precision alone."""
        flags = RunFlags(out, "", 0, 0, save_every=1, log_every=1, seed=seed, dtype=dtype, device=device)
        return cls(flags, "inference")

    def start_wandb(self) -> Any:
        import wandb

        return wandb.init(project="pupil", name=self.name, config=dataclasses.asdict(self.settings), dir=self.out)

    def print0(self, text: str) -> None:
        """Print once, however many ranks there are, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)

    # ------------------------------------------------------------ computing

    def restart(self, config: RunFlags, settings: Any) -> None:
        """Another run in the same process, with its own folder, seed and log. The one before it is drawn."""
        self.draw_curves()
        if self.history:
            self.record(self.out, ended=True)
        self.config, self.settings, self.out = config, settings, Path(config.out)
        self.history, self.drawn, self.state = [], 0, {}
        torch.manual_seed(config.seed)

    def feature_cache(self, model: VLM) -> Path | None:
        """Where features of the encoder are kept; None where it is trained and must see pixels at every step, and in a trial."""
        return None if self.preview_only or recipe.count_trainable(model.encoder) else self.config.feature_cache

    def require_same_start(self, fingerprint: str) -> None:
        """UserError where a run is resumed that began with other weights: what it compares with would be another model."""
        if self.state.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(f"{self.out} was started from other weights than those of --init now: restore them, or start again "
                            f"without --resume")

    def wrap(self, model: nn.Module, shard: str = "ddp") -> nn.Module:
        """The module to call in training. Always this one: a call of the bare model would not average gradients.

        shard: ddp, the whole model on every rank | zero2 | zero3 (model/sharding.py). The optimizer of a sharded model is made
        after this.
        """
        torch.manual_seed(self.config.seed + self.rank)  # ... and other random numbers on each rank
        if self.ring:
            if self.config.compile:
                raise UserError("--compile and --context_parallel do not go together: leave one of them out")
            whole: Any = getattr(model, "model", model)  # a value head stands beside it (model/rl/critic.py)
            self.context = context_parallel.apply(whole, self.ring)
        if shard != "ddp":
            if not isinstance(model, VLM):
                raise UserError(f"--shard {shard} divides a model without a value head")
            self.sharded = model
            if self.config.compile:
                raise UserError(f"--compile and --shard {shard} do not go together: leave one of them out")
            return sharding.apply(model, shard, self.device)
        wrapped: Any = torch.compile(model, dynamic=True) if self.config.compile else model
        of_llm = [p for name, p in model.named_parameters() if name.removeprefix("model.").startswith("llm.")]
        if of_llm and not any(p.requires_grad for p in of_llm):
            return sharding.Averaged(wrapped, [p for p in model.parameters() if p.requires_grad])
        if self.world_size == 1:
            return wrapped
        # A rank whose rows hold no image uses no connector: find_unused_parameters lets the others go on without it.
        return DistributedDataParallel(wrapped, find_unused_parameters=True)

    def gather(self) -> None:
        """Make a sharded model whole on every rank until the next step, so that one may use it alone; all ranks call this."""
        if self.sharded:
            sharding.gather(self.sharded)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where it is used; training, references and evaluation all run inside it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, batch: dict) -> dict:
        """A batch of training on this rank's device: with --context_parallel, this rank's share of it."""
        return self.move(self.context.shard(batch) if self.context else batch)

    def move(self, batch: dict) -> dict:
        """The batch with its tensors on this rank's device."""
        return {name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else
                value.to(self.device) if isinstance(value, Shard) else value for name, value in batch.items()}

    def score(self, model: nn.Module, batch: dict, temperature: float = 1.0, banned: Sequence[int] = ()) -> Score:
        """`score` (model/losses.py) of all of a batch's learned tokens, of a share those on other ranks too; see `all_tokens`."""
        score = losses.score(model, batch, temperature, banned)
        return self.context.gather_score(score, batch) if self.context and "shard" in batch else score

    def all_tokens(self, values: Tensor, batch: dict) -> Tensor:
        """A value for each learned token of this rank -> for each of the micro-batch, (L,). One process holds all of them."""
        return self.context.gather(values, batch) if self.context else values

    def generator(self, generate: Callable, model: nn.Module, **options: Any) -> Callable[..., Any]:
        """`generate(model, batch, **options)` of a batch, and of options still to come, on this run's device and precision."""

        def of_batch(batch: dict, **more: Any) -> Any:
            with self.autocast():
                return generate(model, self.move(batch), **options, **more)

        return of_batch

    def barrier(self) -> None:
        """Wait until every rank is here."""
        checkpoint.barrier(self.world_size)

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.world_size == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        all_reduce(total)
        return total.item()

    def max(self, value: float) -> float:
        """The largest of a number over all ranks."""
        return max(self.all_gather({self.rank: value}).values())

    def all_gather(self, found: dict) -> dict:
        """The dicts of all ranks as one."""
        if self.world_size == 1:
            return found
        parts: list[dict] = [{}] * self.world_size
        all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    # ------------------------------------------------------------ saving

    def save(self, model: VLM, optimizer: OptimizerGroup, tokenizer_file: Path, step: int, position: int,
             **more: float | str) -> None:
        """The model for anyone, and everything that resuming needs; `more` comes back in `self.state`."""
        if self.preview_only:
            return
        state = {"step": step, "position": position, "seconds": self.seconds, "data": data_settings(self.settings), **more}
        with sharding.unsharded(model):
            if self.is_main:
                checkpoint.save(self.out, model, tokenizer_file)
                self.record(self.out, self.base)
            checkpoint.save_resume(self.out, model, optimizer, state, self.rank, self.world_size)

    def claim(self) -> None:
        """Take --out for this process alone; UserError where another writes there, or an interrupted run would be lost."""
        if self.is_main and not self.preview_only and self.lock is None:
            self.lock = run_folder.lock(self.base)
            if self.anew:
                run_folder.require_free(self.base, self.settings, self.config.overwrite)

    def begin_record(self) -> None:
        """Write run.json, beside the checkpoints of all iterations too."""
        if self.is_main:
            name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
            self.facts = run_folder.facts(self.settings, self.config.seed, f"{name}, {self.dtype}", self.world_size)
            self.record(self.out, self.base)

    def record(self, *folders: Path, ended: bool = False) -> None:
        """Write run.json into folders, with the seconds so far."""
        for folder in dict.fromkeys(folders if self.is_main else ()):
            run_folder.write(folder, {**self.facts, "seconds": round(self.seconds, 1), "ended": ended})

    def resume(self, model: VLM, optimizer: OptimizerGroup) -> tuple[int, int]:
        """(step, data position) to go on from; (0, 0) without --resume. The log loses what came after that step."""
        log = self.out / "log.jsonl"
        if self.preview_only:
            return 0, 0
        if not self.config.resume:
            if self.is_main:
                if self.anew and (done := run_folder.make_room(self.base, self.config.feature_cache)):
                    self.print0(f"{self.base}: {done}")
                self.out.mkdir(parents=True, exist_ok=True)
                for name in ("log.jsonl", "bad_rows.jsonl", "scores.json", "best.json", "resume"):  # of a run that saved nothing
                    old = self.out / name
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            self.anew = False
            self.barrier()
            return 0, 0
        with sharding.unsharded(model, write=True):
            self.state = state = checkpoint.load_resume(self.out, model, optimizer, self.rank, self.world_size)
        then, now = state.pop("data", None), data_settings(self.settings)
        if then is not None and then != now:
            changed = [f"--{name} {then.get(name)!r}, now {now.get(name)!r}" for name in sorted({**then, **now})
                       if then.get(name) != now.get(name)]
            raise UserError(f"{self.out} was started with {'; '.join(changed)}: --resume would go on with other rows. Give the "
                            f"same flags and the same files")
        lines = log.read_text().splitlines() if log.is_file() else []
        self.history = [row for row in map(json.loads, lines) if row["step"] < state["step"]]
        self.barrier()
        if self.is_main:
            log.write_text("".join(json.dumps(row) + "\n" for row in self.history))
        self.started = time.time() - state["seconds"]
        self.print0(f"resuming {self.out} at step {state['step']}")
        return state["step"], state["position"]

    # ------------------------------------------------------------ steps and the log

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, those before a resume included."""
        return time.time() - self.started

    @property
    def preview_only(self) -> bool:
        """Whether this run writes nothing: it stops before it learns (--check_data), or after two trial steps (--dry_run)."""
        return self.config.dry_run or self.config.check_data

    def steps(self, first: int, total: int) -> Iterator[int]:
        """first..total, with a progress bar: a script evaluates and saves at the last one, and learns in all others.

        UserError for a first step behind the last.
        """
        if first > total:
            raise UserError(f"{self.out} was saved at step {first}, and this run ends at {total}: resume with the same flags")
        if self.preview_only:
            yield from self.trial_steps(total)
            return
        self.begin_record()  # not before: until here a run may be refused, and what lies in --out stays as it was
        if self.config.wandb and self.is_main:
            self.wandb = self.start_wandb()
        self.counted_from = time.time()
        self.bar = tqdm(total=total, initial=first, unit="step", disable=not self.is_main, dynamic_ncols=True)
        for step in range(first, total + 1):
            yield step
            self.bar.update(step < total)

    def trial_steps(self, total: int) -> Iterator[int]:
        """The first two steps of --dry_run, and then a line about the time and the memory that the run needs."""
        for step in range(min(2, total)):
            began = time.time()
            yield step
        seconds = time.time() - began  # of the second: the first one warms up
        self.print0(f"{seconds:.2g} s a step with the encoder's part, so {total} steps take about {duration(seconds * total)}, "
                    f"without checks; memory {self.max(memory(self.device)) / 1e9:.1f} GB")

    def count_tokens(self, batches: Sequence[dict]) -> None:
        """Count the tokens of a step for the speed."""
        self.tokens += sum(batch["input_ids"].numel() for batch in batches)

    def tokens_per_second(self) -> float:
        """Tokens counted, on all ranks, per second since this was last asked."""
        speed = self.sum(self.tokens) / max(1e-9, time.time() - self.counted_from)
        self.tokens, self.counted_from = 0, time.time()
        return speed

    def log_step(self, step: int, batches: Sequence[dict], **metrics: float) -> None:
        """Count a step's tokens, and every --log_every steps log its metrics and the tokens per second."""
        self.count_tokens(batches)
        if step % self.config.log_every == 0:
            self.log(step, **metrics, tokens_per_second=self.tokens_per_second())

    def log(self, step: int, **metrics: float) -> None:
        """One line of log.jsonl, and the end of the bar."""
        row = {"step": step, "seconds": round(self.seconds, 2), **{k: float(f"{v:.6g}") for k, v in metrics.items()}}
        self.history.append(row)
        if self.is_main and not self.preview_only:
            with (self.out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(metrics, step=step)
            shown = {name: metrics[name] for name in ("loss", "lr", "tokens_per_second") if name in metrics}
            if shown:
                self.bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in shown.items()))

    def draw_curves(self) -> None:
        """curves.png, unless what it shows is all that was logged."""
        if self.is_main and self.drawn != len(self.history):
            draw_curves(self.history, self.out / "curves.png")
        self.drawn = len(self.history)

    def finish(self, wrote: str, then: str) -> None:
        """Close everything and tell what was written and what to run next."""
        self.bar.close()
        self.draw_curves()
        if self.wandb:
            self.wandb.finish()
        self.record(self.out, self.base, ended=True)
        self.print0(f"{wrote} in {self.seconds:.0f} s. Next: {then}")
        if self.world_size > 1:
            destroy_process_group()


class StepMetrics:
    """What is logged of a step: sums over its tokens or pairs, and largest values, over micro-batches and ranks."""

    def __init__(self, run: Run):
        self.run, self.sums = run, Counter[str]()
        self.peaks: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        """Values of a micro-batch's tokens or pairs, (...): their sum is counted."""
        self.sums.update({name: float(value.detach().float().sum()) for name, value in values.items()})

    def peak(self, **values: Tensor) -> None:
        """Of these the largest."""
        for name, value in values.items():
            self.peaks[name] = max(float(value.detach().max()), self.peaks.get(name, -math.inf))

    def reduce(self, count: float) -> dict[str, float]:
        """Means over `count` tokens or pairs of all ranks, and largest values."""
        return {**{name: self.run.sum(value) / count for name, value in self.sums.items()},
                **{name: self.run.max(value) for name, value in self.peaks.items()}}


def prepare(model: VLM, run: Run, train: Train, flags: OptimizerFlags, *, adapter: Path | None = None, shard: str = "ddp",
            module: nn.Module | None = None) -> tuple[nn.Module, OptimizerGroup]:
    """A model ready to be trained: (the module to call in training, its optimizer). Tells what is trained.

    adapter, shard   of stages 1 and 2
    module           what holds the model, where it has more than the model's own weights (model/rl/critic.py)
    """
    run.claim()
    recipe.apply(model, train, run.config.checkpointing, adapter)
    run.print0(recipe.summary(model))
    wrapped = run.wrap(module or model, shard)
    return wrapped, make_optimizer(model, flags.optimizer, lr=flags.lr, weight_decay=flags.weight_decay, train=train)


def memory(device: torch.device) -> float:
    """The most bytes that this process has held: of a GPU's memory, or else of the machine's (0 where that is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """`50 s`, `12 min` or `7.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def pick_device(wanted: str) -> torch.device:
    """The device of --device; auto: this rank's GPU where there is one."""
    kind = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install torch with CUDA")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch sees no Apple GPU: use --device cpu")
    if kind != "cuda":
        try:
            return torch.device(kind)
        except RuntimeError as error:
            raise UserError(f"--device is auto, cpu, cuda or mps, not {wanted!r}") from error
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The precision of --dtype."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if wanted not in DTYPES:
        raise UserError(f"--dtype is auto, {' or '.join(DTYPES)}, not {wanted!r}")
    return DTYPES[wanted]


FIRST = ("reward", "accuracy", "length_right", "length_wrong")  # panels of curves.png, in this order


def draw_curves(history: list[dict], file: Path) -> None:
    """A PNG with one small plot for every metric that was logged more than once; for all, if none was.

    Those that stayed the same are left out; reward, accuracy and the length of answers come first.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = Counter(key for row in history for key in row if key not in ("step", "seconds"))
    values = {name: [row[name] for row in history if name in row] for name in logged}
    again = [name for name, times in logged.items() if times > 1] or list(logged)
    names = [name for name in again if not math.isclose(min(values[name]), max(values[name]), rel_tol=1e-3)] or again
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 4 * columns, 2.6 * rows  # inches
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in history if name in row]
        axis.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None)
        axis.set_title(name, fontsize=9)
        axis.locator_params(nbins=4)  # most of the time goes into ticks
    for axis in axes.flat[len(names):]:
        axis.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.15 / width, top=1 - 0.4 / height, bottom=0.5 / height, wspace=0.3,
                           hspace=0.35)  # tight_layout would draw everything once more to find these
    figure.savefig(file, dpi=80)
    plt.close(figure)
