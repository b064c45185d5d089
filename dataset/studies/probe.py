"""What can be read from the frozen encoder: a linear probe on the drawings of the tasks.

In:  an encoder and a source of drawings with known labels.
Out: the share of the labels of unseen drawings that a linear map of one language-model token reads right. A token is a cell of
     32 x 32 pixels: the features of its 2 x 2 patches side by side.

The language model has only a linear projection of that token (model/connector/pixel_shuffle.py). So a problem is not fair if the
probe cannot read its labels: perception comes before reasoning.

    python -m dataset.studies.probe                          a table of every kind of drawing, a minute on one core
    python -m dataset.studies.probe --only digits dice --drawings 4000 --encoder tiny_clip
"""
from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dataset.images import from_image, pixels
from dataset.protocols import Encoder
from dataset.world import drawings, figures
from dataset.world.drawings import Drawing
from dataset.world.scenes import CELL
from model.registry import ENCODERS, UserError

Label = tuple[int, str]  # a cell (0 to 8, in reading order), and the label there


def by_cell(picture: Drawing) -> list[Label]:
    """The label of each region, in the cell of its centre."""
    labels = []
    for region in picture.regions:
        left, top, right, bottom = region.box
        labels.append((int((top + bottom) / 2) // CELL * 3 + int((left + right) / 2) // CELL, region.en))
    return labels


def by_quarter(picture: Drawing, quarter: int) -> list[Label]:
    """Sokoban: one of the four squares of each cell: top left (0), top right (1), bottom left (2) or bottom right (3)."""
    return [(i // 12 * 3 + i % 6 // 2, region.en) for i, region in enumerate(picture.regions)
            if i // 6 % 2 * 2 + i % 2 == quarter]


# ---------------------------------------------------------------- what is probed

def readable(picture: Drawing) -> list[Label]:
    """The labels without '?', which no problem needs to read."""
    return [(cell, name) for cell, name in by_cell(picture) if not name.endswith("?")]


def digit(picture: Drawing, place: int) -> list[Label]:
    """The tens (0) or units (1) of labels that end with a number; the tens of a single digit are '-'."""
    return [(cell, name.split()[-1].rjust(2, "-")[place]) for cell, name in readable(picture)]


def word(picture: Drawing, place: int) -> list[Label]:
    """The first word of each label (0), or the words after it (1)."""
    return [(cell, name.split(" ", 1)[place]) for cell, name in by_cell(picture)]


def random_numbers(rng: random.Random, low: int, high: int) -> list[int]:
    """Two to nine random numbers."""
    return [rng.randint(low, high) for _ in range(rng.randint(2, 9))]


Source = tuple[Callable[[random.Random], Drawing], Callable[[Drawing], list[Label]]]  # draws a picture; returns its labels
SOURCES: dict[str, Source] = {
    "digits": (lambda rng: drawings.digits(random_numbers(rng, 0, 9), rng), by_cell),
    "dice": (lambda rng: drawings.dice(random_numbers(rng, 1, 6), rng), by_cell),
    "angles of triangles, tens": (figures.RANDOM["angles of triangles"], partial(digit, place=0)),
    "angles of triangles, units": (figures.RANDOM["angles of triangles"], partial(digit, place=1)),
    "sides of rectangles": (figures.RANDOM["sides of rectangles"], by_cell),
    "sides of L shapes": (figures.RANDOM["sides of L shapes"], by_cell),
    "legs of right triangles, tens": (figures.RANDOM["legs of right triangles"], partial(digit, place=0)),
    "legs of right triangles, units": (figures.RANDOM["legs of right triangles"], partial(digit, place=1)),
    "shapes": (figures.RANDOM["shapes"], by_cell),
    "shapes of two sizes, size": (figures.RANDOM["shapes of two sizes"], partial(word, place=0)),
    "shapes of two sizes, name": (figures.RANDOM["shapes of two sizes"], partial(word, place=1)),
    "things of two sizes, size": (figures.RANDOM["things of two sizes"], partial(word, place=0)),
    "things of two sizes, name": (figures.RANDOM["things of two sizes"], partial(word, place=1)),
    **{f"sokoban, the {corner} square of a cell": (drawings.random_board, partial(by_quarter, quarter=quarter))
       for quarter, corner in enumerate(("top left", "top right", "bottom left", "bottom right"))},
    "cards (in no task)": (lambda rng: drawings.cards(random_numbers(rng, 0, 99), rng), by_cell),
    "labels of 13 pixels (in no task)": (drawings.random_polygon, by_cell),
}


# ---------------------------------------------------------------- the probe

@torch.inference_mode()
def cell_features(encoder: Encoder, pictures: Sequence[Drawing], batch: int = 64) -> torch.Tensor:
    """Drawings -> (n, 9, 4 D): the features of each cell's 2 x 2 patches side by side, as the connector gets them."""
    edge, skip = math.isqrt(encoder.tokens - int(encoder.has_cls)), int(encoder.has_cls)
    cells = []
    for start in range(0, len(pictures), batch):
        images = [from_image(picture.image) for picture in pictures[start:start + batch]]
        features = encoder(torch.stack([pixels(image, encoder.size, encoder.mean, encoder.std, "square") for image in images]))
        grid = features[:, skip:].unflatten(1, (3, edge // 3, 3, edge // 3))  # (n, row, row in cell, column, column in cell, D)
        cells.append(grid.transpose(2, 3).flatten(3, 5).flatten(1, 2))
    return torch.cat(cells)


def ridge(inputs: torch.Tensor, targets: torch.Tensor, classes: int, penalty: float = 1e-3) -> torch.Tensor:
    """(n, D), (n,) -> (D + 1, classes): least squares onto one-hot targets, with a penalty on all weights but the bias.

    `penalty` is in units of n times the mean square of the inputs, so that it does not depend on their number or scale.
    """
    rows = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    weight = penalty * len(rows) * inputs.square().mean().double() * torch.ones(rows.shape[1], dtype=torch.double)
    weight[-1] = 0.0
    onto = torch.nn.functional.one_hot(targets, classes).double()
    return torch.linalg.solve(rows.T @ rows + torch.diag(weight), rows.T @ onto).float()


@dataclass(frozen=True)
class Reading:
    """Result on unseen drawings: share of labels read right, labels, share of the most common label, different labels."""

    right: float
    labels: int
    commonest: float
    names: int


def probe(encoder: Encoder, source: Source, n: int, seed: int = 0) -> Reading:
    """Fit on n drawings and test on n / 4 others."""
    draw, labels_of = source
    sets = []
    for split, size in (("train", n), ("test", n // 4)):
        rng = random.Random(f"probe/{seed}/{split}")
        pictures = [draw(rng) for _ in range(size)]
        features = cell_features(encoder, pictures)
        labelled = [(i, cell, name) for i, picture in enumerate(pictures) for cell, name in labels_of(picture)]
        sets.append((torch.stack([features[i, cell] for i, cell, _ in labelled]), [name for *_, name in labelled]))
    (inputs, names), (unseen, truth) = sets
    index = {name: k for k, name in enumerate(sorted(set(names)))}
    mean = inputs.mean(0)
    weights = ridge(inputs - mean, torch.tensor([index[name] for name in names]), len(index))
    guess = ((unseen - mean) @ weights[:-1] + weights[-1]).argmax(-1).tolist()
    right = np.mean([index.get(name) == k for name, k in zip(truth, guess, strict=True)])
    return Reading(float(right), len(truth), Counter(truth).most_common(1)[0][1] / len(truth), len(index))


@dataclass
class Config:
    only: tuple[str, ...] = ()  # kinds of drawings; default: all
    drawings: int = 2000  # drawings of each kind to fit on; a quarter as many more to test on
    encoder: str = "tiny_clip"  # encoder, by its name in the registry
    seed: int = 0  # seed of the drawings


def main(config: Config) -> None:
    encoder = ENCODERS.make(config.encoder).eval()
    for name in config.only:
        if name not in SOURCES:
            raise UserError(f"unknown drawing {name!r}; known: {', '.join(SOURCES)}")
    print("| drawing | labels read right | of | names | the commonest |\n| --- | --- | --- | --- | --- |")
    for name in config.only or SOURCES:
        reading = probe(encoder, SOURCES[name], config.drawings, config.seed)
        print(f"| {name} | {reading.right:.1%} | {reading.labels:,} | {reading.names} | {reading.commonest:.1%} |", flush=True)


if __name__ == "__main__":
    from model import cli

    cli.run(main, cli.parse(Config))
