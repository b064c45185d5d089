"""How a rank computes: its device and precision, its share of a batch, scores and answers of a model.

In:  batches, models.  Out: the same on this rank's device; log-probabilities of all of a batch's tokens, whoever holds them.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model import losses, sharding
from model.context_parallel import ContextParallel, Shard
from model.losses import Score
from model.ranks import Ranks


@dataclass(frozen=True)
class DataRanks:
    """The groups of ranks that get different micro-batches, and which of them this rank is in."""

    rank: int
    world_size: int


class Computing(Ranks):
    """A rank with a device, a precision, and the ways of a model that is divided among ranks."""

    dtype: torch.dtype
    context: ContextParallel | None = None  # once a model is ready to be trained, and ranks share its sequences
    sharded: nn.Module | None = None  # a model that is divided among the ranks

    def gather(self) -> None:
        """Make a sharded model whole on every rank until the next step, so that one may use it alone; all ranks call this."""
        if self.sharded:
            sharding.gather(self.sharded)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where it is used; training, references and evaluation all run inside it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, batch: dict) -> dict:
        """A batch of training on this rank's device: with --context_parallel, this rank's share of it."""
        return self.move(self.context.shard(batch) if self.context else batch)

    def micro_steps(self, policy: nn.Module, batches: Sequence[dict]) -> Iterator[dict]:
        """The micro-batches of a step. Ranks add up their gradients once, with the last: until then each keeps its own."""
        for k, batch in enumerate(batches, 1):
            if isinstance(policy, DistributedDataParallel) and k < len(batches):
                with policy.no_sync():
                    yield batch
            else:
                yield batch

    def move(self, batch: dict) -> dict:
        """The batch with its tensors on this rank's device."""
        return {name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else
                value.to(self.device) if isinstance(value, Shard) else value for name, value in batch.items()}

    def score(self, model: nn.Module, batch: dict, temperature: float = 1.0, banned: Sequence[int] = ()) -> Score:
        """`score` (model/losses.py) of all of a batch's learned tokens, of a share those on other ranks too; see `all_tokens`."""
        score = losses.score(model, batch, temperature, banned)
        return self.context.gather_score(score, batch) if self.context and "shard" in batch else score

    def all_tokens(self, values: Tensor, batch: dict) -> Tensor:
        """A value for each learned token of this rank -> for each of the micro-batch, (L,). One process holds all of them."""
        return self.context.gather(values, batch) if self.context else values

    def generator(self, generate: Callable, model: nn.Module, **options: Any) -> Callable[..., Any]:
        """`generate(model, batch, **options)` of a batch, and of options still to come, on this run's device and precision."""

        def of_batch(batch: dict, **more: Any) -> Any:
            with self.autocast():
                return generate(model, self.move(batch), **options, **more)

        return of_batch


class StepMetrics:
    """What is logged of a step: sums over its tokens or pairs, and largest values, over micro-batches and ranks."""

    def __init__(self, run: Ranks):
        self.run, self.sums = run, Counter[str]()
        self.peaks: dict[str, float] = {}

    def add(self, **values: Tensor) -> None:
        """Values of a micro-batch's tokens or pairs, (...): their sum is counted."""
        self.sums.update({name: float(value.detach().float().sum()) for name, value in values.items()})

    def peak(self, **values: Tensor) -> None:
        """Of these the largest."""
        for name, value in values.items():
            self.peaks[name] = max(float(value.detach().max()), self.peaks.get(name, -math.inf))

    def reduce(self, count: float) -> dict[str, float]:
        """Means over `count` tokens or pairs of all ranks, and largest values."""
        return {**{name: self.run.sum(value) / count for name, value in self.sums.items()},
                **{name: self.run.max(value) for name, value in self.peaks.items()}}
