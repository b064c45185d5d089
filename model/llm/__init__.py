"""Language models, one file each, found by name in LLMS. What each must offer stands in `LanguageModel`.

One that can begin with pretrained weights also has a function of its name in PRETRAINED: SOURCE -> `Pretrained`
(model/llm/pretrained.py), for `--llm NAME:SOURCE`. Programs are run by `python -m` and register nothing: gguf.
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

    def cache(self, rows: int, room: int) -> Any:
        """An empty key-value cache for `rows` sequences of at most `room` tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor, position_ids: Tensor, packed: Any, logits_to_keep: Tensor | None = None,
                cache: Any = None) -> Tensor:
        """x (T, C), position_ids (T,), logits_to_keep (T,) bool or None: all -> logits (kept, V)."""
        raise NotImplementedError
