"""Documents to batches: all tokens on one axis for training, padded rows for generation.

In:  documents, and an image processor that turns their pictures into tensors.
Out: batches, dicts of `input_ids, labels, position_ids, document_ids (B, T)`, `pixels (N, 3, S, S)` or `features (N, P, D)`, and
     `ids`, the documents' names.
Legend: B sequences, T tokens, N images, P patch tokens per image, D channels of the encoder, S side of a picture in pixels.

Why one axis: documents differ in length, and padding them to the longest would spend compute on tokens that teach nothing.
End to end, every token counts. `document_ids` keep attention inside a document, and positions restart at each, so each document
gets the same logits as alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dataset.bad_rows import BadRow
from dataset.chat import Document
from dataset.images import Picture

IGNORE = -100  # the label of a token that is not learned, as in model/losses.py

Images = Callable[[Sequence[Picture]], Tensor]  # pictures -> pixels (N, 3, S, S) or features (N, P, D)


def collate(documents: Sequence[Document], images: Images) -> dict:
    """Documents end to end on one axis: B = 1, no padding. BadRow names the document whose picture does not open.

    input_ids      a1 a2 a3 b1 b2
    labels          .  . a3  . b2     . is -100. A label stands at its own token; model/losses.py shifts by one
    position_ids    0  1  2  0  1
    document_ids    0  0  0  1  1
    """
    return {**token_tensors(documents), **image_tensors(documents, images), "ids": [document.id for document in documents]}


def token_tensors(documents: Sequence[Document]) -> dict[str, Tensor]:
    """The tokens of `collate` as tensors, each (1, T)."""
    lengths = [len(document) for document in documents]
    input_ids = torch.tensor([token for document in documents for token in document.input_ids])
    learn = torch.tensor([flag for document in documents for flag in document.learn])
    batch = {
        "input_ids": input_ids,
        "labels": torch.where(learn, input_ids, IGNORE),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "document_ids": torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(lengths)),
    }
    return {name: values[None] for name, values in batch.items()}


def pad(documents: Sequence[Document], images: Images, pad_id: int) -> dict:
    """The same tensors with one document per row, padded on the right to the longest, for generation."""
    lengths = torch.tensor([len(document) for document in documents])
    real = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    padding = {"input_ids": pad_id, "labels": IGNORE, "position_ids": 0, "document_ids": -1}
    batch = {name: torch.full(real.shape, value) for name, value in padding.items()}
    for name, values in token_tensors(documents).items():
        batch[name][real] = values[0]
    return {**batch, **image_tensors(documents, images), "ids": [document.id for document in documents]}


def image_tensors(documents: Sequence[Document], images: Images) -> dict[str, Tensor]:
    """{"pixels": (N, 3, S, S)} or {"features": (N, P, D)} of all pictures in reading order; {} without pictures."""
    tensors = []
    for document in documents:
        if document.pictures:
            try:
                tensors.append(images(document.pictures))
            except BadRow as bad:
                bad.where = document.id
                raise
    if not tensors:
        return {}
    return {"pixels" if tensors[0].ndim == 4 else "features": torch.cat(tensors)}
