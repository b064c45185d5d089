"""A yaml file of flags: a mapping of names to values, which become a dataclass's own, with its types.

In:  a dataclass with its defaults, and the file of --config.  Out: the dataclass with the file's values.
An unknown key is an error that names the nearest known one.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from model.flags import OptimizerFlags, RunFlags


def read_mapping(file: Path) -> dict:
    """The mapping in a yaml file, {} of an empty one; SystemExit for anything else."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SystemExit(f"--config: {file}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SystemExit(f"--config: {file} is not a yaml file: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise SystemExit(f"{file}: a mapping of flags is expected, not {type(values).__name__}")
    return values or {}


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
            return str(value) if isinstance(old, str) else type(old)(value)  # str: given, no longer a Default
        except (TypeError, ValueError) as error:
            raise SystemExit(f"{where}: {value!r} is not a {type(old).__name__}") from error
    return value


def as_mapping(config: Any) -> dict[str, Any]:
    """The flags of a dataclass as such a file holds them: `from_mapping` makes the same dataclass of it."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        if isinstance(value, RunFlags | OptimizerFlags):
            found |= as_mapping(value)
        else:
            found[one.name] = as_mapping(value) if dataclasses.is_dataclass(value) else plain(value)
    return found


def plain(value: Any) -> Any:
    """A value as yaml and json have it: text for a path, a list for a tuple."""
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
