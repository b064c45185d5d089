"""The loss of language modelling, in pure functions; the one place where labels are shifted.

In:  labels and logits.    Out: targets, a summed loss, or log-probabilities of single tokens.
Sums, not means: the script divides by the learned tokens of the whole step, over micro-steps and ranks.
"""

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
