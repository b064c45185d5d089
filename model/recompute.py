"""Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept (arXiv 1604.06174).

In:  a finished model.  Out: the same model, with the same gradients, in less memory, for one more forward pass: of each block
     only its input is kept.

    recompute.apply(model)
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from model.vlm import VLM


def apply(model: VLM) -> None:
    """Wrap the forward of every block of every part."""
    for part in model.parts.values():
        blocks: Iterable[Any] = getattr(part, "blocks", ())
        for block in blocks:
            block.forward = recomputed(block.forward)


def recomputed(forward: Callable) -> Callable:
    """The same function; where gradients are wanted, it keeps nothing but its arguments."""

    def forward_again(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():  # an answer is being written: nothing would be kept anyhow
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return forward_again
