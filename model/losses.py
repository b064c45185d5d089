"""From logits to log-probabilities: the only place where labels are shifted, and the only function that scores a batch.

In:  a model and a batch (dataset/collate.py).
Out: the log-probability of every learned token. Supervised training maximises their sum; DPO compares the sums of two answers;
     RL compares them with those at the time of sampling.
Legend: B sequences, T tokens, L learned tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the label of a token that is not learned (PyTorch's default ignore_index)


def next_token_targets(labels: Tensor, document_ids: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B, T): the token that each position must predict, or IGNORE.

    labels        .  .  c  d | .  f  pad      `.` and pad: not learned; | a new document begins
    targets       .  c  d  . | f  .  .        the last token of a document never predicts the next document's first
    """
    targets = torch.full_like(labels, IGNORE)
    same_document = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    targets[:, :-1] = labels[:, 1:].where(same_document, IGNORE)
    return targets


def count_learned(batch: dict) -> int:
    """L, the learned tokens of a batch. Their sum over micro-steps and ranks divides the loss."""
    return int((next_token_targets(batch["labels"], batch["document_ids"]) != IGNORE).sum())


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(L, V), (L,) -> (L,): the log-probability of each target in nats, in fp32: log softmax(logits)[target]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sampling_logits(logits: Tensor, temperature: float, banned: Sequence[int]) -> Tensor:
    """(..., V) -> (..., V) in fp32: the logits that sampling and scoring share.

    A banned token has probability 0. A sampled image placeholder would break the next forward pass, since no image belongs to
    it. Scoring bans it too: otherwise its log-probabilities would not belong to the distribution that was sampled.
    """
    logits = logits.float()
    if banned:
        index = torch.tensor(banned, dtype=torch.long, device=logits.device)
        logits = logits.index_fill(-1, index, float("-inf"))
    return logits if temperature == 1 else logits / temperature


class Score(NamedTuple):
    """A model's scores of the L learned tokens of a batch.

    logps    (L,) log-probability of each token in nats
    owner    (L,) the document of each token: 0, 1, ... in the order of the batch
    logits   (L, V) the logits that predict it
    values   (L,) the value of the state before each token, from a model with a value head (model/rl/critic.py); else None
    """

    logps: Tensor
    owner: Tensor
    logits: Tensor
    values: Tensor | None


def score(model: nn.Module, batch: dict, temperature: float = 1.0, banned: Sequence[int] = ()) -> Score:
    """Score the learned tokens of a batch. Logits are computed only at positions that predict one of them.

    temperature, banned   in RL: those that the tokens were sampled with
    """
    targets = next_token_targets(batch["labels"], batch["document_ids"])  # (B, T)
    learned = targets != IGNORE
    output = model(batch, learned)
    logits, values = output if isinstance(output, tuple) else (output, None)  # (L, V), (L,)
    logits = sampling_logits(logits, temperature, banned)
    return Score(token_logps(logits, targets[learned]), batch["document_ids"][learned], logits, values)


def sum_by_document(logps: Tensor, owner: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """(L,), (L,) -> the sum of log-probabilities of each document (documents,), and its number of learned tokens (documents,)."""
    return logps.new_zeros(documents).index_add(0, owner, logps), torch.bincount(owner, minlength=documents)


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """(L, V) -> (L,): entropy of each distribution in nats: how much the policy still explores."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)  # a banned token adds 0, not 0 * -inf
