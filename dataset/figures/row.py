"""One training row: its tokens with the loss mask, and its way through the model with shapes and files.

In:  the first short row of the run's data that has a picture.  Out: two figures of this row.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dataset.bad_rows import BadRow
from dataset.chat import Conversation, Document, Prefill
from dataset.figures.stage import BAD, IMAGE, INK, LEARNED, READ, CannotDraw, Stage, Trained, blank, canvas, chinese_font
from dataset.mixture import mixture

LONGEST, ROWS = 64, 60  # tokens of a row that is shown; rows among which it is searched
WIDE = 9.0  # inches of a figure


@functools.lru_cache(maxsize=1)  # for both figures
def example(stage: Stage) -> tuple[Conversation, Document]:
    """A short row of the run's data with one picture, if possible in English and of several turns; CannotDraw without one."""
    trained, data = stage.trained(), stage.flags.get("data") or ["world"]
    source = mixture(data, stage.name, stage.flags.get("image_folder"), bool(stage.flags.get("allow_urls")))
    best: tuple[Conversation, Document] | None = None
    for index in range(min(ROWS, len(source))):
        try:
            row = source[index]
            document = trained.processor.document(row, 10_000)
        except BadRow:
            continue  # the run itself has listed it
        text = "".join(message.text for message in row.messages)
        prefilled = any(isinstance(part, Prefill) for message in row.messages for part in message.parts)
        if len(row.pictures) != 1 or len(document) > LONGEST or prefilled or not (text.isascii() or chinese_font()):
            continue
        if len(row.messages) > 2 and text.isascii():
            return row, document
        best = best or (row, document)
    if not best:
        raise CannotDraw(f"none of the first {ROWS} rows has one picture and at most {LONGEST} tokens")
    return best


def title(axis: Any, text: str) -> None:
    """The heading of a figure."""
    axis.text(0.1, 0.27, text, fontsize=12, fontweight="bold", va="center")


def pieces(trained: Trained, document: Document) -> Iterator[tuple[str, str]]:
    """(text, colour) of each token; the text of a piece that is not a letter by itself is a dot."""
    tokenizer = trained.processor.tokenizer
    for token, learned in zip(document.input_ids, document.learn):
        text = "image" if token == tokenizer.image else tokenizer.decode_all([token]).strip() or "␣"
        yield text.replace("\ufffd", "·"), IMAGE if token == tokenizer.image else LEARNED if learned else ""


def box(axis: Any, x: float, y: float, width: float, height: float, colour: str) -> None:
    """A rounded box with its top left corner at (x, y); without a colour only its edge."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.05", linewidth=1,
                                  facecolor=colour or "none", edgecolor=colour or READ))


def tokens(stage: Stage) -> Figure:
    """The strip of tokens: what is learned, what is only read, and the places that the picture's tokens take."""
    trained = stage.trained()
    row, document = example(stage)
    parts = list(pieces(trained, document))
    places, x, y = [], 1.55, 0.55
    for text, colour in parts:
        width = 0.13 + 0.088 * sum(1 if letter.isascii() else 1.75 for letter in text)
        if x + width > WIDE - 0.1:
            x, y = 1.55, y + 0.42
        places.append((x, y, width, text, colour))
        x += width + 0.05
    height = max(y + 0.42, 1.9) + 0.42
    figure = blank(WIDE, height)
    axis = canvas(figure)
    title(axis, f"One training row of {stage.name}: {len(document)} tokens, of which {sum(document.learn)} are learned")
    axis.imshow(row.pictures[0].load(), extent=(0.1, 1.4, 1.85, 0.55), interpolation="nearest", zorder=2)
    axis.set(xlim=(0, WIDE), ylim=(height, 0), aspect="auto")
    for x, y, width, text, colour in places:
        box(axis, x, y, width, 0.33, colour)
        axis.text(x + width / 2, y + 0.165, text, ha="center", va="center", fontsize=9, color="black" if colour else INK)
    x = 1.55
    for colour, meaning in ((LEARNED, "learned: the loss is here"), ("", "only read: label -100"),
                            (IMAGE, "placeholder for a token of the picture")):
        box(axis, x, height - 0.33, 0.22, 0.2, colour)
        axis.text(x + 0.3, height - 0.23, meaning, va="center", fontsize=9)
        x += 0.6 + 0.072 * len(meaning)
    return figure


