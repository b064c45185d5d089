"""The losses, in pure functions; the one place where labels are shifted.

In:  labels and logits.    Out: targets, a summed loss, or log-probabilities of single tokens.
Legend: B sequences, T tokens, V vocabulary, K positions that are learned.
Sums, not means: the script divides by the learned tokens of the whole step, over micro-steps and ranks.
Below them the losses of preference learning, by name: log-probabilities of answers -> a loss for each pair.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

IGNORE = -100  # the label of a token that is not learned (PyTorch's default ignore_index)


def next_token_targets(labels: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """(B, T), (B, T) -> (B, T): what each position must predict, IGNORE where that is nothing.

    labels        .  .  c  d | .  f  pad      `.` and pad: not learned, | a new document begins
    targets       .  c  d  . | f  .  .        the last token of a document predicts nothing, never the next one's first
    """
    targets = torch.full_like(labels, IGNORE)
    same_document = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    targets[:, :-1] = labels[:, 1:].where(same_document, IGNORE)
    return targets


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(K, V), (K,) -> scalar: negative log-likelihood in nats, summed over positions, in fp32."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")


def token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(K, V), (K,) -> (K,): log-probability of each target in nats, in fp32 (0 where the target is IGNORE)."""
    return -F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")


def ban(logits: torch.Tensor, banned: tuple[int, ...] | list[int]) -> torch.Tensor:
    """(..., V) -> (..., V): probability 0 for the banned tokens; for the sampler and the scorer alike.

    A policy that samples the image placeholder breaks its own next forward pass; one that is scored with it
    allowed gets log-probabilities of another distribution than the one it sampled from.
    """
    index = torch.tensor(banned, dtype=torch.long, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


# ---------------------------------------------------------------- preference learning


class Pairs(NamedTuple):
    """What N preference pairs come to under a model and its reference, every field (N,), in nats and tokens.

    chosen, rejected       log-probability of the whole answer, its end of turn included: the sum over its tokens
    reference_chosen, ...  the same under the reference, a constant
    chosen_tokens, ...     how many tokens the sums are over
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    def per_token(self) -> "Pairs":
        """The same with means in place of sums, so that long and short answers weigh alike."""
        return Pairs(
            self.chosen / self.chosen_tokens,
            self.rejected / self.rejected_tokens,
            self.reference_chosen / self.chosen_tokens,
            self.reference_rejected / self.rejected_tokens,
            torch.ones_like(self.chosen_tokens),
            torch.ones_like(self.rejected_tokens),
        )


@dataclass(frozen=True)
class PreferenceOptions:
    """The numbers in the losses below; each takes those that its formula has.

    beta       how much a nat of log-ratio is worth: small allows the policy to go far from its reference
    smoothing  the share of pairs that are taken to be the wrong way round, 0 to below 0.5
    gamma      simpo: the margin, in units of reward, that the chosen answer should have
    shift      bco: the reward that counts as neither good nor bad, a moving average of past rewards
    """

    beta: float
    smoothing: float = 0.0
    gamma: float = 0.0
    shift: float = 0.0

    def __post_init__(self):
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing is the share of swapped pairs, 0 to below 0.5, not {self.smoothing}")
        if self.beta <= 0:
            raise ValueError(f"beta is above 0, not {self.beta}")


def answer_sums(logps: torch.Tensor, documents: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,), (K,) -> sums (count,), tokens (count,): log-probabilities of learned tokens added up by document.

    documents[k] in 0..count-1 is the document of learned token k.
    """
    tokens = torch.bincount(documents, minlength=count)
    return logps.new_zeros(count).index_add(0, documents, logps), tokens


def as_pairs(logps: torch.Tensor, documents: torch.Tensor, reference: torch.Tensor) -> Pairs:
    """Token log-probabilities (K,) of a batch whose documents are chosen, rejected, chosen, rejected, ... as N pairs.

    reference (2N,): the sums under the reference in the same order.
    """
    sums, tokens = answer_sums(logps, documents, len(reference))
    return Pairs(sums[0::2], sums[1::2], reference[0::2], reference[1::2], tokens[0::2], tokens[1::2])


def rewards(pairs: Pairs, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """beta * (log pi - log ref) of both answers, (N,) each: the reward that the policy implies (arXiv 2305.18290, eq. 5)."""
    return beta * (pairs.chosen - pairs.reference_chosen), beta * (pairs.rejected - pairs.reference_rejected)


def dpo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """-log sigmoid(r_c - r_r) (arXiv 2305.18290, eq. 7); (N,), as all below.

    With smoothing e, the expectation over labels of which a share e is swapped, (1 - e) L(c, r) + e L(r, c): "conservative
    DPO" (E. Mitchell 2023, ericmitchell.ai/cdpo.pdf).
    """
    chosen, rejected = rewards(pairs, options.beta)
    e, h = options.smoothing, chosen - rejected
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


def robust(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """((1 - e) L(c, r) - e L(r, c)) / (1 - 2e): DPO's loss without the bias of a share e of swapped labels (arXiv 2403.00409)."""
    chosen, rejected = rewards(pairs, options.beta)
    e, h = options.smoothing, chosen - rejected
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def ipo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """(log-ratio of c - log-ratio of r - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17), on means over tokens.

    A margin to reach, not to exceed for ever. Means, as in TRL: with sums the target would mean less for a longer answer.
    """
    chosen, rejected = rewards(pairs.per_token(), beta=1.0)
    return (chosen - rejected - 1 / (2 * options.beta)).square()


def hinge(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """max(0, 1 - (r_c - r_r)): SLiC (arXiv 2305.10425) on DPO's rewards (arXiv 2309.06657, hinge-norm)."""
    chosen, rejected = rewards(pairs, options.beta)
    return F.relu(1 - (chosen - rejected))


def simpo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """-log sigmoid(beta * (mean logp of c - mean logp of r) - gamma), without a reference (arXiv 2405.14734, eq. 6)."""
    mean = pairs.per_token()
    return -F.logsigmoid(options.beta * (mean.chosen - mean.rejected) - options.gamma)


def apo_zero(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """(1 - sigmoid(r_c)) + sigmoid(r_r): the chosen up and the rejected down, each for itself (arXiv 2408.06266, APO-zero)."""
    chosen, rejected = rewards(pairs, options.beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def bco(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """-log sigmoid(r_c - shift) - log sigmoid(-(r_r - shift)): is this one answer good? (arXiv 2404.04656, BCO)."""
    chosen, rejected = rewards(pairs, options.beta)
    return -F.logsigmoid(chosen - options.shift) - F.logsigmoid(options.shift - rejected)


def mpo(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """0.8 dpo + 0.2 bco: preference and quality in MPO (arXiv 2411.10442); its third term, 1.0 x generation, is the anchor."""
    return 0.8 * dpo(pairs, options) + 0.2 * bco(pairs, options)


def sft_chosen(pairs: Pairs, options: PreferenceOptions) -> torch.Tensor:
    """0: the anchor alone is left, fine-tuning on the chosen answers. The control that every gain must be compared with."""
    return torch.zeros_like(pairs.chosen)


def anchor(pairs: Pairs) -> torch.Tensor:
    """-(log-probability of the chosen answer) / its tokens, (N,), added with weight 1 (arXiv 2404.19733; L_g in 2411.10442).

    A preference loss sees differences alone: it may lower both answers, and the policy forgets to say anything.
    """
    return -pairs.chosen / pairs.chosen_tokens


PREFERENCE_LOSSES = {
    "dpo": dpo, "ipo": ipo, "hinge": hinge, "robust": robust, "simpo": simpo, "apo_zero": apo_zero, "bco": bco, "mpo": mpo,
    "sft_chosen": sft_chosen,
}  # fmt: skip
PER_TOKEN = ("ipo", "simpo")  # compare means over tokens: so do their margins and accuracies
WITHOUT_REFERENCE = ("simpo",)
