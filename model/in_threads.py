"""A small model on several cores: each computes some of a batch's documents, in a thread of its own.

In:  a model, and batches as dataset/collate.py makes them.  Out: the model's logits and its gradients.

torch divides every operation among the cores, and at its end they wait for each other. An operation of `nano` takes a fraction
of a millisecond, so that two cores gain a sixth over one. With documents of its own a core waits twice a step, as a rank of data
parallel training does; but weights, optimizer and log stay in one process. The gradients of the parts are added in their order,
so that the same seed and number of threads give the same bytes.

Legend: T tokens of all documents, V vocabulary.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from model.vlm import VLM

MOST = 4  # parts: Python itself runs one thread at a time, and each part costs it some milliseconds a step
LEAST = 512  # tokens of a part: matrix products of fewer rows lose what is gained
TOKENS = ("input_ids", "labels", "position_ids", "document_ids")  # what a batch holds of each token

Part = tuple[dict, Tensor]  # some documents of a batch, and which of their tokens' logits are wanted


def split(batch: dict, keep: Tensor, parts: int, image_token_id: int, image_tokens: int) -> list[Part]:
    """A batch (1, T) cut between documents, into at most `parts` parts of about T / parts tokens."""
    document_ids = batch["document_ids"][0]
    images = next((name for name in ("features", "pixels") if name in batch), "")
    placeholders = (batch["input_ids"][0] == image_token_id).cumsum(0)  # (T,) up to each token
    starts = (document_ids[1:] != document_ids[:-1]).nonzero().squeeze(1) + 1  # of all documents but the first
    if not len(starts) or int(placeholders[-1]) != (len(batch[images]) * image_tokens if images else 0):
        return [(batch, keep)]  # one document; or a mistake, of which the model itself tells
    tokens = len(document_ids)
    bounds = sorted({0, tokens, *(int(starts[(starts - tokens * k / parts).abs().argmin()]) for k in range(1, parts))})
    made, first = [], 0
    for start, end in zip(bounds, bounds[1:]):
        part = {name: batch[name][:, start:end] for name in TOKENS}
        part["ids"] = batch["ids"][int(document_ids[start]):int(document_ids[end - 1]) + 1]
        last = int(placeholders[end - 1]) // image_tokens
        if last > first:
            part[images] = batch[images][first:last]
        made.append((part, keep[:, start:end]))
        first = last
    return made


class InThreads(nn.Module):
    """A model for training, called as the model itself."""

    def __init__(self, model: VLM, threads: int):
        super().__init__()
        self.model, self.parts = model, min(threads, MOST)
        self.pool = ThreadPoolExecutor(self.parts, initializer=torch.set_num_threads, initargs=(threads // self.parts,))

    def forward(self, batch: dict, keep: Tensor) -> Tensor:
        rows, tokens = batch["input_ids"].shape
        count = min(self.parts, tokens // LEAST) if rows == 1 else 1
        parts = split(batch, keep, count, self.model.config.image_token_id, self.model.image_tokens) if count > 1 else []
        if len(parts) < 2 or not torch.is_grad_enabled():  # to score alone, all cores share each operation
            return self.model(batch, keep)
        return Divided.apply(self, parts, *(p for p in self.model.parameters() if p.requires_grad))

    def map(self, function: Callable[[Any], Any], items: Iterable) -> list:
        """The result of a function for each item, by a thread each, in the precision of this thread."""
        enabled, dtype, grad = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()

        def computed(item: Any) -> Any:
            # Weights that were cast are kept for all threads in one place, with a piece of one thread's graph: so keep none.
            with torch.autocast("cpu", dtype, enabled=enabled, cache_enabled=False), torch.set_grad_enabled(grad):
                return function(item)

        return list(self.pool.map(computed, items))


def on_cores(model: nn.Module) -> nn.Module:
    """The module to call in training: `InThreads` on several cores of a CPU, or the model itself.

    Not where a call keeps something in the module, as the critic's does (model/rl/critic.py), and modules of others may.
    """
    threads = torch.get_num_threads()
    stateless = all(type(module).__module__.partition(".")[0] in ("model", "torch") for module in model.modules())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    return InThreads(model, threads) if isinstance(model, VLM) and stateless and on_cpu and threads > 1 else model


class Divided(torch.autograd.Function):
    """The graphs of all parts as one operation in the graph of the loss: logits (selected, V)."""

    @staticmethod
    def forward(ctx: Any, owner: InThreads, parts: list[Part], *trained: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.logits = owner.map(lambda part: owner.model(*part), parts)
        ctx.owner, ctx.trained = owner, trained
        return torch.cat([logits.detach() for logits in ctx.logits])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        def of_part(item: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(item[0], ctx.trained, item[1], allow_unused=True)

        of_parts = ctx.owner.map(of_part, zip(ctx.logits, gradient.split([len(logits) for logits in ctx.logits])))
        ctx.logits = None  # and with them the graphs
        return None, None, *(added(found) for found in zip(*of_parts))


def added(gradients: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of those that there are, in their order; None where there is none."""
    total = None
    for gradient in gradients:
        if gradient is not None:
            total = gradient if total is None else total.add_(gradient)
    return total
