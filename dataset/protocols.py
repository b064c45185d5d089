"""Protocols: what the data need of the objects that scripts pass to them, so that `dataset/` does not import `model/`.

`Source`   rows by index
`Ranks`    the rank and number of processes             `Run`   a training run (all three: model/runtime.py)
`DataRanks`  of those with micro-batches of their own
`Encoder`  `Model`                                      parts of model/vlm.py
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from model.config import VLMConfig


class Source(Protocol):
    """Rows by index, each made or read on access. An optional `blocks()` says which rows are read together."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


class DataRanks(Protocol):
    """Which of how many shares of the micro-batches a process gets. With --context_parallel, several processes get the same."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


class Ranks(DataRanks, Protocol):
    """The rank of this process, the number of processes, and the device that it computes on."""

    @property
    def device(self) -> torch.device: ...

    def barrier(self) -> None:
        """Wait for every other rank."""

    def all_gather(self, entries: dict, /) -> dict:
        """The dicts of all ranks, merged."""
        ...


class Run(Ranks, Protocol):
    """A training run: its flags (model/cli.py: `RunFlags`), its output folder and its log."""

    config: Any
    name: str
    out: Path
    history: list[dict]
    is_main: bool
    data_ranks: Any

    @property
    def preview_only(self) -> bool:
        """Whether the run stops before it trains or writes anything."""
        ...

    @property
    def seconds(self) -> float: ...

    def gather(self) -> None:
        """Gather the weights of a sharded model, so that one rank can use it alone."""

    def print0(self, text: str) -> None:
        """Print on the first rank alone."""

    def log(self, step: int, **metrics: float) -> None:
        """Append a line to log.jsonl."""


class Encoder(Protocol):
    """The facts and the forward pass of an encoder (model/encoder/__init__.py)."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tokens: int
    dim: int
    has_cls: bool

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor: ...

    def fingerprint(self) -> str: ...


class Model(Protocol):
    """The facts of a model that a processor needs."""

    encoder: Any
    config: VLMConfig

    @property
    def image_tokens(self) -> int: ...
