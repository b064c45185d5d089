"""Language models, one file each, found by name in LLMS. What each must offer stands in `LanguageModel`.

A language model with pretrained weights also registers a function SOURCE -> `Pretrained` in PRETRAINED under its name
(model/llm/pretrained.py), for `--llm NAME:SOURCE`. gguf.py registers nothing: it is a program, run by `python -m`.
"""

from typing import Any

from torch import Tensor, nn


class LanguageModel(nn.Module):
    """What a language model must offer.

    dim   C, its channels
    """

    dim: int
    config: Any

    @property
    def blocks(self) -> list[nn.Module]:
        """Its blocks, first to last."""
        raise NotImplementedError

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) -> (T, C)."""
        raise NotImplementedError

    def cache(self, rows: int, capacity: int) -> Any:
        """An empty key-value cache for `rows` sequences of at most `capacity` tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, position_ids: Tensor, packed: Any, logits_to_keep: Tensor | None = None,
                cache: Any = None) -> Tensor:
        """x (T, C), position_ids (T,), logits_to_keep (T,) bool or None for all -> logits (selected, V)."""
        raise NotImplementedError
