"""How fast pictures are read: JPEG files to batches of pixels, by a thread and by processes.

In:  JPEG files with the texture of photos, made in a temporary folder, and rows that name them.
Out: printed and returned: pictures/s for each number of processes, with the range, in rounds that alternate.

    python -m tests.speed.loading                       640 x 480 to 224 x 224, about a minute
    python -m tests.speed.loading --size 256 --workers 2

It is the way of a run whose encoder is trained, or whose features do not fit: a row of a file, its picture (dataset/images.py),
the micro-batch (dataset/collate.py), ahead of the model by a thread (0) or by processes (dataset/workers.py). Nothing computes
beside it, and the first batches, which fill what is made ahead, are not counted.
"""

import json
import os
import statistics
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from dataset.bad_rows import BadRows
from dataset.batches import Batches
from dataset.mixture import mixture
from dataset.processor import Processor
from dataset.tokenizer import SentencePieceTokenizer
from dataset.vision.image_processor import ImageProcessor, OneRank
from model import cli
from model.registry import TEMPLATES
from tests.speed import measuring
from tests.speed.measuring import spread

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@dataclass
class Config:
    width: int = 640  # of a picture, in pixels
    height: int = 480
    size: int = 224  # sides of the square that an encoder takes
    pictures: int = 64  # files
    reads: int = 512  # pictures that a round reads; the files come again and again
    batch_size: int = 16  # pictures of a micro-batch
    workers: tuple[int, ...] = (0, 1, 2, 4)  # processes; 0: a thread
    rounds: int = 3  # counted rounds; in each, every number of processes reads once
    seed: int = 0  # of the pictures
    results: Path | None = measuring.RESULTS  # where a line of results goes; None: nowhere


def photo(width: int, height: int, generator: np.random.Generator) -> Image.Image:
    """A picture whose JPEG file has about the size of a photo's: large patches of colour, and blurred noise."""
    def noise(columns: int, rows: int) -> Image.Image:
        return Image.fromarray(generator.integers(0, 256, (rows, columns, 3), dtype=np.uint8))

    patches = noise(8, 6).resize((width, height), Image.Resampling.BICUBIC)
    fine = noise(width, height).filter(ImageFilter.GaussianBlur(2))
    values = 0.5 * np.asarray(patches, np.float32) + 1.5 * (np.asarray(fine, np.float32) - 127.5) + 64
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def write_rows(folder: Path, config: Config) -> Path:
    """A file of captions with one picture each, and the pictures beside it."""
    generator, rows = np.random.default_rng(config.seed), []
    for number in range(config.pictures):
        name = f"{number}.jpg"
        photo(config.width, config.height, generator).save(folder / name, quality=90)
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is a picture."}]
        rows.append(json.dumps({"image": name, "conversations": turns}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file


def make_batches(file: Path, config: Config) -> Batches:
    """The micro-batches of a run that shows an encoder the pixels of these pictures."""
    encoder: Any = SimpleNamespace(size=config.size, tokens=50, dim=768, has_cls=True, **CLIP)
    images = ImageProcessor(encoder, "square", 0, None, OneRank())
    processor = Processor(TEMPLATES.make("pupil"), SentencePieceTokenizer(), encoder.tokens, images, 1024)
    source = mixture([str(file)], "pretrain", None, allow_urls=False)
    return Batches(source, partial(processor.document, max_length=1024), processor.batch, batch_size=config.batch_size,
                   seed=config.seed, bad_rows=BadRows(None, len(source), 0.0))


def pictures_per_second(batches: Batches, workers: int, pictures: int) -> float:
    """The rate at which so many pictures come, once what is made ahead is in its steady state."""
    batches.workers = workers
    stream = iter(batches.stream(0, OneRank()))
    for _ in islice(stream, 2 * workers + 1):  # a process makes two micro-batches ahead, a thread one
        pass
    found: list[torch.Tensor] = []
    counted = islice(stream, -(-pictures // batches.batch_size))
    taken = measuring.seconds(lambda: found.extend(batch["pixels"][:, 0, 0, 0] for batch in counted))
    return sum(map(len, found)) / taken


def measure(config: Config) -> dict[str, Any]:
    """{"pictures_per_second": {processes: [a rate for each round]}, "bytes": of a file in the mean}."""
    measuring.prepare("cpu", 1)
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(Path(folder), config)
        sizes = [picture.stat().st_size for picture in file.parent.glob("*.jpg")]
        batches = make_batches(file, config)
        rates: dict[int, list[float]] = {workers: [] for workers in config.workers}
        for _ in range(config.rounds):
            for workers in config.workers:
                rates[workers].append(pictures_per_second(batches, workers, config.reads))
    return {"pictures_per_second": rates, "bytes": statistics.mean(sizes)}


def main(config: Config) -> None:
    found = measure(config)
    print(f"JPEG {config.width} x {config.height}, {found['bytes'] / 1000:.0f} kB, to {config.size} x {config.size}; "
          f"{os.cpu_count()} cores; pictures/s, medians [range] of {config.rounds} rounds:")
    for workers, rates in found["pictures_per_second"].items():
        print(f"{f'{workers} processes' if workers else 'a thread':12} {spread(rates, 0)}")
    measuring.add_result(config.results, "loading", asdict(config), found)


if __name__ == "__main__":
    main(cli.parse(Config))
