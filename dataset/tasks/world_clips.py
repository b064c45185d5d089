"""Short clips of the world: in three to five frames one thing moves, appears or vanishes, or nothing happens.

"What happens?" "the fox moves to the top right". "Which way does the fox go?" "left". Each frame stands behind its time, as the
frames of a video do (dataset/vision/video.py). One frame alone tells neither: the control `single_frame` asks about one of them.

    python 2-sft_vlm.py --init out/sft --out out/sft-clips --data world_clips world:0.2 --bench world_clips,world
    python 4-eval_chat.py --model out/sft-clips --bench world_clips,world
"""
from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from dataset.chat import Conversation, Message
from dataset.images import Picture
from dataset.tasks import Example, Generated, Task, dialogue, guessing, means
from dataset.tasks.world import picture
from dataset.vision.video import timed
from dataset.world import inventories
from dataset.world.clips import Clip, clip
from dataset.world.openmoji import LANGUAGES
from dataset.world.questions import single_objects
from dataset.world.scenes import Object
from dataset.world.wordings import opened
from model.registry import TASKS

ASK: dict[str, dict[str, tuple[str, ...]]] = {  # the plainest words first
    "happens": {"en": ("What happens?", "What happens in the clip?", "What is going on?", "What changes?", "Describe the clip."),
                "zh": ("发生了什么？", "视频里发生了什么？", "有什么变化？", "描述这段视频。")},
    "way": {"en": ("Which way does {it} go?", "Where does {it} go?", "In which direction does {it} move?"),
            "zh": ("{it}往哪边走？", "{it}向哪个方向移动？", "{it}去哪边？")},
    "follow": {"en": ("Follow each.",), "zh": ("跟踪每个。",)},
}  # fmt: skip
FOLLOW = 0.4  # share of the training rows that are an inventory of all things


def it(obj: Object, language: str) -> str:
    return f"the {obj.category.en}" if language == "en" else obj.category.zh


def question(kind: str, language: str, thing: Object, rng: random.Random) -> str:
    """A question of ASK as somebody types it."""
    return opened(rng.choice(ASK[kind][language]).format(it=it(thing, language)), language, "train", rng)


@TASKS.register("world_clips")
class WorldClips(Task):
    """What happens in a clip, and which way a thing goes, in English and Chinese.

    rows, clips   training rows of stage 2, and the clips they share
    one_frame     show one frame of each clip alone: what can be learned from it is what the task does not need a clip for
    """

    size = 300  # clips of the test set

    def __init__(self, rows: int = 10_000, clips: int = 3_000, one_frame: bool = False):
        self.rows, self.clips, self.one_frame = rows, clips, one_frame

    def train(self, stage: str) -> Generated | None:
        return Generated(self.rows, self.row) if stage == "sft" else None

    def shown(self, seen: Clip, i: int) -> list[str | Picture]:
        """The frames of a clip, each behind its time."""
        frames = [random.Random(f"frame/{i}").choice(seen.frames)] if self.one_frame else seen.frames
        return timed([(seconds, picture(scene)) for seconds, scene in frames])

    def row(self, i: int) -> Conversation:
        """A clip with an inventory of what becomes of each thing, or with what happens and the ways of one or two things."""
        rng, seen = random.Random(f"world_clips/{i}"), clip("train", i % self.clips)
        id, language, parts = f"world_clips/train/{i}", rng.choice(LANGUAGES), self.shown(seen, i)
        things = single_objects(seen.scene)
        rng.shuffle(things)
        if len(things) > 1 and rng.random() < FOLLOW:
            items = [(it(obj, language), seen.fate(obj, language)) for obj in things]
            return inventories.conversation(id, parts, ASK["follow"][language][0], inventories.joined(items, language))
        turns = [(question("happens", language, seen.thing, rng), seen.happens(language))]
        things.sort(key=lambda obj: obj != seen.thing)  # the one that moves is asked about
        asked = [obj for obj in things[:2] if obj != seen.thing or seen.event in ("moves", "nothing")]
        turns += [(question("way", language, obj, rng), seen.goes(obj, language)) for obj in asked]
        rng.shuffle(turns)
        return dialogue(id, parts, turns)

    def examples(self, split: str, n: int) -> list[Example]:
        """Of each of n clips what happens, and of those where a thing moves its way; tags: language, frames of the clip."""
        examples = []
        for i in range(n):
            seen, rng, language = clip(split, i), random.Random(f"world_clips/{split}/{i}"), LANGUAGES[i // 2 % 2]
            answers = {"happens": seen.happens(language)}
            still = [obj for obj in single_objects(seen.scene) if obj != seen.thing]
            thing = rng.choice(still) if still and rng.random() < 0.2 else seen.thing
            if seen.event == "moves":
                answers["way"] = seen.goes(thing, language)
            for kind, answer in answers.items():
                text = question(kind, language, thing, rng)
                prompt = dialogue(f"world_clips/{split}/{i}/{kind}", self.shown(seen, i), [(text, "")])
                examples.append(Example(prompt, answer, kind, (language, seen.event), ASK[kind][language][0]))
        return examples

    def controls(self, examples: Sequence[Example]) -> dict[str, list[Example]]:
        """single_frame: the same questions about one frame of the clip, any of them."""
        single = []
        for example in examples:
            *parts, text = example.prompt.messages[0].parts
            time = 2 * random.Random(example.prompt.id).randrange(len(parts) // 2)
            prompt = dataclasses.replace(example.prompt, messages=(Message("user", (*parts[time:time + 2], text)),))
            single.append(dataclasses.replace(example, prompt=prompt))
        return {"single_frame": single}

    def summary(self, examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
        """exact: all questions; by kind, language and event."""
        return {"exact": sum(scores) / len(scores),
                **means(examples, scores, lambda example: [example.kind, *example.tags])}

    def guess(self, examples: Sequence[Example]) -> float:
        """The score of the most common answer to each kind of question, among 300 validation clips."""
        return guessing(examples, self.examples("val", 300))
