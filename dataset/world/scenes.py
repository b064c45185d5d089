"""The embedded world: scenes of real drawings whose truth is known exactly.

In:  the name of a split and an index.  Out: a `Scene` (which object is where) and its picture (96 x 96 pixels).

Held out, never trained: a tenth of all pairs of categories, a tenth of all category x count combinations, and every scene of
the splits `val` and `test`. Test scenes with such a combination show whether the model composes or remembers.

    python -m dataset.world.scenes sheet.png        draws a sheet of scenes and prints their captions
"""
from __future__ import annotations

import functools
import itertools
import random
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.world.openmoji import Category, categories, drawing, paste
from model.registry import UserError

MOST_OBJECTS = 9                 # cells of the canvas
CANVAS = 96                      # side of a scene in pixels
CELL = 32                        # side of a cell: a scene has 3 x 3 cells, a cell 2 x 2 patches of the tiny CLIP
SIZES = range(24, 33, 2)         # side of a drawing in pixels


@dataclass(frozen=True)
class Object:
    """One drawing on the canvas: its category, its cell (0 to 8), its top left corner and its side in pixels."""

    category: Category
    cell: int
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Up to nine objects in reading order on a plain light background; `key` identifies the scene."""

    key: str
    objects: tuple[Object, ...]
    background: tuple[int, int, int]

    @functools.cached_property
    def counts(self) -> Counter:
        """How often each category appears, ordered by first appearance."""
        return Counter(obj.category for obj in self.objects)


def draw_scene(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, 96 x 96."""
    canvas = np.empty((CANVAS, CANVAS, 3), np.uint8)
    canvas[:] = scene.background
    for obj in scene.objects:
        paste(canvas, drawing(obj.category.code, obj.size), obj.x, obj.y)
    return Image.fromarray(canvas)


# ---------------------------------------------------------------- what is held out

def chance(*parts) -> float:
    """A number in 0..1 that depends on these words alone: equal on every machine and in every run, unlike Python's `hash`."""
    return zlib.crc32("|".join(str(part) for part in parts).encode()) / 2**32


@functools.lru_cache(maxsize=100_000)
def held_out_pair(first: Category, second: Category) -> bool:
    """Whether a pair of categories is held out, as a tenth of all pairs are."""
    return chance("pair", *sorted((first.en, second.en))) < 0.1


@functools.cache
def companions(which: str = "nano") -> dict[Category, Category]:
    """Category -> its companion: the two often appear together, as knives and forks do. No such pair is held out."""
    pool = list(categories(which))
    random.Random("partners").shuffle(pool)
    pairs = {}
    while pool:
        first = pool.pop()
        second = next((category for category in pool if not held_out_pair(first, category)), None)
        if second:
            pool.remove(second)
            pairs.update({first: second, second: first})
    return pairs


def is_new(scene: Scene) -> bool:
    """Whether the scene has a combination that is never trained: a held-out pair, or a held-out count above one."""
    counts = scene.counts
    return (any(held_out_pair(first, second) for first, second in itertools.combinations(counts, 2))
            or any(chance("count", category.en, n) < 0.1 for category, n in counts.items() if n > 1))


def light(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255)


def place_objects(members: list[Category], rng: random.Random) -> tuple[Object, ...]:
    """Put each category at a random position in a cell of its own; objects are in reading order."""
    cells = sorted(rng.sample(range(9), len(members)))
    return tuple(place_object(category, cell, rng) for cell, category in zip(cells, members))


def place_object(category: Category, cell: int, rng: random.Random) -> Object:
    size = rng.choice(SIZES)
    row, column = divmod(cell, 3)
    return Object(category, cell, column * CELL + rng.randint(0, CELL - size), row * CELL + rng.randint(0, CELL - size), size)


