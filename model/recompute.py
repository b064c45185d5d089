"""Gradient checkpointing: activations inside a block are computed again in the backward pass instead of kept (arXiv 1604.06174).

In:  a finished model.  Out: the same model, with the same gradients, in less memory, for one more forward pass: of each block
     only its input is kept.

    recompute.apply(model)
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def apply(model: nn.Module) -> None:
    """Wrap the forward of every block of every part."""
    for part in model.parts.values():
        for block in getattr(part, "blocks", ()):
            block.forward = recomputed(block.forward)


def recomputed(forward):
    """The same function; where gradients are wanted, it keeps nothing but its arguments."""

    def forward_again(*arguments, **named):
        if not torch.is_grad_enabled():  # an answer is being written: nothing would be kept anyhow
            return forward(*arguments, **named)
        return checkpoint(forward, *arguments, use_reentrant=False, **named)

    return forward_again