def way(stage: Stage) -> Figure:
    """From the picture to the loss: the shapes that each part takes and gives, and the file that it is written in."""
    trained = stage.trained()
    row, document = example(stage)
    batch = trained.processor.batch([document])
    steps = trained.inspector.steps(batch)
    logps, learned = trained.inspector.answer_logps(batch)
    loss = -float(logps[0]) / int(learned[0])
    (_, _, side, _), (_, patches, dim) = steps["encoder"].took, steps["encoder"].gave
    (_, count, channels), (length, _) = steps["connector"].gave, steps["llm"].took
    boxes = [
        ("picture", f"(3, S, S) = 3 x {side} x {side}", "dataset/images.py", READ),
        ("encoder", f"(P, D) = {patches} x {dim}", steps["encoder"].file, IMAGE),
        ("connector", f"(tokens, C) = {count} x {channels}", steps["connector"].file, IMAGE),
        ("splice", f"(T, C) = {length} x {channels}", "model/vlm.py", LEARNED),
        ("LLM: logits", f"(L, V) = {steps['llm'].gave[0]} x {steps['llm'].gave[1]:,}", steps["llm"].file, LEARNED),
        ("loss", f"{loss:.2f} nats a token", "model/losses.py", BAD),
    ]
    figure = blank(WIDE, 3.45)
    axis = canvas(figure)
    title(axis, "The way of this row: from pixels to its loss")
    step = WIDE / len(boxes)
    for k, (name, shape, file, colour) in enumerate(boxes):
        middle = step * (k + 0.5)
        box(axis, middle - 0.63, 1.95, 1.26, 0.62, colour)
        axis.text(middle, 2.13, name, ha="center", va="center", fontsize=9.5, fontweight="bold", color="black")
        axis.text(middle, 2.4, shape, ha="center", va="center", fontsize=7.5, color="black")
        folder, _, name = file.rpartition("/")
        axis.text(middle, 2.68, f"{folder}/\n{name}", ha="center", va="top", fontsize=7.5)
        if k:
            axis.annotate("", (middle - 0.65, 2.26), (middle - step + 0.65, 2.26), arrowprops=dict(arrowstyle="->", color=INK))
    illustrate(axis, step, row, document, trained)
    cls = " and CLS" if trained.inspector.model.encoder.has_cls else ""
    axis.text(0.1, 3.25, f"S pixels a side, P patches{cls}, D channels of the encoder, C of the language model, T tokens, "
                         "L learned ones, V vocabulary", fontsize=8, va="center")
    axis.set(xlim=(0, WIDE), ylim=(3.45, 0), aspect="auto")
    return figure


def illustrate(axis: Any, step: float, row: Conversation, document: Document, trained: Trained) -> None:
    """What each box of `way` holds, above it: the picture, its patches, its squares, and the row with both kinds of tokens."""
    image, encoder = row.pictures[0].load(), trained.inspector.model.encoder
    squares = trained.processor.image_tokens - (trained.processor.image_tokens == encoder.tokens and encoder.has_cls)
    for k, count in enumerate((1, encoder.tokens - encoder.has_cls, squares)):
        left, edge = step * (k + 0.5) - 0.6, round(count**0.5)
        if edge**2 != count:
            continue
        gap = 0.012 * (edge > 1)
        axis.imshow(image, extent=(left, left + 1.2, 1.8, 0.6), interpolation="nearest", zorder=2)
        for cut in range(1, edge):
            at = 1.2 * cut / edge
            for patch in (Rectangle((left + at - gap, 0.6), 2 * gap, 1.2), Rectangle((left, 0.6 + at - gap), 1.2, 2 * gap)):
                patch.set(facecolor=IMAGE, zorder=3)
                axis.add_patch(patch)
    cells = list(pieces(trained, document))
    columns = 8
    for k in (3, 4):
        left = step * (k + 0.5) - 0.6
        for index, (_, colour) in enumerate(cells):
            down, right = divmod(index, columns)
            if k == 4:  # the position before a learned token predicts it
                colour = LEARNED if index + 1 < len(cells) and cells[index + 1][1] == LEARNED else ""
            axis.add_patch(Rectangle((left + 0.15 * right, 0.6 + 0.17 * down), 0.13, 0.14, facecolor=colour or "none",
                                     edgecolor=colour or READ, linewidth=0.6))
    axis.text(step * 5.5, 1.2, "mean of\n-log p(next token)\nover the\nlearned ones", ha="center", va="center", fontsize=8.5)
