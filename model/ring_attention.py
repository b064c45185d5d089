"""Ring attention: exact attention over a sequence that no single rank holds (arXiv 2310.01889).

In:  queries, keys and values of this rank's share of the tokens.  Out: what these queries gather from the tokens of all ranks.

Queries stay. Keys and values travel round a ring of R ranks; after R - 1 hops each rank has met those of every other:

    round 0                    round 1                    round 2                    round 3
    rank    0   1   2   3      rank    0   1   2   3      rank    0   1   2   3      rank    0   1   2   3
    q       0   1   2   3      q       0   1   2   3      q       0   1   2   3      q       0   1   2   3
    k, v    0 > 1 > 2 > 3 >    k, v    3 > 0 > 1 > 2 >    k, v    2 > 3 > 0 > 1 >    k, v    1   2   3   0

While a rank computes with one block, the next one is on its way. Softmax needs the sum over all keys, and each round sees only
some of them. So each round gives a partial result, `out`, already divided by its own sum of exponentials, and the logarithm of
that sum, `lse`. Two partial results merge exactly (as in FlashAttention, arXiv 2205.14135, section 3.1):

    lse = log(exp(lse_1) + exp(lse_2))           out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The backward pass sends keys and values round once more, and with them their gradients: each rank adds what its queries
contribute, and after R hops the gradients are back at the rank that owns the keys.

Which tokens a rank holds: with R contiguous pieces the first rank would idle, since causal attention gives early tokens little to
see. The zigzag cuts 2R chunks, and rank i holds the chunks i and 2R - 1 - i (github.com/zhuzilin/ring-flash-attention/issues/2;
Llama 3, arXiv 2407.21783, section 3.3.2). Here R is 4; `x` is computed in full, of `/` a half, and nothing of a blank:

               keys   0 1 2 3 4 5 6 7
    queries  rank 0   /                        chunk 0
             rank 1   x /                      chunk 1
             rank 2   x x /                    chunk 2
             rank 3   x x x /                  chunk 3        Every rank computes 7 x and 2 /, and in every round as much as
             rank 3   x x x x /                chunk 4        all others: nobody waits.
             rank 2   x x x x x /              chunk 5
             rank 1   x x x x x x /            chunk 6
             rank 0   x x x x x x x /          chunk 7

Inside a chunk, attention goes tile by tile, so no matrix of scores is larger than TILE x TILE (arXiv 2112.05682).
Legend: T tokens of this rank, H heads, J key-value heads, G = H / J query heads per key-value head, K channels per head;
n queries and m keys of a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup, batch_isend_irecv, irecv, isend

TILE = 512  # queries, and keys, that one matrix of scores is computed for


# ---------------------------------------------------------------- the ring


@dataclass(frozen=True)
class Ring:
    """R ranks that share one sequence.

    ranks   their numbers among all processes, in the order of the ring
    index   which of them this process is
    group   their process group
    """

    ranks: tuple[int, ...]
    index: int
    group: ProcessGroup

    @property
    def size(self) -> int:
        return len(self.ranks)

    def positions(self, index: int, chunk: int) -> Tensor:
        """(2 * chunk,): the places in the whole sequence of the tokens that rank `index` holds: chunks i and 2R - 1 - i."""
        places = torch.arange(chunk)
        return torch.cat([index * chunk + places, (2 * self.size - 1 - index) * chunk + places])

    def send_on(self, block: Tensor) -> "Incoming":
        """Send a block to the next rank, and begin to receive that of the rank before; the caller goes on computing."""
        return Incoming(self, block)


class Incoming:
    """A block on its way."""

    def __init__(self, ring: Ring, outgoing: Tensor):
        self.outgoing, self.received = outgoing.contiguous(), torch.empty_like(outgoing.contiguous())
        after, before = ring.ranks[(ring.index + 1) % ring.size], ring.ranks[ring.index - 1]
        self.requests = batch_isend_irecv([P2POp(isend, self.outgoing, after, ring.group),
                                           P2POp(irecv, self.received, before, ring.group)])

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.received


# ---------------------------------------------------------------- what each rank computes, round by round


class Schedule:
    """The tiles of every round, for the tokens that this rank holds; the same for all layers.

    Token i sees key j if both belong to one document and j is not later: starts[i] <= place of j <= place of i, where starts[i]
    is the place at which i's document begins. So keys need no document ids on their way: their rank tells their places.
    """

    def __init__(self, ring: Ring, chunk: int, starts: Tensor):
        """chunk: tokens of each of the rank's two chunks; starts (2 * chunk,) of its tokens, on the CPU."""
        self.ring, self.starts = ring, starts
        self.keys = [ring.positions((ring.index - hop) % ring.size, chunk) for hop in range(ring.size)]  # (T,) in each round
        self.queries = self.keys[0]
        parts = [slice(first, min(first + TILE, end)) for begin, end in ((0, chunk), (chunk, 2 * chunk))
                 for first in range(begin, end, TILE)]
        self.tiles = [[(q, k) for q in parts for k in parts if self.meet(q, k, keys)] for keys in self.keys]

    def meet(self, q: slice, k: slice, keys: Tensor) -> bool:
        """Whether any query of a tile sees any of its keys. Places and starts rise inside a tile, so its ends tell."""
        return bool((keys[k.start] <= self.queries[q.stop - 1]) & (keys[k.stop - 1] >= self.starts[q.start]))

    def visible(self, q: slice, k: slice, hop: int) -> Tensor:
        """(n, m) bool: which keys each query of a tile sees in a round."""
        keys = self.keys[hop][k]
        return (self.starts[q, None] <= keys) & (keys <= self.queries[q, None])

    def to(self, device: torch.device) -> "Schedule":
        self.starts, self.queries = self.starts.to(device), self.queries.to(device)
        self.keys = [keys.to(device) for keys in self.keys]
        return self


