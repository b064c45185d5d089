"""The files of Python in an exported folder, for what no class of transformers computes. They import nothing of this repository.

modeling_pupil.py           LLaVA with another connector: its source is copied from model/connector, so that there is one of it
image_processing_pupil.py   pictures as our chat sees them, from the source of dataset/images.py. LLaVA's image processors differ
                            by a pixel in what the middle is, by a grey level in resizing, and know no bands (--fit pad)
transformers runs such files only where it is told trust_remote_code=True.
"""

import ast
import importlib
import re
from pathlib import Path

from torch import nn

FILES, ROOT = Path(__file__).parent / "files", Path(__file__).parents[2]


def modeling(connector: nn.Module) -> str:
    """The text of modeling_pupil.py, whose class computes this connector."""
    part = type(connector)
    return filled("modeling_pupil.py", CONNECTOR=part.__name__, SOURCE=source_with_parts(part.__module__, set()))


def image_processing() -> str:
    """The text of image_processing_pupil.py."""
    parts = {"dataset/vision/decoding.py": ("to_rgb", "eight_bits", "BITS"),
             "dataset/images.py": ("resized", "middle_square", "padded")}  # fmt: skip
    source = "\n\n".join(definitions(ROOT / file, names) for file, names in parts.items())
    return filled("image_processing_pupil.py", SOURCE=source)


def filled(name: str, **values: str) -> str:
    """A file of files/ with values in the place of their names."""
    text = (FILES / f"{name}.txt").read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"${key}$", value)
    return text


def source_with_parts(module: str, done: set[str]) -> str:
    """The source of a connector's module, after those of model/connector and model/attention.py that it imports."""
    done.add(module)
    file = Path(str(importlib.import_module(module).__file__))
    needed = re.findall(r"^from (model\.(?:connector|attention)[\w.]*) import", file.read_text(encoding="utf-8"), re.MULTILINE)
    parts = [source_with_parts(name, done) for name in needed if name not in done]
    return "\n\n".join([*parts, definitions(file)])


def definitions(file: Path, names: tuple[str, ...] = ()) -> str:
    """The source of a file without its docstring and its imports of this repository; with names, of these definitions alone."""
    text = file.read_text(encoding="utf-8")
    lines, kept = text.splitlines(), []
    for node in ast.parse(text).body:
        ours = isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("model", "dataset", "__future__")
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        targets = [ast.unparse(target) for target in getattr(node, "targets", ())]
        if not ours and not docstring and (not names or {getattr(node, "name", ""), *targets} & set(names)):
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
            kept.append("\n".join(lines[first - 1:node.end_lineno]))
    return "\n\n".join(kept)
