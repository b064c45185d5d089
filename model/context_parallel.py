"""Context parallelism: R ranks share one sequence, so its length may grow with R. `--context_parallel R`.

In:  a finished model, and batches as dataset/collate.py makes them.
Out: the same losses and gradients. Each rank holds T / R tokens: their embeddings, activations and logits, and only those
     pictures whose placeholders they are. Attention alone needs the other tokens (model/ring_attention.py).

    torchrun --nproc_per_node 4 2-sft_vlm.py --context_parallel 2         2 rings of 2 ranks, each ring with its own micro-batch

A micro-batch of 8 tokens, documents of 5 and 3, for a ring of 2. There are 4 chunks; rank 0 gets the first and the last:

    tokens         a a | a a | a b | b b        labels and document ids have one column more than the rest: a chunk's last
    rank 0         a a               b b        token must predict the next chunk's first. `next_token_targets` shifts them
      labels       a a a             b b .      as always, and looks at nothing but these two.
    rank 1               a a   a b
      labels             a a a a b b            Each chunk is a row of the batch that the rank gets, (2, T / 2R).

The loss of stages 1 and 2 is a sum over tokens: each rank sums its own, and scripts divide by the tokens of all ranks anyway.
Stage 3 needs whole answers (the pairs of DPO, the ratio of gspo, the critic of ppo): `gather` gives every rank of a ring the
log-probabilities of all, L numbers, not L x V. Then all R ranks compute the same loss, and everything that a script sums over
ranks, counts and gradients alike, is R times as large; so all quotients stay as they are.

Legend: B sequences, T tokens of the whole micro-batch, N images, L learned tokens, C channels of the LLM, V vocabulary.
"""

import math
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import all_reduce, new_group

from model.llm.attention import PackedSequences, attend
from model.losses import IGNORE, Score, next_token_targets
from model.registry import UserError
from model.ring_attention import Ring, RingAttention, Schedule
from model.vlm import VLM, check_placeholders, image_index


