"""out/report.md: one page that grows with every stage: metrics, curves, and pictures with the model's answers.

In:  a stage's title and metrics.  Out: its section of the page. When a stage runs again, its section is replaced.
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from dataset.evaluation import Answer
from dataset.overview import folded, with_overview
from dataset.protocols import Run
from dataset.tasks import Example, Task
from dataset.writing import naming, write_text


def section(file: Path, title: str, body: str) -> None:
    """Write a section: instead of the one with the same title, or at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page = file.read_text(encoding="utf-8") if file.is_file() else "# Report\n"
    new = f"## {title}\n\n{folded(body.strip())}\n\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    page = old.sub(lambda match: new, page) if old.search(page) else f"{page.rstrip()}\n\n{new}"
    write_text(file, with_overview(page, file.parent))


def subsections(file: Path, title: str) -> dict[str, str]:
    """The parts "### NAME" of a section by their names; {} where there is no such section."""
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    parts = re.split(r"^### (.*)\n", found[1] if found else "", flags=re.MULTILINE)
    return dict(zip(parts[1::2], (body.strip() for body in parts[2::2])))


NOT_SHARES = re.compile(r"(^|/)(length(_\w+)?|seconds|loss|reward|margin|mmhal/score(_\w+)?"  # ratings from 0 to 6
                        r"|mme/(perception|cognition|score_\w+)|gqa/distribution)( before)?$")  # points up to 2000, chi-square


def is_share(metric: str) -> bool:
    """Whether a metric, "task/name", is a share of 1, not a length, a time, a rating, points, a loss or a reward."""
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


def link(file: Path, page: Path) -> str:
    """The address of a file in a page of Markdown, where blanks would end it."""
    return quote(file.relative_to(page.parent).as_posix())


THUMBNAIL = 192  # pixels of the longer side


def thumbnails(folder: Path, page: Path, index: int, example: Example) -> str:
    """The pictures of a question, twice their size and at most THUMBNAIL, in FOLDER/pictures, as Markdown for the page."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    images = []
    for k, picture in enumerate(example.prompt.pictures):
        image = picture.load()
        file = folder / "pictures" / f"{index:02d}-{k}.png"
        scale = min(2, THUMBNAIL / max(image.size))
        resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        with naming(file):
            image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)), resample).save(file)
        images.append(f"![]({link(file, page)})")
    return " ".join(images)


def cell(text: str) -> str:
    """A text as a cell of a table, with its special characters escaped."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


Question = tuple[Task, Example]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def mark(question: Question, answer: str) -> str:
    """What the task says of an answer: ✓ where it is right, else ✗."""
    task, example = question
    return task.mark(example, answer)


def sheet(folder: Path, page: Path, questions: Sequence[Question], answers: dict[str, Sequence[str]]) -> str:
    """A table of held-out questions: picture, question, truth, and a column of marked answers for each heading of `answers`.

    The pictures go to FOLDER/pictures.
    """
    lines = [f"| picture | question | truth | {' | '.join(answers)} |", f"| --- | --- | --- |{' --- |' * len(answers)}"]
    for index, (question, *texts) in enumerate(zip(questions, *answers.values(), strict=True)):
        _, example = question
        asked = (thumbnails(folder, page, index, example), cell(example.prompt.messages[-1].text), cell(example.answer))
        lines.append(f"| {' | '.join([*asked, *(f'{mark(question, text)} {cell(text)}' for text in texts)])} |")
    return "\n".join(lines)


CHINESE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "PingFang.ttc",
                 "STHeiti Medium.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "simhei.ttf", "DroidSansFallbackFull.ttf")


@functools.cache
def fonts(size: int) -> tuple[Font, Font | None]:
    """(Pillow's own font, the first Chinese font that the system has or None)."""
    for name in CHINESE_FONTS:
        with contextlib.suppress(OSError):  # not installed
            return ImageFont.load_default(size), ImageFont.truetype(name, size)
    return ImageFont.load_default(size), None


def wrapped(text: str, font: Font, width: int, lines: int) -> list[str]:
    """A text as at most so many lines of a width in pixels; an ellipsis where it goes on."""
    rows = [""]
    for word in re.findall(r"\s*[!-~]+|\s*.", text):  # a word, or one character of Chinese
        if rows[-1] and font.getlength(rows[-1] + word) > width:
            rows.append("")
        rows[-1] = (rows[-1] + word).lstrip()
    return rows if len(rows) <= lines else [*rows[:lines - 1], f"{rows[lines - 1]}…"]


