"""The command line of every script: the fields of a dataclass, their comments as help, and a yaml file under them.

    python 1-pretrain_vlm.py --config run.yaml --lr 1e-3        the file first, flags on top
An unknown flag or key is an error that names the nearest known one.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import tyro
import yaml


def parse(config_class: type, arguments: list[str] | None = None):
    """An instance of the dataclass from the command line; SystemExit with a message where it does not fit."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    default = config_class()
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise SystemExit("--config needs a yaml file")
        file = Path(arguments[at + 1])
        if not file.is_file():
            raise SystemExit(f"--config: no file {file}")
        default = from_mapping(default, yaml.safe_load(file.read_text(encoding="utf-8")) or {}, str(file))
        del arguments[at : at + 2]
    description = sys.modules[config_class.__module__].__doc__
    return tyro.cli(config_class, default=default, args=arguments, use_underscores=True, description=description)


def run(main: Callable, config_class: type) -> None:
    """`main` with its Config from the command line; a missing file is told in one line, as it is nobody's bug."""
    try:
        main(parse(config_class))
    except FileNotFoundError as error:
        raise SystemExit(f"{error}") from error


def from_mapping(default, values: dict, where: str):
    """The dataclass with the mapping's values in place of its own; a nested mapping goes into a nested dataclass."""
    if not isinstance(values, dict):
        raise SystemExit(f"{where}: a mapping of flags is expected, not {type(values).__name__}")
    known = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    kinds = get_type_hints(type(default))
    changes = {}
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise SystemExit(f"{where}: unknown key {key!r}" + (f"; perhaps you meant {near[0]!r}" if near else ""))
        changes[key] = coerced(known[key], value, f"{where}: {key}", kinds[key])
    return dataclasses.replace(default, **changes)


def coerced(old, value, where: str, kind: type):
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
