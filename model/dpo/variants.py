"""The other preference losses, by name: `--algo ipo`, `--algo simpo:beta=2,gamma=1`, ... Each is DPO with another function.

In and out: as model/dpo/losses.py.
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
    """((1 - e) L(c, r) - e L(r, c)) / (1 - 2e): DPO's loss without the bias of a share e of swapped labels (arXiv 2403.00409)."""

    smoothing: float = 0.1

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        e, margin = self.smoothing, chosen - rejected
        return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)


@PREFERENCE_LOSSES.register("ipo")
@dataclass
class IPO(PreferenceLoss):
    """(log-ratio of c - log-ratio of r - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), on means over tokens.

    A margin to reach, not to exceed for ever. Means, as in TRL: with sums the target would mean less for a longer answer.
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

    gamma   the margin, in units of reward, that the chosen answer should have
    """

    beta: float = 2.0  # of means over tokens, which are smaller than sums
    gamma: float = 1.0
    per_token = True
    uses_reference = False

    def __call__(self, pairs: Pairs) -> Tensor:
        mean = pairs.per_token()
        return -F.logsigmoid(self.beta * (mean.chosen - mean.rejected) - self.gamma)


@PREFERENCE_LOSSES.register("apo_zero")
@dataclass
class APOZero(PreferenceLoss):
    """(1 - sigmoid(r_c)) + sigmoid(r_r): the chosen up and the rejected down, each for itself (arXiv 2408.06266, APO-zero)."""

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@PREFERENCE_LOSSES.register("bco")
@dataclass
class BCO(PreferenceLoss):
    """-log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift)): is this one answer good? (arXiv 2404.04656, BCO).

    `shift`, the reward that counts as neither good nor bad, is a moving average of the rewards so far.
    """

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        return -F.logsigmoid(chosen - self.shift) - F.logsigmoid(self.shift - rejected)

    def after_step(self, mean_reward: float) -> None:
        self.shift = 0.9 * self.shift + 0.1 * mean_reward


@PREFERENCE_LOSSES.register("mpo")
@dataclass
class MPO(BCO):
    """0.8 dpo + 0.2 bco: preference and quality in MPO (arXiv 2411.10442). The SFT term is its third, 1.0 x generation."""

    smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        return 0.8 * DPO(self.beta, self.smoothing)(pairs) + 0.2 * super().__call__(pairs)


@PREFERENCE_LOSSES.register("sft_chosen")
@dataclass
class SFTChosen(PreferenceLoss):
    """0: what is left is the SFT term, fine-tuning on the chosen answers. The control that every gain is compared with."""

    def __call__(self, pairs: Pairs) -> Tensor:
        return torch.zeros_like(pairs.chosen)
