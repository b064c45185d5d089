"""What every benchmark here measures with: seconds, the rate of matrix products, memory, and the file of results.

In:  a device, and what is to be measured as a function.  Out: seconds, GFLOP/s, bytes; a line of JSON at the end of a file.
"""

import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from model.devices import keep_freed_memory, pick_device, use_wide_vectors
from model.run_folder import commit

CPU = torch.device("cpu")
RESULTS = Path(__file__).with_name("results.jsonl")  # one line a run; model/README.md quotes it


def prepare(device: str, threads: int) -> torch.device:
    """This process as the scripts set theirs up; returns what --device means."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    picked = pick_device(device)
    if picked.type == "cpu":
        use_wide_vectors()
    return picked


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(action: Callable[[], Any], device: torch.device = CPU) -> float:
    """How long an action takes, with all that it starts on the device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def gemm_rate(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of a product of two square matrices: what this machine could do at best in this moment."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(9)) / 1e9


def memory(line: str) -> int:
    """Bytes from this line of the kernel's account of this process (VmRSS: resident now, VmHWM: the most so far)."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{line}:")[1].split()[0])


def added_memory(action: Callable[[], Any], device: torch.device = CPU) -> float:
    """The most bytes that an action adds to what is held before it; nan where it cannot be known (not glibc)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.libc_ver()[0] != "glibc":
        action()
        return float("nan")
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed goes back to the kernel ...
    Path("/proc/self/clear_refs").write_text("5")  # ... and its peak is forgotten
    before = memory("VmRSS")
    action()
    return memory("VmHWM") - before


def peak_memory(device: torch.device = CPU) -> float:
    """The most bytes that this process has held, of a GPU's memory or else of the machine's, since `added_memory` forgot."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else memory("VmHWM")


def spread(values: list[float], digits: int) -> str:
    """The median and the range."""
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}-{max(values):.{digits}f}]"


def processor_name(device: torch.device = CPU) -> str:
    """What the machine's GPU or processor is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")
    names = [line for line in listed.read_text().splitlines() if line.startswith("model name")] if listed.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def add_result(file: Path | None, benchmark: str, settings: dict[str, Any], results: dict[str, Any],
               device: torch.device = CPU) -> None:
    """Append a line to a file of results, if there is one: when, where and of which commit, the settings and what came out."""
    settings = {name: value for name, value in settings.items() if name != "results"}
    line = {"benchmark": benchmark, "date": date.today().isoformat(), "processor": processor_name(device),
            "torch": torch.__version__, "commit": commit(), "settings": settings, "results": results}
    if file is not None:
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line, default=str) + "\n")
