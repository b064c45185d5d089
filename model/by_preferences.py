"""Stage 3 by preferences, on batches: what is minimised.

In:  micro-batches of pairs (dataset/preferences.py: `join`), and what the reference thinks of them (model/reference.py).
Out: `ByPreferences`: `compared`, the batches with that, and `minimised`, one of the losses of model/losses.py and an anchor.

The anchor keeps the better answer likely in itself: without it the surest way never to be wrong is to say nothing.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.generate import evaluating
from model.losses import (
    IGNORE,
    PER_TOKEN,
    PREFERENCE_LOSSES,
    Pairs,
    PreferenceOptions,
    anchor,
    answer_sums,
    as_pairs,
    next_token_targets,
    rewards,
    token_logps,
)
from model.rl.clipping import Clipped
from model.runtime import Run, clip_gradients
from model.vlm import VLM


def preference_options(algo: str, beta: float, smoothing: float, gamma: float, nll_weight: float) -> PreferenceOptions:
    """The numbers of a loss; ValueError for those with which it would be another one, or nothing."""
    options = PreferenceOptions(beta, smoothing, gamma)
    if smoothing and algo not in ("dpo", "robust", "mpo"):
        raise ValueError(f"--algo {algo} has no use for --smoothing")
    if gamma != 1.0 and algo != "simpo":
        raise ValueError(f"--algo {algo} has no use for --gamma")
    if algo == "robust" and smoothing == 0:
        raise ValueError("robust without swapped pairs is dpo: say how many there are, --smoothing 0.1")
    if algo == "sft_chosen" and nll_weight == 0:
        raise ValueError("sft_chosen learns by the anchor alone: --nll_weight must be above 0")
    return options


def answer_logps(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Log-probability of every learned token (K,) and its document (K,): one function for the policy and its reference."""
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    learned = targets != IGNORE
    return token_logps(model(batch, learned), targets[learned]), batch["document_ids"][learned]


@torch.no_grad()
def sums_now(model: VLM, run: Run, batch: dict) -> Tensor:
    """(2N,): the log-probabilities of a batch's answers under the model as it is, in its precision, in evaluation mode."""
    with evaluating(model), run.autocast():
        logps, documents = answer_logps(model, batch)
    return answer_sums(logps, documents, len(batch["ids"]))[0]


def preference_objective(pairs: Pairs, options: PreferenceOptions, algo: str, nll_weight: float) -> tuple[Tensor, dict]:
    """The loss summed over the pairs, and sums over them of all that is logged."""
    preference, nll = PREFERENCE_LOSSES[algo](pairs, options), anchor(pairs)
    loss = preference + nll_weight * nll
    chosen, rejected = rewards(pairs.per_token() if algo in PER_TOKEN else pairs, options.beta)
    mean = pairs.per_token()
    measured = {
        "loss": loss, "preference_loss": preference, "nll": nll, "reward_chosen": chosen, "reward_rejected": rejected,
        "margin": chosen - rejected, "accuracy": (chosen > rejected).float(), "logp_chosen": mean.chosen,
        "logp_rejected": mean.rejected, "length_chosen": pairs.chosen_tokens, "length_rejected": pairs.rejected_tokens,
    }  # fmt: skip
    return loss.sum(), {name: float(values.detach().sum()) for name, values in measured.items()}


class ByPreferences:
    """A loss over pairs, and the one number that it remembers from step to step, the zero of bco.

    trained     what is called in training (Run.wrap)
    reference   batch -> (2N,), the log-probabilities of its answers under the reference
    max_norm    of the gradient
    """

    def __init__(self, run: Run, trained: nn.Module, reference: Callable[[dict], Tensor], algo: str, options: PreferenceOptions,
                 nll_weight: float, max_norm: float):
        self.run, self.trained, self.reference, self.algo = run, trained, reference, algo
        self.options = dataclasses.replace(options, shift=run.state.get("shift", 0.0))
        self.nll_weight, self.max_norm = nll_weight, max_norm

    def compared(self, batch: dict) -> dict:
        """The batch on the device, with what the reference thinks of each answer."""
        batch = self.run.to_device(batch)
        return {**batch, "reference": self.reference(batch)}

    def minimised(self, batch: dict) -> tuple[Tensor, dict, dict]:
        """The loss summed over the pairs, sums over them for the log, and no largest values."""
        with self.run.autocast():
            logps, documents = answer_logps(self.trained, batch)
        return *preference_objective(as_pairs(logps, documents, batch["reference"]), self.options, self.algo, self.nll_weight), {}

    def clip(self, model: nn.Module) -> Clipped:
        return Clipped(clip_gradients(model, self.max_norm))

    def after(self, metrics: dict[str, float]) -> None:
        """The zero of bco follows the rewards."""
        mean_reward = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
        self.options = dataclasses.replace(self.options, shift=0.9 * self.options.shift + 0.1 * mean_reward)

    @property
    def state(self) -> dict[str, float]:
        return {"shift": self.options.shift}
