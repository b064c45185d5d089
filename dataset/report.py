"""out/report.md: one page that grows with every stage, with numbers, curves, and pictures with what the model says of them.

In:  a stage's title and numbers.  Out: its section of the page; running a stage again replaces its section.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dataset.chat import Document
from dataset.tasks import Example


def section(file: Path, title: str, body: str) -> None:
    """Write a section, in the place of an older one of the same title or at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page = file.read_text(encoding="utf-8") if file.is_file() else "# Report\n"
    new = f"## {title}\n\n{body.strip()}\n\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
    page = old.sub(lambda match: new, page) if old.search(page) else f"{page.rstrip()}\n\n{new}"
    file.write_text(page, encoding="utf-8")


NO_SHARES = re.compile(r"length(_\w+)?|seconds|mmhal/score(_\w+)?")  # lengths, seconds, ratings from 0 to 6


def no_share(metric: str) -> bool:
    """Whether a metric, "task/name", is a length, a time or a rating."""
    return re.search(rf"(^|/)({NO_SHARES.pattern})$", metric) is not None


def table(numbers: dict[str, float]) -> str:
    """Metrics as a table; shares in percent, counts, lengths, ratings and seconds as they are."""
    rows = []
    for name, value in numbers.items():
        share = isinstance(value, float) and 0 <= value <= 1 and not no_share(name)
        rows.append(f"| {name} | {100 * value:.1f} % |" if share else f"| {name} | {value:g} |")
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def with_before(scores: dict[str, float], history: Sequence[dict]) -> dict[str, float]:
    """Scores, each after what it was at step 0, where the log has that."""
    start = next((row for row in history if row["step"] == 0 and scores.keys() & row.keys()), {})
    return {f"{name}{when}": row[name] for name in scores for when, row in ((" before", start), ("", scores)) if name in row}


def thumbnails(folder: Path, page: Path, number: int, example: Example, scale: int) -> str:
    """The pictures of a question, written to FOLDER/pictures, as the page shows them."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    shown = []
    for k, picture in enumerate(example.prompt.pictures):
        image = picture.load()
        file = folder / "pictures" / f"{number:02d}-{k}.png"
        image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file)
        shown.append(f"![]({file.relative_to(page.parent).as_posix()})")
    return " ".join(shown)


def cell(text: str) -> str:
    """A text as a cell of a table, whatever signs it holds."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def sheet(folder: Path, page: Path, examples: Sequence[Example], answers: Sequence[str], scale: int = 2) -> str:
    """Held-out pictures beside the question, the truth and the model's answer; the pictures go to FOLDER/pictures."""
    lines = ["| picture | question | truth | answer | |", "| --- | --- | --- | --- | --- |"]
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        cells = [thumbnails(folder, page, number, example, scale),
                 *map(cell, (example.prompt.messages[-1].text, example.answer, answer)),
                 "✓" if answer.strip() == example.answer.strip() else "✗"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def before_and_after(folder: Path, page: Path, shown: Sequence[tuple], before: Sequence[str], after: Sequence[str],
                     scale: int = 2) -> str:
    """The same of questions (task, example) with what was said before training and after it, and which of these were right."""
    lines = ["| picture | question | truth | before | after |", "| --- | --- | --- | --- | --- |"]
    for number, ((task, example), *said) in enumerate(zip(shown, before, after, strict=True)):
        said = [f"{'✓' if task.score(example, text) == 1 else '✗'} {cell(text)}" for text in said]
        cells = [thumbnails(folder, page, number, example, scale), cell(example.prompt.messages[-1].text), cell(example.answer)]
        lines.append(f"| {' | '.join([*cells, *said])} |")
    return "\n".join(lines)


def poster(file: Path, page: Path, examples: Sequence[Example], answers: Sequence[str], columns: int = 4, side: int = 192) -> str:
    """One PNG of pictures with the question and the answer below, green where it is right; English, one picture each.

    Returns what shows it on the page: nothing where no question is of that kind.
    """
    chosen = [(example, answer) for example, answer in zip(examples, answers, strict=True)
              if len(example.prompt.pictures) == 1 and example.prompt.messages[-1].text.isascii()]
    if not chosen:
        return ""
    rows = -(-len(chosen) // columns)
    font, height = ImageFont.load_default(13), side + 52
    canvas = Image.new("RGB", (columns * (side + 16), rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, (example, answer) in enumerate(chosen):
        x, y = k % columns * (side + 16) + 8, k // columns * height + 8
        canvas.paste(example.prompt.pictures[0].load().resize((side, side), Image.Resampling.NEAREST), (x, y))
        for line, (text, ink) in enumerate(((example.prompt.messages[-1].text, "black"),
                                            (answer, "green" if answer == example.answer else "red"))):
            pen.text((x, y + side + 3 + 18 * line), text if len(text) < 34 else text[:33] + "…", font=font, fill=ink)
    canvas.save(file)
    return f"![]({file.relative_to(page.parent).as_posix()})\n\n"


def marked(document: Document, tokenizer) -> str:
    """A document as text, what is learned in 【brackets】, each picture as one [image]: for `--check_data`."""
    text, was_learned, run = "", False, []
    for number, learned in [*zip(document.input_ids, document.learn), (None, False)]:
        if number is None or learned != was_learned:
            text += (f"【{tokenizer.decode_all(run)}】" if was_learned else tokenizer.decode_all(run)) if run else ""
            run, was_learned = [], learned
        run.append(number)
    return re.sub(r"(<image>)+", "[image]", text)
