"""Gradient checkpointing: compute a block's activations again in the backward pass instead of storing them (arXiv 1604.06174).

In:  a finished model.  Out: the same model with the same gradients. It stores only the input of each block, so it needs less
     memory, at the cost of one more forward pass.

    recompute.apply(model)
"""

import types
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
            block.forward = types.MethodType(recomputed(block.forward.__func__), block)  # a method: a copy has its own


def recomputed(forward: Callable) -> Callable:
    """The same function, which stores only its arguments for the backward pass."""

    def forward_again(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():  # in generation there is no backward pass
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return forward_again
