"""How the cost of a training step grows: with rows in the file, tokens a picture, tokens a row, rows a micro-batch, model size.

In:  random tokens and features, random weights.  Out: growth.png in --out, and the same numbers printed and returned.

    python -m tests.speed.growth --out FOLDER           two threads, about two minutes

One axis at a time; on the others a point has 8 rows a micro-batch, 50 tokens a picture, about 93 tokens a row, and the model
`small`. Each point is one step in the packed form with stored features and AdamW, after another that is not counted: its seconds,
and the most memory that it adds to the weights. Of rows in the file: the seconds until the file's first micro-batch is made, and
the memory of its rows; a step does not know how many there are.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from dataset.bad_rows import BadRows
from dataset.batches import Batches
from dataset.chat import Document
from dataset.collate import collate
from dataset.figures.stage import STYLE
from dataset.images import Picture
from dataset.mixture import mixture
from dataset.processor import Processor
from dataset.tokenizer import SentencePieceTokenizer
from dataset.vision.image_processor import OneRank
from model import cli
from model.config import preset
from model.devices import pick_dtype
from model.registry import TEMPLATES
from model.vlm import VLM
from tests.speed import measuring
from tests.speed.legs import OURS, Leg
from tests.speed.rows import IMAGE, STAGES, make_documents

VOCABULARY = 6400
PATCH = 32  # pixels a side; a picture of n x n patches has n * n + 1 tokens


@dataclass
class Config:
    out: Path = Path("out/growth")  # the folder of the figure
    rows_in_file: tuple[int, ...] = (1_000, 10_000, 100_000)
    patches: tuple[int, ...] = (4, 7, 14, 24)  # a side of a picture: 17, 50, 197 and 577 tokens
    length: tuple[int, ...] = (128, 512, 2048, 4096)  # tokens of the only row of a micro-batch
    rows: tuple[int, ...] = (1, 8, 32)  # of a micro-batch
    size: tuple[str, ...] = ("nano", "small", "base")
    preset: str = "small"  # the model of the other axes
    device: str = "cpu"  # cpu | cuda
    dtype: str = "auto"  # auto | fp32 | bf16, as in the scripts
    threads: cli.Count = 2  # of PyTorch; 1 when anything else runs on the machine
    results: Path | None = measuring.RESULTS  # where a line of results goes; None: nowhere


@dataclass(frozen=True)
class Point:
    """A value on an axis, and what it costs: seconds and bytes."""

    axis: str
    value: float
    seconds: float
    memory: float


def make_model(name: str, patches: int) -> VLM:
    """A model for pictures of so many patches a side. Its encoder never runs: features are stored."""
    encoder = f"clip_random:size={PATCH * patches},patch={PATCH},width=768,layers=1,heads=12"
    torch.manual_seed(0)
    model = VLM(preset(name, vocab_size=VOCABULARY, image_token_id=IMAGE, encoder=encoder, connector="linear"))
    model.encoder.requires_grad_(False)
    return model


def one_row(image_tokens: int, length: int) -> Document:
    """A row of one picture and text, of which the last fifth is learned."""
    text = torch.randint(IMAGE + 1, VOCABULARY, (length - image_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    learned = len(text) // 5
    return Document("row", [IMAGE] * image_tokens + text, [False] * (length - learned) + [True] * learned,
                    (Picture("picture", load=None),))  # type: ignore[arg-type]


def step_cost(config: Config, model: VLM, documents: list[Document]) -> tuple[float, float]:
    """(seconds, bytes) of a training step on a micro-batch of these documents."""
    device = measuring.prepare(config.device, config.threads)
    shape = (model.encoder.tokens, model.encoder.dim)
    batch = collate(documents, lambda pictures: torch.randn(len(pictures), *shape))
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    leg = Leg(OURS, STAGES["pretrain"], model.to(device), [batch], pick_dtype(config.dtype, device, model.llm.dim), "adamw")
    leg.step(batch)
    memory = measuring.added_memory(lambda: leg.step(batch), device)
    return measuring.seconds(lambda: leg.step(batch), device), memory


def file_cost(rows: int) -> tuple[float, float]:
    """(seconds, bytes) from opening a file of so many captions to its first micro-batch."""
    processor = Processor(TEMPLATES.make("pretrain"), SentencePieceTokenizer(), 0, images=None, context_length=1024)
    batches: list[Batches] = []

    def read() -> None:
        source = mixture([str(file)], "pretrain", None, allow_urls=False)
        batches.append(Batches(source, partial(processor.document, max_length=1024), processor.batch, batch_size=8, seed=0,
                               bad_rows=BadRows(None, len(source), 0.0)))
        next(batches[0].stream(0, OneRank()))

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as out:
            out.writelines(json.dumps({"text": f"a tree and {i} small dogs"}) + "\n" for i in range(rows))
        before = measuring.memory("VmRSS")
        taken = measuring.seconds(read)
        return taken, max(0, measuring.memory("VmRSS") - before)


def points(config: Config) -> Iterator[Point]:
    """Every point, measured one after another."""
    documents = partial(make_documents, STAGES["pretrain"], vocabulary=VOCABULARY, seed=0)
    for rows in config.rows_in_file:
        yield Point("rows in the file", rows, *file_cost(rows))
    for patches in config.patches:
        model = make_model(config.preset, patches)
        yield Point("tokens a picture", model.image_tokens, *step_cost(config, model, documents(8, model.image_tokens)))
    model = make_model(config.preset, 7)
    for length in config.length:
        yield Point("tokens a row", length, *step_cost(config, model, [one_row(model.image_tokens, length)]))
    for rows in config.rows:
        yield Point("rows a micro-batch", rows, *step_cost(config, model, documents(rows, model.image_tokens)))
    for size in config.size:
        model = make_model(size, 7)
        weights = sum(weight.numel() for part in (model.llm, model.connector) for weight in part.parameters())
        yield Point("weights", weights, *step_cost(config, model, documents(8, model.image_tokens)))


def short(value: float) -> str:
    """26,000,000 as 26M, 10,000 as 10k, 4,096 as 4096."""
    return f"{value / 1e6:.0f}M" if value >= 1e6 else f"{value / 1e3:.0f}k" if value % 1000 == 0 else f"{value:.0f}"


def draw(found: list[Point]) -> Figure:
    """Seconds above and memory below, an axis a column. Both grow as x where a line has the slope of the grey one."""
    axes = list(dict.fromkeys(point.axis for point in found))
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(axes), 4.6), layout="constrained")
        panels = figure.subplots(2, len(axes), squeeze=False, sharex="col")
        for column, axis in zip(panels.T, axes):
            line = sorted((point for point in found if point.axis == axis), key=lambda point: point.value)
            x = [point.value for point in line]
            for panel, y in zip(column, ([point.seconds for point in line], [point.memory / 1e6 for point in line])):
                panel.loglog(x, [y[-1] * value / x[-1] for value in x], linewidth=1, color="0.6")
                panel.loglog(x, y, linewidth=1.5, marker="o", markersize=4)
            column[1].set_xlabel(axis)
            column[1].set_xticks(x, [short(value) for value in x])
            column[1].xaxis.set_minor_locator(NullLocator())
        panels[0, 0].set_ylabel("seconds")
        panels[1, 0].set_ylabel("memory, MB")
    return figure


def measure(config: Config) -> dict[str, Any]:
    """{"points": [{"axis", "value", "seconds", "memory"}]}; each is printed when it is measured."""
    found = []
    print(f"{'':20}{'':>12}  seconds   memory, MB")
    for point in points(config):
        found.append(point)
        print(f"{point.axis:20}{point.value:>12,}{point.seconds:9.3f}{point.memory / 1e6:13.0f}", flush=True)
    return {"points": [asdict(point) for point in found]}


def main(config: Config) -> None:
    found = measure(config)
    config.out.mkdir(parents=True, exist_ok=True)
    file = config.out / "growth.png"
    with rc_context(STYLE):
        draw([Point(**point) for point in found["points"]]).savefig(file, dpi=110)
    print(f"wrote {file}")
    measuring.add_result(config.results, "growth", asdict(config), found, measuring.prepare(config.device, config.threads))


if __name__ == "__main__":
    main(cli.parse(Config))
