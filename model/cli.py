"""The command line of every script: the fields of dataclasses, their comments as help, and a yaml file under them.

    python 1-pretrain_vlm.py --config run.yaml --lr 1e-3        the file first, flags on top

`RunFlags` are the flags that every training run has; each script adds its own dataclass, and --help shows the two apart.
An unknown flag or key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from model.registry import ALGORITHMS, PREFERENCE_LOSSES, UserError

Flags = TypeVar("Flags")


def data_flag(default: Any) -> Any:
    """A field that decides which row comes when: --resume wants it as it was (model/runtime.py)."""
    return field(default=default, metadata={"data": True})


@dataclass
class RunFlags:
    """Flags that every training run has."""

    out: Path  # where the checkpoint goes
    bench: str  # tasks that are checked on their validation split, with commas between; "" for none
    eval_every: int  # steps between checks; 0: at the end alone
    eval_examples: int  # pictures' worth of questions that a check asks of each task
    save_every: int  # steps between saves for --resume; the end is always saved
    log_every: int  # steps between lines of log.jsonl
    resume: bool = False  # go on exactly where the run in --out stopped
    seed: int = data_flag(0)  # of weights, data order and sampling
    image_folder: Path | None = data_flag(None)  # where the pictures of files are; default: beside the file
    allow_urls: bool = False  # let rows fetch pictures from the network
    max_bad: float = 0.01  # share of bad rows that stops the run
    feature_cache: Path = Path("out/features")  # features of the frozen encoder, computed once
    feature_cache_gb: float = 8.0  # above this the encoder runs at every step instead
    checkpointing: bool = False  # less memory for one more forward pass: activations are computed again, not stored
    compile: bool = False  # torch.compile: a minute of waiting, then faster on a GPU
    dtype: str = "auto"  # auto: bf16 on a GPU that has it, else fp32
    device: str = "auto"  # auto | cpu | cuda | mps
    wandb: bool = False  # log to Weights & Biases as well
    dry_run: bool = False  # print parameters, rows and steps, and stop
    check_data: bool = False  # print some rows of each --data as the model reads them, what is learned in 【brackets】, and stop


@dataclass
class OptimizerFlags:
    """How weights are updated."""

    optimizer: str  # muon (matrices of blocks and connector; AdamW for the rest) | adamw
    lr: float  # peak learning rate
    warmup: int  # steps of rising learning rate
    weight_decay: float  # of matrices, not of norms and biases
    max_steps: int = 0  # stop after so many steps; 0: after the epochs
    clip: float = 1.0  # largest norm of the gradient


SharedFlags = tyro.conf.OmitArgPrefixes[RunFlags]  # --seed, not --run.seed
SharedOptimizerFlags = tyro.conf.OmitArgPrefixes[OptimizerFlags]


def shared(out: str, bench: str, *, eval_every: int, eval_examples: int, save_every: int, log_every: int) -> RunFlags:
    """The field `run` of a script's dataclass, with the script's own defaults."""
    return field(default_factory=lambda: RunFlags(Path(out), bench, eval_every, eval_examples, save_every, log_every))


def optim(optimizer: str, lr: float, *, warmup: int, weight_decay: float = 0.01, max_steps: int = 0) -> OptimizerFlags:
    """The field `optim` of a script's dataclass, with the script's own defaults."""
    return field(default_factory=lambda: OptimizerFlags(optimizer, lr, warmup, weight_decay, max_steps))


# ---------------------------------------------------------------- from arguments to a dataclass


def run(main: Callable[[Flags], None], config_class: type[Flags]) -> None:
    """`main` with its dataclass from the command line. A user's mistake is told in one line; a bug keeps its traceback."""
    try:
        main(parse(config_class))
    except (UserError, FileNotFoundError) as error:
        raise SystemExit(f"{error}") from error


