"""The shape of the repository: who imports whom, what every flag does, and what no file may contain."""

import ast
import fnmatch
import re
import runpy
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("[0-9]-*.py"), ROOT / "web_demo.py"])
MODEL, DATASET = sorted((ROOT / "model").rglob("*.py")), sorted((ROOT / "dataset").rglob("*.py"))
PRODUCT = [*SCRIPTS, *MODEL, *DATASET]
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PRODUCT}
HEAVY = {"open_clip", "timm", "torchvision", "transformers", "wandb", "gradio"}


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def files(paths: list[Path]):
    return pytest.mark.parametrize("file", paths, ids=short)


def imported(tree: ast.AST) -> set[str]:
    """Every module that a file imports, anywhere in it: `from model import cli` is model.cli."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in packages}


# ---------------------------------------------------------------- who imports whom


@files(MODEL)
def test_the_model_imports_nothing_of_the_data(file):
    assert not within(imported(TREES[file]), "dataset", "tests", "web_demo")


@files(DATASET)
def test_the_data_import_the_registry_of_the_model_and_nothing_else_of_it(file):
    allowed = re.compile(r"model\.registry(\.\w+)?")
    assert not {name for name in within(imported(TREES[file]), "model") if not allowed.fullmatch(name)}
    assert not within(imported(TREES[file]), "tests", "web_demo")


@files(SCRIPTS)
def test_a_script_imports_the_two_packages_and_no_other_script(file):
    own = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} | {path.stem for path in ROOT.glob("*.py")}
    assert within(imported(TREES[file]), *own) == within(imported(TREES[file]), "model", "dataset")


@files([file for file in PRODUCT if not file.name.startswith("train_")])
def test_heavy_libraries_are_imported_only_where_they_are_used(file):
    at_import = set()
    for node in TREES[file].body:  # what runs when the file is imported, outside functions
        at_import |= imported(node) if isinstance(node, ast.Import | ast.ImportFrom) else set()
    assert not within(at_import, *HEAVY)


def test_nothing_heavy_is_loaded_on_the_default_path(stage_one):
    """Script 1 from its first to its last step, by the list of what Python imported."""
    loaded = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", stage_one[1].err, re.MULTILINE))
    assert {"torch", "dataset.world", "model.vlm", "matplotlib"} <= loaded  # the list is one
    assert not within(loaded, *HEAVY)


def test_the_top_level_holds_only_what_belongs_there():
    allowed = {"README.md", "LICENSE", "requirements.txt", "model", "dataset", "tests", "web_demo.py", "1-pretrain_vlm.py",
               "2-sft_vlm.py", "3-rl_vlm.py", "4-eval_chat.py"}  # fmt: skip
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if line]
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert {name for name in seen if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)} <= allowed


@files(PRODUCT)
def test_every_file_says_what_it_is(file):
    assert ast.get_docstring(TREES[file]), "a file opens with what it is, what goes in and what comes out"


# ---------------------------------------------------------------- flags


def dataclass_fields(tree: ast.AST, name: str) -> list[str]:
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]


def attributes_of(tree: ast.AST, owner: str) -> set[str]:
    """NAME in `owner.NAME` and `self.owner.NAME`."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and getattr(node.value, "id", getattr(node.value, "attr", None)) == owner}  # fmt: skip


RUN = next(node for node in TREES[ROOT / "model" / "runtime.py"].body if isinstance(node, ast.ClassDef) and node.name == "Run")


@files(SCRIPTS)
def test_every_flag_is_read(file):
    tree = TREES[file]
    used = attributes_of(tree, "config")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if any(getattr(call.func, "id", "") == "Run" for call in calls):  # Run(config, ...): what Run reads of it
        used |= attributes_of(RUN, "config")
    assert not set(dataclass_fields(tree, "Config")) - used


@files([file for file in SCRIPTS if any(getattr(node, "name", "") == "Train" for node in TREES[file].body)])
def test_what_is_trained_is_set_part_by_part(file):
    from tests import tiny

    assert set(dataclass_fields(TREES[file], "Train")) == set(tiny.vlm().parts)
    assert "getattr(config.train, name)" in ast.unparse(TREES[file])


