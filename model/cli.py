"""The command line of every script: a dataclass of flags, their comments as help, and a yaml file under them.

    python 1-pretrain_vlm.py --config run.yaml --lr 1e-3        the file first, flags on top

A mistake is one line and an exit status; a bug keeps its traceback. Nothing here imports torch, which takes seconds: a script
reads its flags before it imports the rest, so that --help and mistakes are answered at once.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from model import durable
from model.flag_file import from_mapping, read_mapping
from model.flags import (
    Count,
    CountOrZero,
    OptimizerFlags,
    Port,
    Positive,
    PositiveOrZero,
    PositiveShare,
    RunFlags,
    Seed,
    Share,
    SharedFlags,
    SharedOptimizerFlags,
    Train,
    data_flag,
    optim,
    require_in_bounds,
    shared,
)
from model.registry import ALGORITHMS, PREFERENCE_LOSSES, UserError
from model.stopping import Stopped, end_on_signals, hide_traceback

__all__ = [
    "Count", "CountOrZero", "OptimizerFlags", "Port", "Positive", "PositiveOrZero", "PositiveShare", "RunFlags", "Seed", "Share",
    "SharedFlags", "SharedOptimizerFlags", "Train", "data_flag", "flag_names", "from_mapping", "given_value", "optim", "parse",
    "refusal", "run", "shared", "unknown_algorithm",
]  # fmt: skip

Flags = TypeVar("Flags")
DISTRIBUTIONS = {"open_clip": "open_clip_torch", "math_verify": "math-verify", "PIL": "pillow", "yaml": "pyyaml"}  # to install
ALONE = 3.0  # seconds that a rank waits for torchrun to end it for another rank's mistake
CONFIG_HELP = "--config run.yaml reads flags from a file; those of the command line stand above them."


def run(main: Callable[[Flags], None], config: Flags) -> None:
    """`main` with its flags. A mistake of the user's is told in one line, as is a signal; a bug keeps its traceback."""
    end_on_signals()
    try:
        main(config)
    except (KeyboardInterrupt, Stopped) as stop:  # with notes that say how far it came, if anything can go on
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        if first_rank():
            print("", *getattr(stop, "__notes__", [f"stopped by {signal.Signals(number).name}"]), sep="\n", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:  # whoever read our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        raise refusal(line) from error


def first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def refusal(line: str, status: int = 1) -> SystemExit:
    """The end of the process with a line, which the first rank says.

    The other ranks make the same mistake most of the time, and torchrun ends them when the first one ends. One that is still
    there after `ALONE` seconds is alone with its mistake, and says it.
    """
    if first_rank():
        return SystemExit(line)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(ALONE)
    print(f"rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
    return SystemExit(status)


def mistake(error: Exception) -> str | None:
    """What a user's mistake, or a lack of the machine's, is called in a line; None for a bug."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        remedy = ". Free some space, and give the same command again" if error.errno in durable.FULL else ""
        return f"{error.filename}: {error.strerror}{remedy}"
    if isinstance(error, UserError | OSError | FloatingPointError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in ("model", "dataset"):
        library = error.name.partition(".")[0]
        return f"this needs the library {library}: pip install {DISTRIBUTIONS.get(library, library)}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory: lower --batch_size and raise --accumulate as much, or add --checkpointing"
    return None


# ---------------------------------------------------------------- from arguments to a dataclass


def parse(config_class: type[Flags], arguments: Sequence[str] | None = None) -> Flags:
    """An instance of the dataclass from the command line; SystemExit with one line where it does not fit."""
    sys.excepthook = hide_traceback  # of Ctrl-C while a script imports what it needs
    write_utf8()
    if first_rank():
        return parsed(config_class, arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return parsed(config_class, arguments)
    except SystemExit as end:
        raise refusal(end.code if isinstance(end.code, str) else said.getvalue().strip()) from None


def parsed(config_class: type[Flags], arguments: Sequence[str] | None) -> Flags:
    """`parse` on one rank."""
    file, given = split_config_file(list(sys.argv[1:] if arguments is None else arguments))
    default = config_class()
    if file:
        default = from_mapping(default, read_mapping(file), str(file))
    config, unknown = read_arguments(config_class, default, given)
    if unknown:
        print(unknown_flag(unknown[0], config), file=sys.stderr)
        raise SystemExit(2)
    try:
        require_in_bounds(config)
    except UserError as error:
        raise SystemExit(str(error)) from error
    return config


def write_utf8() -> None:
    """Read and write UTF-8 whatever the locale is: the model speaks Chinese. What a stream cannot show is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.encoding.lower() != "utf-8":
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")


class Captured(io.StringIO):
    """Takes what tyro prints, in colours where the terminal has them and NO_COLOR (no-color.org) is not set."""

    encoding = "utf-8"  # as write_utf8 has set it

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty() and not os.environ.get("NO_COLOR")


def read_arguments(config_class: type[Flags], default: Flags, arguments: list[str]) -> tuple[Flags, list[str]]:
    """(the dataclass, arguments that no flag took). Prints --help; of a message of tyro's, the sentence alone."""
    description = f"{sys.modules[config_class.__module__].__doc__ or ''}\n\n{CONFIG_HELP}"
    out, err = Captured(), Captured()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(config_class, default=default, args=arguments, use_underscores=True, description=description,
                            return_unknown_args=True)
    except SystemExit:
        print(out.getvalue(), end="")
        if err.getvalue():
            print(first_sentence(err.getvalue()), file=sys.stderr)
        raise


def first_sentence(box: str) -> str:
    """The message in a box of tyro's, without its frame, colours and line breaks."""
    text = re.sub(r"\x1b\[[\d;]*m", "", box)
    lines = [line.strip("│ ") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    end = next((k for k, line in enumerate(lines) if set(line) == {"─"}), len(lines))
    message = re.sub(r"Error parsing (\S+): invalid literal for int\(\) with base 10: ", r"\1 is a whole number, not ",
                     " ".join(lines[:end]))
    return re.sub(r"Error parsing (\S+): could not convert string to float: ", r"\1 is a number, not ", message)


def split_config_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of --config FILE or --config=FILE, if it is given, and the other arguments."""
    file, others, rest = None, [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("--"):
            raise SystemExit("--config needs a yaml file")
        file = Path(value)
        if not file.is_file():
            raise SystemExit(f"--config: no file {file}")
    return file, others


def given_value(flag: str, default: str, arguments: Sequence[str] | None = None) -> str:
    """The value of one flag before the others are parsed, from the command line or from the file of --config."""
    file, given = split_config_file(list(sys.argv[1:] if arguments is None else arguments))
    values = [value if name == f"--{flag}" else name.partition("=")[2] for name, value in zip(given, [*given[1:], ""])
              if name == f"--{flag}" or name.startswith(f"--{flag}=")]
    if values:
        return values[-1]  # of a flag that is given twice the last value counts
    return str(read_mapping(file).get(flag, default)) if file else default


# ---------------------------------------------------------------- messages


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
    rules, preferences = ALGORITHMS.declared(), PREFERENCE_LOSSES.declared()
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


