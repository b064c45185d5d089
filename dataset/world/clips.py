"""Clips of the embedded world: in a few frames one thing moves, appears or vanishes, or nothing happens.

In:  the name of a split and an index.  Out: a `Clip`: scenes with their times, and what happens in words.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from dataset.world.openmoji import LANGUAGES
from dataset.world.questions import named, single_objects
from dataset.world.scenes import CELL, Object, Scene, sample_scene
from dataset.world.words import PLACES

WAYS = {(0, -1): ("left", "左"), (0, 1): ("right", "右"), (-1, 0): ("up", "上"), (1, 0): ("down", "下")}  # (rows, columns)
STAYS = ("it stays", "不动")
EVENTS = {"moves": 7, "appears": 2, "vanishes": 2, "nothing": 1}  # how often each


@dataclass(frozen=True)
class Clip:
    """Frames with their times in seconds; `event` of EVENTS happens to `thing`, which goes `way` to the cell `end`."""

    frames: tuple[tuple[float, Scene], ...]
    scene: Scene  # with all things, in their first places
    event: str
    thing: Object
    way: tuple[int, int]
    end: int

    def happens(self, language: str) -> str:
        """What happens: "the fox moves to the top right"."""
        thing, one, place = self.thing.category, named(self.thing.category, language), PLACES[language][self.end]
        if language == "zh":
            return {"moves": f"{one}移到{place}", "appears": f"{place}出现{one}", "vanishes": f"{place}的{one}消失",
                    "nothing": "什么也没有发生"}[self.event]  # fmt: skip
        return {"moves": f"the {thing.en} moves to the {place}", "appears": f"{one} appears at the {place}",
                "vanishes": f"{one} vanishes at the {place}", "nothing": "nothing happens"}[self.event]  # fmt: skip

    def goes(self, obj: Object, language: str) -> str:
        """Which way a thing goes: "left"."""
        words = WAYS[self.way] if self.event == "moves" and obj == self.thing else STAYS
        return words[LANGUAGES.index(language)]

    def fate(self, obj: Object, language: str) -> str:
        """What becomes of a thing: "left", "appears", "vanishes"; "it stays" where nothing does."""
        if obj == self.thing and self.event in ("appears", "vanishes"):
            return self.event if language == "en" else {"appears": "出现", "vanishes": "消失"}[self.event]
        return self.goes(obj, language)


def clip(split: str, i: int) -> Clip:
    """Clip i of a split, made from scene i with two to four things, in three to five frames.

    A path and its way back are equally likely, and so are the moments at which it begins: no single frame tells a direction.
    """
    rng, scene = random.Random(f"clip/{split}/{i}"), sample_scene(split, i, most=4, least=2)
    event = rng.choices(tuple(EVENTS), tuple(EVENTS.values()))[0]
    routes = [(obj, way, steps) for obj in single_objects(scene) for way, steps in paths(scene, obj)]
    if event == "moves" and not routes:
        event = rng.choice(("appears", "vanishes"))
    if event == "moves":
        ways = {way: [route for route in routes if route[1] == way] for way in WAYS}
        thing, way, steps = rng.choice(rng.choice([found for found in ways.values() if found]))
        moved = [step(thing, way, k) for k in range(steps + 1)]
        scenes, end = [with_object(scene, thing, one) for one in moved], moved[-1].cell
    else:
        thing = rng.choice(scene.objects)
        way, end, without = (0, 0), thing.cell, with_object(scene, thing, None)
        scenes = {"appears": [without, scene], "vanishes": [scene, without], "nothing": [scene]}[event]
    extra = rng.randint(3, 5) - len(scenes)
    before = rng.randint(0, extra)  # how long the first and the last scene stay
    shown = [scenes[0]] * before + scenes + [scenes[-1]] * (extra - before)
    pace = rng.choice((0.2, 0.5, 1, 2))  # seconds between frames
    return Clip(tuple((pace * k, one) for k, one in enumerate(shown)), scene, event, thing, way, end)


def paths(scene: Scene, obj: Object) -> list[tuple[tuple[int, int], int]]:
    """(way, steps) of an object over free cells: one or two straight steps of a cell."""
    row, column = divmod(obj.cell, 3)
    taken, found = {other.cell for other in scene.objects}, []
    for way in WAYS:
        for steps in (1, 2):
            r, c = row + steps * way[0], column + steps * way[1]
            if not (0 <= r < 3 and 0 <= c < 3) or 3 * r + c in taken:
                break
            found.append((way, steps))
    return found


def step(obj: Object, way: tuple[int, int], steps: int) -> Object:
    """The object after some steps of a cell."""
    down, right = steps * way[0], steps * way[1]
    return dataclasses.replace(obj, cell=obj.cell + 3 * down + right, x=obj.x + right * CELL, y=obj.y + down * CELL)


def with_object(scene: Scene, old: Object, new: Object | None) -> Scene:
    """The scene with another object in the place of one, or without it."""
    objects = [obj for obj in scene.objects if obj != old] + ([new] if new else [])
    return Scene(f"{scene.key}/clip", tuple(sorted(objects, key=lambda obj: obj.cell)), scene.background)
