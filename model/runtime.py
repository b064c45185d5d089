"""The mechanics that every training script shares: its folder, saving and resuming, steps, the log, the curves.

In:  a script's `RunFlags` (model/cli.py).  Out: a `Run`, of which one process on one CPU is the ordinary case.

    python 1-pretrain_vlm.py                                   one process
    torchrun --nproc_per_node 2 1-pretrain_vlm.py              two; the effective batch is twice as large

No GradScaler: bf16 where it is faster, fp32 elsewhere (model/devices.py).
Nobody needs to read this file to follow the training loops.
"""

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import checkpoint, context_parallel, durable, recipe, resume, run_folder, run_log, sharding, tensor_file, wandb_log
from model.cli import OptimizerFlags, RunFlags
from model.computing import Computing, DataRanks, StepMetrics
from model.curves import draw_curves
from model.devices import DTYPES, keep_freed_memory, memory, pick_device, pick_dtype, use_wide_vectors
from model.faults import StepFaults
from model.in_threads import on_cores
from model.optimizer import OptimizerGroup, make_optimizer
from model.recipe import Train
from model.registry import UserError
from model.run_data import data_settings, require_same_data
from model.vlm import VLM

__all__ = ["Run", "StepMetrics", "data_settings", "draw_curves", "duration", "pick_device", "prepare"]


