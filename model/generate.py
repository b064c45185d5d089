"""Generation in small functions: prefill -> sample -> decode -> sample -> ..., and two loops over them, generate and stream.

In:  a batch of prompts, one document per row, padded on the right; lengths and image counts may differ.
Out: generate -> Answers; stream -> tokens one by one.    Legend: B sequences (prompts, later answers), V vocabulary.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.llm.attention import PackedSequences
from model.llm.cache import Cache
from model.losses import sampling_logits
from model.registry import UserError
from model.vlm import VLM

BROKEN = ("the model gives probabilities that are not finite, so its weights are out of bounds: lower --lr and go on from an "
          "earlier state with --resume, or take another checkpoint")


@dataclasses.dataclass
class Answer:
    """One sampled answer.

    tokens    without the stop token
    logps     log-probability, in nats, of every sampled token under the distribution that it was sampled from. If stopped,
              there is one more than tokens: to end the answer was a choice too, and RL learns it
    stopped   the model ended the answer by a stop token, before max_new_tokens ran out
    """

    tokens: list[int]
    logps: list[float]
    stopped: bool


@torch.no_grad()
def prefill(model: VLM, batch: dict, new_tokens: int) -> tuple[Tensor, Cache]:
    """Read B prompts -> the logits of their next tokens (B, V), and a cache with space for `new_tokens` more tokens."""
    real = batch["document_ids"] >= 0
    packed = PackedSequences(batch["document_ids"])
    rows, longest = real.shape
    if packed.count != rows or not real[:, 0].all():
        raise ValueError("a batch of prompts holds one document per row, padded on the right")
    limit = model.config.llm.max_position_embeddings
    if longest + new_tokens > limit:
        raise ValueError(f"a prompt of {longest} tokens and {new_tokens} new ones exceed max_position_embeddings = {limit}: "
                         f"shorten the prompt or lower max_new_tokens")
    last = torch.zeros_like(real).scatter(1, packed.lengths[:, None] - 1, True)  # (B, T), True at each prompt's last token
    cache = model.llm.cache(rows, longest + new_tokens)
    return model(batch, logits_to_keep=last, cache=cache), cache


def next_logits(model: VLM, batch: dict) -> Tensor:
    """Read B prompts -> the logits of their next tokens (B, V)."""
    return prefill(model, batch, new_tokens=0)[0]


@torch.no_grad()
def decode(model: VLM, tokens: Tensor, cache: Cache) -> Tensor:
    """One more token per row: (B,) -> logits (B, V)."""
    return model.llm(model.llm.embed(tokens), cache.lengths, packed=None, cache=cache)


def sample(logits: Tensor, temperature: float, top_p: float, banned: Sequence[int],
           generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(B, V) -> tokens (B,), and their log-probabilities (B,) under exactly the distribution that they are drawn from.

    Order: ban, temperature, then the smallest set of tokens that holds top_p (1.0: all; nucleus sampling, arXiv 1904.09751).
    Temperature 0 takes the likeliest token; it is certain, so its log-probability is 0. UserError for a temperature below 0, or
    a top_p outside (0, 1].
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"the temperature must be at least 0, top_p above 0 and at most 1, not {temperature} and {top_p}")
    logits = sampling_logits(logits, temperature or 1.0, banned)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # of likelier tokens: 0 for the first, so it stays
        dropped = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    probabilities = logits.softmax(-1)
    tokens = draw(probabilities, generator)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1).log()


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, V) -> (B,): a random token per row, by inverting the cumulative distribution, first of blocks and then of one block.

    torch.multinomial draws V random numbers a row, and a running sum over all of V is slow on a CPU.
    """
    rows, vocabulary = probabilities.shape
    width = math.isqrt(vocabulary - 1) + 1
    blocks = F.pad(probabilities, (0, -vocabulary % width)).unflatten(1, (-1, width))  # (B, blocks, width)
    ends = blocks.sum(-1).cumsum(-1)  # (B, blocks)
    point = torch.rand(rows, 1, generator=generator, device=ends.device) * ends[:, -1:]  # (B, 1)
    block = above(ends, point)
    begin = F.pad(ends, (1, 0)).gather(1, block)  # (B, 1) where the block begins
    inside = blocks[torch.arange(rows, device=block.device), block.squeeze(1)].cumsum(-1)  # (B, width)
    tokens = block * width + above(inside, point - begin)
    return tokens.squeeze(1).clamp(max=vocabulary - 1)  # of a row of NaN it would be V or more


def above(cumulative: Tensor, point: Tensor) -> Tensor:
    """The first place of each row whose sum is above the point, (B, n), (B, 1) -> (B, 1): never one of probability 0."""
    end = cumulative[:, -1:]
    point = torch.minimum(point, end.nextafter(torch.zeros_like(end)))  # below the end even after rounding
    return torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[1] - 1)


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; the mode from before after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.inference_mode()
def generate(
    model: VLM,
    batch: dict,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
    generator: torch.Generator | None = None,
    group_size: int = 1,
) -> list[Answer]:
    """`group_size` answers per prompt, first all those of the first prompt. Each prompt is read once."""
    with evaluating(model):
        logits, cache = prefill(model, batch, new_tokens=max_new_tokens)
        cache.repeat(group_size)
        logits = logits.repeat_interleave(group_size, dim=0)
        results = [Answer([], [], stopped=False) for _ in range(len(logits))]
        active = results
        for remaining in reversed(range(max_new_tokens)):
            tokens, logps = sample(logits, temperature, top_p, banned, generator)
            unfinished = []
            for row, (answer, token, logp) in enumerate(zip(active, tokens.tolist(), logps.tolist(), strict=True)):
                if not math.isfinite(logp):
                    raise FloatingPointError(BROKEN)
                answer.logps.append(logp)
                if token in stop_ids:
                    answer.stopped = True
                else:
                    answer.tokens.append(token)
                    unfinished.append(row)
            if not unfinished or remaining == 0:
                break
            if len(unfinished) < len(active):  # drop finished rows
                active = [active[row] for row in unfinished]
                rows = torch.tensor(unfinished, device=tokens.device)
                tokens = tokens[rows]
                cache.select(rows)
            logits = decode(model, tokens, cache)
    return results


@torch.inference_mode()
def stream(
    model: VLM,
    batch: dict,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
    generator: torch.Generator | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[int]:
    """Yield the tokens of one prompt's answer as they are sampled, until should_stop() is true (a stop button)."""
    with evaluating(model):
        logits, cache = prefill(model, batch, new_tokens=max_new_tokens)
        for remaining in reversed(range(max_new_tokens)):
            if should_stop is not None and should_stop():
                return
            token, logp = sample(logits, temperature, top_p, banned, generator)
            if not math.isfinite(float(logp)):
                raise FloatingPointError(BROKEN)
            if int(token) in stop_ids:
                return
            yield int(token)
            if remaining > 0:
                logits = decode(model, token, cache)
