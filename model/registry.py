"""Parts by name: `CONNECTORS.make("resampler:queries=16", **context)`.

In:  a spec, NAME or NAME:key=value,key=value; the first option may drop its key (`open_clip:ViT-B-32/laion2b_s34b_b79k`). A
     spec inside a spec stands in parentheses: `select:(clip_random:size=96,patch=16),layer=-2`.
Out: what the part's factory returns. A new part is one new file in the folder, with `@CONNECTORS.register("name")`.
Run: python -m model.registry        lists every part
"""

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LARGEST = 10**9  # of an option's numbers


class UserError(ValueError):
    """A mistake in the user's flags or files: scripts print it as one line, without a traceback."""


class Default(str):
    """The default of a flag, which other flags may overrule; a value that the user gave is an ordinary str."""


def parse_value(text: str) -> int | float | bool | str:
    """`4` -> int, `0.5` -> float, `true` -> bool; anything else stays text, without parentheses around it."""
    if text.startswith("(") and text.endswith(")"):
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def typed(text: str, annotation: type | str, where: str) -> int | float | bool | str:
    """The value of an option; UserError if the annotation is int, float, bool or str and the value has another type."""
    value, name = parse_value(text), annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = name.removesuffix(" | None")  # None: the option was left out
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(name, (type(value),))
    if name == "str":
        return value if isinstance(value, str) else text  # a folder may be named 2024
    if type(value) not in allowed:
        raise UserError(f"{where} is not of type {name}")
    return value


def require_in_range(value: Any, lowest: float, where: str) -> None:
    """UserError for a number that no option means: infinite, or below `lowest`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and not lowest <= value <= LARGEST:
        raise UserError(f"{where} is a number from {lowest:g} to {LARGEST:,}, not {value}")


def split_options(text: str) -> list[str]:
    """`a=1,b=(c:d=2,e=3)` -> ["a=1", "b=(c:d=2,e=3)"]; UserError for an unmatched parenthesis."""
    options, depth = [""] if text else [], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            options.append("")
        else:
            options[-1] += letter
    if depth:
        raise UserError(f"{text!r}: a parenthesis is missing; a spec inside a spec is written (NAME:key=value,key=value)")
    return options


class Registry:
    """The parts of one kind, found by importing every module of `package` on the first look-up."""

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self.factories: dict[str, Callable] = {}
        self.searched = False

    def register(self, name: str) -> Callable:
        """Decorator that registers a factory under an exact name; ValueError if the name is taken."""

        def add(factory: Callable) -> Callable:
            if name in self.factories:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self.factories[name]} and {factory}")
            self.factories[name] = factory
            return factory

        return add

    def names(self) -> list[str]:
        """Every known name, sorted."""
        if not self.searched:
            # Set first, because a module of the folder may look up a part while it is being imported.
            self.searched = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):  # a single file has no __path__
                importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self.factories)

    def declared(self) -> list[str]:
        """Every name of a package that holds parts of one kind, as its source declares it: nothing is imported, torch neither."""
        found = importlib.util.find_spec(self.package)
        sources = [file.read_text(encoding="utf-8") for folder in (found.submodule_search_locations or () if found else ())
                   for file in Path(folder).glob("*.py")]
        return sorted(name for source in sources for name in re.findall(r'^@\w+\.register\("(.+?)"\)', source, re.MULTILINE))

    def factory(self, name: str) -> Callable:
        """The factory of exactly this name; UserError lists the known names and the nearest spelling."""
        known = self.names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}")
        return self.factories[name]

    def parameters(self, name: str) -> dict[str, inspect.Parameter]:
        """The parameters of a part's factory, by name."""
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # as of a class without __init__
        signature = inspect.signature(self.factory(name))
        return {key: parameter for key, parameter in signature.parameters.items() if parameter.kind not in unnamed}

    def make(self, spec: str, **context: Any) -> Any:
        """Build the part that `spec` names. `context`: arguments of the caller (sizes, configs), which a spec may not set."""
        name, options = self.parsed(spec, **context)
        try:
            made = self.factory(name)(**context, **options)
        except UserError:  # the part itself knows its range better
            raise
        except Exception:
            self.require_not_negative(name, options)
            raise
        self.require_not_negative(name, options)
        return made

    def require_not_negative(self, name: str, options: dict[str, Any]) -> None:
        """UserError for a number below 0 where the default is not."""
        for key, value in options.items():
            default = self.parameters(name)[key].default
            if not (isinstance(default, int | float) and default < 0):
                require_in_range(value, 0, f"{self.kind} {name!r}: {key}")

    def parsed(self, spec: str, **context: Any) -> tuple[str, dict[str, Any]]:
        """(name, options) of a spec; UserError for an unknown name, or for an option that the factory does not take."""
        name, _, text = spec.partition(":")
        known = self.parameters(name)
        allowed = [key for key in known if key not in context]
        options: dict[str, Any] = {}
        for position, option in enumerate(split_options(text)):
            key, value = option_and_value(option)
            if key is None and position == 0 and allowed:
                key = allowed[0]
            if key not in allowed:
                raise UserError(f"{self.kind} {name!r} has no option {option!r}. Options: {', '.join(allowed) or 'none'}")
            if key in options:
                raise UserError(f"{self.kind} {name!r}: option {key!r} is given twice in {spec!r}")
            options[key] = typed(value, known[key].annotation, f"{self.kind} {name!r}: {option!r}")
            require_in_range(options[key], -LARGEST, f"{self.kind} {name!r}: {key}")
        missing = [key for key in allowed if key not in options and known[key].default is inspect.Parameter.empty]
        if missing:
            raise UserError(f"{self.kind} {name!r} also needs {', '.join(missing)}: write {name}:{missing[0]}=...")
        return name, options


