"""The core group of requirements.txt alone runs all four stages; where another library is needed, one line names it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT, TINY

GROUPS = re.split(r"^# (?:core|demo|tests)\b.*$", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
MODULES = {"open_clip_torch": "open_clip", "pytest-xdist": "xdist", "math-verify": "math_verify"}  # where the names differ
MISSING = [MODULES.get(name, name) for group in GROUPS[2:] for name in re.findall(r"^[\w-]+", group, re.MULTILINE)]
PROGRAM = """
import runpy, sys
script, missing, *sys.argv = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing.split(",")))  # as if they were not installed
runpy.run_path(script, run_name="__main__")
"""


def run(script: str, *arguments, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT / script), ",".join(MISSING), script, *map(str, arguments)],
                          cwd=cwd, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True,
                          timeout=300)  # fmt: skip


def test_the_groups_are_told_apart():
    assert len(GROUPS) == 4 and {"gradio", "wandb", "openai", "open_clip", "transformers", "pytest"} <= set(MISSING)
    assert not {"torch", "pillow", "matplotlib"} & set(MISSING)


def test_the_core_alone_trains_and_measures(tmp_path):
    short = ("--max_steps", 2, "--device", "cpu", "--log_every", 1)
    for script, arguments in (
        ("1-pretrain_vlm.py", ("--data", "world:rows=12", "--max_steps", 2, *TINY)),
        ("2-sft_vlm.py", ("--data", "world:rows=12", "text:rows=6", *short, "--bench", "world", "--eval_examples", 1)),
        ("3-rl_vlm.py", (*short, "--prompts", 2, "--group_size", 2, "--max_new_tokens", 3, "--bench", "")),
        ("4-eval_chat.py", ("--bench", "world", "--examples", 1, "--device", "cpu", "--max_new_tokens", 3)),
    ):  # fmt: skip
        done = run(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(("script", "arguments", "library"), [
    ("1-pretrain_vlm.py", (*TINY, "--data", "world:rows=12", "--max_steps", 1, "--wandb", "eyes"), "wandb"),
    ("1-pretrain_vlm.py", ("--encoder", "open_clip:ViT-B-32", "--device", "cpu", "--max_steps", 1), "open_clip_torch"),
    ("web_demo.py", ("--device", "cpu", "--model", "CHECKPOINT"), "gradio"),
])  # fmt: skip
def test_what_is_missing_is_named_in_one_line(script, arguments, library, stage_one, tmp_path):
    checkpoint = stage_one[0] / "out" / "pretrain"
    done = run(script, *(checkpoint if one == "CHECKPOINT" else one for one in arguments), cwd=tmp_path)
    assert done.returncode == 1 and f"pip install {library}\n" in done.stderr, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
