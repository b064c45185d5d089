"""Parts by name: `CONNECTORS.make("resampler:queries=16", **context)`.

In:  a spec, NAME or NAME:key=value,key=value; the first option may drop its key (`open_clip:ViT-B-32/laion2b_s34b_b79k`). A
     value that is a spec with commas of its own stands in parentheses: `select:(clip_random:size=96,patch=16),layer=-2`.
Out: whatever the part's factory returns. A new part is one new file in the folder, with `@CONNECTORS.register("name")`.
Run: python -m model.registry        lists every part
"""

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable


def parse_value(text: str) -> int | float | bool | str:
    """`4` -> int, `0.5` -> float, `true` -> bool, anything else stays text, less parentheses around it."""
    if text.startswith("(") and text.endswith(")"):
        return text[1:-1]
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def typed(text: str, annotation: type | str, where: str) -> int | float | bool | str:
    """The value of an option; ValueError where its type is plain and the value is of another."""
    value, name = parse_value(text), annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = name.removesuffix(" | None")  # None is what an option is that is left out
    wanted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(name, (type(value),))
    if name == "str":
        return value if isinstance(value, str) else text  # a folder may be named 2024
    if type(value) not in wanted:
        raise ValueError(f"{where} is not of type {name}")
    return value


def options_of(text: str) -> list[str]:
    """`a=1,b=(c:d=2,e=3)` -> ["a=1", "b=(c:d=2,e=3)"]; ValueError for a parenthesis without its other half."""
    options, depth = [""] if text else [], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            options.append("")
        else:
            options[-1] += letter
    if depth:
        raise ValueError(f"{text!r}: a parenthesis is missing; a spec inside a spec is written (NAME:key=value,key=value)")
    return options


class Registry:
    """The parts of one kind, found by importing every module of `package` on the first look-up."""

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self.factories: dict[str, Callable] = {}
        self.searched = False

    def register(self, name: str) -> Callable:
        """Decorator that files a factory under an exact name; ValueError when the name is taken."""

        def file(factory: Callable) -> Callable:
            if name in self.factories:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self.factories[name]} and {factory}")
            self.factories[name] = factory
            return factory

        return file

    def names(self) -> list[str]:
        """Every known name, sorted."""
        if not self.searched:
            # Marked first: a module of the folder may itself look a part up while it is being imported.
            self.searched = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(getattr(package, "__path__", [])):  # a single file has no __path__
                importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self.factories)

    def factory(self, name: str) -> Callable:
        """The factory filed under exactly this name; ValueError lists the known names and the nearest spelling."""
        known = self.names()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(known)}")
        return self.factories[name]

    def make(self, spec: str, **context):
        """Build the part that `spec` names; `context` is what the caller knows (sizes, configs) and a spec may not set.

        Raises ValueError for an unknown name, or for an option that the factory does not take.
        """
        name, _, text = spec.partition(":")
        factory = self.factory(name)
        known = {key: parameter for key, parameter in inspect.signature(factory).parameters.items()
                 if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)}  # of a class without __init__
        allowed = [key for key in known if key not in context]
        options = {}
        for position, option in enumerate(options_of(text)):
            key, value = re.fullmatch(r"(?:(\w+)=)?(.*)", option).groups()
            if key is None and position == 0 and allowed:
                key = allowed[0]
            if key not in allowed:
                raise ValueError(
                    f"{self.kind} {name!r} has no option {option!r}. Options: {', '.join(allowed) or 'none'}"
                )
            if key in options:
                raise ValueError(f"{self.kind} {name!r}: option {key!r} is given twice in {spec!r}")
            options[key] = typed(value, known[key].annotation, f"{self.kind} {name!r}: {option!r}")
        missing = [
            key
            for key, parameter in known.items()
            if key in allowed and key not in options and parameter.default is parameter.empty
        ]
        if missing:
            raise ValueError(f"{self.kind} {name!r} also needs {', '.join(missing)}: write {name}:{missing[0]}=...")
        return factory(**context, **options)


def specs(text: str) -> list[str]:
    """`world,mmhal:path=a.json,images=b,text` -> its parts by name with their options: no option begins without KEY=."""
    return [spec for spec in re.split(r",(?!\w+=)", text) if spec]


LLMS = Registry("llm", "model.llm")
PRETRAINED = Registry("pretrained llm", "model.llm")
ENCODERS = Registry("encoder", "model.encoder")
CONNECTORS = Registry("connector", "model.connector")
TEMPLATES = Registry("template", "dataset.chat")
TASKS = Registry("task", "dataset.tasks")


def parameters(registry: Registry, name: str) -> str:
    """How many parameters a part has among the other parts of `nano`; `-` where it needs options or does not fit them."""
    from model.config import PRESETS  # here, because the parts import this file

    nano = PRESETS["nano"]
    contexts = {"llm": lambda: {"config": nano.llm}, "encoder": dict,
                "connector": lambda: {"encoder": ENCODERS.make(nano.encoder), "channels": nano.llm.hidden_size}}
    if registry.kind not in contexts:
        return ""
    try:
        part = registry.make(name, **contexts[registry.kind]())
    except (ValueError, FileNotFoundError):
        return "-"
    return f"{sum(weight.numel() for weight in part.parameters()):,}"


def listing(registries: list[Registry]) -> str:
    """One line per part: kind, name, parameters, and the first line of its docstring."""
    lines = []
    for registry in registries:
        for name in registry.names():
            description = (inspect.getdoc(registry.factories[name]) or "").partition("\n")[0]
            lines.append(f"{registry.kind:10} {name:14} {parameters(registry, name):>10}  {description}")
    return "\n".join(lines)


if __name__ == "__main__":
    # Parts register themselves in the imported module; this running copy, called __main__, stays empty.
    registries = importlib.import_module("model.registry")
    print("kind       name           parameters of it in `nano`; - where it needs options or fits no other part of nano")
    print(registries.listing([getattr(registries, name) for name in ("LLMS", "ENCODERS", "CONNECTORS", "TEMPLATES", "TASKS")]))
