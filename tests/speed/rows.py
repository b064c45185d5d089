"""What the benchmark trains on: rows with the lengths of real ones, random tokens, and pictures that are tensors already.

In:  a stage and a seed.  Out: documents; batches of them, packed or padded.

    pretrain   a picture's 50 tokens, a question, a caption: about 93 tokens, 18 of them learned
    sft        a picture's 50 tokens, a question, an answer: about 185 tokens, 101 of them learned
    dpo        rows of sft in pairs: one question and picture, two answers
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.chat import Document
from dataset.collate import Images, collate, pad
from dataset.images import Picture
from model.encoder import Encoder
from model.losses import IGNORE
from model.registry import UserError

IMAGE, PAD = 4, 2  # ids of the placeholder and of padding; any would do


@dataclass(frozen=True)
class Stage:
    """The lengths of its rows, and what its script trains with."""

    question: tuple[int, int]  # tokens, each number equally likely
    answer: float  # tokens in the mean; their lengths are log-normal
    deviation: float  # of the lengths' logarithms
    longest: int  # tokens of an answer
    maximum: int  # what an implementation that pads every row alike pads to
    optimizer: str = "muon"  # the script's default
    batch_size: int = 40  # rows an update, likewise
    lr: float = 4e-4  # of small and base
    weight_decay: float = 0.01
    pairs: bool = False  # neighbours answer one question


STAGES = {
    "pretrain": Stage((18, 32), 18, 0.42, 80, 512),
    "sft": Stage((24, 44), 101, 0.6, 500, 768),
    "dpo": Stage((24, 44), 101, 0.6, 500, 768, "adamw", 16, lr=2e-5, weight_decay=0.0, pairs=True),
}


def make_documents(stage: Stage, count: int, image_tokens: int, vocabulary: int, seed: int) -> list[Document]:
    """Rows of one picture, a question and an answer, which alone is learned."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(IMAGE + 1, vocabulary, (length,), generator=generator).tolist()

    documents: list[Document] = []
    for index in range(count):
        second = stage.pairs and index % 2 == 1  # answer to the question before
        if not second:
            question = tokens(int(torch.randint(stage.question[0], stage.question[1] + 1, (1,), generator=generator)))
            picture = Picture(f"picture {index}", load=None)  # only its key is used: a table holds its tensor
        length = torch.empty(1).log_normal_(math.log(stage.answer) - stage.deviation**2 / 2, stage.deviation, generator=generator)
        answer = tokens(int(length.round().clamp(5, stage.longest)))
        prompt = [IMAGE] * image_tokens + question
        learn = [False] * len(prompt) + [True] * len(answer)
        documents.append(Document(f"row {index}", prompt + answer, learn, (picture,)))
    return documents


def image_tables(documents: Sequence[Document], encoder: Encoder, seed: int) -> dict[bool, Images]:
    """How a batch gets its images: {stored: pictures -> features (N, P, D), not stored: pictures -> pixels (N, 3, S, S)}."""
    generator = torch.Generator().manual_seed(seed)
    device = next(encoder.parameters()).device
    pixels: dict[Picture, Tensor] = {}
    features: dict[Picture, Tensor] = {}
    for (picture,) in dict.fromkeys(document.pictures for document in documents):
        pixels[picture] = torch.randn(3, encoder.size, encoder.size, generator=generator)
        with torch.no_grad():
            features[picture] = encoder(pixels[picture][None].to(device))[0].half().float().cpu()  # a cache keeps fp16

    def of(table: dict[Picture, Tensor]) -> Images:
        return lambda pictures: torch.stack([table[picture] for picture in pictures])

    return {True: of(features), False: of(pixels)}


def padded(documents: Sequence[Document], images: Images, maximum: int | None) -> dict:
    """One document a row, padded to the longest of them or to a maximum. Padding is part of a row: every position is computed."""
    batch = pad(documents, images, PAD)
    rows, longest = batch["input_ids"].shape
    length = longest if maximum is None else maximum
    if longest > length:
        raise UserError(f"a row of {longest} tokens does not fit into the {length} that rows are padded to")
    batch["input_ids"] = F.pad(batch["input_ids"], (0, length - longest), value=PAD)
    batch["labels"] = F.pad(batch["labels"], (0, length - longest), value=IGNORE)
    batch["position_ids"] = torch.arange(length).expand(rows, length)
    batch["document_ids"] = torch.arange(rows)[:, None].expand(rows, length)
    return batch


def parts(documents: Sequence[Document], rows: int) -> list[Sequence[Document]]:
    """The documents of each micro-batch."""
    return [documents[start : start + rows] for start in range(0, len(documents), rows)]


PACKING: dict[str, Callable[[Sequence[Document], Images, int], dict]] = {  # documents, images, maximum -> batch
    "": lambda documents, images, maximum: collate(documents, images),
    "longest": lambda documents, images, maximum: padded(documents, images, None),
    "maximum": padded,
}
