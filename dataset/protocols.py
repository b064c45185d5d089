"""What the data ask of the objects that scripts pass to them, so that `dataset/` need not import `model/`.

`Source`   rows by number
`Ranks`    which of how many processes this one is      `Run`   a training run (both: model/runtime.py)
`Encoder`  `Model`                                      parts of model/vlm.py
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from model.config import VLMConfig


class Source(Protocol):
    """Rows by number, each made or read when it is asked for. `blocks()`, where there is one, says what is read together."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class Ranks(Protocol):
    """Which of how many processes this one is, and where it computes."""

    @property
    def device(self) -> torch.device: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def all_gather(self, found: dict) -> dict:
        """The dicts of all ranks as one."""
        ...


class Run(Ranks, Protocol):
    """A training run: its flags (model/cli.py: `RunFlags`), its folder and its log."""

    config: Any
    out: Path
    history: list[dict]
    is_main: bool

    @property
    def only_looks(self) -> bool:
        """Whether it stops before it learns or writes anything."""
        ...

    @property
    def seconds(self) -> float: ...

    def gather(self) -> None:
        """Make a sharded model whole, so that one rank may use it alone."""

    def print0(self, text: str) -> None:
        """Print once, however many ranks there are."""

    def log(self, step: int, **metrics: float) -> None:
        """One line of log.jsonl."""


class Encoder(Protocol):
    """What the data need of an encoder (model/encoder/__init__.py)."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int
    dim: int
    has_cls: bool

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor: ...

    def fingerprint(self) -> str: ...


class Model(Protocol):
    """What a processor needs of a model."""

    encoder: Any
    config: VLMConfig

    @property
    def image_tokens(self) -> int: ...
