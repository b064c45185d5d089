"""Where and how exactly a run computes.

In:  --device and --dtype.  Out: what torch calls them; UserError where this machine lacks it.
"""

import ctypes
import os
import sys
from importlib.util import find_spec
from typing import Any

import torch

from model.registry import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_CHANNELS = 128  # a language model of fewer, as in a test, is no faster in bf16 on a CPU: casts cost what products save


def keep_freed_memory() -> None:
    """Let glibc reuse what a tensor frees for the next one (Linux; elsewhere nothing happens).

    By default every block above some megabytes goes back to the system and comes anew, a page fault for each 4 kB: 5 to 15 %
    of the time of a nano step on a CPU.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # not in musl
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def pick_device(wanted: str) -> torch.device:
    """The device of --device; auto: this rank's GPU where there is one."""
    kind = wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU: use --device cpu, or install torch with CUDA")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch sees no Apple GPU: use --device cpu")
    if kind != "cuda":
        try:
            return torch.device(kind)
        except RuntimeError as error:
            raise UserError(f"--device is auto, cpu, cuda or mps, not {wanted!r}") from error
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def processor() -> dict[str, Any]:
    """What this machine's processor can do, by the names of torch.cpu.get_capabilities; {} where torch is too old to say it."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def use_wide_vectors() -> None:
    """Let oneDNN multiply in fp32 on AMD processors with AVX-512, where torch's other library, MKL, uses half of a vector unit.

    The setting allows products to be rounded to bf16, too. oneDNN does that with AMX alone, so those processors are left out,
    and here products stay exact to fp32; a test compares them. On an EPYC of 2024 they are twice as fast.
    """
    can = processor()
    if can.get("cpu_name", "").startswith("AMD") and can["avx512_f"] and not can["amx_tile"]:
        torch.set_float32_matmul_precision("medium")


def multiplies_in_bf16(device: torch.device) -> bool:
    """Whether a GPU or a processor has instructions for products in bf16; without them a processor is many times slower in it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(processor().get(name) for name in ("avx512_bf16", "amx_bf16"))


def pick_dtype(wanted: str, device: torch.device, channels: int = 0) -> torch.dtype:
    """The precision of --dtype for a language model of so many channels.

    auto: bf16 on a GPU that has it, and on a processor that has it where a model is wide enough to gain. This is a rule and not a
    measurement, so that a run gives the same numbers again.
    """
    if wanted == "auto":
        wide = device.type == "cuda" or channels >= BF16_CHANNELS
        return torch.bfloat16 if wide and multiplies_in_bf16(device) else torch.float32
    if wanted not in DTYPES:
        raise UserError(f"--dtype is auto, {' or '.join(DTYPES)}, not {wanted!r}")
    return DTYPES[wanted]


def memory(device: torch.device) -> float:
    """The most bytes that this process has held: of a GPU's memory, or else of the machine's (0 where that is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if find_spec("resource") is None:  # Windows
        return 0.0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
