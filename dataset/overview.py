"""The beginning of out/report.md: all stages in one table, how each was made, and the contents; long tables fold.

In:  the page, and the folders of the stages beside it: scores.json, log.jsonl, run.json.  Out: the page with its beginning anew.
"""
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

COMMANDS = {  # stage, by the folder that it writes to: the command that makes it
    "pretrain": "python 1-pretrain_vlm.py", "sft": "python 2-sft_vlm.py", "dpo": "python 3-rl_vlm.py --algo dpo",
    "grpo": "python 3-rl_vlm.py",
}  # fmt: skip
HEADINGS = {"pretrain": "pretrain", "sft": "SFT", "dpo": "DPO", "grpo": "RL"}
NUMBERS = {  # a metric: what it is
    "world/caption": "captions that name all and nothing else", "world/exact": "questions about scenes, right",
    "world_words/exact": "the same in words that no stage trained", "easy_vqa/accuracy": "easy-VQA, right",
    "hallucination/false": "descriptions with something false (lower is better)", "arithmetic/accuracy": "sums, right",
}  # fmt: skip
LONG = 12  # rows of a table that stays open


def folded(body: str) -> str:
    """Markdown with every table of more than LONG rows inside <details>."""

    def fold(match: re.Match) -> str:
        rows = match[0].count("\n") - 2  # without heading and rule
        return match[0] if rows <= LONG else f"<details><summary>{rows} rows</summary>\n\n{match[0]}\n</details>\n"

    return re.sub(r"(?:^\|.*\n)+", fold, f"{body}\n", flags=re.MULTILINE).strip()


def anchor(title: str) -> str:
    """The address of a heading on its page, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def share(scores: dict[str, float], metric: str) -> str:
    """"91.4 % (n 3,474)", or "" where the metric was not measured; no n for one kind, since "task/n" counts all kinds."""
    if metric not in scores:
        return ""
    task, _, kind = metric.partition("/")
    count = None if kind == "caption" else scores.get(f"{task}/n")
    return f"{100 * scores[metric]:.1f} %" + (f" (n {count:,.0f})" if count else "")


def duration(folder: Path) -> str:
    """How long the run took, "14 min 42 s"; "" where it is not known."""
    log = folder / "log.jsonl"
    last = log.read_text(encoding="utf-8").splitlines()[-1:] if log.is_file() else []
    seconds = read_json(folder / "run.json").get("seconds") or (json.loads(last[0]).get("seconds") if last else None)
    return "" if seconds is None else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def origin(folder: Path, name: str) -> str:
    """When, by which command, from which commit and on which machine a run was made, as far as its run.json says it."""
    record, made = read_json(folder / "run.json"), datetime.fromtimestamp((folder / "config.json").stat().st_mtime)
    facts = [f"{made:%Y-%m-%d %H:%M}", f"`{record['command']}`" if record.get("command") else "",
             f"commit {record['commit'][:12]}" if record.get("commit") else "",
             ", ".join(str(record[key]) for key in ("device", "platform") if record.get(key))]
    return f"- {HEADINGS[name]}: {'; '.join(filter(None, facts))}"


def stages(out: Path) -> Iterator[str]:
    """The lines of the table over the stages that have a checkpoint, and of where they come from; nothing without stages."""
    names = [name for name in COMMANDS if (out / name / "config.json").is_file()]
    if not names:
        return
    scores = {name: read_json(out / name / "scores.json") for name in names}
    yield f"| | {' | '.join(HEADINGS[name] for name in names)} |\n| --- |{' --- |' * len(names)}"
    for metric, meaning in NUMBERS.items():
        if any(metric in scores[name] for name in names):
            yield f"| {meaning} | {' | '.join(share(scores[name], metric) for name in names)} |"
    yield f"| time | {' | '.join(duration(out / name) for name in names)} |\n"
    yield from (origin(out / name, name) for name in names)
    yield ""


def with_overview(page: str, out: Path) -> str:
    """The page with everything above its first section written anew."""
    sections = page[page.index("\n## ") + 1:]
    titles = re.findall(r"^## (.*)$", sections, re.MULTILINE)
    contents = "\n".join(f"- [{title}](#{anchor(title)})" for title in titles)
    return "\n".join(["# Report\n", *stages(out), f"Contents:\n\n{contents}\n", sections])
