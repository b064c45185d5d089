"""Drawings beside the emoji scenes: digits, dice, number cards, labelled shapes, and Sokoban boards.

In:  what to draw, and a random generator for the jitter.
Out: a `Drawing`: the picture (96 x 96), its caption in English and Chinese, and its regions (box in pixels and name).

The tiny CLIP is trained on these drawings, and the reasoning tasks ask about them. No question is made here.

    python -m dataset.world.drawings sheet.png     draws a sheet of examples
"""
from __future__ import annotations

import functools
import math
import random
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset.world.openmoji import drawing
from dataset.world.scenes import CANVAS, CELL, light

COLOURS = {  # name in English: (name in Chinese, RGB)
    "red": ("红色", (220, 30, 30)), "blue": ("蓝色", (30, 60, 230)), "green": ("绿色", (30, 150, 50)),
    "black": ("黑色", (10, 10, 10)), "gray": ("灰色", (128, 128, 128)), "teal": ("青色", (0, 128, 128)),
    "brown": ("棕色", (150, 75, 30)), "yellow": ("黄色", (240, 210, 0)), "purple": ("紫色", (130, 40, 160)),
    "orange": ("橙色", (245, 130, 0)),
}
SHAPES = {"circle": "圆形", "rectangle": "长方形", "triangle": "三角形"}
TILE = 16                        # side of a Sokoban square in pixels: each square of a 6 x 6 board is one patch
SOKOBAN = {                      # the usual text signs of Sokoban levels: (English, Chinese, emoji, ring colour)
    "#": ("wall", "墙", "🧱", None), " ": ("floor", "地板", None, None), ".": ("target", "目标", None, (225, 30, 60)),
    "@": ("player", "玩家", "🤖", None), "$": ("box", "箱子", "📦", None),
    "+": ("player on a target", "玩家在目标上", "🤖", (225, 30, 60)),
    "*": ("box on a target", "箱子在目标上", "📦", (30, 160, 60)),
}


@dataclass(frozen=True)
class Region:
    """A named part of a drawing: its box (left, top, right, bottom, in pixels) and its name in English and Chinese."""

    box: tuple[float, float, float, float]
    en: str
    zh: str


