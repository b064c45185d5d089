"""Examples of the page: a question of every task, and what is right about a message.

In:  the tasks and the embedded world.  Out: `Shown` examples; the `Truth` about a message that uses their pictures.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dataset.chat import Message
from dataset.images import Picture, from_image
from dataset.tasks import Example, Task, dialogue
from dataset.tasks.world import picture
from dataset.vision.video import FRAMES, timed
from dataset.world import questions
from dataset.world.clips import clip
from dataset.world.questions import Question
from dataset.world.scenes import Scene, changed_scene, sample_scene
from dataset.world.words import description
from model.registry import TASKS

PLAIN = {  # task: the question in plain words
    "arithmetic": "What is the sum of the dice", "easy_vqa": "what is the red", "geometry": "What is the hypotenuse?",
    "sokoban": "Push the boxes",
}  # fmt: skip
TAUGHT = 7  # of the examples, by the default commands


@dataclass(frozen=True)
class Shown:
    """An example of the page.

    task     what knows how right an answer is
    scenes   those that its pictures show, if they are of the embedded world
    """

    task: Task
    example: Example
    scenes: tuple[Scene, ...] = ()

    @functools.cached_property
    def keys(self) -> list[str]:
        """The pixels of its pictures, which a copy of the file has as well."""
        return pixel_keys(self.example.prompt.messages[-1])

    def message(self, folder: Path, number: int) -> dict:
        """The message as gradio takes it, with its pictures drawn into the folder: frames with their times are one animation."""
        *shown, text = self.example.prompt.messages[-1].parts
        images = [part.load() for part in shown if isinstance(part, Picture)]
        times = [float(part.split()[0]) for part in shown if isinstance(part, str)]
        files = [str(folder / f"example-{number}-{k}.png") for k in range(1 if times else len(images))]
        if times:
            images[0].save(files[0], save_all=True, append_images=images[1:], duration=1000 * (times[1] - times[0]))
        else:
            for file, image in zip(files, images, strict=True):
                image.save(file)
        return {"text": text, "files": files}


def pixel_keys(message: Message) -> list[str]:
    return [from_image(part.load()).key for part in message.parts if not isinstance(part, str)]


def examples() -> list[Shown]:
    """Questions of the test split: about scenes, one of them with two pictures; then one of each other task, and of a clip."""
    rng = random.Random(0)
    one, two, three, four = (sample_scene("test", index) for index in range(4))
    changed, change, old, new = changed_scene(four, rng)
    world = TASKS.make("world")

    def of_world(question: Question, *scenes: Scene) -> Shown:
        prompt = dialogue("page", [picture(scene) for scene in scenes], [(question.text, "")])
        return Shown(world, Example(prompt, question.answer, question.kind, (question.language,)), scenes)

    return [
        of_world(questions.account("caption", one, "en"), one),
        of_world(questions.what(three, "en", rng, "nano"), three),
        of_world(questions.count(two, "zh", rng, "nano"), two),
        of_world(questions.account("description", three, "zh"), three),
        of_world(questions.difference(change, old, new, "en"), four, changed),
        *(of_task(*name) for name in PLAIN.items()),
        of_clip(),
    ]


def of_task(name: str, beginning: str) -> Shown:
    """The first question of a task that is about a picture and begins so."""
    task = TASKS.make(name)
    found = next(example for example in task.examples("test", 50)
                 if example.prompt.pictures and example.prompt.messages[-1].parts[-1].startswith(beginning))  # fmt: skip
    return Shown(task, found)


def of_clip() -> Shown:
    """What happens in the first clip where a thing moves in every frame: so none is left out of the file or of the message."""
    moving = (one for one in (clip("test", index) for index in itertools.count()) if one.event == "moves")
    seen = next(one for one in moving if len({scene for _, scene in one.frames}) == len(one.frames) <= FRAMES)
    frames = timed([(seconds, picture(scene)) for seconds, scene in seen.frames])
    prompt = dialogue("page", frames, [("What happens?", "")])
    return Shown(TASKS.make("world_clips"), Example(prompt, seen.happens("en"), "happens"))


class Truth(NamedTuple):
    """What is right about a message: the example whose question it is, if it is one, and what to show."""

    shown: Shown | None
    text: str


def truth(message: Message, examples: Sequence[Shown]) -> Truth:
    """The answer of the example with the same pictures and words; for other words what its scenes show; else nothing."""
    keys = pixel_keys(message)
    same = [shown for shown in examples if keys and shown.keys == keys]
    for shown in same:
        if message.text.strip() == shown.example.prompt.messages[-1].text:
            return Truth(shown, shown.example.answer)
    scenes = next((shown.scenes for shown in same), ())
    return Truth(None, " / ".join(description(scene, "en") for scene in scenes))