def poster(file: Path, page: Path, questions: Sequence[Question], answers: Sequence[str], columns: int = 4) -> str:
    """One PNG of pictures, each with its question and answer below, in green where it is right. One picture each.

    Returns the Markdown that shows it on the page: "" where no question fits. Chinese needs a Chinese font on the system.
    """
    side, line = 192, 18
    latin, chinese = fonts(13)
    pictured = [(question, answer) for question, answer in zip(questions, answers, strict=True)
                if len(question[1].prompt.pictures) == 1
                and (chinese or (question[1].prompt.messages[-1].text + answer).isascii())]
    if not pictured:
        return ""
    height = side + 10 + 5 * line
    canvas = Image.new("RGB", (columns * (side + 16), -(-len(pictured) // columns) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (question, answer) in enumerate(pictured):
        x, y = k % columns * (side + 16) + 8, k // columns * height + 8
        prompt = question[1].prompt
        canvas.paste(prompt.pictures[0].load().resize((side, side), Image.Resampling.NEAREST), (x, y))
        y += side + 3
        for text, ink, lines in ((prompt.messages[-1].text, "black", 2), (answer, INK.get(mark(question, answer), "black"), 3)):
            font = latin if text.isascii() or not chinese else chinese
            for row in wrapped(text, font, side, lines):
                pen.text((x, y), row, font=font, fill=ink)
                y += line
    with naming(file):
        canvas.save(file)
    return f"![]({link(file, page)})\n\n"


INK = {"✓": "green", "✗": "red"}


# ---------------------------------------------------------------- the section of a run


def finish_stage(run: Run, title: str, scores: dict[str, float], questions: Sequence[Question], answer: Answer) -> None:
    """Write the scores to scores.json, and the report section of stages 1 and 2: scores, curves, held-out answers."""
    run.gather()
    if run.is_main:
        add_scores(run.out, scores)
        answers, page = answer([example.prompt for _, example in questions]), run.out.parent / "report.md"
        section(page, title, f"{table({**with_before(scores, run.history), 'seconds': round(run.seconds)})}\n\n"
                f"![]({run.out.name}/curves.png)\n\n{sheet(run.out, page, questions, {'answer': answers})}")
    run.barrier()


class HeldOutAnswers:
    """Answers of stage 3 to some validation questions, before training and by the best checkpoint so far, for the report.

    They are stored in OUT/before.json and OUT/after.json, so that a resumed run still has them.
    own   held-out rows of files, to be asked beside those of the tasks
    """

    def __init__(self, run: Run, tasks: dict[str, Task], answer: Answer, first_step: int, own: Sequence[Question] = ()):
        self.run, self.answer = run, answer
        self.questions = [*((task, example) for task in tasks.values() for example in task.examples("val", 8)[:14]), *own]
        if run.is_main and first_step == 0 and not run.preview_only:
            self.save("before")
            (run.out / "after.json").unlink(missing_ok=True)

    def save(self, name: str) -> None:
        """Store the answers of the current model as `before` or `after`."""
        answers = self.answer([example.prompt for _, example in self.questions])
        write_text(self.run.out / f"{name}.json", json.dumps(answers))

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
        answers = {"before": self.read("before")} if compare else {}
        body = sheet(folder, page, self.questions, {**answers, "after": self.read("after")})
        metrics = table({**scores, "seconds": round(self.run.seconds)})
        section(page, f"{title}: {folder.name}", f"{metrics}\n\n![]({folder.name}/curves.png)\n\n{body}")


def bench_page(folder: Path, name: str, task: Task, answered: Sequence[tuple[Example, str]]) -> None:
    """The part of a benchmark in the report: all test scores of the checkpoint, and some answers."""
    page, title = folder.parent / "report.md", f"Test scores of {folder.name}"
    questions, answers = [(task, example) for example, _ in answered], [answer for _, answer in answered]
    image = poster(folder / f"{name}.png", page, questions, answers)
    parts = {**subsections(page, title), name: f"{image}{sheet(folder / name, page, questions, {'answer': answers})}"}
    section(page, title, "\n\n".join([table(bench_scores(folder)), *(f"### {part}\n\n{parts[part]}" for part in parts)]))


def write_rows(file: Path, rows: Sequence[dict]) -> None:
    """Write the rows of a benchmark, as `scores_and_rows` returns them: an object a line."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def known_scores(folder: Path) -> dict[str, float]:
    """What FOLDER/scores.json holds."""
    file = folder / "scores.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def add_scores(folder: Path, scores: dict[str, float], replaced: str = "") -> None:
    """Add scores to FOLDER/scores.json, beside those of other benchmarks and in the place of all of the task `replaced`."""
    known = {name: value for name, value in known_scores(folder).items() if name.rpartition("/")[0] != replaced or not replaced}
    write_text(folder / "scores.json", json.dumps({**known, **scores}, indent=1, sort_keys=True) + "\n")


def bench_scores(folder: Path) -> dict[str, float]:
    """The scores in FOLDER/scores.json that 4-eval_chat.py measured on test splits: those of tasks with seconds."""
    known = known_scores(folder)
    return {name: value for name, value in known.items() if f"{name.rpartition('/')[0]}/seconds" in known}
