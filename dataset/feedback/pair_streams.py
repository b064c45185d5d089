"""The sources of DPO's micro-batches of pairs: stored pairs, or answers sampled in every step.

Both have `next()`, this rank's micro-batches of a step, `stats` for the log, and `position`, saved for --resume.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

from dataset.batches import Batches, Stream
from dataset.chat import Pair
from dataset.early_stop import PATIENCE, early_stop_reason
from dataset.processor import Processor
from dataset.protocols import DataRanks
from dataset.rollouts import share_out
from dataset.sampler import Sampler
from model.registry import UserError


class StoredPairs:
    """Pairs that exist before the first step: `accumulate` micro-batches per step."""

    def __init__(self, batches: Batches, accumulate: int, ranks: DataRanks):
        self.batches, self.accumulate, self.ranks = batches, accumulate, ranks
        self.position = 0
        self.stats: dict[str, float] = {}
        self.stream: Stream | None = None

    def next(self) -> list[dict]:
        self.stream = self.stream or self.batches.stream(self.position, self.ranks)
        micro_batches = [next(self.stream) for _ in range(self.accumulate)]
        self.position = self.stream.position
        return micro_batches


class SampledPairs:
    """Online DPO: the best and the worst of several answers to each problem, sampled from the current policy."""

    def __init__(self, sampler: Sampler, batch_size: int, processor: Processor, ranks: DataRanks):
        self.sampler, self.batch_size, self.processor, self.ranks = sampler, batch_size, processor, ranks
        self.stats: dict[str, float] = {}

    @property
    def position(self) -> int:
        return self.sampler.position

    @position.setter
    def position(self, position: int) -> None:
        self.sampler.position = position

    def next(self) -> list[dict]:
        """The micro-batches of a step; RuntimeError where answers never differ in reward."""
        for _ in range(PATIENCE):
            rollout = self.sampler.next()
            self.stats = rollout.stats
            pairs = rollout.pairs()
            if len(pairs) >= self.ranks.world_size:  # else no two answers differ: sample on
                return self.micro_batches(pairs)
        reason = early_stop_reason([self.stats] * PATIENCE, 0.0) or "raise --group_size or --prompts"
        raise UserError(f"{PATIENCE} times in a row no answer to any of {self.stats['sampled']} problems was better than "
                        f"another: {reason}")

    def micro_batches(self, pairs: Sequence[Pair]) -> list[dict]:
        """This rank's share of the pairs."""
        join: Callable[[list[Pair]], dict] = self.processor.pair_batch
        return [join([pairs[k] for k in indices]) for indices in share_out(len(pairs), self.batch_size, self.ranks)]