def make_ring(size: int, rank: int, world_size: int) -> Ring | None:
    """The ring of this rank, with the neighbours that share its sequences; None for 1. Every rank calls this.

    UserError where the processes do not make whole rings.
    """
    if size < 1 or world_size % size:
        raise UserError(f"--context_parallel {size}: {world_size} process(es) cannot be divided into groups of {size}, each of "
                        f"which shares a sequence: torchrun --nproc_per_node {max(2, size)}, or a multiple of it")
    rings = [tuple(range(first, first + size)) for first in range(0, world_size, size)]
    groups: list[Any] = [new_group(list(ranks)) for ranks in rings] if size > 1 else []  # all ranks must make all groups
    return Ring(rings[rank // size], rank % size, groups[rank // size]) if groups else None


@dataclass
class Shard:
    """What the tokens of one rank need to know of the whole micro-batch.

    schedule       which tiles of attention it computes
    placeholders   (image tokens here,): which row of its pictures' tokens, (N * tokens,), each takes
    image_index    (N,) position of each of its pictures in its conversation
    learned        (learned tokens here,): the place of each among the L of the micro-batch
    total          L
    """

    schedule: Schedule
    placeholders: Tensor
    image_index: Tensor
    learned: Tensor
    total: int

    def to(self, device: torch.device) -> "Shard":
        return Shard(self.schedule.to(device), self.placeholders.to(device), self.image_index.to(device), self.learned.to(device),
                     self.total)


class ContextParallel:
    """A model whose batches are shared out in a ring: `shard` a batch, call the model with it, `gather` its scores."""

    def __init__(self, model: VLM, ring: Ring):
        self.ring, self.image_token_id, self.image_tokens = ring, model.config.image_token_id, model.image_tokens
        self.looks_back = model.connector.looks_back

    def shard(self, batch: dict) -> dict:
        """The batch with this rank's tokens (2, chunk), its labels and document ids (2, chunk + 1), its pictures and a `shard`.

        The last chunk is filled up with tokens that form a document of their own and teach nothing. What the batch holds beside
        tokens and pictures stays whole. ValueError if placeholders and images disagree.
        """
        packed = PackedSequences(batch["document_ids"])
        tokens = {name: packed.pack(batch[name]) for name in ("input_ids", "position_ids", "labels", "document_ids")}  # (T,)
        length = len(packed.owner)
        chunk = math.ceil(length / (2 * self.ring.size))
        filled = 2 * self.ring.size * chunk
        fillers = {"input_ids": int(self.image_token_id == 0), "position_ids": 0, "labels": IGNORE, "document_ids": -1}
        tokens = {name: F.pad(values, (0, filled + 1 - length), value=fillers[name]) for name, values in tokens.items()}
        places = self.ring.positions(self.ring.index, chunk).view(2, chunk)
        wider = torch.cat([places, places[:, -1:] + 1], dim=1)  # (2, chunk + 1)

        starts = (packed.lengths.cumsum(0) - packed.lengths)[packed.owner]  # (T,)
        starts = F.pad(starts, (0, filled - length), value=length)[places.flatten()]
        learned = next_token_targets(tokens["labels"][None], tokens["document_ids"][None])[0] != IGNORE  # (filled + 1,)
        here = places.flatten()  # (T / R,)
        order = (learned.cumsum(0) - 1)[here][learned[here]]
        pictures, placeholders, index = self.pictures(batch, tokens["input_ids"] == self.image_token_id, packed, here)
        shard = Shard(Schedule(self.ring, chunk, starts), placeholders, index, order, int(learned.sum()))
        return {**{name: value for name, value in batch.items() if name not in ("pixels", "features")}, **pictures,
                **{name: values[wider if name in ("labels", "document_ids") else places] for name, values in tokens.items()},
                "shard": shard}

    def pictures(self, batch: dict, is_image: Tensor, packed: PackedSequences, here: Tensor) -> tuple[dict, Tensor, Tensor]:
        """(the pictures whose placeholders are among the tokens `here`, `placeholders`, `image_index`); see Shard.

        A picture across a boundary is encoded on both sides. A connector that compares a picture with the one before gets that
        one too, in the row above.
        """
        name = next((name for name in ("features", "pixels") if name in batch), None)
        images, real = len(batch[name]) if name else 0, is_image[:len(packed.owner)]
        check_placeholders(real, packed, images, self.image_tokens, batch.get("ids"))
        number = (is_image.cumsum(0) - 1)[here][is_image[here]]  # of each placeholder here, among all
        if name is None or not len(number):
            return {}, number, number
        image, index = number // self.image_tokens, image_index(real, packed, self.image_tokens)
        before = [image[index[image] >= back] - back for back in range(1, self.looks_back + 1)]
        rows = torch.cat([image, *before]).unique()  # ascending
        placeholders = torch.searchsorted(rows, image) * self.image_tokens + number % self.image_tokens
        return {name: batch[name][rows]}, placeholders, index[rows]

    def gather(self, values: Tensor, batch: dict) -> Tensor:
        """This rank's (learned tokens here,) -> (L,), those of all ranks of the ring in the order of the whole micro-batch."""
        shard = batch["shard"]
        return RingSum.apply(values.new_zeros(shard.total).index_copy(0, shard.learned, values), self.ring)

    def gather_score(self, score: Score, batch: dict) -> Score:
        """The score with logps, owner and values of all L tokens; its logits stay this rank's."""
        values = None if score.values is None else self.gather(score.values, batch)
        return Score(self.gather(score.logps, batch), self.gather(score.owner, batch), score.logits, values)


class RingSum(torch.autograd.Function):
    """The sum over the ranks of a ring. The loss of each of them reads it, so its gradient is a sum too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ring: Ring) -> Tensor:
        ctx.ring, total = ring, values.clone()
        all_reduce(total, group=ring.group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        all_reduce(total, group=ctx.ring.group)
        return total, None


# ---------------------------------------------------------------- the model


def apply(model: VLM, ring: Ring) -> ContextParallel:
    """Let the model read shards as well as ordinary batches; UserError for a language model of another library."""
    blocks: list[Any] = list(model.llm.blocks)
    if not all(hasattr(getattr(block, "self_attn", None), "attend") for block in blocks):
        raise UserError(f"--context_parallel needs --llm gpt, which computes its own attention, not {model.config.llm_name}")
    for block in blocks:
        block.self_attn.attend = attend_in_ring
    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]  # a method: a copy of the model has its own
    return ContextParallel(model, ring)


def attend_in_ring(q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
    """`attend` (model/llm/attention.py) for ordinary batches, and ring attention for a shard."""
    if not isinstance(packed, Shard):
        return attend(q, k, v, packed)
    return RingAttention.apply(q.to(v.dtype), k.to(v.dtype), v, packed.schedule)


def forward(self: VLM, batch: dict, logits_to_keep: Tensor, cache: Any = None) -> Tensor:
    """VLM.forward; of a shard, logits_to_keep (2, chunk + 1), the logits of this rank's tokens."""
    shard: Shard | None = batch.get("shard")
    if shard is None:
        return type(self).forward(self, batch, logits_to_keep, cache)
    input_ids = batch["input_ids"].flatten()
    x, features = self.llm.embed(input_ids), self.image_features(batch)
    if features is not None:
        tokens = self.connector(features, shard.image_index).flatten(0, 1)[shard.placeholders]  # (image tokens here, C)
        x = x.masked_scatter((input_ids == self.config.image_token_id)[:, None], tokens.to(x.dtype))
    if torch.is_grad_enabled() and not x.requires_grad:
        x.requires_grad_()  # all ranks take part in each other's backward pass, even those without a trained weight below
    return self.llm(x, batch["position_ids"].flatten(), shard, logits_to_keep[:, :-1].flatten())
