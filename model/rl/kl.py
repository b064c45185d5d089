"""The KL to the reference: a price for moving away from the model that the run began with. `--algo grpo:kl=0.01`.

In:  log-probabilities of the sampled tokens under the policy and under the reference, (L,).    Out: one estimate per token, (L,).
The three estimates: J. Schulman 2020, joschu.net/blog/kl-approx.html.

Off by default: with verified rewards there is no reward model to fool, and MM-EUREKA reports that a KL costs accuracy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model.generate import evaluating
from model.losses import Score
from model.reference import ReferenceModel
from model.runtime import Run, StepMetrics


def k1(logps: Tensor, reference: Tensor) -> Tensor:
    """logp - logp_ref: unbiased as a number. As a loss its gradient is 0 on average, so it belongs in the reward."""
    return logps - reference


def k2(logps: Tensor, reference: Tensor) -> Tensor:
    """(logp - logp_ref)^2 / 2: biased as a number, but its gradient on policy is that of KL(pi | pi_ref)."""
    return (logps - reference).square() / 2


def k3(logps: Tensor, reference: Tensor) -> Tensor:
    """exp(logp_ref - logp) - 1 - (logp_ref - logp): unbiased and never negative."""
    return (reference - logps).exp() - 1 - (reference - logps)


KL_ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


class KLPenalty:
    """beta times the KL to the reference, as `--algo NAME:kl=beta,kl_estimate=k3` wants it: in the rewards (k1) or in the losses.

    score   as the policy's sampled tokens are scored: with the sampler's temperature and bans
    """

    def __init__(self, weight: float, estimate: str, reference: ReferenceModel, score: Callable[..., Score], run: Run):
        self.weight, self.estimate, self.reference, self.score, self.run = weight, estimate, reference, score, run

    @torch.no_grad()
    def off_rewards(self, rewards: Tensor, batches: Sequence[dict]) -> Tensor:
        """(Q, G) -> (Q, G): for k1 the rewards less the penalty of each answer. Gives each batch `reference_logps (L,)`."""
        for batch in batches:
            with self.reference() as model, evaluating(model), self.run.autocast():
                batch["reference_logps"] = self.score(model, batch).logps
        if self.estimate != "k1":
            return rewards
        return rewards - self.weight * self.of_answers(batches, rewards.numel()).view_as(rewards)

    def of_answers(self, batches: Sequence[dict], answers: int) -> Tensor:
        """(answers,): k1 of each answer of the update, summed over its tokens; those of the other ranks too."""
        found: dict[int, float] = {}
        for batch in batches:
            estimates = k1(batch["rollout_logps"], batch["reference_logps"])
            for answer in batch["answer_ids"].unique().tolist():
                found[answer] = float(estimates[batch["answer_ids"] == answer].sum())
        found = self.run.all_gather(found)
        return torch.tensor([found[k] for k in range(answers)], device=self.run.device)

    def of_tokens(self, logps: Tensor, batch: dict, metrics: StepMetrics) -> Tensor:
        """(L,) -> (L,): what is added to the losses, 0 for k1; the KL itself goes to the log."""
        estimate = KL_ESTIMATES[self.estimate](logps, batch["reference_logps"])
        metrics.add(kl=estimate)
        return estimate * (0.0 if self.estimate == "k1" else self.weight)
