"""How fast a training step is: the packed form of this repository against ordinary padded training, side by side.

In:  fixed pretraining-like rows (about 93 tokens: an image's 50, a question, a caption of about 18 learned ones), random weights.
Out: printed: samples/s of both forms, their ratio with its range, the machine's GEMM rate in the same minutes, memory.

    python -m tests.speed                               two threads, `small`, about two minutes
    python -m tests.speed --ladder --threads 1          what each step from the padded form to ours brings

A form is one leg. Legs alternate in one process, so that whatever else the machine does falls on all of them; each has its own
copy of the same weights and sees the same rows, and their first losses must agree. A step is that of 1-pretrain_vlm.py: forward,
backward, clip, update. Reading and resizing pictures is left out of every leg: a step starts from tensors.
Ratios travel to another machine; seconds do not. tests/test_speed.py gates on what is counted, not timed.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.chat import Document
from dataset.collate import Images, collate, pad
from dataset.images import Picture
from model import cli
from model.config import PRESETS, VLMConfig
from model.devices import DTYPES, use_wide_vectors
from model.encoder import Encoder
from model.llm.attention import PackedSequences
from model.losses import IGNORE, next_token_targets
from model.optimizer import clip_gradients, make_optimizer
from model.vlm import VLM, count_parameters
from tests.speed.measuring import added_memory, gemm_rate, spread

IMAGE, PAD = 4, 2  # ids of the placeholder and of padding; any would do


@dataclass
class Config:
    preset: str = "small"  # nano | small | base: the language model's size
    encoder: str = "clip_random:size=224,patch=32,width=768,layers=12,heads=12"  # ViT-B/32: 50 tokens an image
    threads: int = 2  # of PyTorch; 1 when anything else runs on the machine
    rounds: int = 3  # counted rounds; in each, every leg runs once
    steps: int = 2  # steps of a leg, each on a micro-batch of its own
    rows: int = 8  # rows a micro-batch
    maximum: int = 512  # what the padded form pads every row to
    ladder: bool = False  # also the forms between the two
    optimizer: str = "adamw"  # adamw | muon, which stage 1 takes by itself
    dtype: str = "fp32"  # fp32 | bf16
    seed: int = 3  # of the rows and the weights; 3 draws 16 rows of 92.4 tokens, 18.6 learned: near the mean of many


@dataclass(frozen=True)
class Form:
    """One way to compute the same step."""

    name: str
    padded: str  # "maximum": rows padded to a fixed length; "longest": to the micro-batch's longest; "": no padding
    everywhere: bool  # logits at every position, padding too; otherwise where something is learned
    cached: bool  # the frozen encoder's features come from a cache; otherwise it runs at every step


LADDER = (
    Form("padded to the maximum", "maximum", everywhere=True, cached=False),
    Form("+ padded to the longest", "longest", everywhere=True, cached=False),
    Form("+ learned positions only", "longest", everywhere=False, cached=False),
    Form("+ cached features", "longest", everywhere=False, cached=True),
    Form("packed (ours)", "", everywhere=False, cached=True),
)
NAIVE, OURS = LADDER[0], LADDER[-1]


# ---------------------------------------------------------------- rows and batches


def make_documents(count: int, image_tokens: int, vocabulary: int, seed: int) -> list[Document]:
    """Rows of one image, a question of 18-32 tokens and a caption whose length is log-normal, 18 in the mean, at most 80."""
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for index in range(count):
        question = int(torch.randint(18, 33, (1,), generator=generator))
        caption = int(torch.empty(1).log_normal_(2.8, 0.42, generator=generator).round().clamp(5, 80))
        text = torch.randint(IMAGE + 1, vocabulary, (question + caption,), generator=generator).tolist()
        learn = [False] * (image_tokens + question) + [True] * caption
        picture = Picture(f"picture {index}", load=None)  # only its key is used: a table holds its tensor
        documents.append(Document(f"row {index}", [IMAGE] * image_tokens + text, learn, (picture,)))
    return documents


def image_tables(documents: list[Document], encoder: Encoder, seed: int) -> dict[bool, Images]:
    """How a batch gets its images: {cached: pictures -> features (N, P, D), not cached: pictures -> pixels (N, 3, S, S)}."""
    generator = torch.Generator().manual_seed(seed)
    pixels, features = {}, {}
    for (picture,) in (document.pictures for document in documents):
        pixels[picture] = torch.randn(3, encoder.size, encoder.size, generator=generator)
        with torch.no_grad():
            features[picture] = encoder(pixels[picture][None])[0].half().float()  # a cache keeps fp16
    return {
        cached: lambda pictures, table=table: torch.stack([table[picture] for picture in pictures])
        for cached, table in ((True, features), (False, pixels))
    }


def make_batch(documents: list[Document], form: Form, maximum: int, tables: dict[bool, Images]) -> dict:
    """The micro-batch as this form computes it. In a padded one padding is part of the row: every position is computed."""
    images = tables[form.cached]
    if not form.padded:
        return collate(documents, images)
    batch = pad(documents, images, PAD)
    rows, longest = batch["input_ids"].shape
    length = maximum if form.padded == "maximum" else longest
    if longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into --maximum {length}")
    batch["input_ids"] = F.pad(batch["input_ids"], (0, length - longest), value=PAD)
    batch["labels"] = F.pad(batch["labels"], (0, length - longest), value=IGNORE)
    batch["position_ids"] = torch.arange(length).expand(rows, length)
    batch["document_ids"] = torch.arange(rows)[:, None].expand(rows, length)
    return batch


# ---------------------------------------------------------------- one leg


def attend_rows(q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences) -> Tensor:
    """What a padded implementation does: rows of one length are padded already, so nothing is copied."""
    q, k, v = (x.unflatten(0, (packed.count, packed.longest)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


class Leg:
    """A form with its own copy of the weights, its optimizer and its batches."""

    def __init__(self, form: Form, model: VLM, batches: list[dict], config: Config):
        self.form, self.batches, self.dtype = form, batches, DTYPES[config.dtype]
        self.model = VLM(model.config, encoder=model.encoder)  # the encoder is frozen: one serves all legs
        self.model.load_state_dict(model.state_dict())
        self.optimizer = make_optimizer(self.model, config.optimizer, lr=4e-4, weight_decay=0.05, dtype=self.dtype)
        if form.padded:
            for block in self.model.llm.blocks:
                block.self_attn.attend = attend_rows

    def loss(self, batch: dict) -> Tensor:
        """The mean over learned tokens."""
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        learned = targets != IGNORE
        wanted = torch.ones_like(learned) if self.form.everywhere else learned
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            logits = self.model(batch, wanted)
        return F.cross_entropy(logits.float(), targets[wanted], ignore_index=IGNORE, reduction="sum") / learned.sum()

    def step(self, batch: dict) -> float:
        """One update; returns the loss before it."""
        loss = self.loss(batch)
        loss.backward()
        clip_gradients(self.model, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self) -> float:
        """How long one pass over the batches takes."""
        start = time.perf_counter()
        for batch in self.batches:
            self.step(batch)
        return time.perf_counter() - start


def make_legs(config: Config, model_config: VLMConfig) -> list[Leg]:
    """A leg for each form, all with the same weights and rows."""
    torch.manual_seed(config.seed)
    model = VLM(model_config)
    model.encoder.requires_grad_(False)
    documents = make_documents(config.steps * config.rows, model.image_tokens, model_config.llm.vocab_size, config.seed)
    tables = image_tables(documents, model.encoder, config.seed)
    parts = [documents[start : start + config.rows] for start in range(0, len(documents), config.rows)]
    return [
        Leg(form, model, [make_batch(part, form, config.maximum, tables) for part in parts], config)
        for form in (LADDER if config.ladder else (NAIVE, OURS))
    ]


# ---------------------------------------------------------------- measuring


def step_memory(leg: Leg) -> float:
    """The most bytes that a step adds to the weights and the optimizer's state."""
    return added_memory(lambda: leg.step(leg.batches[0]))


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    use_wide_vectors()
    legs = make_legs(config, replace(PRESETS[config.preset], encoder=config.encoder, image_token_id=IMAGE))
    model, packed = legs[0].model, legs[-1].batches
    rows = config.steps * config.rows
    tokens = sum(batch["input_ids"].numel() for batch in packed) / rows
    learned = sum(int((batch["labels"] != IGNORE).sum()) for batch in packed) / rows
    print(f"{config.preset}: {count_parameters(model.llm, model.connector):,} parameters trained, "
          f"{count_parameters(model.encoder):,} frozen; {config.optimizer}, {config.dtype}, "
          f"{config.threads} thread(s), PyTorch {torch.__version__}\n"
          f"{config.steps} micro-batches of {config.rows} rows, {tokens:.1f} tokens a row, {learned:.1f} learned")

    # The discarded first leg of each: the loss of a first step, the memory of a second.
    losses, bytes_of = [leg.step(leg.batches[0]) for leg in legs], [step_memory(leg) for leg in legs]
    for leg, loss in zip(legs, losses):
        difference = abs(loss - losses[0]) / losses[0]
        print(f"loss {loss:.6f}  relative difference {difference:.1e}  {leg.form.name}")
        limit = 1e-4 if config.dtype == "fp32" else 1e-2
        assert difference < limit, f"{leg.form.name} computes another loss than {legs[0].form.name}: {loss} and {losses[0]}"

    rates, seconds = [], [[] for _ in legs]
    for number in range(1, config.rounds + 1):
        rates.append(gemm_rate())
        for leg, times in zip(legs, seconds):
            times.append(leg.seconds())
        latest = ", ".join(f"{times[-1]:.2f}" for times in seconds)
        print(f"round {number}: GEMM {rates[-1]:.0f} GFLOP/s; seconds {latest}", flush=True)

    print(f"\nGEMM rate {spread(rates, 0)} GFLOP/s; medians [range] of {config.rounds} rounds:\n"
          "samples/s               against padded          memory of a step")
    for leg, times, peak in zip(legs, seconds, bytes_of):
        ratio = statistics.median(seconds[0]) / statistics.median(times)
        ratios = [before / after for before, after in zip(seconds[0], times)]
        print(f"{spread([rows / value for value in times], 2):22}  x{ratio:.2f} [{min(ratios):.2f}-{max(ratios):.2f}]".ljust(48)
              + f"{peak / 1e9:.2f} GB  {leg.form.name}")


if __name__ == "__main__":
    main(cli.parse(Config))
