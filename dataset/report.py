"""out/report.md: one page that grows with every stage: metrics, curves, and pictures with the model's answers.

In:  a stage's title and metrics.  Out: its section of the page. When a stage runs again, its section is replaced.
"""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.evaluation import Answer
from dataset.protocols import Run
from dataset.tasks import Example, Task


def section(file: Path, title: str, body: str) -> None:
    """Write a section: instead of the one with the same title, or at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page = file.read_text(encoding="utf-8") if file.is_file() else "# Report\n"
    new = f"## {title}\n\n{body.strip()}\n\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    page = old.sub(lambda match: new, page) if old.search(page) else f"{page.rstrip()}\n\n{new}"
    file.write_text(page, encoding="utf-8")


NOT_SHARES = re.compile(r"(^|/)(length(_\w+)?|seconds|mmhal/score(_\w+)?)$")  # lengths, seconds, ratings from 0 to 6


def is_share(metric: str) -> bool:
    """Whether a metric, "task/name", is a share of 1, not a length, a time or a rating."""
    return NOT_SHARES.search(metric) is None


def table(metrics: dict[str, float]) -> str:
    """Metrics as a table: shares in percent; counts, lengths, ratings and seconds unchanged."""
    rows = []
    for name, value in metrics.items():
        share = isinstance(value, float) and 0 <= value <= 1 and is_share(name)
        rows.append(f"| {name} | {100 * value:.1f} % |" if share else f"| {name} | {value:g} |")
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def with_before(scores: dict[str, float], history: Sequence[dict]) -> dict[str, float]:
    """Scores, each after its value at step 0, where the log has one."""
    start = next((row for row in history if row["step"] == 0 and scores.keys() & row.keys()), {})
    return {f"{name}{when}": row[name] for name in scores for when, row in ((" before", start), ("", scores)) if name in row}


def thumbnails(folder: Path, page: Path, index: int, example: Example) -> str:
    """The pictures of a question, twice their size, saved in FOLDER/pictures, as Markdown for the page."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    images = []
    for k, picture in enumerate(example.prompt.pictures):
        image = picture.load()
        file = folder / "pictures" / f"{index:02d}-{k}.png"
        image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(file)
        images.append(f"![]({file.relative_to(page.parent).as_posix()})")
    return " ".join(images)


def cell(text: str) -> str:
    """A text as a cell of a table, with its special characters escaped."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def sheet(folder: Path, page: Path, examples: Sequence[Example], answers: Sequence[str]) -> str:
    """A table of held-out questions: picture, question, truth, the model's answer. The pictures go to FOLDER/pictures."""
    lines = ["| picture | question | truth | answer | |", "| --- | --- | --- | --- | --- |"]
    for index, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        cells = [thumbnails(folder, page, index, example),
                 *map(cell, (example.prompt.messages[-1].text, example.answer, answer)),
                 "✓" if answer.strip() == example.answer.strip() else "✗"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def before_and_after(folder: Path, page: Path, questions: Sequence[tuple[Task, Example]], before: Sequence[str],
                     after: Sequence[str]) -> str:
    """The same table with the answers before and after training, each marked as right or wrong."""
    lines = ["| picture | question | truth | before | after |", "| --- | --- | --- | --- | --- |"]
    for index, ((task, example), *answers) in enumerate(zip(questions, before, after, strict=True)):
        marked = [f"{'✓' if task.score(example, text) == 1 else '✗'} {cell(text)}" for text in answers]
        cells = [thumbnails(folder, page, index, example), cell(example.prompt.messages[-1].text), cell(example.answer)]
        lines.append(f"| {' | '.join([*cells, *marked])} |")
    return "\n".join(lines)


def poster(file: Path, page: Path, examples: Sequence[Example], answers: Sequence[str], columns: int = 4, side: int = 192) -> str:
    """One PNG of pictures, each with its question and answer below, in green where it is right. English, one picture each.

    Returns the Markdown that shows it on the page: "" where no question fits.
    """
    pictured = [(example, answer) for example, answer in zip(examples, answers, strict=True)
                if len(example.prompt.pictures) == 1 and example.prompt.messages[-1].text.isascii()]
    if not pictured:
        return ""
    rows = -(-len(pictured) // columns)
    font, height = ImageFont.load_default(13), side + 52
    canvas = Image.new("RGB", (columns * (side + 16), rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (example, answer) in enumerate(pictured):
        x, y = k % columns * (side + 16) + 8, k // columns * height + 8
        canvas.paste(example.prompt.pictures[0].load().resize((side, side), Image.Resampling.NEAREST), (x, y))
        for line, (text, ink) in enumerate(((example.prompt.messages[-1].text, "black"),
                                            (answer, "green" if answer == example.answer else "red"))):
            pen.text((x, y + side + 3 + 18 * line), text if len(text) < 34 else text[:33] + "…", font=font, fill=ink)
    canvas.save(file)
    return f"![]({file.relative_to(page.parent).as_posix()})\n\n"


# ---------------------------------------------------------------- the section of a run


def finish_stage(run: Run, title: str, scores: dict[str, float], examples: Sequence[Example], answer: Answer) -> None:
    """Write the scores to scores.json, and the report section of stages 1 and 2: scores, curves, held-out answers."""
    if run.is_main:
        add_scores(run.out, scores)
        answers, page = answer([example.prompt for example in examples]), run.out.parent / "report.md"
        section(page, title, f"{table({**scores, 'seconds': round(run.seconds)})}\n\n"
                f"![]({run.out.name}/curves.png)\n\n{sheet(run.out, page, examples, answers)}")
    run.barrier()


class HeldOutAnswers:
    """Answers of stage 3 to some validation questions, before training and by the best checkpoint so far, for the report.

    They are stored in OUT/before.json and OUT/after.json, so that a resumed run still has them.
    """

    def __init__(self, run: Run, tasks: dict[str, Task], answer: Answer, first_step: int):
        self.run, self.answer = run, answer
        self.questions = [(task, example) for task in tasks.values() for example in task.examples("val", 8)[:14]]
        if run.is_main and first_step == 0:
            self.save("before")
            (run.out / "after.json").unlink(missing_ok=True)

    def save(self, name: str) -> None:
        """Store the answers of the current model as `before` or `after`."""
        answers = self.answer([example.prompt for _, example in self.questions])
        (self.run.out / f"{name}.json").write_text(json.dumps(answers))

    def read(self, name: str) -> list[str]:
        """The stored answers; where no best checkpoint was saved, those of the current model."""
        if not (self.run.out / f"{name}.json").is_file():
            self.save(name)
        return json.loads((self.run.out / f"{name}.json").read_text())

    def write_section(self, title: str, scores: dict[str, float], *, compare: bool) -> None:
        """The run's section of the report; `compare` shows scores and answers before and after."""
        folder, page = self.run.out, self.run.out.parent / "report.md"
        if compare:
            scores = with_before(scores, self.run.history)
            body = before_and_after(folder, page, self.questions, self.read("before"), self.read("after"))
        else:
            body = sheet(folder, page, [example for _, example in self.questions], self.read("after"))
        metrics = table({**scores, "seconds": round(self.run.seconds)})
        section(page, f"{title}: {folder.name}", f"{metrics}\n\n![]({folder.name}/curves.png)\n\n{body}")


def add_scores(folder: Path, scores: dict[str, float]) -> None:
    """Add scores to FOLDER/scores.json, beside those of other benchmarks."""
    file = folder / "scores.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **scores}, indent=1, sort_keys=True) + "\n")