def option_and_value(option: str) -> tuple[str | None, str]:
    """`queries=16` -> ("queries", "16"); the first option may have no key."""
    match = re.fullmatch(r"(?:(\w+)=)?(.*)", option)
    return (match[1], match[2]) if match else (None, option)


def specs(text: str) -> list[str]:
    """`world,mmhal:path=a.json,images=b,text` -> its specs: after a comma, KEY= continues a spec and a name begins one."""
    return [spec for spec in re.split(r",(?!\w+=)", text) if spec]


LLMS = Registry("llm", "model.llm")
PRETRAINED = Registry("pretrained llm", "model.llm")
ENCODERS = Registry("encoder", "model.encoder")
CONNECTORS = Registry("connector", "model.connector")
TEMPLATES = Registry("template", "dataset.formats")
TASKS = Registry("task", "dataset.tasks")
DIVIDERS = Registry("divider", "dataset.feedback")
ALGORITHMS = Registry("RL algorithm", "model.rl")
PREFERENCE_LOSSES = Registry("preference loss", "model.dpo")


def count_parameters(registry: Registry, name: str) -> str:
    """The number of parameters of a part beside the other parts of `nano`; `-` if it needs options or does not fit them."""
    from model.config import PRESETS  # imported here, because the parts import this file

    nano = PRESETS["nano"]
    contexts: dict[str, Callable[[], dict[str, Any]]] = {"llm": lambda: {"config": nano.llm}, "encoder": dict,
                "connector": lambda: {"encoder": ENCODERS.make(nano.encoder), "channels": nano.llm.hidden_size}}
    if registry.kind not in contexts:
        return ""
    try:
        part = registry.make(name, **contexts[registry.kind]())
    except (ValueError, FileNotFoundError):
        return "-"
    return f"{sum(weight.numel() for weight in part.parameters()):,}"


def listing(registries: Sequence[Registry]) -> str:
    """One line per part: kind, name, parameters, and the first line of its docstring."""
    lines = []
    for registry in registries:
        for name in registry.names():
            description = (inspect.getdoc(registry.factories[name]) or "").partition("\n")[0]
            lines.append(f"{registry.kind:15} {name:21} {count_parameters(registry, name):>10}  {description}")
    return "\n".join(lines)


if __name__ == "__main__":
    # Parts register in the imported module; the registries of this running copy, __main__, stay empty.
    registries = importlib.import_module("model.registry")
    kinds = ("LLMS", "ENCODERS", "CONNECTORS", "TEMPLATES", "TASKS", "ALGORITHMS", "PREFERENCE_LOSSES", "DIVIDERS")
    print("kind            name                  parameters of it in `nano`; - if it needs options or does not fit nano")
    print(registries.listing([getattr(registries, name) for name in kinds]))
