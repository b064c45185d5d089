"""Policy gradients in pure functions: rewards -> advantages, log-probabilities -> a loss for each token.

In:  rewards of G answers to each of P prompts; log-probabilities of sampled tokens under the policy of now and under the one that
     sampled them.
Out: advantages (P, G); losses (K,) of K learned tokens. Sums are the script's: it divides by the learned tokens of the whole
     step, over micro-steps and ranks.

    A      how much better an answer was than expected         (one of ADVANTAGES, or `gae`)
    rho    pi(token) / pi_rollout(token), 1 at the first step after the rollouts
    loss   -rho A, and some way to stop when rho has gone far  (one of TOKEN_LOSSES)

On policy rho is exactly 1, so the loss is -mean(A), which is about 0 whatever is learned: only its gradient means something.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.losses import ban

# ---------------------------------------------------------------- how much better than expected, (P, G) -> (P, G)


def dr_grpo(rewards: Tensor) -> Tensor:
    """r - mean of the group (arXiv 2503.20783). The other answers to the prompt say what was to be expected of it.

    Exactly 0 where all are alike, which the rounded mean of eight 0.1 is not: Muon would make a whole step of the rest.
    """
    alike = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    return (rewards - rewards.mean(1, keepdim=True)).masked_fill(alike, 0.0)


def grpo(rewards: Tensor) -> Tensor:
    """(r - mean) / (standard deviation + 1e-4), both of the group (arXiv 2402.03300, section 4.1.2).

    The division gives groups in which nearly all answers agree, too easy or too hard ones, as large gradients as any other.
    """
    return dr_grpo(rewards) / (rewards.std(1, keepdim=True) + 1e-4)


def rloo(rewards: Tensor) -> Tensor:
    """r - mean of the *other* answers of the group (arXiv 2402.14740): n / (n - 1) times `dr_grpo`, and unbiased."""
    n = rewards.shape[1]
    return dr_grpo(rewards) * n / (n - 1)


def whitened(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over everything, (...) -> (...); all 0 where there is no difference."""
    return (values - values.mean()) / (values.std() + 1e-8)


def reinforce_pp(rewards: Tensor) -> Tensor:
    """r, whitened over all answers of the update (arXiv 2501.03262): no groups; a hard prompt is bad luck for its answers."""
    return whitened(rewards)


def reinforce_pp_baseline(rewards: Tensor) -> Tensor:
    """r - mean of the group, then whitened over all answers of the update (arXiv 2501.03262, REINFORCE++-baseline)."""
    return whitened(dr_grpo(rewards))


ADVANTAGES = {"dr_grpo": dr_grpo, "grpo": grpo, "rloo": rloo, "reinforce++": reinforce_pp,
              "reinforce++_baseline": reinforce_pp_baseline}  # fmt: skip


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every token, (..., T) each (arXiv 1506.02438, eq. 16), for ppo.

        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1        return_t = A_t + V_t

    V_t is the value before token t; after the last token it is 0. Zeros behind the end of a shorter answer change nothing.
    """
    advantages, following, value_after = torch.zeros_like(values), 0.0, 0.0
    for t in reversed(range(values.shape[-1])):
        delta = rewards[..., t] + gamma * value_after - values[..., t]
        following = delta + gamma * lam * following
        advantages[..., t], value_after = following, values[..., t]
    return advantages, advantages + values


# ---------------------------------------------------------------- what each token costs


class Tokens(NamedTuple):
    """K learned tokens of several answers, every field (K,).

    logps       under the policy of now, in nats, with gradient
    rollout     under the policy that sampled them, in nats
    advantages  of the token, which is that of its answer but for ppo
    answers     0..count-1, whose token it is
    """

    logps: Tensor
    rollout: Tensor
    advantages: Tensor
    answers: Tensor


@dataclass(frozen=True)
class PolicyOptions:
    """What a name on the command line stands for (ALGORITHMS), and the numbers in it; each loss takes those that it has.

    clip_low, clip_high   how far rho may fall below and rise above 1 before a token stops counting; a wider upper side lets
                          unlikely tokens grow, and keeps entropy (clip-higher, arXiv 2503.14476, section 3.1)
    drift                 cpgd: weight of the pull back to the policy that sampled
    advantage, loss       of ADVANTAGES, or gae; of TOKEN_LOSSES
    per_sequence          mean over the tokens of an answer first, see `per_sequence`
    temperature           of the sampler
    beta, kl              weight of the distance to the model that the run began with, and its estimate, one of KL
    lam                   gae: how far an advantage looks ahead
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    drift: float = 0.0
    advantage: str = "dr_grpo"
    loss: str = "surrogate"
    per_sequence: bool = False
    temperature: float = 1.0
    beta: float = 0.0
    kl: str = "k3"
    lam: float = 0.95

    def __post_init__(self):
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(f"clip_low is between 0 and 1 and clip_high above 0, not {self.clip_low} and {self.clip_high}")


def clipped_surrogate(ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> Tensor:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), (K,): PPO's (arXiv 1707.06347, eq. 7), with two sides of their own."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * advantages)


