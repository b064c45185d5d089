"""Generation as a ladder of functions: prefill -> sample -> decode -> sample -> ..., and two that climb it.

In:  a batch of prompts, one document per row, padded on the right; different lengths and image counts mix.
Out: generate -> Answers; stream -> tokens one by one.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from model.llm.attention import PackedSequences
from model.llm.cache import Cache
from model.losses import sampling_logits
from model.registry import UserError
from model.vlm import VLM


@dataclasses.dataclass
class Answer:
    """One sampled answer.

    tokens    without the stop token
    logps     log-probability, in nats, of every sampled token under the distribution it was sampled from; when
              stopped, one more than tokens: ending the answer was a choice too, and RL learns it
    stopped   it ended by itself, not because max_new_tokens ran out
    """

    tokens: list[int]
    logps: list[float]
    stopped: bool


def max_prompt_tokens(model: VLM, max_new_tokens: int) -> int:
    """Tokens that a prompt may have before so long an answer; UserError where none are left."""
    room = model.config.llm.max_position_embeddings - max_new_tokens
    if room < 1 or max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {max_new_tokens} leaves no room for prompt and answer: this model reads "
                         f"{model.config.llm.max_position_embeddings} tokens")
    return room


@torch.no_grad()
def prefill(model: VLM, batch: dict, room: int) -> tuple[Tensor, Cache]:
    """Read B prompts -> logits of each one's next token (B, V), and a cache with room for `room` more tokens."""
    real = batch["document_ids"] >= 0
    packed = PackedSequences(batch["document_ids"])
    rows, longest = real.shape
    if packed.count != rows or not real[:, 0].all():
        raise ValueError("a batch of prompts holds one document per row, padded on the right")
    limit = model.config.llm.max_position_embeddings
    if longest + room > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and {room} new ones exceed max_position_embeddings = {limit}: "
            f"shorten the prompt or lower max_new_tokens"
        )
    last = torch.zeros_like(real).scatter(1, packed.lengths[:, None] - 1, True)
    cache = model.llm.cache(rows, longest + room)
    return model(batch, logits_to_keep=last, cache=cache), cache


def next_logits(model: VLM, batch: dict) -> Tensor:
    """Read B prompts -> logits of each one's next token (B, V)."""
    return prefill(model, batch, room=0)[0]


@torch.no_grad()
def decode(model: VLM, tokens: Tensor, cache: Cache) -> Tensor:
    """One more token per row: (B,) -> logits (B, V)."""
    return model.llm(model.llm.embed(tokens), cache.lengths, packed=None, cache=cache)


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    banned: Sequence[int],
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """(B, V) -> tokens (B,), and their log-probabilities (B,) under exactly the distribution they were drawn from.

    Order: ban, temperature, then the smallest set of tokens that holds top_p (1.0: all; nucleus sampling, arXiv 1904.09751).
    Temperature 0 takes the likeliest token, with certainty: log-probability 0. ValueError for a temperature below 0, or a top_p
    that is not a share above 0.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise UserError(f"a temperature is at least 0, top_p above 0 and at most 1, not {temperature} and {top_p}")
    logits = sampling_logits(logits, temperature or 1.0, banned)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens hold: 0 for the first, always kept
        dropped = (before >= top_p).scatter(1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    logps = logits.log_softmax(-1)
    tokens = draw(logps.exp(), generator)[:, None]
    return tokens.squeeze(1), logps.gather(1, tokens).squeeze(1)


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """(B, V) -> (B,): a token of each row, by inverting the sum of the probabilities up to it.

    One random number a row; torch.multinomial draws one for each of the V tokens, and took 20 times as long (256 x 6400, CPU).
    """
    upto = probabilities.cumsum(-1)
    place = torch.rand(len(upto), 1, generator=generator, device=upto.device) * upto[:, -1:]
    place = torch.minimum(place, upto[:, -1:].nextafter(torch.zeros_like(place)))  # below the end, also when it was rounded
    return torch.searchsorted(upto, place, right=True).squeeze(1)  # right: never a token of probability 0


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, whatever it was before after it."""
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
    """`group_size` answers per prompt, all those of the first prompt first; a prompt is read once however many it gets."""
    with evaluating(model):
        logits, cache = prefill(model, batch, room=max_new_tokens)
        cache.repeat(group_size)
        logits = logits.repeat_interleave(group_size, dim=0)
        results = [Answer([], [], stopped=False) for _ in range(len(logits))]
        active = results
        for remaining in reversed(range(max_new_tokens)):
            tokens, logps = sample(logits, temperature, top_p, banned, generator)
            going = []
            for row, (answer, token, logp) in enumerate(zip(active, tokens.tolist(), logps.tolist(), strict=True)):
                answer.logps.append(logp)
                if token in stop_ids:
                    answer.stopped = True
                else:
                    answer.tokens.append(token)
                    going.append(row)
            if not going or remaining == 0:
                break
            if len(going) < len(active):  # finished rows leave
                active = [active[row] for row in going]
                rows = torch.tensor(going, device=tokens.device)
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
    """The tokens of one prompt's answer as they are sampled; should_stop is asked before each (a stop button)."""
    with evaluating(model):
        logits, cache = prefill(model, batch, room=max_new_tokens)
        for remaining in reversed(range(max_new_tokens)):
            if should_stop is not None and should_stop():
                return
            token, _ = sample(logits, temperature, top_p, banned, generator)
            if int(token) in stop_ids:
                return
            yield int(token)
            if remaining > 0:
                logits = decode(model, token, cache)
