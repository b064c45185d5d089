"""The shape of the repository: who imports whom, what every flag does, how a loop reads, and what no file may contain."""

import ast
import dataclasses
import graphlib
import io
import re
import runpy
import subprocess
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import ROOT

SCRIPTS = sorted([*ROOT.glob("[0-9]-*.py"), ROOT / "web_demo.py"])
MODEL, DATASET = sorted((ROOT / "model").rglob("*.py")), sorted((ROOT / "dataset").rglob("*.py"))
PRODUCT = [*SCRIPTS, *MODEL, *DATASET]
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in PRODUCT}
HEAVY = {"open_clip", "timm", "torchvision", "transformers", "wandb", "gradio"}


def short(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


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


def test_the_model_imports_nothing_of_the_data():
    assert not {short(file): names for file in MODEL if (names := within(imported(TREES[file]), "dataset", "tests", "web_demo"))}


def test_the_data_import_the_registry_and_the_config_of_the_model_and_nothing_else_of_it():
    allowed = re.compile(r"model\.(registry|config)(\.\w+)?")
    found = {}
    for file in DATASET:
        program = [node for node in TREES[file].body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
        of_program = set().union(*map(imported, program)) & {"model.cli"}  # as a program, it has the command line of the scripts
        assert program or not of_program
        module_alone = ast.Module([node for node in TREES[file].body if node not in program], [])
        assert "model.cli" not in imported(module_alone)
        joins = set()
        if short(file) == "dataset/dialogue.py":  # whose `load` joins both packages, as a script does, for use in Python
            (load,) = [node for node in TREES[file].body if isinstance(node, ast.FunctionDef) and node.name == "load"]
            joins = within(imported(load), "model")
            module_alone = ast.Module([node for node in TREES[file].body if node is not load], [])
            assert not {name for name in within(imported(module_alone), "model") if not allowed.fullmatch(name)}
        found[short(file)] = {name for name in within(imported(TREES[file]), "model", "tests", "web_demo") - of_program - joins
                              if not allowed.fullmatch(name)}
    assert not {file: names for file, names in found.items() if names}


def test_a_script_imports_the_two_packages_and_no_other_script():
    scripts = [path.stem for path in SCRIPTS]
    assert not {short(file): names for file in SCRIPTS if (names := within(imported(TREES[file]), "tests", *scripts))}


def module(file: Path) -> str:
    return short(file).removesuffix(".py").replace("/", ".").removesuffix(".__init__")


MODULES = {module(file) for file in PRODUCT}
CLOSERS = {  # imports that close a circle when they run, which is never while a module is imported: (who, whom)
    ("model.registry", "model.config"),  # the list of parts counts their parameters in `nano`; every part imports the registry
    ("dataset.world.scenes", "dataset.world.words"),  # as a program it shows scenes with their words, which are about scenes
}


def runs_later(node: ast.AST) -> bool:
    """Whether code runs when it is called, or as a program, and not when its module is imported."""
    return isinstance(node, ast.FunctionDef) or isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)


def graph(*, later: bool) -> dict[str, set[str]]:
    """Module -> the product modules that it imports, with the packages that they are in: when it is imported, or ever."""
    found = {}
    for file in PRODUCT:
        waits = {id(node) for code in ast.walk(TREES[file]) if runs_later(code) for node in ast.walk(code)}
        code = ast.Module([node for node in ast.walk(TREES[file]) if isinstance(node, ast.Import | ast.ImportFrom)
                           and (later or id(node) not in waits)], [])  # fmt: skip
        parts = [name.split(".") for name in imported(code)]
        found[module(file)] = {".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)} & MODULES - {module(file)}
    return found


def test_no_module_imports_itself_by_way_of_others():
    """So every file can be read after those that it uses."""
    imports = graph(later=False)
    assert "model.config" in imports["model.vlm"] and "model.connector" in imports["model.connector.linear"]
    assert "dataset.formats.tokenizer_json" not in imports["dataset.tokenizer"]  # it is imported in a function
    graphlib.TopologicalSorter(imports).prepare()  # CycleError tells the modules of a circle


def test_what_functions_import_closes_no_circle_but_where_it_must():
    imports = graph(later=True)
    assert "dataset.formats.tokenizer_json" in imports["dataset.tokenizer"]
    for who, whom in CLOSERS:
        imports[who].remove(whom)
    graphlib.TopologicalSorter(imports).prepare()
    for who, whom in CLOSERS:
        with pytest.raises(graphlib.CycleError):
            graphlib.TopologicalSorter({**imports, who: imports[who] | {whom}}).prepare()


def test_heavy_libraries_are_imported_only_where_they_are_used():
    found = {}
    for file in [file for file in PRODUCT if not file.name.startswith("train_")]:
        at_import = [imported(node) for node in TREES[file].body if isinstance(node, ast.Import | ast.ImportFrom)]
        found[short(file)] = within(set().union(*at_import), *HEAVY)  # of what runs when the file is imported, outside functions
    assert not {file: names for file, names in found.items() if names}


def test_nothing_heavy_is_loaded_on_the_default_path(stage_one):
    """Script 1 from its first to its last step, by the list of what Python imported."""
    loaded = set(re.findall(r"^import time:.*\|\s+([\w.]+)$", stage_one[1].err, re.MULTILINE))
    assert {"torch", "dataset.world", "model.vlm", "matplotlib"} <= loaded  # the list is one
    assert not within(loaded, *HEAVY)


def test_the_top_level_holds_only_what_belongs_there():
    """Of the files that git tracks: what lies beside the scripts of somebody's own is no business of a test."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("no clone of the repository")
    seen = {path.split("/")[0] for path in listed.stdout.split("\0") if path}
    assert {name for name in seen - {"README_zh.md"} if not name.startswith(".")} == {
        "README.md", "LICENSE", "requirements.txt", "model", "dataset", "tests", "web_demo.py", "1-pretrain_vlm.py",
        "2-sft_vlm.py", "3-rl_vlm.py", "4-eval_chat.py"}  # fmt: skip


def test_every_file_opens_with_what_it_is():
    assert not [short(file) for file in PRODUCT if not ast.get_docstring(TREES[file])]


# ---------------------------------------------------------------- how it reads

READING_ORDER = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Read it in one evening")[2]
PARTS = re.findall(r"([\d,]+) lines\.\n\n\| file.*\n.*\n((?:\|.*\n)+)", READING_ORDER)  # (lines stated, rows of a table)
PATH = [re.findall(r"\]\((.*?)\)", rows) for _, rows in PARTS]


def line_count(path: str) -> int:
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def test_the_reading_order_has_two_parts_whose_lines_are_counted():
    assert [int(stated.replace(",", "")) for stated, _ in PARTS] == [sum(map(line_count, files)) for files in PATH]
    assert {"1-pretrain_vlm.py", "2-sft_vlm.py"} <= set(PATH[0]) and PATH[1][-1] == "3-rl_vlm.py"


@pytest.mark.parametrize("path", [file for files in PATH for file in files if not file[0].isdigit()])
def test_a_file_of_the_reading_order_is_read_at_one_go(path):
    assert line_count(path) <= 200


def code_lines(file: Path) -> int:
    """Lines that hold code, without those of docstrings, comments and blanks."""
    text, strings = file.read_text(encoding="utf-8"), set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            strings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    return len({line for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in layout
                for line in range(token.start[0], token.end[0] + 1)} - strings)  # fmt: skip


def test_the_evening_is_short():
    assert sum(code_lines(ROOT / path) for path in PATH[0]) <= 1100 and len(PATH[0]) == 14


def loop(file: Path, function: str) -> str:
    """The training loop of a function, `for step in ...`, as lower-case code without comments."""
    text = file.read_text(encoding="utf-8")
    (code,) = [node for node in TREES[file].body if isinstance(node, ast.FunctionDef) and node.name == function]
    (steps,) = [node for node in ast.walk(code) if isinstance(node, ast.For) and ast.unparse(node.target) == "step"]
    source = ast.get_source_segment(text, steps)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source + "\n").readline) if token.type != tokenize.COMMENT]
    return tokenize.untokenize(tokens).lower()


def first(word: str, code: str) -> int:
    """Where a word first begins a name, or a part of one behind an underscore."""
    return re.search(rf"(?<![a-z]){word}", code).start()


@pytest.mark.parametrize(("function", "words"), [
    ("grpo", ["reward", "advantage", "ratio", "loss"]), ("dpo", ["chosen", "rejected", "reference", "loss"]),
])  # fmt: skip
def test_a_loop_of_stage_three_shows_its_algorithm_in_the_order_of_the_paper(function, words):
    code = loop(ROOT / "3-rl_vlm.py", function)
    assert "#" not in code and ".backward()" in code
    places = [first(word, code) for word in words]
    assert places == sorted(places)


def test_the_first_place_of_a_word_is_that_of_a_name_or_of_its_part():
    assert first("ratio", "num_iterations = 1; log_ratio") == 24 and first("loss", "losses") == 0


# ---------------------------------------------------------------- flags

CONFIGS = [("1-pretrain_vlm.py", "Config"), ("2-sft_vlm.py", "Config"), ("3-rl_vlm.py", "GRPO"), ("3-rl_vlm.py", "DPO"),
           ("3-rl_vlm.py", "OnlineDPO"), ("4-eval_chat.py", "Config"), ("web_demo.py", "Config")]  # fmt: skip
GROUPS = ("", "run", "optim", "train", "config")  # parts of a config that are passed on; `config` is what a Run keeps of it


def config_class(script: str, name: str) -> type:
    return runpy.run_path(str(ROOT / script))[name]


def definitions() -> dict[str, list[ast.FunctionDef]]:
    """The functions of all modules by name; under the name of a class, its __init__."""
    found = defaultdict(list)
    for tree in TREES.values():
        for node in tree.body:
            for code in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(code, ast.FunctionDef) and (code is node or code.name == "__init__"):
                    found[node.name].append(code)
    return found


FUNCTIONS = definitions()
(RUN,) = [node for node in TREES[ROOT / "model" / "runtime.py"].body if isinstance(node, ast.ClassDef) and node.name == "Run"]


def below(name: str, node: ast.AST) -> str | None:
    """`run.seed` of config.run.seed, "" of config itself; None of anything else."""
    text = ast.unparse(node)
    return "" if text == name else text.removeprefix(f"{name}.") if re.fullmatch(rf"{name}(\.\w+)+", text) else None


def reads(code: ast.AST, name: str, active: tuple = ()) -> set[str]:
    """What a function reads of `name`, itself or in a function that it passes it to: {"algo", "run.seed"} of a config."""
    if (code, name) in active:
        return set()
    found = {path for node in ast.walk(code) if isinstance(node, ast.Attribute) and (path := below(name, node))}
    for call in [node for node in ast.walk(code) if isinstance(node, ast.Call)]:
        called, given = ast.unparse(call.func).rpartition(".")[2], call.args
        if called == "getattr" and below(name, given[0]) == "" and isinstance(given[1], ast.Constant):
            found.add(given[1].value)
        for function in FUNCTIONS[called]:
            takes = [argument.arg for argument in function.args.args if argument.arg != "self"]
            passed = [*zip(takes, given), *((keyword.arg, keyword.value) for keyword in call.keywords)]
            for parameter, value in passed:
                if (path := below(name, value)) in GROUPS:
                    inside = reads(function, parameter, (*active, (code, name)))
                    found |= {f"{path}.{more}".lstrip(".") for more in inside}
    return found


def read_flags(script: str, name: str) -> set[str]:
    """The flags of a config class that the functions of its script read, which say in their signature that they take one.

    A Run keeps config.run: what itself reads of it, and what is read of `run.config` by whoever the script passes the Run to.
    """
    found = set()
    for code in [node for node in TREES[ROOT / script].body if isinstance(node, ast.FunctionDef)]:
        for argument in code.args.args:
            if argument.annotation and re.search(rf"\b{name}\b", ast.unparse(argument.annotation)):
                found |= reads(code, argument.arg)
        found |= {path.replace("config.", "run.") for path in reads(code, "run") if path.startswith("config.")}
    if any(isinstance(node, ast.Call) and ast.unparse(node.func) == "Run" for node in ast.walk(TREES[ROOT / script])):
        found |= {f"run.{path}" for path in reads(RUN, "self.config")}
    program = TREES[ROOT / script]  # of which some flags choose the class
    return found | {call.args[0].value for call in ast.walk(program) if isinstance(call, ast.Call)
                    and ast.unparse(call.func) == "cli.given_value"}  # fmt: skip


def fields(config: type) -> set[str]:
    """Every flag of a config class, those of its groups with the name of the group; `train` is one."""
    found = set()
    for field in dataclasses.fields(config):
        group = [] if field.name == "train" else getattr(getattr(config(), field.name), "__dataclass_fields__", [])
        found |= {f"{field.name}.{name}" for name in group} or {field.name}
    return found


@pytest.mark.parametrize(("script", "name"), CONFIGS)
def test_every_flag_is_read(script, name):
    assert fields(config_class(script, name)) - read_flags(script, name) == set()


def test_a_flag_that_nothing_reads_is_noticed(monkeypatch):
    """Whoever reads it: the loop, the sampler through a protocol, or the run."""
    for reader, text, flag in (("grpo", "config.entropy_floor", "entropy_floor"),
                               ("problems", "flags.reward", "reward"),
                               ("prepare", "run.config.checkpointing", "run.checkpointing")):  # fmt: skip
        assert flag in read_flags("3-rl_vlm.py", "GRPO")
        (node,) = [node for code in FUNCTIONS[reader] for node in ast.walk(code)
                   if isinstance(node, ast.Attribute) and ast.unparse(node) == text]  # fmt: skip
        monkeypatch.setattr(node, "attr", "other")
        assert flag not in read_flags("3-rl_vlm.py", "GRPO")


@pytest.mark.parametrize(("script", "name"), [config for config in CONFIGS if config[0] < "4"])
def test_a_run_knows_all_flags_of_its_script_and_trains_what_they_say_part_by_part(script, name):
    """So that --resume can compare them; `train` has a flag for every part, and all of them are read."""
    calls = [node for node in ast.walk(TREES[ROOT / script]) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.args[2]) for call in calls if ast.unparse(call.func) == "Run"} == {"config"}
    assert {ast.unparse(call.args[2]) for call in calls if ast.unparse(call.func) == "prepare"} == {"config.train"}
    assert {field.name for field in dataclasses.fields(config_class(script, name)().train)} == set(tiny.vlm().parts)
    (modes,) = [node for node in ast.walk(TREES[ROOT / "model" / "flags.py"]) if getattr(node, "name", "") == "modes"]
    assert "dataclasses.asdict(self).items()" in ast.unparse(modes)


HELPED = [*((ROOT / script, name) for script, name in [*CONFIGS, ("3-rl_vlm.py", "RolloutFlags")]),
          *((ROOT / "model" / "flags.py", name) for name in ("RunFlags", "OptimizerFlags", "Train"))]  # fmt: skip


@pytest.mark.parametrize(("file", "name"), HELPED, ids=lambda value: value if isinstance(value, str) else short(value))
def test_every_flag_has_a_default_and_a_help_text_unless_it_is_a_group(file, name):
    """The comment of a field is its help: tyro shows it. What groups leave open, each script fills in (`cli.shared`)."""
    lines = file.read_text(encoding="utf-8").splitlines()
    (config,) = [node for node in TREES[file].body if isinstance(node, ast.ClassDef) and node.name == name]
    flags = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    assert flags
    assert not [node.target.id for node in flags if "#" not in lines[node.lineno - 1]
                and node.target.id not in ("train", "optim", "run")]  # fmt: skip
    if file in SCRIPTS:
        assert all(node.value is not None for node in flags)


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
    if isinstance(node, ast.Constant) and "sbatch" in str(node.value) or isinstance(node, ast.Name) and "sbatch" in node.id:
        return "submits a job"
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
        if call_name(node) in ("eval", "exec", "os.system"):
            return "runs a string"
        if call_name(node).endswith(".cuda"):
            return "a device that is not asked for"
    return None


def violations(tree: ast.AST) -> set[str]:
    return {why for node in ast.walk(tree) if (why := forbidden(node))}


def test_no_file_contains_what_is_forbidden():
    assert not {short(file): found for file in PRODUCT if (found := violations(TREES[file]))}


@pytest.mark.parametrize("source", [
    "try: f()\nexcept: pass", "try: f()\nexcept Exception: x = 0", "import pickle", "from pickle import load", "from os import *",
    "import sys\nsys.path.insert(0, '.')", "serve(host='0.0.0.0')", "device == 'cuda'", "self.device == 'cuda'",
    "m.load_state_dict(x, strict=False)", "warnings.filterwarnings('ignore')", "p.add_argument('--compile', type=bool)",
    "torch.load(f)", "torch.load(f, weights_only=False)", "wandb.init(entity='x')", "model.push_to_hub('x')", "eval('1')",
    "x.cuda()", "subprocess.run(['sbatch', 'job.sh'])",
])  # fmt: skip
def test_each_forbidden_thing_is_recognised(source):
    assert violations(ast.parse(source))


def test_what_is_allowed_passes():
    allowed = "try: f()\nexcept Exception as e: raise ValueError from e\ndevice.type == 'cuda'\nzip(a, b, strict=True)"
    assert not violations(ast.parse(allowed + "\ntorch.load(f, weights_only=True)\n# serve('0.0.0.0')"))


def test_no_gradient_is_kept_alive_by_adding_nothing():
    """`loss + 0 * p.sum()` hides that a part is not used. Text alone uses no connector, and DDP is told so."""
    zeros = [(short(file), ast.unparse(node)) for file in PRODUCT for node in ast.walk(TREES[file])
             if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
             and any(isinstance(side, ast.Constant) and side.value == 0 for side in (node.left, node.right))]  # fmt: skip
    assert not [(file, text) for file, text in zeros if "sum" in text or "mean" in text or "loss" in text]


def test_no_file_names_a_place_on_somebodys_machine():
    place = re.compile(r"[\"' (=](/home/|/root/|/Users/|/tmp/|/work/|/mnt/|[A-Z]:\\\\)")
    assert not {short(file): found for file in PRODUCT if (found := place.findall(file.read_text(encoding="utf-8")))}


def test_the_parts_can_be_listed(capsys):
    runpy.run_path(str(ROOT / "model" / "registry.py"), run_name="__main__")  # python -m model.registry
    listed = capsys.readouterr().out
    for part in ("gpt", "tiny_clip", "clip_random", "open_clip", "linear", "pupil", "chatml", "world", "easy_vqa", "arithmetic",
                 "claims", "grpo", "dpo"):  # fmt: skip
        assert re.search(rf"^\w+(?: \w+)* +{part} +\S", listed, re.MULTILINE), part
