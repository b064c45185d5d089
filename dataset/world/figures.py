"""Figures that the tiny CLIP can read: geometry with its labels, and shapes or objects of two sizes.

In:  what to draw, and a random generator for the jitter.  Out: a `Drawing` with the truth of each label.

Each label has a cell of the 3 x 3 grid to itself, because one token of the language model covers one cell. Its digits are as
large and as far apart as the single digits that the encoder learned to read. The figure in the middle is not to scale.
`python -m dataset.studies.probe` measures what can be read of each figure.

    python -m dataset.world.figures sheet.png     draws a sheet of examples
"""
from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from PIL import Image, ImageDraw

from dataset.world.drawings import CANVAS, CELL, COLOURS, SHAPES, Drawing, Region, blank, dark, light, write
from dataset.world.openmoji import Category, categories
from dataset.world.scenes import SIZES as PIXELS
from dataset.world.scenes import Object, Scene, draw_scene
from dataset.world.words import caption

SPACING = 14  # pixels from digit to digit
Point = tuple[float, float]


def middle(cell: int, rng: random.Random, jitter: int = 2) -> Point:
    """The centre of a cell, shifted by up to `jitter` pixels."""
    row, column = divmod(cell, 3)
    return column * CELL + CELL // 2 + rng.randint(-jitter, jitter), row * CELL + CELL // 2 + rng.randint(-jitter, jitter)


def label(pen: ImageDraw.ImageDraw, text: str, cell: int, rng: random.Random, prefix: tuple[str, str]) -> Region:
    """Write a number of one or two digits, or '?', into a cell and return its region; a '°' after it is small and raised."""
    x, y = middle(cell, rng)
    digits, ink, size = text.rstrip("°"), dark(rng), rng.randint(22, 24)
    left = x - SPACING * (len(digits) - 1) / 2 - 5 * (digits != text)
    for k, digit in enumerate(digits):
        write(pen, digit, (left + k * SPACING, y), size, ink)
    if digits != text:
        write(pen, "°", (left + SPACING * len(digits) - 3, y - 3), 12, ink)
    half = SPACING * len(digits) / 2
    return Region((x - half, y - 9, x + half, y + 9), f"{prefix[0]} {digits}", prefix[1] + digits)


def figure(name: tuple[str, str], corners: Sequence[Point], labels: dict[int, str], prefix: tuple[str, str],
           rng: random.Random) -> Drawing:
    """Draw a closed outline with labels by cell; `prefix` names what they label: ('side', '边长') or ('angle', '角')."""
    image, pen = blank(rng)
    pen.polygon(list(corners), outline=dark(rng), fill=light(rng), width=2)
    regions = tuple(label(pen, text, cell, rng, prefix) for cell, text in sorted(labels.items()))
    english, chinese = ", ".join(region.en for region in regions), "、".join(region.zh for region in regions)
    return Drawing(image, f"A {name[0]}: {english}.", f"{name[1]}：{chinese}。", regions)


ANGLE, SIDE = ("angle", "角"), ("side", "边长")


def triangle(angles: Sequence[str], rng: random.Random) -> Drawing:
    """Draw a triangle that stands on a side or on a corner; the labels of its angles are in reading order."""
    up = rng.random() < 0.5
    point = (rng.randint(40, 56), 30)
    base = [(rng.randint(64, 72), rng.randint(60, 67)), (rng.randint(24, 32), rng.randint(60, 67))]
    corners = [(x, y if up else CANVAS - y) for x, y in (point, *base)]
    return figure(("triangle", "三角形"), corners, dict(zip((1, 6, 8) if up else (0, 2, 7), angles)), ANGLE, rng)


def rectangle(sides: Sequence[int], rng: random.Random) -> Drawing:
    """Draw a rectangle with the lengths of two neighbouring sides outside it, in reading order."""
    wide, high = rng.randint(10, 15), rng.randint(10, 15)
    corners = [(48 - wide, 48 - high), (48 + wide, 48 - high), (48 + wide, 48 + high), (48 - wide, 48 + high)]
    cells = sorted((rng.choice((1, 7)), rng.choice((3, 5))))
    return figure(("rectangle", "长方形"), corners, {cell: str(side) for cell, side in zip(cells, sides)}, SIDE, rng)


def l_shape(sides: Sequence[int], rng: random.Random) -> Drawing:
    """Draw an L with four labelled sides, in reading order: short top, full left, short right, full bottom."""
    wide, high = rng.randint(12, 15), rng.randint(12, 15)
    across, down = 48 - wide + rng.randint(9, 15), 48 + high - rng.randint(9, 15)
    corners = [(48 - wide, 48 - high), (across, 48 - high), (across, down), (48 + wide, down), (48 + wide, 48 + high),
               (48 - wide, 48 + high)]  # fmt: skip
    return figure(("L shape", "L形"), corners, {cell: str(side) for cell, side in zip((1, 3, 5, 7), sides)}, SIDE, rng)