def surrogate(tokens: Tokens, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of every token by itself; (loss (K,), the ratio that is clipped (K,)), as all below."""
    ratio = (tokens.logps - tokens.rollout).exp()
    return clipped_surrogate(ratio, tokens.advantages, options), ratio


def cispo(tokens: Tokens, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-sg(min(rho, 1 + high)) A logp (arXiv 2506.13585, eq. 4): the weight is clipped, and no token loses its gradient.

    sg: no gradient through it. As published there is no lower bound: clip_low is not used.
    """
    ratio = (tokens.logps - tokens.rollout).exp()
    return -ratio.detach().clamp(max=1 + options.clip_high) * tokens.advantages * tokens.logps, ratio


def gspo(tokens: Tokens, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """The clipped surrogate with one ratio for a whole answer: s = exp(mean over its tokens of logp - logp_rollout).

    arXiv 2507.18071, eq. 5 to 7. Every token of the answer carries the answer's loss, so with the weights of
    `per_sequence` every answer counts once. s moves less than rho: the published clips are 3e-4 and 4e-4.
    """
    ratio = mean_by_answer(tokens.logps - tokens.rollout, tokens.answers).exp()
    return clipped_surrogate(ratio, tokens.advantages, options), ratio


def cpgd(tokens: Tokens, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """-min(log rho A, clip(log rho, log(1 - low), log(1 + high)) A) + drift (rho - 1 - log rho) (arXiv 2505.12504).

    The logarithm of the ratio in its place: its gradient has no factor rho, which can explode where A < 0 and nothing is clipped.
    The drift is an unbiased estimate of KL(pi_rollout | pi), since the tokens are those of pi_rollout.
    """
    log_ratio = tokens.logps - tokens.rollout
    low, high = math.log(1 - options.clip_low), math.log(1 + options.clip_high)
    gain = torch.minimum(log_ratio * tokens.advantages, log_ratio.clamp(low, high) * tokens.advantages)
    return -gain + options.drift * (log_ratio.exp() - 1 - log_ratio), log_ratio.exp()


TOKEN_LOSSES = {"surrogate": surrogate, "cispo": cispo, "gspo": gspo, "cpgd": cpgd}


ALGORITHMS = {
    "grpo": PolicyOptions(), "rloo": PolicyOptions(advantage="rloo"), "reinforce++": PolicyOptions(advantage="reinforce++"),
    "reinforce++_baseline": PolicyOptions(advantage="reinforce++_baseline"), "ppo": PolicyOptions(advantage="gae"),
    "cispo": PolicyOptions(loss="cispo"), "gspo": PolicyOptions(3e-4, 4e-4, advantage="grpo", loss="gspo", per_sequence=True),
    "cpgd": PolicyOptions(loss="cpgd"),
}  # fmt: skip
NEEDS_NO_GROUPS = ("reinforce++", "gae")  # advantages that an answer has also where its group agrees


def mean_by_answer(values: Tensor, answers: Tensor) -> Tensor:
    """(K,), (K,) -> (K,): each token gets the mean of its answer."""
    lengths = torch.bincount(answers)
    sums = values.new_zeros(len(lengths)).index_add(0, answers, values)
    return (sums / lengths)[answers]


def per_sequence(lengths: Tensor) -> Tensor:
    """(A,) -> (A,): weights of the tokens of A answers of these lengths, mean length / length.

    Sums with these weights, divided by all tokens, are means over the tokens of an answer first and over answers then, as GRPO
    was published. Why it is not the default: a wrong answer costs less for each of its tokens the longer it is, and a right one
    gains more the shorter it is, so wrong answers grow and right ones shrink (arXiv 2503.20783, section 3.1). A small model that
    can say little takes the second way: its reasoning collapses into the bare answer.
    """
    return lengths.double().mean() / lengths


def clipped_shares(ratio: Tensor, advantages: Tensor, options: PolicyOptions) -> tuple[Tensor, Tensor]:
    """(K,) bool each: tokens that would go on falling, or rising, but for the clip; cispo stops none of them."""
    return (ratio < 1 - options.clip_low) & (advantages < 0), (ratio > 1 + options.clip_high) & (advantages > 0)


# ---------------------------------------------------------------- the distance to another policy


def k1(logps: Tensor, reference: Tensor) -> Tensor:
    """logp - logp_ref, (K,): unbiased as a number; as a loss its gradient is 0 on average, so it belongs in the reward."""
    return logps - reference


def k2(logps: Tensor, reference: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2, (K,): biased as a number, but its gradient on policy is that of KL(pi | pi_ref)."""
    return (logps - reference).square() / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """exp(logp_ref - logp) - 1 - (logp_ref - logp), (K,): unbiased and never negative.

    All three: J. Schulman 2020, joschu.net/blog/kl-approx.html.
    """
    return (reference - logps).exp() - 1 - (reference - logps)


KL = {"k1": k1, "k2": k2, "k3": k3}

# ---------------------------------------------------------------- scoring, and the value of a state


def scored(logits: Tensor, targets: Tensor, banned: tuple[int, ...], temperature: float) -> tuple[Tensor, Tensor]:
    """(K, V), (K,) -> log-probabilities of the targets (K,) and entropies (K,), in nats, of what the sampler drew from.

    The same bans and the same temperature as model.generate.sample: else rho would compare two different distributions.
    """
    all_logps = (ban(logits.float(), banned) / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = torch.special.entr(all_logps.exp()).sum(-1)  # of a banned token: 0, not 0 x -inf
    return all_logps.gather(1, targets[:, None]).squeeze(1), entropy


DISCOUNT = 1.0  # an answer is worth as much late as early
VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.5


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """max((v - R)^2, (v_clipped - R)^2) / 2, (K,), v_clipped within `clip` of the value before the update (PPO's code)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (clipped - returns).square()) / 2