def parse(config_class: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """An instance of the dataclass from the command line; SystemExit with a message where it does not fit."""
    file, given = split_config_file(list(sys.argv[1:] if arguments is None else arguments))
    default = config_class()
    if file:
        default = from_mapping(default, yaml.safe_load(file.read_text(encoding="utf-8")) or {}, str(file))
    description = sys.modules[config_class.__module__].__doc__
    config, unknown = tyro.cli(config_class, default=default, args=given, use_underscores=True, description=description,
                               return_unknown_args=True)
    if unknown:
        print(unknown_flag(unknown[0], config), file=sys.stderr)
        raise SystemExit(2)
    return config


def split_config_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of --config, if it is given, and the other arguments."""
    if "--config" not in arguments:
        return None, arguments
    at = arguments.index("--config")
    if at + 1 == len(arguments):
        raise SystemExit("--config needs a yaml file")
    file = Path(arguments[at + 1])
    if not file.is_file():
        raise SystemExit(f"--config: no file {file}")
    return file, arguments[:at] + arguments[at + 2:]


def given_value(flag: str, default: str, arguments: Sequence[str] | None = None) -> str:
    """The value of one flag before the others are parsed, from the command line or from the file of --config."""
    file, given = split_config_file(list(sys.argv[1:] if arguments is None else arguments))
    values = [value if name == f"--{flag}" else name.partition("=")[2] for name, value in zip(given, [*given[1:], ""])
              if name == f"--{flag}" or name.startswith(f"--{flag}=")]
    if values:
        return values[-1]  # of a flag that is given twice the last value counts
    stored = yaml.safe_load(file.read_text(encoding="utf-8")) if file else None
    return str(stored.get(flag, default)) if isinstance(stored, dict) else default


def flag_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Every flag of a dataclass by its name on the command line."""
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if isinstance(value, RunFlags | OptimizerFlags):
            yield from flag_names(value)
        elif dataclasses.is_dataclass(value):
            yield from flag_names(value, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}"


def unknown_algorithm(name: str) -> str:
    """One line about a --algo that there is not."""
    rules, preferences = ALGORITHMS.names(), PREFERENCE_LOSSES.names()
    near = difflib.get_close_matches(name, [*rules, *preferences], n=1)
    hint = f"; perhaps you meant {near[0]}" if near else ""
    return f"unknown --algo {name}{hint}. Known: by rules {', '.join(rules)}; by preferences {', '.join(preferences)}"


def unknown_flag(argument: str, config: Any) -> str:
    """One line about an argument that no flag took."""
    name = argument.removeprefix("--").partition("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, ["config", *flag_names(config)], n=1)
    hint = f"; perhaps you meant --{near[0]}" if near else ""
    return f"unknown flag or value {argument}{hint}. {options_of_algorithm(name, config)}--help lists the flags"


def options_of_algorithm(name: str, config: Any) -> str:
    """Which options the run's algorithm has, and which algorithms have an option of this name; "" where there is no --algo."""
    if not hasattr(config, "algo"):
        return ""
    algo = config.algo.partition(":")[0]
    of = {one: list(registry.parameters(one)) for registry in (ALGORITHMS, PREFERENCE_LOSSES) for one in registry.names()}
    owners = [one for one in of if name in of[one]]
    hint = f"{name} is an option of {', '.join(owners)}, written --algo {owners[0]}:{name}=... " if owners else ""
    return f"Options of {algo}, written --algo {algo}:{of[algo][0]}=...: {', '.join(of[algo])}. {hint}"


# ---------------------------------------------------------------- a yaml file of flags


def from_mapping(default: Any, values: Any, where: str) -> Any:
    """The dataclass with the mapping's values in place of its own; a nested mapping goes into a nested dataclass."""
    if not isinstance(values, dict):
        raise SystemExit(f"{where}: a mapping of flags is expected, not {type(values).__name__}")
    known = {one.name: getattr(default, one.name) for one in dataclasses.fields(default)}
    groups = {name: group for name, group in known.items() if isinstance(group, RunFlags | OptimizerFlags)}
    group_of = {one.name: name for name, group in groups.items() for one in dataclasses.fields(group)}
    of_groups: dict[str, dict] = {name: {} for name in groups}
    kinds = get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key in group_of:
            of_groups[group_of[key]][key] = value
        elif key in known and key not in groups:
            changes[key] = coerced(known[key], value, f"{where}: {key}", kinds[key])
        else:
            near = difflib.get_close_matches(key, [*known, *group_of], n=1)
            raise SystemExit(f"{where}: unknown key {key!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))
    changes.update({name: from_mapping(groups[name], given, where) for name, given in of_groups.items() if given})
    return dataclasses.replace(default, **changes)


def coerced(old: Any, value: Any, where: str, kind: Any) -> Any:
    """A yaml value as the type that the default has: yaml reads 1e-3 as a string, and a list where a tuple is meant.

    Where the default is None, `kind` says what else it may be: `float | None`.
    """
    if old is None and value is None:
        return None
    if old is None:
        kind = next(option for option in get_args(kind) if option is not type(None))
        old = (get_origin(kind) or kind)()
    if dataclasses.is_dataclass(old):
        return from_mapping(old, value, where)
    if isinstance(old, bool) or isinstance(value, bool):
        if not (isinstance(old, bool) and isinstance(value, bool)):
            raise SystemExit(f"{where}: {value!r} is not of the type of {old!r}")
        return value
    if isinstance(old, tuple):
        return tuple(value) if isinstance(value, list) else (value,)
    if isinstance(old, Path):
        return Path(value)
    if isinstance(old, int | float | str):
        try:
            return type(old)(value)
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{where}: {value!r} is not a {type(old).__name__}") from error
    return value
