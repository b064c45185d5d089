"""Legs in processes of their own: the code of others (peer_worker.py), from a folder that the user names.

In:  --peer minimind-v:PATH or nanovlm:PATH, the benchmark's documents and sizes.  Out: `Times` of a round, memory.

A worker stays warm between rounds, and does one round at a time, when it is asked to: nothing else of the benchmark runs then.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.config import VLMConfig
from model.devices import DTYPES
from model.registry import UserError, option_and_value, split_options
from tests.speed.legs import Leg, Times
from tests.speed.rows import make_documents

ROOT = Path(__file__).parents[2]
NAMES = ("minimind-v", "nanovlm")
SIZES = ("size", "patch", "width", "layers", "heads")  # of an encoder


@dataclass(frozen=True)
class Task:
    """What a worker needs to know, as JSON can say it."""

    documents: list[tuple[list[int], list[bool]]]  # token ids, and which are learned
    image_tokens: int  # placeholders of a picture
    llm: dict[str, Any]  # model.config.LLMConfig
    encoder: dict[str, int]  # size, patch, width, layers, heads of a ViT
    rows: int  # of a micro-batch
    stage: str
    maximum: int  # tokens
    lr: float
    threads: int
    device: str
    dtype: str  # fp32 | bf16
    same_settings: bool  # of torch and of the allocator as here


def name_and_commit(spec: str) -> str:
    """NAME:PATH -> NAME, and the commit of the code there if it is a clone."""
    name, _, folder = spec.partition(":")
    asked = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return f"{name} {asked.stdout.strip()}".strip()


def task(config: Any, stage: str, shape: VLMConfig, leg: Leg) -> Task:
    """What a peer needs to know to train as a leg does: the same sizes, the same rows."""
    encoder = {name: int(value) for name, value in map(option_and_value, split_options(shape.encoder.partition(":")[2]))}
    if set(encoder) != set(SIZES) or leg.model.image_tokens != (encoder["size"] // encoder["patch"]) ** 2 + 1:
        raise UserError(f"peers need an encoder clip_random:{'=..,'.join(SIZES)}=.. and a connector that keeps all its tokens, "
                        f"as --preset small has, not {shape.encoder} and {shape.connector}")
    documents = make_documents(leg.stage, config.rows * config.steps, leg.model.image_tokens, shape.llm.vocab_size, config.seed)
    return Task(
        [(document.input_ids, document.learn) for document in documents], leg.model.image_tokens, asdict(shape.llm), encoder,
        config.rows, stage, config.maximum or leg.stage.maximum, leg.stage.lr, config.threads, leg.device.type,
        next(name for name, dtype in DTYPES.items() if dtype == leg.dtype), config.same_settings)


class Peer:
    """The process of a peer: `round`, as a leg has it, and the memory of its first steps."""

    def __init__(self, spec: str, task: Task):
        self.name, _, folder = spec.partition(":")
        if self.name not in NAMES or not Path(folder).is_dir():
            known = " or ".join(f"{name}:PATH" for name in NAMES)
            raise UserError(f"--peer is {known} with the folder of its code, not {spec!r}")
        command = [sys.executable, "-m", "tests.speed.peer_worker", self.name, str(Path(folder).resolve())]
        many = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}  # oneDNN's own default
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=many)
        self.tell(asdict(task))

    def tell(self, message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"the process of {self.name} ended with status {self.process.wait()}: what it said stands above")
        return json.loads(line)

    def warm_up(self) -> tuple[float, float, float]:
        """(loss of its first step, bytes that a step adds, the most bytes that the process held)."""
        self.tell("warm up")
        return tuple(self.hear())

    def round(self) -> Times:
        self.tell("round")
        return Times(*self.hear())

    def close(self) -> None:
        """End the process: it reads no further message."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
