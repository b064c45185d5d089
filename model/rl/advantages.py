"""Advantages: how much better an answer was than expected.

In:  rewards (Q, G) of G answers to each of Q prompts.    Out: advantages of the same shape.

The policy gradient raises the probability of an answer in proportion to its advantage. Any baseline that does not depend on the
answer leaves the gradient's mean as it is and makes it less noisy. The mean of the group is such a baseline, and it costs
nothing: the other answers to a prompt show how hard the prompt is.

    rewards       1.1  1.1  0.1  1.1        mean 0.85
    advantages    .25  .25 -.75  .25        the right answers become a little likelier, the wrong one much less likely
"""

from collections.abc import Callable

import torch
from torch import Tensor


def dr_grpo(rewards: Tensor) -> Tensor:
    """r - mean of the group (arXiv 2503.20783).

    Exactly 0 where all rewards of a group are equal. The rounded mean of eight times 0.1 is not exactly 0.1, and Muon would
    make a whole step of what is left.
    """
    equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(equal, 0.0)


def grpo(rewards: Tensor) -> Tensor:
    """(r - mean) / (standard deviation + 1e-4), both of the group (arXiv 2402.03300, section 4.1.2).

    The division gives groups in which nearly all answers agree, too easy or too hard ones, as large gradients as any other.
    """
    return dr_grpo(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


def rloo(rewards: Tensor) -> Tensor:
    """r - mean of the *other* answers of the group (arXiv 2402.14740): G / (G - 1) times `dr_grpo`, and unbiased."""
    group_size = rewards.shape[1]
    return dr_grpo(rewards) * group_size / (group_size - 1)


def whitened(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over everything, (...) -> (...); all 0 where there is no difference."""
    return (values - values.mean()) / (values.std() + 1e-8)


def reinforce_pp(rewards: Tensor) -> Tensor:
    """r, whitened over all answers of the update (arXiv 2501.03262): without groups a hard prompt counts against its answers."""
    return whitened(rewards)


def reinforce_pp_baseline(rewards: Tensor) -> Tensor:
    """r - mean of the group, then whitened over all answers of the update (arXiv 2501.03262, REINFORCE++-baseline)."""
    return whitened(dr_grpo(rewards))


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "dr_grpo": dr_grpo, "grpo": grpo, "rloo": rloo, "reinforce++": reinforce_pp, "reinforce++_baseline": reinforce_pp_baseline,
}  # fmt: skip


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, (..., T) each, from a critic's values (arXiv 1506.02438, eq. 16), for ppo.

        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1        return_t = A_t + V_t

    V_t is the value before token t; after the last token it is 0. Zeros behind the end of a shorter answer change nothing.
    """
    advantages, following, value_after = torch.zeros_like(values), torch.zeros(()), torch.zeros(())
    for t in reversed(range(values.shape[-1])):
        delta = rewards[..., t] + gamma * value_after - values[..., t]
        following = delta + gamma * lam * following
        advantages[..., t], value_after = following, values[..., t]
    return advantages, advantages + values
