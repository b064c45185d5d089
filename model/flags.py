"""The flags that scripts share, as dataclasses, and what values a flag may have. Nothing here imports torch.

    batch_size: Count = 40        a flag; its comment is its help, its annotation refuses 0

`RunFlags` are the flags that every training run has, `OptimizerFlags` and `Train` say how and what is trained; each script adds
its own dataclass. model/cli.py reads them from the command line.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from model.registry import Default, UserError

# ---------------------------------------------------------------- what values a flag may have


@dataclass(frozen=True)
class Bounds:
    """The range of a number, written in its annotation; `above`: the lowest value itself is outside."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.above else 'at least'} {self.low}"
        return f"above {self.low} and at most {self.high}" if self.above else f"{self.low} to {self.high}"


Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, above=True)]
PositiveOrZero = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, above=True)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Port = Annotated[int, Bounds(1, 65535)]


def outside(annotation: Any, value: Any) -> Bounds | None:
    """The bounds that a value breaks; the values of a tuple have the annotations of its parts."""
    if get_origin(annotation) is Annotated:
        bounds = [one for one in annotation.__metadata__ if isinstance(one, Bounds)]
        return next((one for one in bounds if value not in one), None)
    if get_origin(annotation) is tuple:
        return next((found for part, one in zip(get_args(annotation), value) if (found := outside(part, one))), None)
    return None


def require_in_bounds(config: Any, prefix: str = "") -> None:
    """UserError for the first flag of a dataclass, and of the dataclasses in it, whose value is outside its bounds."""
    hints = get_type_hints(type(config), include_extras=True)
    if isinstance(config, Train):
        config.modes()  # UserError for what is not a mode
    for name, value in named_values(config):
        if dataclasses.is_dataclass(value):
            require_in_bounds(value, prefix if isinstance(value, RunFlags | OptimizerFlags) else f"{prefix}{name}.")
        elif bounds := outside(hints[name], value):
            values = value if isinstance(value, tuple) else (value,)
            given = " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in values)
            raise UserError(f"--{prefix}{name} is {bounds}, not {given}")


