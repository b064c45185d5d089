"""Where the model looks: the attention of the position that writes an answer over the tokens of the picture.

In:  a checkpoint.  Out: one held-out scene, asked what is at three places, in English and in Chinese; each token of the picture
     covers a square of it, in nano a cell of the 3 x 3 grid, and has a share of the weight.

Shown is the last block, the mean over its heads, as shares of what falls on the picture. Of the positions that write the answer
it is the one that looks at the picture most: "a" in "a bus" is grammar. One picture is an anecdote, so the mean of many
questions stands below. All ask what lies at a place: for a count or a place, the last block of nano does not look at the object.
"""
from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from dataset.chat import Conversation
from dataset.checkpoints import Trained
from dataset.figures.stage import BAD, GOOD, INK, LEARNED, CannotDraw, Stage, blank, chinese_font
from dataset.look import grid, on_pictures
from dataset.tasks import dialogue
from dataset.tasks.world import picture
from dataset.world.questions import Question, named
from dataset.world.scenes import Object, Scene, sample_scene
from dataset.world.words import PLACES

MANY = 10  # scenes of the mean: up to four questions each, in one language


def asked(scene: Scene, obj: Object, language: str) -> tuple[Conversation, str]:
    """(what is at the place of an object?, its name)."""
    place = PLACES[language][obj.cell]
    at = f"at the {place}" if language == "en" else place
    question = Question("what", language, {"at": at}, named(obj.category, language))
    return dialogue(f"{scene.key}/{obj.cell}/{language}", [picture(scene)], [(question.text, "")]), question.answer


def scenes(count: int, least: int) -> list[Scene]:
    """The first held-out scenes with at least so many categories."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = sample_scene("test", index)
        found += [scene] if len(scene.counts) >= least else []
        index += 1
    return found


def answers(trained: Trained, prompts: Sequence[Conversation]) -> list[str]:
    """The greedy answer to each prompt."""
    processor = trained.processor
    batch = processor.padded([processor.prompt(prompt) for prompt in prompts])
    found = trained.inspector.sample(batch, 1, temperature=0.0, max_new_tokens=12, **processor.sampling)
    return [processor.tokenizer.decode(answer.tokens) for answer in found]


def looks(trained: Trained, prompts: Sequence[Conversation], texts: Sequence[str]) -> list[torch.Tensor]:
    """Where the model looked while it wrote these answers: (edge, edge) shares of each picture, which sum to 1."""
    processor, edge = trained.processor, grid(trained)
    documents = [processor.with_answer(prompt, text, 1000) for prompt, text in zip(prompts, texts, strict=True)]
    batch = processor.batch(documents)
    maps = []
    for document, weights in zip(documents, trained.inspector.attention(batch), strict=True):
        first = document.learn.index(True)
        writers = slice(first - 1, max(first, len(document) - 2))  # positions that write the answer, without its end of turn
        shares, _ = on_pictures(trained, document, weights.mean(0)[writers], edge)
        maps.append(shares[0])
    return maps


def on_object(shares: torch.Tensor, obj: Object) -> float:
    """The share on the cell of an object, wherever the squares lie."""
    edge = len(shares)
    row, column = divmod(obj.cell, 3)
    if edge % 3:
        raise CannotDraw(f"{edge} x {edge} squares do not fit the 3 x 3 cells of a scene")
    side = edge // 3
    return float(shares[row * side:(row + 1) * side, column * side:(column + 1) * side].sum())


def mean_on_object(trained: Trained, language: str) -> tuple[float, int]:
    """(the mean share on the cell that was asked for, of so many questions)."""
    found = [(obj, *asked(scene, obj, language)) for scene in scenes(MANY, 1) for obj in scene.objects]
    objects, prompts, right = zip(*found)
    shares = [on_object(look, obj) for look, obj in zip(looks(trained, prompts, right), objects)]
    return sum(shares) / len(shares), len(shares)


def draw(stage: Stage) -> Figure:
    """Six questions about one scene, as heat squares over the picture."""
    trained, languages = stage.trained(), ("en", "zh") if chinese_font() else ("en",)
    scene = scenes(1, 4)[0]
    objects = scene.objects[:3]
    found = [asked(scene, obj, language) for language in languages for obj in objects]
    prompts, right = zip(*found)
    texts = answers(trained, prompts)
    maps = looks(trained, prompts, texts)
    figure = blank(3 * 2.7, 3.2 * len(languages) + 0.75)
    axes = figure.subplots(len(languages), 3, squeeze=False).flatten()
    for axis, prompt, text, truth, shares in zip(axes, prompts, texts, right, maps):
        panel(axis, prompt.pictures[0].load(), shares, float(shares.max()))
        axis.set_title(prompt.messages[-1].text, fontsize=11, pad=5)
        axis.set_xlabel(f"→ {text}", color=GOOD if text == truth else BAD, fontsize=11, labelpad=4)
    means = {language: mean_on_object(trained, language) for language in languages}
    said = ", ".join(f"{language}: {100 * mean:.0f} % (n {count})" for language, (mean, count) in means.items())
    figure.text(0.5, 0.985, "Same picture, another question: where does the model look?", ha="center", va="top",
                fontsize=12, fontweight="bold")
    figure.text(0.5, 0.012, f"Mean weight on the cell that is asked for, held-out scenes: {said}; by chance 11 %", ha="center",
                fontsize=9)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.65 / height, bottom=0.55 / height, wspace=0.06, hspace=0.27)
    return figure


def panel(axis: Any, image: Image.Image, shares: torch.Tensor, most: float) -> None:
    """The picture under its squares, the more coloured the more weight they have; `most` is the largest share."""
    edge = len(shares)
    axis.imshow(image, extent=(0, edge, edge, 0), interpolation="nearest")
    for place, share in enumerate(shares.flatten().tolist()):
        row, column = divmod(place, edge)
        axis.add_patch(Rectangle((column, row), 1, 1, facecolor=(*to_rgb(LEARNED), 0.6 * share / most), edgecolor="white",
                                 linewidth=1.5))
        if edge <= 4:
            axis.text(column + 0.06, row + 0.06, f"{100 * share:.0f} %", va="top", fontsize=9, color="black",
                      fontweight="bold" if share > 0.2 else "normal",
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])
    axis.set(xlim=(0, edge), ylim=(edge, 0), xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=True, color=INK)


def heat_map(pictures: Sequence[Image.Image], shares: torch.Tensor) -> bytes:
    """Pictures side by side, four in a row, under their squares (N, edge, edge), as a PNG file."""
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = blank(2.7 * columns, 2.7 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(pictures):]:
        axis.set_axis_off()
    for axis, image, of_picture in zip(axes, pictures, shares):
        panel(axis, image, of_picture, float(shares.max()))
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(file := io.BytesIO(), dpi=110, transparent=True)
    return file.getvalue()
