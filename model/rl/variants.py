"""The other algorithms of rule-based RL, by name: `--algo rloo`, `--algo gspo:clip_high=4e-4`, `--algo ppo:lam=1`, ...

In and out: as model/rl/algorithms.py. Each is GRPO with another advantage, ratio or loss.
Legend: Q prompts, G answers per prompt, L learned tokens of a batch.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.registry import ALGORITHMS, UserError
from model.rl.algorithms import Algorithm


@ALGORITHMS.register("rloo")
@dataclass(frozen=True)
class RLOO(Algorithm):
    """REINFORCE, the mean of the other answers as the baseline (arXiv 2402.14740), with the clipped surrogate."""

    advantage: str = "rloo"


@ALGORITHMS.register("reinforce++")
@dataclass(frozen=True)
class ReinforcePP(Algorithm):
    """REINFORCE++: rewards whitened over the update, without groups (arXiv 2501.03262)."""

    advantage: str = "reinforce++"


@ALGORITHMS.register("reinforce++_baseline")
@dataclass(frozen=True)
class ReinforcePPBaseline(Algorithm):
    """REINFORCE++-baseline: r - mean of the group, whitened over the update (arXiv 2501.03262)."""

    advantage: str = "reinforce++_baseline"


@ALGORITHMS.register("ppo")
@dataclass(frozen=True)
class PPO(Algorithm):
    """PPO: advantages of every token from a value head (arXiv 1707.06347; critic.py).

    lam   how far generalised advantage estimation looks ahead; 1: to the end of the answer
    """

    lam: float = 0.95
    advantage: str = field(default="dr_grpo", init=False)  # not an option here: the critic gives the advantages
    has_critic = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise UserError(f"lam is between 0 and 1, not {self.lam}")

    @property
    def needs_groups(self) -> bool:
        return False


@ALGORITHMS.register("cispo")
@dataclass(frozen=True)
class CISPO(Algorithm):
    """-sg(min(ratio, 1 + high)) A logp: the weight is clipped, and no token loses its gradient (arXiv 2506.13585, eq. 4).

    sg: no gradient through it.
    """

    clip_low: float = field(default=0.2, init=False)  # not an option here: as published there is no lower bound

    def loss(self, ratio: Tensor, advantages: Tensor, logps: Tensor, log_ratio: Tensor) -> Tensor:
        return -ratio.detach().clamp(max=1 + self.clip_high) * advantages * logps


@ALGORITHMS.register("gspo")
@dataclass(frozen=True)
class GSPO(Algorithm):
    """The clipped surrogate with one ratio for a whole answer: exp(mean over its tokens of the log-ratio) (arXiv 2507.18071).

    Equations 5 to 7. Every token of the answer carries the answer's loss, so with `per_sequence` every answer counts once.
    This ratio moves less than that of a token: the published clips are 3e-4 and 4e-4.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    advantage: str = "grpo"
    per_sequence: bool = True

    def ratio(self, log_ratio: Tensor, owner: Tensor) -> Tensor:
        return mean_by_answer(log_ratio, owner).exp()


@ALGORITHMS.register("cpgd")
@dataclass(frozen=True)
class CPGD(Algorithm):
    """-min(log ratio A, clip(log ratio, log(1 - low), log(1 + high)) A) + drift (ratio - 1 - log ratio) (arXiv 2505.12504).

    The logarithm in the ratio's place: its gradient has no factor `ratio`, which can explode where A < 0 and nothing is clipped.
    drift   weight of the pull back to the policy that sampled, an unbiased estimate of KL(pi_rollout | pi)
    """

    drift: float = 0.0

    def loss(self, ratio: Tensor, advantages: Tensor, logps: Tensor, log_ratio: Tensor) -> Tensor:
        clipped = log_ratio.clamp(math.log(1 - self.clip_low), math.log(1 + self.clip_high))
        return -torch.minimum(log_ratio * advantages, clipped * advantages) + self.drift * (ratio - 1 - log_ratio)


def mean_by_answer(values: Tensor, owner: Tensor) -> Tensor:
    """(L,), (L,) -> (L,): each token gets the mean of its answer."""
    lengths = torch.bincount(owner)
    sums = values.new_zeros(len(lengths)).index_add(0, owner, values)
    return (sums / lengths)[owner]
