"""Rollouts: answers that the policy sampled, several to each problem, each with its reward; what one update learns from.

In:  groups of G answers (dataset/sampler.py).  Out: micro-batches of tokens, with statistics for the log.

    prompt 1   8   8   9   8      rewards 1.1 1.1 0.1 1.1    learned: what made the third one worse than the others?
    prompt 2   3   3   3   3      rewards 1.1 1.1 1.1 1.1    dropped: no answer is better than another, all advantages are 0
    prompt 3   5   7   4   6      rewards 0.1 0.1 0.1 0.1    dropped, and two prompts more are sampled in their place

Legend: Q prompts of an update, G answers per prompt, L learned tokens of a batch.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset.chat import Document, Pair
from dataset.problems import Problem
from dataset.processor import Processor
from dataset.protocols import DataRanks
from dataset.rewards import Reward
from dataset.tasks import Truncated
from model.registry import UserError


@dataclass(frozen=True)
class Rollout:
    """One answer to a problem, as it will be learned.

    document   prompt, answer, and the stop token where the policy ended by itself; only what it sampled is learned
    logps      of each learned token, in nats, under the distribution that it was drawn from
    text       the answer; `Truncated` where the limit on its length ended it
    """

    document: Document
    logps: list[float]
    text: str
    reward: Reward

    @property
    def stopped(self) -> bool:
        return not isinstance(self.text, Truncated)

    def __len__(self) -> int:
        return len(self.logps)


@dataclass(frozen=True)
class Group:
    """All answers to one problem."""

    problem: Problem
    rollouts: list[Rollout]

    @property
    def zero_variance(self) -> bool:
        """Whether all answers have the same reward: then there is nothing to learn."""
        return len({rollout.reward.total for rollout in self.rollouts}) == 1


def as_rollout(prompt: Document, stop: int, answer: Any, text: str, reward: Reward) -> Rollout:
    """The prompt's tokens and those that were sampled, without encoding anything again: text could be cut into other tokens.

    <s>  <|user|>  image image  3 + 5 ?  <|assistant|>  <think> ... </answer>  <|end|>
     .      .        .     .    .  .  .       .            x     x      x         x        x learned, . only read

    An answer that did not end by itself learns no end.
    """
    sampled = [*answer.tokens, stop] if answer.stopped else list(answer.tokens)
    if len(sampled) != len(answer.logps):
        raise ValueError(f"{len(sampled)} tokens have {len(answer.logps)} log-probabilities ({prompt.id})")
    learn = [False] * len(prompt) + [True] * len(sampled)
    document = Document(prompt.id, prompt.input_ids + sampled, learn, prompt.pictures)
    return Rollout(document, answer.logps, (str if answer.stopped else Truncated)(text), reward)


@dataclass(frozen=True)
class RolloutBatch:
    """What one update learns from.

    groups   Q at most; where no group has any variance, those of the first round, whose advantages are 0
    stats    for the log, about all answers, those of dropped groups too
    """

    groups: list[Group]
    stats: dict[str, float]

    @property
    def rewards(self) -> Tensor:
        """(Q, G)."""
        return torch.tensor([[rollout.reward.total for rollout in group.rollouts] for group in self.groups])

    @property
    def lengths(self) -> Tensor:
        """(Q, G): learned tokens."""
        return torch.tensor([[len(rollout) for rollout in group.rollouts] for group in self.groups])

    def micro_batches(self, size: int, processor: Processor, ranks: DataRanks) -> list[dict]:
        """This rank's micro-batches of at most `size` answers, equally many on every rank.

        Packed as `collate` makes them, and for the L learned tokens in their order: `rollout_logps (L,)`, and `answer_ids (L,)`,
        which of the Q x G answers each belongs to.
        """
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        batches = []
        for answers in share_out(len(rollouts), size, ranks):
            chosen = [rollouts[k] for k in answers]
            lengths = torch.tensor([len(rollout) for rollout in chosen])
            batches.append({**processor.batch([rollout.document for rollout in chosen]),
                            "rollout_logps": torch.tensor([logp for rollout in chosen for logp in rollout.logps]),
                            "answer_ids": torch.repeat_interleave(torch.from_numpy(answers), lengths)})
        return batches

    def pairs(self) -> list[Pair]:
        """A preference pair of each group with variance: its best answer and its worst one, the first of equals."""
        pairs = []
        for group in self.groups:
            if not group.zero_variance:
                ordered = sorted(group.rollouts, key=lambda rollout: -rollout.reward.total)
                pairs.append(Pair(ordered[0].document, ordered[-1].document))
        return pairs


def share_out(count: int, size: int, ranks: DataRanks) -> list[np.ndarray]:
    """Numbers 0..count-1 in parts of at most `size`, equally many parts on every rank; UserError for fewer numbers than ranks.

    One number more than `size` stands in a part where there are too few for one part more on every rank. The parts do not depend
    on the data, so every rank knows those of all others without asking.
    """
    if count < ranks.world_size:
        raise UserError(f"{count} answers cannot be shared out over {ranks.world_size} processes: raise --prompts")
    each = min(count // ranks.world_size, math.ceil(count / (size * ranks.world_size)))
    return np.array_split(np.arange(count), each * ranks.world_size)[ranks.rank::ranks.world_size]


def add_to_tokens(batches: Sequence[dict], **values: Tensor) -> None:
    """Give each batch a value for each of its tokens (L,), that of the token's answer; values (Q, G)."""
    for batch in batches:
        batch.update({name: value.flatten()[batch["answer_ids"]] for name, value in values.items()})


def stats(groups: Sequence[Group]) -> dict[str, float]:
    """Means over all answers, and over groups, for the log; no length of answers that there are not.

    A reward function of one's own calls no answer right or wrong. Then the log tells the best and the worst reward of each group,
    and the lengths of answers above and below the mean of their group.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    facts = by_rule(groups) if all(group.problem.ruled for group in groups) else by_value(groups)
    return {
        "reward": fmean([rollout.reward.total for rollout in rollouts]),
        "format": fmean([rollout.reward.format for rollout in rollouts]),
        "zero_variance": fmean([group.zero_variance for group in groups]),
        **{name: fmean(found) for name, found in facts.items() if found},
        "truncated": fmean([not rollout.stopped for rollout in rollouts]),
    }


def by_rule(groups: Sequence[Group]) -> dict[str, list[float]]:
    """What a rule says of answers and groups."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    right = [fmean([rollout.reward.accuracy == 1 for rollout in group.rollouts]) for group in groups]
    return {"accuracy": [rollout.reward.accuracy for rollout in rollouts],
            "all_right": [float(share == 1) for share in right], "all_wrong": [float(share == 0) for share in right],
            "length_right": [len(rollout) for rollout in rollouts if rollout.reward.accuracy == 1],
            "length_wrong": [len(rollout) for rollout in rollouts if rollout.reward.accuracy < 1]}


def by_value(groups: Sequence[Group]) -> dict[str, list[float]]:
    """What a reward without right and wrong says of them."""
    facts: dict[str, list[float]] = {"reward_best": [], "reward_worst": [], "length_above": [], "length_below": []}
    for group in groups:
        rewards = [rollout.reward.total for rollout in group.rollouts]
        facts["reward_best"].append(max(rewards))
        facts["reward_worst"].append(min(rewards))
        facts["length_above"] += [len(one) for one in group.rollouts if one.reward.total > fmean(rewards)]
        facts["length_below"] += [len(one) for one in group.rollouts if one.reward.total < fmean(rewards)]
    return facts
