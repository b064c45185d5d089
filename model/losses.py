"""From logits to log-probabilities: the one place where labels are shifted, and the one function that scores a batch.

In:  a model and a batch (dataset/collate.py).
Out: the log-probability of every learned token. Supervised training minimises minus their sum; DPO compares the sums of two
     answers; RL compares them with what they were when the tokens were sampled.
Legend: B sequences, T tokens, L learned tokens of a batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # the label of a token that is not learned (PyTorch's default ignore_index)


def next_token_targets(labels: Tensor, document_ids: Tensor) -> Tensor:
    """(B, T), (B, T) -> (B, T): the token that each position must predict, IGNORE where there is none.

    labels        .  .  c  d | .  f  pad      `.` and pad: not learned, | a new document begins
    targets       .  c  d  . | f  .  .        the last token of a document never predicts the next document's first
    """
    targets = torch.full_like(labels, IGNORE)
    same_document = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] >= 0)
    targets[:, :-1] = labels[:, 1:].where(same_document, IGNORE)
    return targets


def count_learned(batch: dict) -> int:
    """L, the learned tokens of a batch: what the sum of its losses is divided by, over micro-steps and ranks."""
    return int((next_token_targets(batch["labels"], batch["document_ids"]) != IGNORE).sum())


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """(L, V), (L,) -> (L,): the log-probability of each target in nats, in fp32: log softmax(logits)[target]."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


def sampling_logits(logits: Tensor, temperature: float, banned: Sequence[int]) -> Tensor:
    """(..., V) -> (..., V) in fp32: the logits that a token is drawn from, and therefore scored by.

    A banned token has probability 0. A policy that samples the image placeholder breaks its own next forward pass, and one that
    is scored with the placeholder allowed gets the log-probabilities of another distribution than the one it sampled from.
    """
    logits = logits.float()
    if banned:
        index = torch.tensor(banned, dtype=torch.long, device=logits.device)
        logits = logits.index_fill(-1, index, float("-inf"))
    return logits if temperature == 1 else logits / temperature


class Score(NamedTuple):
    """What a model makes of the L learned tokens of a batch.

    logps    (L,) log-probability of each token in nats
    owner    (L,) the document that each token belongs to: 0, 1, ... in the order of the batch
    logits   (L, V) the logits behind them
    values   (L,) the value of the state before each token, from a model with a value head (model/rl/critic.py); else None
    """

    logps: Tensor
    owner: Tensor
    logits: Tensor
    values: Tensor | None


def score(model: nn.Module, batch: dict, temperature: float = 1.0, banned: Sequence[int] = ()) -> Score:
    """Score the learned tokens of a batch. Logits are computed only at the positions that predict one.

    temperature, banned   as the tokens were sampled, in RL
    """
    targets = next_token_targets(batch["labels"], batch["document_ids"])  # (B, T)
    learned = targets != IGNORE
    output = model(batch, learned)
    logits, values = output if isinstance(output, tuple) else (output, None)  # (L, V), (L,)
    logits = sampling_logits(logits, temperature, banned)
    return Score(token_logps(logits, targets[learned]), batch["document_ids"][learned], logits, values)


def sum_by_document(logps: Tensor, owner: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """(L,), (L,) -> (documents,) log-probability of each document's learned tokens together, (documents,) how many these are."""
    return logps.new_zeros(documents).index_add(0, owner, logps), torch.bincount(owner, minlength=documents)


@torch.no_grad()
def token_entropy(logits: Tensor) -> Tensor:
    """(L, V) -> (L,): entropy of each distribution in nats, a measure of how much is still tried."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)  # a banned token adds 0, not 0 * -inf
