"""Attention, softmax(q k^T / sqrt(K)) v, in the form that is fastest where it runs.

In:  queries, keys and values of sequences of equal length.  Out: what each query gathers.
Legend: B sequences, T tokens, H heads, K channels per head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SCORES = 256 * 256  # of a head that are stored


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """q (B, H, T, K), k and v (B, fewer heads, tokens, K) -> (B, H, T, K).

    causal   no token gathers from a later one
    mask     broadcasts to (B, fewer heads, queries, tokens): False where nothing is gathered
    Torch's fused kernel stores no scores, which long sequences need. On a CPU it multiplies small tiles one by one, so that
    short sequences in bf16 take two to four times as long as written out.
    """
    if q.device.type != "cpu" or q.shape[2] * k.shape[2] > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    # Query heads that share a key head are passed as more queries, so that no key is copied.
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) * q.shape[-1] ** -0.5  # (B, fewer heads, queries, K)
    scores = grouped @ k.mT  # (B, fewer heads, queries, tokens)
    if causal:
        later = torch.full(scores.shape[-1:] * 2, -torch.inf, dtype=scores.dtype).triu(1)  # (T, T)
        scores += later.repeat(q.shape[1] // k.shape[1], 1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
