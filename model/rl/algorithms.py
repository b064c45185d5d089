"""The algorithms of rule-based RL, by name: `--algo grpo`, `--algo gspo:clip_high=4e-4`, `--algo ppo:lam=1`.

An algorithm says what each sampled token costs. With

    A       the advantage of the token's answer                                             (advantages.py)
    ratio   pi(token) / pi_rollout(token), the policy of now over the one that sampled it: 1 at the first step after sampling

the loss is -ratio * A, and some way to stop when the ratio has gone far: answers say little about a policy that no longer gives
them. 3-rl_vlm.py sums the losses and divides by the learned tokens of the whole step, over micro-steps and ranks.
On policy the loss is minus the mean advantage, about 0 whatever is learned: only its gradient means something.
Legend: Q prompts, G answers per prompt, L learned tokens of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.registry import ALGORITHMS, UserError
from model.rl.advantages import ADVANTAGES
from model.rl.kl import KL_ESTIMATES


@dataclass(frozen=True)
class Algorithm:
    """The clipped surrogate of PPO (arXiv 1707.06347, eq. 7) for every token, and the options that all algorithms share.

    clip_low, clip_high   how far the ratio may fall below and rise above 1 before a token stops counting. A wider upper side
                          lets unlikely tokens grow and keeps entropy (clip-higher, arXiv 2503.14476, section 3.1)
    kl, kl_estimate       weight of the KL to the reference, the model that the run began with, and its estimate: k1 in the
                          reward, k2 or k3 in the loss (kl.py). 0: no reference, and no second model in memory
    advantage             dr_grpo, grpo, rloo, reinforce++ or reinforce++_baseline (advantages.py)
    per_sequence          mean over the tokens of an answer first, then over answers; see `token_weights`
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.0
    kl_estimate: str = "k3"
    advantage: str = "dr_grpo"
    per_sequence: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise UserError(f"clip_low is between 0 and 1 and clip_high above 0, not {self.clip_low} and {self.clip_high}")
        for option, known in (("advantage", ADVANTAGES), ("kl_estimate", KL_ESTIMATES)):
            if getattr(self, option) not in known:
                raise UserError(f"{option} is one of {', '.join(known)}, not {getattr(self, option)!r}")
        if self.kl_estimate != Algorithm.kl_estimate and not self.kl:
            raise UserError(f"kl_estimate has no use without kl, as in kl=0.01,kl_estimate={self.kl_estimate}")

    has_critic = False  # advantages from a value head, in the place of the group

    @property
    def needs_groups(self) -> bool:
        """Whether a group whose rewards are all equal teaches nothing: its advantages are 0."""
        return self.advantage != "reinforce++"

    def advantages(self, rewards: Tensor) -> Tensor:
        """(Q, G) -> (Q, G): how much better each answer was than expected."""
        return ADVANTAGES[self.advantage](rewards)

    def ratio(self, log_ratio: Tensor, owner: Tensor) -> Tensor:
        """(L,), (L,) -> (L,): logp - logp_rollout of each token, and the answer it belongs to, as the ratio that is clipped."""
        return log_ratio.exp()

    def loss(self, ratio: Tensor, advantages: Tensor, logps: Tensor, log_ratio: Tensor) -> Tensor:
        """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), (L,)."""
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def clipped(self, ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """(L,) bool each: tokens that would go on falling, or rising, but for the clip."""
        return (ratio < 1 - self.clip_low) & (advantages < 0), (ratio > 1 + self.clip_high) & (advantages > 0)

    def token_weights(self, lengths: Tensor) -> Tensor:
        """(Q, G) lengths of answers in tokens -> (Q, G) weights of their tokens: 1, or with `per_sequence` mean length / length.

        Sums with the second kind, divided by all tokens, are means over the tokens of an answer first and over answers then, as
        GRPO was published. It is not the default, because a wrong answer then costs less per token the longer it is, and a right
        one gains more per token the shorter it is: wrong answers grow and right ones shrink (arXiv 2503.20783, section 3.1).
        """
        return (lengths.double().mean() / lengths).float() if self.per_sequence else torch.ones(lengths.shape)


@ALGORITHMS.register("grpo")
@dataclass(frozen=True)
class GRPO(Algorithm):
    """Dr. GRPO with clip-higher: r - mean of the group, every token counts alike (arXiv 2402.03300, 2503.20783, 2503.14476)."""