@dataclass(frozen=True)
class Drawing:
    """A picture with its caption in English and Chinese and its regions."""

    image: Image.Image
    en: str
    zh: str
    regions: tuple[Region, ...]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, so that every machine draws the same pixels."""
    return ImageFont.load_default(size)


def write(pen: ImageDraw.ImageDraw, text: str, centre: tuple[float, float], size: int, ink=(0, 0, 0)) -> tuple:
    """Write a text centred on a point and return its box."""
    pen.text(centre, text, font=font(size), fill=ink, anchor="mm")
    return pen.textbbox(centre, text, font=font(size), anchor="mm")


def dark(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(0, 110), rng.randint(0, 110), rng.randint(0, 110)


def cell_centres(n: int, rng: random.Random, jitter: int = 3) -> list[tuple[int, int]]:
    """The centres of n different cells of the 3 x 3 grid, in reading order, each shifted by up to `jitter` pixels."""
    return [(column * CELL + CELL // 2 + rng.randint(-jitter, jitter), row * CELL + CELL // 2 + rng.randint(-jitter, jitter))
            for row, column in (divmod(cell, 3) for cell in sorted(rng.sample(range(9), n)))]


def blank(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (CANVAS, CANVAS), light(rng))
    return image, ImageDraw.Draw(image)


def digits(values: list[int], rng: random.Random) -> Drawing:
    """Draw up to nine single digits in random cells, in reading order."""
    image, pen = blank(rng)
    regions = []
    for value, centre in zip(values, cell_centres(len(values), rng)):
        box = write(pen, str(value), centre, rng.randint(22, 30), dark(rng))
        regions.append(Region(box, f"digit {value}", f"数字{value}"))
    listed = ", ".join(map(str, values))
    return Drawing(image, f"The digits {listed}.", f"数字{listed}。", tuple(regions))


def dice(values: list[int], rng: random.Random) -> Drawing:
    """Draw up to nine dice with values 1 to 6 in random cells, in reading order."""
    image, pen = blank(rng)
    regions = []
    for value, (x, y) in zip(values, cell_centres(len(values), rng, jitter=2)):
        half = rng.randint(11, 13)
        box = (x - half, y - half, x + half, y + half)
        pen.rounded_rectangle(box, 4, fill=(255, 255, 255), outline=(40, 40, 40))
        offset = half * 0.55
        spots: dict[int, list[tuple[float, float]]] = {1: [(0, 0)], 2: [(-offset, -offset), (offset, offset)]}
        spots[4] = [(a, b) for a in (-offset, offset) for b in (-offset, offset)]
        spots[3], spots[5] = spots[1] + spots[2], spots[1] + spots[4]
        spots[6] = spots[4] + [(-offset, 0), (offset, 0)]
        for dx, dy in spots[value]:
            pen.ellipse((x + dx - 2.2, y + dy - 2.2, x + dx + 2.2, y + dy + 2.2), fill=(20, 20, 20))
        regions.append(Region(box, f"die showing {value}", f"骰子{value}点"))
    listed = ", ".join(map(str, values))
    return Drawing(image, f"Dice showing {listed}.", f"骰子{listed}点。", tuple(regions))


def cards(values: list[int], rng: random.Random) -> Drawing:
    """Draw up to nine coloured cards with numbers 0 to 99 in random cells, in reading order."""
    image, pen = blank(rng)
    regions = []
    for value, (x, y) in zip(values, cell_centres(len(values), rng, jitter=2)):
        colour = rng.choice(sorted(COLOURS))
        box = (x - 13, y - 10, x + 13, y + 10)
        pen.rounded_rectangle(box, 3, fill=tuple(255 - (255 - part) // 5 for part in COLOURS[colour][1]),
                              outline=COLOURS[colour][1], width=2)
        write(pen, str(value), (x, y), 16)
        regions.append(Region(box, f"{colour} card {value}", f"{COLOURS[colour][0]}卡片{value}"))
    listed = ", ".join(map(str, values))
    return Drawing(image, f"Cards with the numbers {listed}.", f"卡片上的数{listed}。", tuple(regions))


def shapes(members: list[tuple[str, str]], rng: random.Random) -> Drawing:
    """Draw up to nine plain shapes (colour, shape) in random cells, in reading order."""
    image, pen = blank(rng)
    regions = []
    for (colour, shape), (x, y) in zip(members, cell_centres(len(members), rng)):
        half = rng.randint(7, 13)
        ink, flat = COLOURS[colour][1], half if shape != "rectangle" else rng.randint(5, half)
        box = (x - half, y - flat, x + half, y + flat)
        if shape == "circle":
            pen.ellipse(box, fill=ink)
        elif shape == "rectangle":
            pen.rectangle(box, fill=ink)
        else:
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=ink)
        regions.append(Region(box, f"{colour} {shape}", COLOURS[colour][0] + SHAPES[shape]))
    english = ", ".join(region.en for region in regions)
    chinese = "、".join(region.zh for region in regions)
    return Drawing(image, f"Shapes: {english}.", f"图形：{chinese}。", tuple(regions))


def polygon(kind: tuple[str, str], corners: list[tuple[float, float]], sides: list[str], angles: list[str],
            rng: random.Random) -> Drawing:
    """Draw a polygon with a label at each side and inside each corner: '' draws no label, '?' marks the unknown.

    corners   in order around the polygon, in pixels
    sides     sides[i] is written outside the side from corner i to corner i + 1
    angles    angles[i] is written inside corner i
    """
    image, pen = blank(rng)
    n = len(corners)
    centre = (sum(x for x, _ in corners) / n, sum(y for _, y in corners) / n)
    pen.polygon(corners, outline=dark(rng), fill=light(rng), width=2)
    regions = []

    def label(text: str, point: tuple[float, float], prefix: tuple[str, str]) -> None:
        x, y = (min(max(part, 9), CANVAS - 9) for part in point)
        box = write(pen, text, (x, y), 13)
        name = ("unknown", "未知") if text.startswith("?") else (text.rstrip("°"),) * 2
        regions.append(Region(box, f"{prefix[0]} {name[0]}", prefix[1] + name[1]))

    for i, text in enumerate(sides):
        (x, y), (u, v) = corners[i], corners[(i + 1) % n]
        away = math.hypot((x + u) / 2 - centre[0], (y + v) / 2 - centre[1]) or 1.0
        if text:
            outwards = (((x + u) / 2 - centre[0]) / away, ((y + v) / 2 - centre[1]) / away)
            label(text, ((x + u) / 2 + 9 * outwards[0], (y + v) / 2 + 9 * outwards[1]), ("side", "边长"))
    for (x, y), text in zip(corners, angles):
        towards = math.hypot(centre[0] - x, centre[1] - y) or 1.0
        if text:
            label(text + "°", (x + 17 * (centre[0] - x) / towards, y + 17 * (centre[1] - y) / towards), ("angle", "角"))
    english = ", ".join(region.en for region in regions)
    chinese = "、".join(region.zh for region in regions)
    return Drawing(image, f"A {kind[0]}: {english}.", f"{kind[1]}：{chinese}。", tuple(regions))


def board(rows: list[str], rng: random.Random) -> Drawing:
    """Draw a Sokoban board of up to 6 x 6 squares, given in the usual text signs; squares outside it are wall."""
    if len(rows) > 6 or any(len(row) > 6 for row in rows) or set("".join(rows)) - set(SOKOBAN):
        raise ValueError(f"a board has at most 6 x 6 squares of {''.join(SOKOBAN)!r}, not {rows}")
    floor = light(rng)
    canvas = Image.new("RGB", (CANVAS, CANVAS), floor)
    pen = ImageDraw.Draw(canvas)
    regions = []
    rows = [row.ljust(6, "#") for row in rows] + ["######"] * (6 - len(rows))
    for r, row in enumerate(rows):
        for c, sign in enumerate(row):
            english, chinese, code, ring = SOKOBAN[sign]
            x, y = c * TILE, r * TILE
            if ring:
                pen.ellipse((x + 2, y + 2, x + TILE - 3, y + TILE - 3), fill=(255, 255, 255), outline=ring, width=2)
            if code:
                size = TILE if sign == "#" else TILE - 2
                picture = Image.fromarray(drawing(code, size))
                canvas.paste(picture, (x + (TILE - size) // 2, y + (TILE - size) // 2), picture)
            if ring and code:
                pen.rectangle((x, y, x + TILE - 1, y + TILE - 1), outline=ring, width=2)
            regions.append(Region((x, y, x + TILE, y + TILE), english, chinese))
    boxes, targets = (sum(row.count(sign) for row in rows for sign in signs) for signs in ("$*", ".+*"))
    return Drawing(canvas, f"A Sokoban board with {boxes} boxes and {targets} targets.",
                   f"推箱子，{boxes}个箱子，{targets}个目标。", tuple(regions))


# ---------------------------------------------------------------- random examples, to train the encoder

def random_polygon(rng: random.Random) -> Drawing:
    """A triangle, rectangle, right triangle or L shape with random labels."""
    def number(low, high):
        return str(rng.randint(low, high))

    def jitter(x, y):
        return (x + rng.randint(-5, 5), y + rng.randint(-5, 5))

    kind = rng.choice(("triangle", "rectangle", "right", "L"))
    if kind == "triangle":
        angles = [str(5 * rng.randint(4, 26)) for _ in range(3)]
        angles[rng.randrange(3)] = "?"
        corners = [jitter(rng.randint(25, 70), 14), jitter(88, 82), jitter(8, 82)]
        return polygon(("triangle", "三角形"), corners, [], angles, rng)
    if kind == "rectangle":
        left, top = rng.randint(16, 30), rng.randint(18, 32)
        right, bottom = rng.randint(62, 76), rng.randint(60, 78)
        corners = [(left, top), (right, top), (right, bottom), (left, bottom)]
        return polygon(("rectangle", "长方形"), corners, [number(1, 20), number(1, 20), "", ""], [], rng)
    if kind == "right":
        corners = [jitter(22, 18), jitter(80, 76), (22, 76)]
        labels = [number(3, 41), number(3, 41), number(3, 41)]
        labels[rng.randrange(3)] = "?"
        return polygon(("right triangle", "直角三角形"), corners, labels, [], rng)
    a, b = rng.randint(36, 56), rng.randint(38, 56)
    corners = [(18, 18), (a, 18), (a, b), (78, b), (78, 78), (18, 78)]
    labels = [number(1, 12), "", number(1, 12), number(1, 12), number(1, 20), number(1, 20)]
    return polygon(("L shape", "L形"), corners, labels, [], rng)


def random_board(rng: random.Random) -> Drawing:
    """A board with or without a border of walls, with inner walls and one or two boxes and targets; it may have no solution."""
    squares = [[" "] * 6 for _ in range(6)]
    if rng.random() < 0.5:
        for i in range(6):
            squares[0][i] = squares[5][i] = squares[i][0] = squares[i][5] = "#"
    free = [(r, c) for r in range(6) for c in range(6) if squares[r][c] == " "]
    rng.shuffle(free)
    for sign in "@" * (rng.random() < 0.9) + rng.choice(("$.", "$$..", "$*.", "+$", "*")) + "#" * rng.randint(0, 6):
        r, c = free.pop()
        squares[r][c] = sign
    return board(["".join(row) for row in squares], rng)


def random_drawing(rng: random.Random) -> Drawing:
    """A drawing of a random kind."""
    n = rng.randint(2, 9)
    kind = rng.choices(("digits", "dice", "cards", "shapes", "polygon", "board"), (6, 4, 3, 3, 4, 1))[0]
    if kind == "digits":
        return digits([rng.randint(0, 9) for _ in range(n)], rng)
    if kind == "dice":
        return dice([rng.randint(1, 6) for _ in range(n)], rng)
    if kind == "cards":
        return cards([rng.randint(0, 99) for _ in range(n)], rng)
    if kind == "shapes":
        return shapes([(rng.choice(sorted(COLOURS)), rng.choice(sorted(SHAPES))) for _ in range(n)], rng)
    return random_polygon(rng) if kind == "polygon" else random_board(rng)


def sheet(columns: int = 8, rows: int = 4) -> Image.Image:
    rng, picture = random.Random(0), Image.new("RGB", (CANVAS * columns, CANVAS * rows))
    for i in range(columns * rows):
        picture.paste(random_drawing(rng).image, (i % columns * CANVAS, i // columns * CANVAS))
    return picture


def region_of_patches(regions: tuple[Region, ...], patch: int, size: int = CANVAS) -> np.ndarray:
    """For each patch the region that covers most of it: its index, or -1 below a fifth; ((size / patch)^2,) in reading order."""
    n = size // patch
    best, owner = np.full(n * n, 0.2), np.full(n * n, -1)
    for index, region in enumerate(regions):
        left, top, right, bottom = (edge / patch for edge in region.box)
        across = np.clip(np.minimum(right, np.arange(1, n + 1)) - np.maximum(left, np.arange(n)), 0, 1)
        down = np.clip(np.minimum(bottom, np.arange(1, n + 1)) - np.maximum(top, np.arange(n)), 0, 1)
        cover = np.outer(down, across).ravel()
        owner[cover > best] = index
        best = np.maximum(best, cover)
    return owner


if __name__ == "__main__":
    sheet().save(sys.argv[1] if len(sys.argv) > 1 else "sheet.png")