@files(SCRIPTS)
def test_every_flag_has_a_default_and_a_help_text_unless_its_name_says_all(file):
    """The comment of a field is its help: tyro shows it."""
    lines = file.read_text(encoding="utf-8").splitlines()
    (config,) = [node for node in TREES[file].body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    assert all(node.value is not None for node in fields)
    plain = {"seed", "train", "weight_decay", "max_new_tokens"}
    assert not [node.target.id for node in fields if "#" not in lines[node.lineno - 1] and node.target.id not in plain]


# ---------------------------------------------------------------- what no file may contain


def call_name(node: ast.Call) -> str:
    return ast.unparse(node.func)


def forbidden(node: ast.AST) -> str | None:
    """Why a piece of code may not stand in a product file, or None."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return "bare except"
    if isinstance(node, ast.ExceptHandler) and ast.unparse(node.type) in ("Exception", "BaseException"):
        if not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            return "every error swallowed"
    if isinstance(node, ast.Import | ast.ImportFrom) and within(imported(node), "pickle", "dill"):
        return "pickle"
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        return "star import"
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
        return "sys.path edit"
    if isinstance(node, ast.Constant) and node.value == "0.0.0.0":
        return "open to the network by default"
    if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith("device") and any(
            isinstance(other, ast.Constant) and other.value in ("cuda", "cpu") for other in node.comparators):  # fmt: skip
        return "a device compared with a string"
    if isinstance(node, ast.Call):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("strict") == "False":
            return "strict=False"
        if call_name(node).endswith(("filterwarnings", "simplefilter")):
            return "warnings hidden"
        if keywords.get("type") == "bool":
            return "type=bool: `--flag False` would be True"
        if call_name(node) == "torch.load" and keywords.get("weights_only") != "True":
            return "torch.load that may run code"
        if keywords.get("trust_remote_code") == "True":
            return "foreign code"
        if "entity" in keywords or call_name(node).endswith(("push_to_hub", "create_repo", "upload_folder", "upload_file")):
            return "goes to somebody's account"
        if "sbatch" in ast.unparse(node):
            return "submits a job"
        if call_name(node) in ("eval", "exec", "os.system"):
            return "runs a string"
        if call_name(node).endswith(".cuda"):
            return "a device that is not asked for"
    return None


def violations(source: str) -> set[str]:
    return {why for node in ast.walk(ast.parse(source)) if (why := forbidden(node))}


@files(PRODUCT)
def test_no_file_contains_what_is_forbidden(file):
    assert violations(file.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("source", [
    "try: f()\nexcept: pass", "try: f()\nexcept Exception: x = 0", "import pickle", "from pickle import load", "from os import *",
    "import sys\nsys.path.insert(0, '.')", "serve(host='0.0.0.0')", "device == 'cuda'", "self.device == 'cuda'",
    "m.load_state_dict(x, strict=False)", "warnings.filterwarnings('ignore')", "p.add_argument('--compile', type=bool)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "wandb.init(entity='x')", "model.push_to_hub('x')", "eval('1')",
    "x.cuda()", "subprocess.run(['sbatch', 'job.sh'])",
])  # fmt: skip
def test_each_forbidden_thing_is_recognised(source):
    assert violations(source)


def test_what_is_allowed_passes():
    allowed = "try: f()\nexcept Exception as e: raise ValueError from e\ndevice.type == 'cuda'\nzip(a, b, strict=True)"
    assert not violations(allowed + "\ntorch.load(f, weights_only=True)\n# serve('0.0.0.0')")


@files(PRODUCT)
def test_no_gradient_is_kept_alive_by_adding_nothing(file):
    """`loss + 0 * p.sum()` hides that a part is not used. Text alone uses no connector, and DDP is told so."""
    zeros = [ast.unparse(node) for node in ast.walk(TREES[file]) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
             and any(isinstance(side, ast.Constant) and side.value == 0 for side in (node.left, node.right))]  # fmt: skip
    assert not [text for text in zeros if "sum" in text or "mean" in text or "loss" in text]


@files(PRODUCT)
def test_no_file_names_a_place_on_somebodys_machine(file):
    text = file.read_text(encoding="utf-8")
    assert not re.search(r"[\"' (=](/home/|/root/|/Users/|/tmp/|/work/|/mnt/|[A-Z]:\\\\)", text)


def test_the_parts_can_be_listed(capsys):
    runpy.run_path(str(ROOT / "model" / "registry.py"), run_name="__main__")  # python -m model.registry
    listed = capsys.readouterr().out
    for part in ("gpt", "tiny_clip", "clip_random", "open_clip", "linear", "pupil", "chatml", "world", "easy_vqa", "arithmetic"):
        assert re.search(rf"^\w+ +{part} +\S", listed, re.MULTILINE), part