# ---------------------------------------------------------------- one tile


def scores_of(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """q (n, J, G, K), k (m, J, K), visible (n, m) -> (J, G, n, m): scaled products; the lowest number where nothing is seen.

    Not -inf: a query that sees no key of a tile has then a finite lse, and exp(lse - that of other tiles) is 0 in the merge.
    """
    scores = torch.einsum("njgk,mjk->jgnm", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)


def tile_output(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the keys of one tile -> out (n, J, G, K), lse (n, J, G)."""
    scores = scores_of(q, k, visible)
    lse = scores.logsumexp(-1)  # (J, G, n)
    weights = scores.sub_(lse[..., None]).exp_()  # (J, G, n, m): softmax over this tile's keys
    return torch.einsum("jgnm,mjk->njgk", weights, v), lse.permute(2, 0, 1)


def tile_gradients(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, lse: Tensor, grad: Tensor,
                   delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tile's share of dq (n, J, G, K), dk and dv (m, J, K) (FlashAttention-2, arXiv 2307.08691, algorithm 2).

    lse     (n, J, G) over the keys of all ranks, so that exp(scores - lse) are the weights of the whole softmax
    grad    (n, J, G, K) of the output
    delta   (n, J, G): grad . out, the mean that softmax's derivative subtracts
    """
    weights = scores_of(q, k, visible).sub_(lse.permute(1, 2, 0)[..., None]).exp_()  # (J, G, n, m)
    dv = torch.einsum("jgnm,njgk->mjk", weights, grad)
    grad_weights = torch.einsum("njgk,mjk->jgnm", grad, v)
    grad_scores = weights.mul_(grad_weights.sub_(delta.permute(1, 2, 0)[..., None])).mul_(q.shape[-1] ** -0.5)
    return torch.einsum("jgnm,mjk->njgk", grad_scores, k), torch.einsum("jgnm,njgk->mjk", grad_scores, q), dv


# ---------------------------------------------------------------- all rounds


class RingAttention(torch.autograd.Function):
    """q (T, H, K), k and v (T, J, K) of each rank -> (T, H, K). All ranks of a ring call it together, backward too.

    Sums are kept in fp32, or in fp64 where q is; keys and values travel in their own precision.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, schedule: Schedule) -> Tensor:
        exact, ring = torch.promote_types(q.dtype, torch.float32), schedule.ring
        queries = q.unflatten(1, (k.shape[1], -1))  # (T, J, G, K): G query heads read the same key head
        out = torch.zeros_like(queries, dtype=exact)
        lse = out.new_full(queries.shape[:-1], -torch.inf)  # (T, J, G): nothing seen yet
        block = torch.stack([k, v])  # (2, T, J, K)
        with torch.autocast(q.device.type, enabled=False):
            for hop, tiles in enumerate(schedule.tiles):
                incoming = ring.send_on(block) if hop < ring.size - 1 else None
                for rows, columns in tiles:
                    keys, values = block[:, columns].to(exact)
                    part, part_lse = tile_output(queries[rows].to(exact), keys, values, schedule.visible(rows, columns, hop))
                    total = torch.logaddexp(lse[rows], part_lse)
                    out[rows] = (lse[rows] - total).exp()[..., None] * out[rows] + (part_lse - total).exp()[..., None] * part
                    lse[rows] = total
                block = incoming.wait() if incoming else block
        out = out.flatten(1, 2).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule = schedule
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        exact, schedule, heads = lse.dtype, ctx.schedule, (k.shape[1], -1)
        queries, grad = q.unflatten(1, heads), grads[0].unflatten(1, heads)
        delta = (grad.to(exact) * out.unflatten(1, heads).to(exact)).sum(-1)  # (T, J, G)
        dq = torch.zeros_like(queries, dtype=exact)
        block = torch.stack([k, v])
        grad_block = torch.zeros_like(block, dtype=exact)  # of the block that is here now: it travels with it
        for hop, tiles in enumerate(schedule.tiles):
            incoming = schedule.ring.send_on(block) if hop < schedule.ring.size - 1 else None
            for rows, columns in tiles:
                keys, values = block[:, columns].to(exact)
                more_dq, *more = tile_gradients(queries[rows].to(exact), keys, values, schedule.visible(rows, columns, hop),
                                                lse[rows], grad[rows].to(exact), delta[rows])
                dq[rows] += more_dq
                grad_block[:, columns] += torch.stack(more)  # dk, dv
            block = incoming.wait() if incoming else block
            grad_block = schedule.ring.send_on(grad_block).wait()  # after R hops it is home
        dk, dv = grad_block.to(k.dtype)
        return dq.flatten(1, 2).to(q.dtype), dk, dv, None
