"""Losses of preference learning, by name: `--algo dpo:beta=0.1`, `--algo simpo:beta=2,gamma=1`.

In:  `Pairs`: the log-probabilities of chosen and rejected answers under the policy and under its reference.
Out: a loss for each pair, (pairs,). 3-rl_vlm.py adds the SFT term and takes the mean.

Why a reference? Without one, the policy could lower the loss without end by making rejected answers ever less likely, and lose
its other abilities. So all losses but simpo's measure how far an answer's probability has moved from the reference's.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.registry import PREFERENCE_LOSSES, UserError


class Pairs(NamedTuple):
    """Preference pairs; every field is (pairs,).

    chosen, rejected       log-probability of the complete answer in nats: the sum over its tokens, its end of turn included
    reference_chosen, ...  the same under the reference, without a gradient
    chosen_tokens, ...     number of tokens in the sums
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> "Pairs":
        """Means over tokens instead of sums, so that long and short answers have equal weight."""
        return Pairs(self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens,
                     self.reference_chosen / self.chosen_tokens, self.reference_rejected / self.rejected_tokens,
                     torch.ones_like(self.chosen_tokens), torch.ones_like(self.rejected_tokens))


def rewards(pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
    """beta * (log pi - log ref) of both answers, (pairs,) each: the implied rewards (arXiv 2305.18290, eq. 5)."""
    return beta * (pairs.chosen - pairs.reference_chosen), beta * (pairs.rejected - pairs.reference_rejected)


@dataclass
class PreferenceLoss:
    """What all preference losses share.

    beta             reward per nat of log-ratio; a small one lets the policy move far from its reference
    per_token        True to compare means over tokens instead of sums
    uses_reference   False if the formula has no reference
    shift            bco's moving average, saved with the run
    """

    beta: float = 0.1
    per_token = False
    uses_reference = True
    shift = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"beta is above 0, not {self.beta}")
        if not 0 <= (smoothing := getattr(self, "smoothing", 0.0)) < 0.5:
            raise UserError(f"smoothing is the share of swapped pairs, 0 to below 0.5, not {smoothing}")

    def __call__(self, pairs: Pairs) -> Tensor:
        """The loss of each pair, (pairs,)."""
        raise NotImplementedError

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The implied rewards of both answers, (pairs,) each, for the log."""
        return rewards(pairs.per_token() if self.per_token else pairs, self.beta)

    def log(self, pairs: Pairs) -> dict[str, Tensor]:
        """Values for the log, (pairs,) each: implied rewards, whether chosen wins, mean log-probabilities, lengths."""
        chosen, rejected = self.rewards(pairs)
        mean = pairs.per_token()
        return {"reward_chosen": chosen, "reward_rejected": rejected, "margin": chosen - rejected,
                "reward_accuracy": (chosen > rejected).float(), "logp_chosen": mean.chosen, "logp_rejected": mean.rejected,
                "length_chosen": pairs.chosen_tokens, "length_rejected": pairs.rejected_tokens}

    def after_step(self, mean_reward: float) -> None:
        """Called after each step with the mean reward of its answers over all ranks; only bco uses it."""


@PREFERENCE_LOSSES.register("dpo")
@dataclass
class DPO(PreferenceLoss):
    """-log sigmoid(r_c - r_r) (arXiv 2305.18290, eq. 7).

    With smoothing e, the loss expected if a share e of the labels is swapped, (1 - e) L(c, r) + e L(r, c): "conservative DPO"
    (E. Mitchell 2023, ericmitchell.ai/cdpo.pdf).
    """

    smoothing: float = 0.0

    def __call__(self, pairs: Pairs) -> Tensor:
        chosen, rejected = rewards(pairs, self.beta)
        e, margin = self.smoothing, chosen - rejected
        return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)