def right_triangle(legs: Sequence[int], rng: random.Random) -> Drawing:
    """Draw a right triangle with the lengths of its vertical and its horizontal leg, and '?' at the hypotenuse."""
    left = rng.random() < 0.5
    wide, high = rng.randint(12, 16), rng.randint(12, 16)
    square, top, end = (48 - wide, 48 + high), (48 - wide, 48 - high), (48 + wide, 48 + high)
    corners = [(x if left else CANVAS - x, y) for x, y in (square, top, end)]
    labels = {3 if left else 5: str(legs[0]), 7: str(legs[1]), 2 if left else 0: "?"}
    return figure(("right triangle", "直角三角形"), corners, labels, SIDE, rng)


# ---------------------------------------------------------------- shapes and objects of two sizes

SMALL, LARGE = 7, 14  # half the side of a shape, in pixels
SIZES = {False: ("small", "小"), True: ("large", "大")}


def shapes(members: Sequence[tuple[str, str]], cells: Sequence[int], largest: int | None, rng: random.Random) -> Drawing:
    """Draw shapes (colour, shape) in given cells: shape `largest` is large and the others small; None: sizes are random."""
    image, pen = blank(rng)
    regions = []
    for k, ((colour, shape), cell) in enumerate(zip(members, cells, strict=True)):
        half = rng.randint(9, 13) if largest is None else LARGE if k == largest else SMALL + rng.randint(-1, 1)
        x, y = middle(cell, rng, jitter=1)
        ink, flat = COLOURS[colour][1], half * 3 // 4 if shape == "rectangle" else half
        box = (x - half, y - flat, x + half, y + flat)
        if shape == "circle":
            pen.ellipse(box, fill=ink)
        elif shape == "rectangle":
            pen.rectangle(box, fill=ink)
        else:
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=ink)
        size = ("", "") if largest is None else SIZES[k == largest]
        regions.append(Region(box, f"{size[0]} {colour} {shape}".strip(), size[1] + COLOURS[colour][0] + SHAPES[shape]))
    english, chinese = ", ".join(region.en for region in regions), "、".join(region.zh for region in regions)
    return Drawing(image, f"Shapes: {english}.", f"图形：{chinese}。", tuple(regions))


def objects(members: Sequence[Category], cells: Sequence[int], largest: int | None, rng: random.Random) -> Drawing:
    """Draw emoji in given cells, with sizes as in `shapes`."""
    placed = []
    for k, (category, cell) in enumerate(zip(members, cells, strict=True)):
        size = rng.choice(PIXELS) if largest is None else 32 if k == largest else rng.choice((22, 24))
        row, column = divmod(cell, 3)
        placed.append(Object(category, cell, column * CELL + rng.randint(0, CELL - size),
                             row * CELL + rng.randint(0, CELL - size), size))
    scene = Scene("", tuple(placed), light(rng))
    regions = tuple(Region((obj.x, obj.y, obj.x + obj.size, obj.y + obj.size), obj.category.en, obj.category.zh)
                    for obj in placed)
    if largest is not None:
        regions = tuple(Region(r.box, f"{SIZES[k == largest][0]} {r.en}", SIZES[k == largest][1] + r.zh)
                        for k, r in enumerate(regions))
    return Drawing(draw_scene(scene), caption(scene, "en"), caption(scene, "zh"), regions)


# ---------------------------------------------------------------- random examples, for the probe and the sheet

def random_cells(rng: random.Random, low: int = 3, high: int = 6) -> list[int]:
    return sorted(rng.sample(range(9), rng.randint(low, high)))


def random_shapes(rng: random.Random, sized: bool) -> Drawing:
    cells = random_cells(rng)
    members = [(rng.choice(sorted(COLOURS)), rng.choice(sorted(SHAPES))) for _ in cells]
    return shapes(members, cells, rng.randrange(len(cells)) if sized else None, rng)


def random_objects(rng: random.Random) -> Drawing:
    cells = random_cells(rng)
    return objects(rng.sample(categories(), len(cells)), cells, rng.randrange(len(cells)), rng)


RANDOM = {
    "angles of triangles": lambda rng: triangle(
        rng.sample([f"{5 * rng.randint(2, 18)}°", f"{5 * rng.randint(2, 18)}°", "?"], 3), rng),
    "sides of rectangles": lambda rng: rectangle([rng.randint(1, 9), rng.randint(1, 9)], rng),
    "sides of L shapes": lambda rng: l_shape([rng.randint(1, 9) for _ in range(4)], rng),
    "legs of right triangles": lambda rng: right_triangle([rng.randint(3, 99), rng.randint(3, 99)], rng),
    "shapes": lambda rng: random_shapes(rng, sized=False),
    "shapes of two sizes": lambda rng: random_shapes(rng, sized=True),
    "things of two sizes": random_objects,
}


if __name__ == "__main__":
    rng, sheet = random.Random(0), Image.new("RGB", (CANVAS * 6, CANVAS * len(RANDOM)))
    for row, draw in enumerate(RANDOM.values()):
        for column in range(6):
            sheet.paste(draw(rng).image, (column * CANVAS, row * CANVAS))
    sheet.save(sys.argv[1] if len(sys.argv) > 1 else "sheet.png")