@functools.lru_cache(maxsize=20_000)  # a training scene is in many rows
def sample_scene(split: str, index: int, which: str = "nano", most: int = 4, least: int = 1) -> Scene:
    """Scene `index` of a split, with `least` to `most` objects; a category often repeats or stands beside its companion.

    `train` has no held-out combination. In `val` and `test` every odd scene has one, and so at least two objects.
    ValueError for another split.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split: train, val or test, not {split!r}")
    if not 2 <= most <= MOST_OBJECTS:
        raise UserError(f"most={most}: a scene has up to 2 to {MOST_OBJECTS} objects")
    rng = random.Random(f"world/{which}/{most}/{split}/{index}")
    wants_new = split != "train" and index % 2 == 1
    pool = categories(which)
    while True:
        n = rng.randint(max(least, 2) if wants_new else least, most)
        kinds = rng.sample(pool, n)
        companion = companions(which).get(kinds[0])
        if n > 1 and companion and companion not in kinds and rng.random() < 0.3:
            kinds[1] = companion
        copies = rng.randint(2, n) if n > 1 and rng.random() < 0.4 else 1
        members = [kinds[0]] * copies + kinds[copies:]
        rng.shuffle(members)
        scene = Scene(f"world/{which}/{most}/{split}/{index}", place_objects(members, rng), light(rng))
        if is_new(scene) == wants_new:
            return scene


def changed_scene(before: Scene, rng: random.Random, which: str = "nano") -> tuple[Scene, str, Object | None, Object | None]:
    """A second scene with at most one difference: (scene, 'same' | 'added' | 'removed' | 'replaced', old object, new object)."""
    present = set(before.counts)
    for _ in range(200):
        objects = list(before.objects)
        kind = rng.choice(("same", "added", "removed", "replaced", "replaced"))
        old = new = None
        if kind in ("removed", "replaced"):
            if kind == "removed" and len(objects) == 1:
                continue
            old = objects.pop(rng.randrange(len(objects)))
        if kind in ("added", "replaced"):
            category = rng.choice([c for c in rng.sample(categories(which), 8) if c not in present])
            if old:  # replaced
                new = Object(category, old.cell, old.x, old.y, old.size)
            else:
                free = sorted(set(range(9)) - {obj.cell for obj in objects})
                new = place_object(category, rng.choice(free), rng)
            objects = sorted([*objects, new], key=lambda obj: obj.cell)
        after = Scene(f"{before.key}/{kind}/{old and old.cell}/{new and (new.cell, new.category.en)}", tuple(objects),
                      before.background)
        if kind == "same" or is_new(after) == is_new(before):
            return after, kind, old, new
    raise RuntimeError(f"no change found for {before.key}")


def varied_scene(before: Scene, rng: random.Random, which: str = "nano") -> Scene:
    """A second scene in which about half of the cells differ: objects are removed, replaced or added."""
    while True:
        remaining = {obj.cell: obj for obj in before.objects if rng.random() < 0.5}
        objects = list(remaining.values())
        for cell in sorted(set(range(9)) - set(remaining)):
            was_taken = any(obj.cell == cell for obj in before.objects)
            if rng.random() < (0.5 if was_taken else 0.25):
                present = {obj.category for obj in (*before.objects, *objects)}
                fitting = (category for category in rng.sample(categories(which), 40)
                           if category not in present and not any(held_out_pair(category, obj.category) for obj in objects))
                if category := next(fitting, None):
                    objects.append(place_object(category, cell, rng))
        after = Scene(f"{before.key}/varied", tuple(sorted(objects, key=lambda obj: obj.cell)), before.background)
        if objects and not is_new(after):
            return after


if __name__ == "__main__":
    from dataset.world.words import caption, description

    sheet = Image.new("RGB", (CANVAS * 6, CANVAS * 4))
    for i in range(24):
        scene = sample_scene("train", i)
        sheet.paste(draw_scene(scene), (i % 6 * CANVAS, i // 6 * CANVAS))
        print(caption(scene, "en"), caption(scene, "zh"), description(scene, "en"))
    sheet.save(Path(sys.argv[1] if len(sys.argv) > 1 else "sheet.png"))