def named_values(config: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each field of a dataclass."""
    return ((one.name, getattr(config, one.name)) for one in dataclasses.fields(config))


def data_flag(default: Any) -> Any:
    """A field that decides which row comes when: --resume wants it as it was (model/runtime.py)."""
    return field(default=default, metadata={"data": True})


# ---------------------------------------------------------------- flags of every run


@dataclass
class RunFlags:
    """Flags that every training run has."""

    out: Path  # where the checkpoint goes
    bench: str  # tasks checked on their validation split, with commas between; "" for none; files alone: none, unless given
    eval_every: CountOrZero  # steps between checks; 0: at the end alone
    eval_examples: Count  # pictures' worth of questions that a check asks of each task
    save_every: Count  # steps between saves for --resume; the end is always saved
    log_every: Count  # steps between lines of log.jsonl
    resume: bool = False  # go on exactly where the run in --out stopped
    overwrite: bool = False  # start anew although --out holds an interrupted run, which is deleted
    keep: Count = 2  # states that are kept for --resume: the newest ones
    max_bad_steps: CountOrZero = 10  # steps left out because loss or gradient is not finite; one more ends the run
    seed: Seed = data_flag(0)  # of weights, data order and sampling
    image_folder: Path | None = data_flag(None)  # where the pictures of files are; default: beside the file
    val_share: Share = data_flag(0.02)  # share of the rows of files held out, by a hash: at least 16 rows, at most half; 0: none
    val_data: tuple[str, ...] = data_flag(())  # files of held-out rows, in place of that share
    allow_urls: bool = False  # let rows fetch pictures from the network
    max_bad: Share = 0.01  # share of bad rows that stops the run
    feature_cache: Path = Path("out/features")  # features of the frozen encoder, computed once
    feature_cache_gb: PositiveOrZero = 8.0  # above this the encoder runs at every step instead
    workers: CountOrZero = 8  # processes of a rank, at most, that read pictures for an encoder that runs at every step on a GPU
    context_parallel: Count = data_flag(1)  # with torchrun: processes that share each sequence; its length may grow with them
    checkpointing: bool = False  # less memory for one more forward pass: activations are computed again, not stored
    compile: bool = False  # torch.compile: a minute of waiting, then faster on a GPU
    dtype: str = "auto"  # auto: bf16 on a GPU or a CPU that multiplies in it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps
    wandb: str = ""  # log to Weights & Biases as well: its PROJECT, or PROJECT/NAME of the run
    dry_run: bool = False  # print parameters, rows, steps, and by two trial steps time and memory; save nothing
    check_data: bool = False  # read every row and picture, print counts, what is bad, and rows as they are learned, and stop
    check_rows: CountOrZero = 0  # rows of each --data that --check_data reads; 0: all


@dataclass
class OptimizerFlags:
    """How weights are updated."""

    optimizer: str  # muon (matrices of blocks and connector; AdamW for the rest) | adamw
    lr: Positive  # peak learning rate
    warmup: CountOrZero  # steps of rising learning rate
    weight_decay: PositiveOrZero  # of matrices, not of norms and biases
    max_steps: CountOrZero = 0  # stop after so many steps; 0: after the epochs
    clip: Positive = 1.0  # largest norm of the gradient


SharedFlags = tyro.conf.OmitArgPrefixes[RunFlags]  # --seed, not --run.seed
SharedOptimizerFlags = tyro.conf.OmitArgPrefixes[OptimizerFlags]


def shared(out: str, bench: str, *, eval_every: int, eval_examples: int, save_every: int, log_every: int) -> RunFlags:
    """The field `run` of a script's dataclass, with the script's own defaults."""
    return field(default_factory=lambda: RunFlags(Path(out), Default(bench), eval_every, eval_examples, save_every, log_every))


def optim(optimizer: str, lr: float, *, warmup: int, weight_decay: float = 0.01, max_steps: int = 0) -> OptimizerFlags:
    """The field `optim` of a script's dataclass, with the script's own defaults."""
    return field(default_factory=lambda: OptimizerFlags(optimizer, lr, warmup, weight_decay, max_steps))


# ---------------------------------------------------------------- which tensors are trained (model/recipe.py)


@dataclass
class Train:
    connector: str = "full"  # freeze | full | partial:K (the last K linear maps) | lora:R (rank R); own rate: full:lr=1e-4
    llm: str = "full"  # freeze | full | partial:K (the last K blocks) | lora:R (adapters of rank R), perhaps with ,lr=
    encoder: str = "freeze"  # the same; a trained encoder runs at every step, a frozen one has cached features

    def modes(self) -> dict[str, "Mode"]:
        """Part -> its mode."""
        return {part: Mode.parse(text) for part, text in dataclasses.asdict(self).items()}

    def learning_rates(self) -> dict[str, float]:
        """Part -> its own learning rate, for the parts that have one."""
        return {part: mode.lr for part, mode in self.modes().items() if mode.lr is not None}


@dataclass(frozen=True)
class Mode:
    """How a part is trained: freeze, full, partial or lora; `count` is the K or R of the last two; `lr` its own learning rate."""

    name: str
    count: int = 0
    lr: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """`lora:8,lr=1e-3` -> Mode("lora", 8, 1e-3); UserError for anything else."""
        number = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
        match = re.fullmatch(rf"(freeze)|(full|(partial|lora):(\d+))(?:[:,]lr=({number}))?", text)
        if not match or (match[5] and float(match[5]) == 0):
            raise UserError(f"a --train flag is freeze, full, partial:K or lora:R, perhaps with its own learning rate as in "
                            f"full:lr=1e-4 or lora:8,lr=1e-3, not {text!r}")
        return cls(match[1] or match[3] or match[2], int(match[4] or 0), float(match[5]) if match[5] else None)
