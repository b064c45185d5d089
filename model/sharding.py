"""Shard a language model over ranks: weights, gradients and optimizer state (ZeRO, arXiv 1910.02054), by torch's fully_shard.

    zero2   each rank stores its shard of gradients and optimizer state; weights are gathered for a step and freed after it
    zero3   weights are also freed after each block of the forward pass, and gathered again for the backward pass

In:  a finished model with `requires_grad` set, the same on every rank.  Out: a module to call in training, like DDP's.
`fully_shard` turns the parameters into DTensors, each rank holding a slice; so the optimizer is made after it.
The encoder and the connector are not sharded; their gradients are averaged. A rank with text-only rows does not use them, and
if they were sharded, the other ranks would wait for it.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce, get_world_size, is_initialized

from model.registry import UserError
from model.vlm import VLM

KINDS = ("ddp", "zero2", "zero3")


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor. It tests for a method, because importing the class takes a second."""
    return hasattr(value, "full_tensor")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def gather_tensor(value: Any) -> Any:
    """The full tensor of a sharded one, on every rank (all must call this); any other value unchanged."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Any, like: Any) -> Any:
    """A full tensor sharded as `like`, a sharded tensor of the same shape; any other value unchanged."""
    if not (is_sharded(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # each rank slices its own copy


class Averaged(nn.Module):
    """A model for training with ranks that use no trained weight, as with text-only rows when only the connector trains.

    With DDP the other ranks would wait forever for such a rank.
    replicated   the parameters that every rank holds in full; their gradients are averaged
    """

    def __init__(self, model: nn.Module, replicated: list[nn.Parameter]):
        super().__init__()
        self.model, self.replicated = model, replicated

    def forward(self, batch: dict, keep: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.model(batch, keep)
        logits = out[0] if isinstance(out, tuple) else out
        if self.replicated and logits.requires_grad:
            # The callback runs at the end of the backward pass, when all gradients exist. DDP and fully_shard do the same.
            logits.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self.average))
        return out

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients of the replicated parameters over ranks; a parameter that no rank used keeps none."""
        if not is_initialized():
            return
        used = torch.tensor([float(p.grad is not None) for p in self.replicated], device=self.replicated[0].device)
        all_reduce(used, ReduceOp.MAX)
        for p, used_by_any in zip(self.replicated, used.tolist()):
            if used_by_any:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                all_reduce(p.grad)
                p.grad /= get_world_size()


class Sharded(Averaged):
    """A model with a sharded language model; evaluation calls the model itself, after `gather`."""

    def __init__(self, model: VLM, kind: str):
        super().__init__(model, [p for part in (model.encoder, model.connector) for p in part.parameters() if p.requires_grad])
        self.kind, self.blocks = kind, list[Any](model.llm.blocks)

    def forward(self, batch: dict, keep: Tensor) -> Tensor | tuple[Tensor, ...]:
        for block in self.blocks:
            block.set_reshard_after_forward(self.kind == "zero3")
        return super().forward(batch, keep)


def apply(model: VLM, kind: str, device: torch.device) -> Sharded:
    """Shard the language model over all ranks; UserError for an unknown kind, or with only one rank."""
    if kind not in KINDS:
        raise UserError(f"--shard is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {kind!r}")
    if not is_initialized():
        raise UserError(f"--shard {kind} divides a model among processes, but there is only one: torchrun --nproc_per_node 2 ...")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    replicated = {p for part in (model.encoder, model.connector) for p in part.parameters()}
    modules: list[Any] = [*model.llm.blocks, model]  # the model itself: for the embedding and the last norm, outside the blocks
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=kind == "zero3", ignored_params=replicated)
    # What to gather next in the backward pass. By default torch infers it from forward passes; but rank 0 also runs those of the
    # evaluation, and ranks that gather different modules wait forever.
    for module, earlier in zip(modules, [modules[-1], *modules[:-1]]):
        module.set_modules_to_backward_prefetch([earlier])
    return Sharded(model, kind)


def gather(model: nn.Module) -> None:
    """Gather the weights until the next step's backward pass, so that one rank may use the model alone. Every rank calls this."""
    for module in sharded_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@contextlib.contextmanager
def unsharded(model: nn.Module, write: bool = False) -> Iterator[None]:
    """Inside the block the parameters are full tensors, to save or, with `write`, to load. Every rank enters it."""
    for module in sharded_modules(model):
        module.reshard()
    places: list[tuple[dict, str, Any]] = [(owner._parameters, name, p) for owner in model.modules()
                                           for name, p in owner._parameters.items() if is_sharded(p)]
    gathered: dict[Tensor, nn.Parameter] = {}  # a tied parameter, in two places, stays one
    for parameters, name, p in places:
        if p not in gathered:
            gathered[p] = nn.Parameter(p.detach().full_tensor(), p.requires_grad)
        parameters[name] = gathered[p]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameters, name, p in places:
                if write:
                    p.copy_(shard_like(parameters[name].detach(), p))
                parameters[name] = p


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_ for sharded and ordinary gradients together; returns the norm of all of them."""
    groups = [[p for p in parameters if is_sharded(p) is sharded] for sharded in (False, True)]
    norms = [gather_tensor(nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups if group]
    norm = functools.reduce(torch.hypot, norms) if norms else torch.tensor(0.0)
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
