"""Models small enough to test in milliseconds, and batches written out by hand (no tokenizer, no data set)."""

import dataclasses

import torch

from dataset.processor import Processor
from dataset.tokenizer import SentencePieceTokenizer
from model.config import LLMConfig, VLMConfig, preset
from model.registry import TEMPLATES
from model.vlm import VLM
from tests.conftest import ENCODER

IMAGE = 3  # the placeholder's id
IMAGE_TOKENS = 5  # (8 / 4)^2 patches and CLS


def llm_config(**changes) -> LLMConfig:
    """A grouped-query decoder of a few thousand parameters."""
    defaults = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    return LLMConfig(**{**defaults, **changes})


def vlm(**changes) -> VLM:
    """A whole model with seeded random weights, large enough for differences to show."""
    torch.manual_seed(0)
    spec = "clip_random:size=8,patch=4,width=16,layers=2,heads=2"
    model = VLM(VLMConfig(llm_config(**changes), encoder=spec, connector="linear", image_token_id=IMAGE))
    for weight in model.llm.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)  # at std 0.02 every logit is nearly 0 and nothing can be told apart
    return model


def nano() -> VLM:
    """The little sister of the nano language model, with the real tokenizer's vocabulary and a random encoder."""
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer()
    config = preset("nano", encoder=ENCODER, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image)
    llm = dataclasses.replace(config.llm, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                              intermediate_size=96)  # fmt: skip
    return VLM(dataclasses.replace(config, llm=llm))


def document(length: int, images: list[int], seed: int) -> list[int]:
    """Random ids with an image span beginning at each of these places (adjacent spans are IMAGE_TOKENS apart)."""
    ids = torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    for start in images:
        ids[start : start + IMAGE_TOKENS] = [IMAGE] * IMAGE_TOKENS
    return ids


def pictures(count: int, seed: int) -> torch.Tensor:
    """Random pixels (count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def padded(documents: list[list[int]]) -> dict:
    """One document per row, padded on the right; every token but the placeholders is learned."""
    longest = max(map(len, documents))
    batch = {name: [] for name in ("input_ids", "labels", "position_ids", "document_ids")}
    for index, ids in enumerate(documents):
        padding = longest - len(ids)
        batch["input_ids"].append(ids + [2] * padding)
        batch["labels"].append([-100 if token == IMAGE else token for token in ids] + [-100] * padding)
        batch["position_ids"].append(list(range(len(ids))) + [0] * padding)
        batch["document_ids"].append([index] * len(ids) + [-1] * padding)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def flat(documents: list[list[int]]) -> dict:
    """The same documents on one axis, as training sees them."""
    batch = padded(documents)
    real = batch["document_ids"] >= 0
    return {name: rows[real][None] for name, rows in batch.items()}


def everywhere(batch: dict) -> torch.Tensor:
    """logits_to_keep (B, T): logits at every real token."""
    return batch["document_ids"] >= 0


class Images:
    """In the place of an image processor: every picture is one, and its pixels are 0."""

    def __init__(self, size: int = 8):
        self.size = size

    def tiles(self, picture):
        return (picture,)

    def __call__(self, pictures):
        return torch.zeros(len(pictures), 3, self.size, self.size)

    def prepare(self, pictures, *bounds):
        for _ in pictures() if callable(pictures) else pictures:
            pass

    def on_one_rank(self):
        return self


def processor(template: str = "pupil", image_tokens: int = IMAGE_TOKENS, *, tokenizer=None, images=None,
              context_length: int = 1_000_000) -> Processor:
    """A processor without a model."""
    return Processor(TEMPLATES.make(template), tokenizer or SentencePieceTokenizer(), image_tokens, images or Images(),
                     context_length)


class Ranks:
    """One of several processes, without the others."""

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.device, self.rank, self.world_size = torch.device("cpu"), rank, world_size

    def barrier(self):
        pass

    def all_gather(self, found):
        return found
