"""The vision-language model: an image's tokens, projected, replace the placeholders in the text.

    "<s> <|user|> 1 [9 x image] What is it? <|assistant|> ..."     the picture is a foreign language, the connector its dictionary
                     |
    pixels -> encoder -> features (N, P, D) -> connector -> (N, tokens, C): as many vectors as there are placeholders

In:  a batch (dataset/collate.py): input_ids, position_ids, document_ids (B, T), and pixels (N, 3, S, S)
     or features (N, P, D) of all its images in reading order, if it has any.
Out: logits (selected, V) of the tokens that logits_to_keep selects.
Legend: B sequences, T tokens, C channels of the LLM, N images, P patch tokens per image, D channels of the encoder, V vocabulary,
     S pixels a side. Inside forward the documents are packed: T counts the tokens of all of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.config import VLMConfig
from model.connector import Connector
from model.encoder import Encoder
from model.llm import LanguageModel
from model.llm.attention import PackedSequences
from model.registry import CONNECTORS, ENCODERS, LLMS


class VLM(nn.Module):
    """encoder -> connector -> llm; a caller may pass an encoder that it has already loaded."""

    value_head: nn.Module  # only with ppo (model/rl/critic.py)
    encoder_was_stored = False  # whether this model's checkpoint held the encoder (model/checkpoint.py)

    def __init__(self, config: VLMConfig, encoder: Encoder | None = None):
        super().__init__()
        if not 0 <= config.image_token_id < config.llm.vocab_size:
            raise ValueError(
                f"image_token_id {config.image_token_id} is outside the vocabulary of {config.llm.vocab_size}: "
                f"dataclasses.replace(config, image_token_id=tokenizer.image)"
            )
        self.config = config
        self.encoder: Encoder = ENCODERS.make(config.encoder) if encoder is None else encoder
        self.llm: LanguageModel = LLMS.make(config.llm_name, config=config.llm)
        self.connector: Connector = CONNECTORS.make(config.connector, encoder=self.encoder, channels=self.llm.dim)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The three parts by the names that recipes and checkpoints use."""
        return {"encoder": self.encoder, "connector": self.connector, "llm": self.llm}

    @property
    def image_tokens(self) -> int:
        """Placeholders that one image takes in the text."""
        return self.connector.tokens

    def forward(self, batch: dict, logits_to_keep: Tensor, cache: Any = None) -> Tensor:
        """logits_to_keep (B, T) bool, False on padding -> logits (selected, V), row by row.

        cache: an empty one, which is filled; the batch then has one document per row. ValueError if placeholders and images
        disagree.
        """
        packed = PackedSequences(batch["document_ids"])
        input_ids = packed.pack(batch["input_ids"])  # (T,)
        x = self.llm.embed(input_ids)  # (T, C)
        x = self.splice(x, input_ids == self.config.image_token_id, packed, batch)
        return self.llm(x, packed.pack(batch["position_ids"]), packed, packed.pack(logits_to_keep), cache)

    def splice(self, x: Tensor, is_image: Tensor, packed: PackedSequences, batch: dict) -> Tensor:
        """(T, C), (T,) -> (T, C): the n-th image token replaces the n-th placeholder; a batch without images is unchanged."""
        features = self.image_features(batch)
        images = 0 if features is None else len(features)
        check_placeholders(is_image, packed, images, self.image_tokens, batch.get("ids"))
        if features is None:
            # With a frozen LLM, rows of text use no trained weight: backward() then needs another leaf, which x becomes.
            return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()
        tokens = self.connector(features, image_index(is_image, packed, self.image_tokens))  # (N, tokens, C)
        return x.masked_scatter(is_image[:, None], tokens.to(x.dtype))

    def image_features(self, batch: dict) -> Tensor | None:
        """(N, P, D) of the batch's images, or None. A frozen encoder gives the same features at every step: cache them."""
        if "features" in batch:
            return batch["features"]
        if "pixels" not in batch:
            return None
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):  # a frozen encoder stores no activations
            return self.encoder(batch["pixels"])


def image_index(is_image: Tensor, packed: PackedSequences, image_tokens: int) -> Tensor:
    """(T,) -> (N,): each image's position among those of its document, from 0; a tile counts as an image."""
    owner = packed.owner[is_image][::image_tokens]  # (N,) document of each image
    images = owner.bincount(minlength=packed.count)
    before = images.cumsum(0) - images  # (documents,) images in earlier documents
    return torch.arange(len(owner), device=owner.device) - before[owner]


def check_placeholders(is_image: Tensor, packed: PackedSequences, images: int, image_tokens: int, ids: list[str] | None) -> None:
    """ValueError unless every document holds complete images, and all documents together exactly `images`."""
    counts = is_image.new_zeros(packed.count, dtype=torch.long).index_add(0, packed.owner, is_image.long())
    broken = counts % image_tokens != 0
    if not (broken.any() | (counts.sum() != images * image_tokens)):
        return
    # Name the documents with an incomplete image; if there are none, images are missing or left over somewhere.
    suspects = broken.nonzero().flatten().tolist() or range(packed.count)
    names = ids or [f"document {index}" for index in range(packed.count)]
    listing = ", ".join(f"{names[index]}: {int(counts[index])}" for index in suspects)
    raise ValueError(
        f"{int(counts.sum())} image placeholders, but {images} image(s) of {image_tokens} tokens = "
        f"{images * image_tokens} feature rows. Placeholders in {listing}. "
        f"Every image needs exactly {image_tokens} placeholders in its own document, and every placeholder an image."
    )


def count_parameters(*modules: nn.Module) -> int:
    """Number of parameters of the modules; a shared one counts once."""
    return sum(parameter.numel() for parameter in {p for module in modules for p in module.parameters()})
