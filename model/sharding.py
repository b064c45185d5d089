"""A language model divided among processes: weights, gradients and the optimizer's memory (ZeRO, arXiv 1910.02054), by torch.

    zero2   each process keeps its share of gradients and optimizer state; weights are gathered for a step and freed after it
    zero3   weights are also freed after each block of the forward pass, and gathered again for the backward pass

In:  a finished model with `requires_grad` set, on every process the same.  Out: a module to call in training, as DDP's is.
Torch's `fully_shard` turns the parameters into DTensors, of which each process holds a slice: the optimizer is made after it.
The encoder and the connector stay whole on every process, and their gradients are averaged: a process whose rows hold no
picture does not use them, and a divided part that one process leaves out would keep all others waiting.
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


def is_divided(value: Any) -> bool:
    """Whether something is a DTensor: told by what it can do, for to import the class takes a second that most runs can save."""
    return hasattr(value, "full_tensor")


def divided_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def full(value: Any) -> Any:
    """A divided tensor gathered, on every process, which all must call this; anything else as it is."""
    return value.full_tensor() if is_divided(value) else value


def divided(value: Any, like: Any) -> Any:
    """A whole tensor divided as a tensor of the same shape is; anything else as it is."""
    if not (is_divided(like) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)  # each takes its slice of its own


class Averaged(nn.Module):
    """A model as training calls it, of which a process may use nothing that is trained, as rows of text where the connector alone
    learns. With DDP the other processes would wait for that one for ever.

    whole   the parameters of which every process has all, and whose gradients are averaged
    """

    def __init__(self, model: nn.Module, whole: list[nn.Parameter]):
        super().__init__()
        self.model, self.whole = model, whole

    def forward(self, batch: dict, keep: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = self.model(batch, keep)
        logits = out[0] if isinstance(out, tuple) else out
        if self.whole and logits.requires_grad:
            # Called at the end of the backward pass, when all gradients are there. DDP and fully_shard do it in this way, too.
            logits.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self.average))
        return out

    @torch.no_grad()
    def average(self) -> None:
        """The mean over processes of the gradients of what is whole; what no process used keeps none."""
        if not is_initialized():
            return
        used = torch.tensor([float(p.grad is not None) for p in self.whole], device=self.whole[0].device)
        all_reduce(used, ReduceOp.MAX)
        for p, somewhere in zip(self.whole, used.tolist()):
            if somewhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                all_reduce(p.grad)
                p.grad /= get_world_size()


class Sharded(Averaged):
    """A model whose language model is divided; evaluation calls the model itself, after `gather`."""

    def __init__(self, model: VLM, kind: str):
        super().__init__(model, [p for part in (model.encoder, model.connector) for p in part.parameters() if p.requires_grad])
        self.kind, self.blocks = kind, list[Any](model.llm.blocks)

    def forward(self, batch: dict, keep: Tensor) -> Tensor | tuple[Tensor, ...]:
        for block in self.blocks:
            block.set_reshard_after_forward(self.kind == "zero3")
        return super().forward(batch, keep)


def apply(model: VLM, kind: str, device: torch.device) -> Sharded:
    """Divide the language model among all processes; UserError for another kind, or where there is only one process."""
    if kind not in KINDS:
        raise UserError(f"--shard is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {kind!r}")
    if not is_initialized():
        raise UserError(f"--shard {kind} divides a model among processes, and there is one: torchrun --nproc_per_node 2 ...")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    whole = {p for part in (model.encoder, model.connector) for p in part.parameters()}
    modules: list[Any] = [*model.llm.blocks, model]  # what is in no block, the embedding and the last norm, belongs to the model
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=kind == "zero3", ignored_params=whole)
    # The next to gather in the backward pass. By default it is what was seen in the forward pass, but the first process also sees
    # its evaluations, and processes that gather different things wait for ever.
    for module, earlier in zip(modules, [modules[-1], *modules[:-1]]):
        module.set_modules_to_backward_prefetch([earlier])
    return Sharded(model, kind)


def gather(model: nn.Module) -> None:
    """Every process: make the weights whole until the backward pass of the next step, so that one process may use them alone."""
    for module in divided_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@contextlib.contextmanager
def whole(model: nn.Module, write: bool = False) -> Iterator[None]:
    """Inside the block the parameters are ordinary whole tensors, to save or, with `write`, to load. Every process enters it."""
    for module in divided_modules(model):
        module.reshard()
    places: list[tuple[dict, str, Any]] = [(owner._parameters, name, p) for owner in model.modules()
                                           for name, p in owner._parameters.items() if is_divided(p)]
    gathered: dict[Tensor, nn.Parameter] = {}  # one in two places, an embedding that is also the head, stays one
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
                    p.copy_(divided(parameters[name].detach(), p))
                parameters[name] = p


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """torch's clip_grad_norm_ where some gradients are divided: scaled together, by the norm of all; returns that."""
    kinds = [[p for p in parameters if is_divided(p) is kind] for kind in (False, True)]
    norms = [full(nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])) for chosen in kinds if chosen]
    norm = functools.reduce(torch.hypot, norms) if norms else torch.tensor(0.0)
    for chosen in kinds:
        nn.utils.clip_grads_with_norm_(chosen, max_norm, norm)
    return norm
