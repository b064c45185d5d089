"""The other preference losses, by name: `--algo ipo`, `--algo simpo:beta=2,gamma=1`, ... Each replaces DPO's loss function.

In, Out: as in model/dpo/losses.py. c and r are the chosen and the rejected answer, r_c and r_r their implied rewards.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.dpo.losses import DPO, Pairs, PreferenceLoss, rewards
from model.registry import PREFERENCE_LOSSES


@PREFERENCE_LOSSES.register("robust")
@dataclass
class Robust(PreferenceLoss):
    """((1 - e) L(c, r) - e L(r, c)) / (1 - 2e): DPO's loss, unbiased if a share e of labels is swapped (arXiv 2403.00409)."""

    smoothing: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        e, margin = self.smoothing, chosen - rejected
        return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


@PREFERENCE_LOSSES.register("ipo")
@dataclass
class IPO(PreferenceLoss):
    """(log-ratio of c - log-ratio of r - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), on means over tokens.

    The margin has a target, so it does not grow without end. Means, as in TRL: a target for sums would depend on the length.
    """

    per_token = True

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs.per_token(), beta=1.0)
        return (chosen - rejected - 1 / (2 * self.beta)).square()


@PREFERENCE_LOSSES.register("hinge")
@dataclass
class Hinge(PreferenceLoss):
    """max(0, 1 - (r_c - r_r)): SLiC (arXiv 2305.10425) on DPO's rewards (arXiv 2309.06657, hinge-norm)."""

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        return F.relu(1 - (chosen - rejected))


@PREFERENCE_LOSSES.register("simpo")
@dataclass
class SimPO(PreferenceLoss):
    """-log sigmoid(beta * (mean logp of c - mean logp of r) - gamma), without a reference (arXiv 2405.14734, eq. 6).

    gamma   the margin that the chosen answer should have, in units of reward
    """

    beta: float = 2.0  # larger than DPO's: means over tokens are smaller than sums
    gamma: float = 1.0
    per_token = True
    uses_reference = False

    def __call__(self, pairs: Pairs) -> Tensor:
        mean = pairs.per_token()
        return -F.logsigmoid(self.beta * (mean.chosen - mean.rejected) - self.gamma)


@PREFERENCE_LOSSES.register("apo_zero")
@dataclass
class APOZero(PreferenceLoss):
    """(1 - sigmoid(r_c)) + sigmoid(r_r): chosen up, rejected down, independently (arXiv 2408.06266, APO-zero)."""

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@PREFERENCE_LOSSES.register("bco")
@dataclass
class BCO(PreferenceLoss):
    """-log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift)): a classifier of single answers (arXiv 2404.04656, BCO).

    `shift`, the reward between good and bad, is a moving average of the rewards so far.
    """

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        return -F.logsigmoid(chosen - self.shift) - F.logsigmoid(self.shift - rejected)

    def after_step(self, mean_reward: float) -> None:
        self.shift = 0.9 * self.shift + 0.1 * mean_reward


@PREFERENCE_LOSSES.register("mpo")
@dataclass
class MPO(BCO):
    """0.8 dpo + 0.2 bco: MPO's preference and quality terms (arXiv 2411.10442). Its third, generation, is the SFT term."""

    smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        return 0.8 * DPO(self.beta, self.smoothing)(pairs) + 0.2 * super().__call__(pairs)


@PREFERENCE_LOSSES.register("sft_chosen")
@dataclass
class SFTChosen(PreferenceLoss):
    """0, so that only the SFT term remains: fine-tuning on the chosen answers, the control for every gain."""

    def __call__(self, pairs: Pairs) -> Tensor:
        return torch.zeros_like(pairs.chosen)
