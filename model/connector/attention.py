"""What the connectors with learned queries share: the queries, cross-attention and the network after it.

Queries, keys and values have a matrix each, because Muon orthogonalises each matrix by itself. The learned queries are an
nn.Embedding, which Muon leaves to AdamW (model/optimizer.py).
Legend: N images, C channels of the LLM, H heads, K channels per head; `queries` and `sources` count tokens.
"""

from torch import Tensor, nn

from model.attention import attention
from model.registry import UserError


def query_table(queries: int, channels: int) -> nn.Embedding:
    """A table of learned query vectors, (queries, C); UserError for fewer than one."""
    if queries < 1:
        raise UserError(f"queries={queries}: at least one query is needed; each becomes one token")
    table = nn.Embedding(queries, channels)
    # Small, as BLIP-2's: what the queries read is added to them. Large queries would hide the difference between pictures.
    nn.init.normal_(table.weight, std=0.02)
    return table


def feed_forward(channels: int) -> nn.Sequential:
    """A norm, then two linear maps with a GELU between them; the inner width is four times the outer."""
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K)) v with H heads; the source may have other channels than the queries."""

    def __init__(self, channels: int, heads: int, source: int):
        super().__init__()
        if heads < 1 or channels % heads:
            raise UserError(f"heads={heads} does not divide the {channels} channels of the language model")
        self.heads = heads
        self.q_proj, self.o_proj = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels, bias=False)
        self.k_proj, self.v_proj = nn.Linear(source, channels, bias=False), nn.Linear(source, channels, bias=False)
        # Normed inputs then give scores of variance 1. PyTorch's default is flatter, so that all queries read the same mean.
        for proj in (self.q_proj, self.k_proj):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(N, queries, C), (N, sources, source channels) -> (N, queries, C)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, queries or sources, K)
                   for part in (self.q_proj(x), self.k_proj(source), self.v_proj(source)))
        return self.o_proj(attention(q, k, v).transpose(1, 2).flatten(2))  # (N, queries, C)