class Run(Computing):
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
        super().__init__()
        keep_freed_memory()
        device = pick_device(config.device)
        if device.type == "cpu":
            use_wide_vectors()
        self.dtype = pick_dtype(config.dtype, device)  # of inference; training: `fit_dtype`
        self.join(device, name, self.settings)
        self.ring = context_parallel.make_ring(config.context_parallel, self.rank, self.world_size)
        self.data_ranks = DataRanks(self.rank // config.context_parallel, self.world_size // config.context_parallel)
        torch.manual_seed(config.seed)  # the same weights everywhere ...
        self.started = time.monotonic()
        self.history: list[dict] = []
        self.drawn = 0  # rows of it that curves.png shows
        self.state: dict = {}  # what a resumed run was saved with
        self.first, self.total = 0, -1  # step
        self.faults = StepFaults(self, self.out, config.max_bad_steps)
        self.bar = tqdm(disable=True)
        self.tokens, self.counted_from = 0, time.monotonic()
        self.base, self.anew = self.out, not config.resume  # --out: for iterations, the folder around theirs
        self.lock: Any = None
        self.facts: dict[str, Any] = {}  # what run.json says of this run
        self.wandb: Any = None  # nothing is started or written before training: --dry_run leaves no trace

    @classmethod
    def inference(cls, out: Path, device: str, dtype: str, seed: int) -> "Run":
        """A run that trains nothing: the device and the precision alone."""
        flags = RunFlags(out, "", 0, 0, save_every=1, log_every=1, seed=seed, dtype=dtype, device=device)
        return cls(flags, "inference")

    # ------------------------------------------------------------ computing

    def restart(self, config: RunFlags, settings: Any) -> None:
        """Another run in the same process, with its own folder, seed and log. The one before it is drawn."""
        self.draw_curves()
        if self.history:
            self.record(self.out, ended=True)
        self.config, self.settings, self.out = config, settings, Path(config.out)
        self.history, self.drawn, self.state = [], 0, {}
        torch.manual_seed(config.seed)

    def fit_dtype(self, model: VLM) -> torch.dtype:
        """Compute from now on in the precision that --dtype means for this model; returns it."""
        self.dtype = pick_dtype(self.config.dtype, self.device, model.llm.dim)
        return self.dtype

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
        if self.world_size == 1 and wrapped is model:
            wrapped = on_cores(model)
        of_llm = [p for name, p in model.named_parameters() if name.removeprefix("model.").startswith("llm.")]
        if of_llm and not any(p.requires_grad for p in of_llm):
            return sharding.Averaged(wrapped, [p for p in model.parameters() if p.requires_grad])
        if self.world_size == 1:
            return wrapped
        # A rank whose rows hold no image uses no connector: find_unused_parameters lets the others go on without it.
        return DistributedDataParallel(wrapped, find_unused_parameters=True)

    # ------------------------------------------------------------ saving

    def save_due(self, step: int, multiple_of: int = 1) -> bool:
        """Whether a run is to be saved before this step: every --save_every steps, and where a signal asks for its end."""
        due = self.stopping and step % multiple_of == 0
        return due or (step > self.first and step % self.config.save_every == 0)

    def save(self, model: VLM, optimizer: OptimizerGroup, tokenizer_file: Path, step: int, position: int,
             **more: float | str) -> None:
        """The model for anyone, and everything that resuming needs; `more` comes back in `self.state`.

        Where a signal asks for it, this is the end. Weights with which no step was good yet are not saved over others.
        """
        if self.preview_only:
            return
        if not self.faults.doubtful(step, last=step == self.total):
            state = {"step": step, "position": position, "seconds": self.seconds, "bad_steps": self.faults.count,
                     "dtype": str(self.dtype), "data": data_settings(self.settings), **more}
            with sharding.unsharded(model):
                if self.is_main:
                    checkpoint.save(self.out, model, tokenizer_file)
                    self.record(self.out, self.base)
                resume.save_resume(self.out, model, optimizer, state, self.rank, self.world_size, self.config.keep)
        if self.stopping:
            self.stop()

    def stop(self) -> NoReturn:
        """The end that a signal asked for."""
        self.bar.close()
        if self.wandb:
            self.wandb.finish()
        saved = resume.saved_steps(self.out)
        self.print0(f"saved at step {int(saved[-1].name)}; go on with --resume" if saved else "stopped; nothing was saved yet")
        self.leave()
        raise SystemExit(128 + (self.signals.number or signal.SIGTERM))

    def claim(self) -> None:
        """Take --out for this process alone; UserError where another writes there, or an interrupted run would be lost."""
        if self.is_main and not self.preview_only and self.lock is None:
            self.lock = run_folder.lock(self.base)
            if self.anew:
                run_folder.require_free(self.base, self.settings, self.config.overwrite)
            run_folder.remove_temporary(self.base, self.config.feature_cache)

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
                self.out.resolve().mkdir(parents=True, exist_ok=True)  # a link stays, and what it points to is new
                for name in ("log.jsonl", "bad_rows.jsonl", "scores.json", "best.json", "resume"):  # of a run that saved nothing
                    old = self.out / name
                    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            self.anew = False
            self.barrier()
            return 0, 0
        with sharding.unsharded(model, write=True):
            self.state = state = resume.load_resume(self.out, model, optimizer, self.rank, self.world_size)
        require_same_data(self.out, state.pop("data"), data_settings(self.settings))
        if (dtype := state.get("dtype", str(self.dtype))) != str(self.dtype):
            name = next(name for name, one in DTYPES.items() if str(one) == dtype)
            raise UserError(f"{self.out} was trained in {name} so far, and would go on in another precision: add --dtype {name}")
        rows, damaged = run_log.read(log)
        self.history = [row for row in rows if row["step"] < state["step"]]
        self.barrier()
        if self.is_main:
            run_log.write(log, self.history)
            if damaged:
                self.print0(f"{log}: {damaged} damaged lines are left out")
        self.started = time.monotonic() - state["seconds"]
        self.print0(f"resuming {self.out} at step {state['step']}")
        return state["step"], state["position"]

    # ------------------------------------------------------------ steps and the log

    @property
    def seconds(self) -> float:
        """Seconds that this run has taken, those before a resume included."""
        return time.monotonic() - self.started

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
        self.first, self.total = first, total
        self.faults = StepFaults(self, self.out, self.config.max_bad_steps, self.state.get("bad_steps", 0))
        self.faults.last_good = first - 1
        if self.preview_only:
            yield from self.trial_steps(total)
            return
        self.begin_record()  # not before: until here a run may be refused, and what lies in --out stays as it was
        if self.config.wandb and self.is_main:
            self.wandb = wandb_log.start(self.config.wandb, self.name, self.settings, self.out)
        self.counted_from = time.monotonic()
        self.bar = tqdm(total=total, initial=first, unit="step", disable=not self.is_main, dynamic_ncols=True)
        with self.signals:
            for step in range(first, total + 1):
                yield step
                self.bar.update(step < total)

    def trial_steps(self, total: int) -> Iterator[int]:
        """The first two steps of --dry_run, and then a line about the time and the memory that the run needs."""
        for step in range(min(2, total)):
            began = time.monotonic()
            yield step
        seconds = time.monotonic() - began  # of the second: the first one warms up
        self.print0(f"{seconds:.2g} s a step with the encoder's part, so {total} steps take about {duration(seconds * total)}, "
                    f"without checks; memory {self.max(memory(self.device)) / 1e9:.1f} GB")

    def is_finite(self, step: int, batches: Sequence[dict], loss: float, gradient_norm: float) -> bool:
        """Whether a step may be taken: loss and gradient, the same on every rank, are finite. Else see model/faults.py."""
        return self.faults.is_finite(step, batches, loss, gradient_norm, store=not self.preview_only)

    def count_tokens(self, batches: Sequence[dict]) -> None:
        """Count the tokens of a step for the speed."""
        self.tokens += sum(batch["input_ids"].numel() for batch in batches)

    def tokens_per_second(self) -> float:
        """Tokens counted, on all ranks, per second since this was last asked."""
        speed = self.sum(self.tokens) / max(1e-9, time.monotonic() - self.counted_from)
        self.tokens, self.counted_from = 0, time.monotonic()
        return speed

    def log_step(self, step: int, batches: Sequence[dict], **metrics: float) -> None:
        """Count a step's tokens, and every --log_every steps log its metrics and the tokens per second."""
        self.count_tokens(batches)
        if step % self.config.log_every == 0:
            self.log(step, **metrics, tokens_per_second=self.tokens_per_second())

    def log(self, step: int, **metrics: float) -> None:
        """One line of log.jsonl, and the end of the bar."""
        row = run_log.as_row(step, self.seconds, metrics)
        self.history.append(row)
        if self.is_main and not self.preview_only:
            run_log.append(self.out / "log.jsonl", row)
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
            wandb_log.finish(self.wandb, self.out)
        self.record(self.out, self.base, ended=True)
        self.print0(f"{wrote} in {self.seconds:.0f} s. Next: {then}")
        self.leave()


def prepare(model: VLM, run: Run, train: Train, flags: OptimizerFlags, *, adapter: Path | None = None, shard: str = "ddp",
            module: nn.Module | None = None) -> tuple[nn.Module, OptimizerGroup]:
    """A model ready to be trained: (the module to call in training, its optimizer). Tells what is trained.

    adapter, shard   of stages 1 and 2
    module           what holds the model, where it has more than the model's own weights (model/rl/critic.py)
    """
    run.claim()
    recipe.apply(model, train, run.config.checkpointing, adapter)
    run.print0(recipe.summary(model))
    if run.world_size > 1:
        run.require_same({f"weights {name}": str(value) for name, value in tensor_file.checksums(model.state_dict()).items()})
    if run.is_main and not run.preview_only:
        require_space(run, module or model)
    wrapped = run.wrap(module or model, shard)
    return wrapped, make_optimizer(model, flags.optimizer, lr=flags.lr, weight_decay=flags.weight_decay, train=train,
                                   dtype=run.fit_dtype(model))


def require_space(run: Run, model: nn.Module) -> None:
    """UserError where the disk has no space for what the run saves: two checkpoints (the last, the best), and its states."""
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    state = weights + sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW remembers two numbers for each
    states = 1 if run.config.resume else run.config.keep + 1  # a new one is complete before an old one goes
    durable.require_space(run.out, 2 * weights + states * state, "lower --keep")


def duration(seconds: float) -> str:
    """`50 s`, `12 min` or `7.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
