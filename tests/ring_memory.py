"""How long a sequence fits into the memory of one process, of a ring of two and of a ring of four.

In:  a budget for what a step adds to weights and gradients.  Out: a table of the longest sequence S(R), and its ratio to S(1).

    python -m tests.ring_memory                        some minutes on two cores, which the processes share

A step is a forward and a backward pass of a small decoder over one document of S tokens, all learned, in fp32. One process runs
the model as it is, with PyTorch's own attention, which stores no scores either. The longest S is found by bisection.
"""

import ctypes
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import multiprocessing

from model import cli
from model.cli import RunFlags
from model.losses import score
from model.runtime import Run
from tests import tiny
from tests.speed.measuring import memory


@dataclass
class Config:
    budget: int = 128  # MB that a step may add to a process
    step: int = 64  # tokens: S is a multiple of it, found to 2 %
    rings: tuple[int, ...] = (1, 2, 4)  # processes


def make_run(size: int) -> Run:
    flags = RunFlags(Path("unused"), "", 0, 0, save_every=1, log_every=1, device="cpu", context_parallel=size)
    return Run(flags, "memory")


def batch_of(length: int) -> dict:
    """One document of `length` tokens."""
    ids = torch.randint(5, 50, (1, length))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)[None], "document_ids": torch.zeros_like(ids)}


def step_bytes(run: Run, model: torch.nn.Module, length: int) -> float:
    """The most bytes that one step adds to any process."""
    batch = run.to_device(batch_of(length))
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed goes back to the kernel ...
    Path("/proc/self/clear_refs").write_text("5")  # ... and their peak is forgotten
    before = memory("VmRSS")
    (-score(model, batch).logps.sum() / length).backward()
    peak = memory("VmHWM") - before
    model.zero_grad(set_to_none=False)
    return run.max(peak)


def longest(rank: int, size: int, config: Config, port: int, answer) -> None:
    """S of a ring, put into the queue `answer` by its first process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run = make_run(size)
    model = tiny.vlm(hidden_size=128, num_hidden_layers=6, intermediate_size=384, num_attention_heads=2, num_key_value_heads=1,
                     head_dim=64)  # fmt: skip
    wrapped = run.wrap(model)
    step_bytes(run, wrapped, 4 * config.step)  # the first one also makes the gradients and buffers
    fits, too_long = 0, 0  # in units of config.step
    while not too_long or too_long - fits > max(1, fits // 50):
        tried = (fits + too_long) // 2 if too_long else max(8 * size, 2 * fits)
        if step_bytes(run, wrapped, tried * config.step) <= config.budget * 1e6:
            fits = tried
        else:
            too_long = tried
    if run.is_main:
        answer.put(fits * config.step)


def main(config: Config) -> None:
    print(f"{config.budget} MB a process\n\n| processes | longest sequence | ratio |\n| --- | --- | --- |")
    found: dict[int, int] = {}
    for size in config.rings:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answer = multiprocessing.get_context("spawn").SimpleQueue()
        multiprocessing.spawn(longest, (size, config, port, answer), nprocs=size)
        found[size] = answer.get()
        print(f"| {size} | {found[size]:,} | {found[size] / found[config.rings[0]]:.2f} |", flush=True)


if __name__ == "__main__":
    main(cli.parse(Config))
