"""The processes of a run: one, or the ranks of torchrun, which compute the same step on different data.

In:  the environment that torchrun sets.  Out: sums and dicts over all ranks. With one process, the ordinary case, nothing is
     asked of others.

Ranks that were started in different ways would wait for each other for ever, or train on in silence; so they compare, before
the first step, their flags, code, data and weights.
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import all_gather_object, all_reduce, destroy_process_group, init_process_group
from tqdm import tqdm

from model.flag_file import as_mapping
from model.registry import UserError
from model.run_data import data_settings
from model.stopping import StopSignals

ROOT = Path(__file__).parents[1]


class Ranks:
    """This process among all of them."""

    device: torch.device

    def __init__(self) -> None:
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_main = self.rank == 0
        self.signals = StopSignals(several=self.world_size > 1)
        self.told_to_stop = 0  # ranks that were, when all of them last summed something

    def join(self, device: torch.device, script: str, settings: Any) -> None:
        """Meet the other ranks; UserError where they differ in their script, flags, data or code."""
        self.device = device
        if self.world_size > 1:
            # The first rank checks and labels alone while the others wait: a day, where ten minutes would end the run.
            init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
            data = {f"--{name}": str(value) for name, value in data_settings(settings).items()}
            self.require_same({"script": script, **flag_facts(as_mapping(settings)), **data, "code": code_fingerprint(),
                               "torch": torch.__version__})

    def leave(self) -> None:
        """Let the other ranks go."""
        if self.world_size > 1:
            destroy_process_group()

    def require_same(self, facts: Mapping[str, str]) -> None:
        """UserError for the first fact that is not the same on every rank."""
        found: list[Mapping[str, str]] = [facts] * self.world_size
        if self.world_size > 1:
            all_gather_object(found, facts)
        for rank, others in enumerate(found):
            for name in {**found[0], **others}:
                if others.get(name) != found[0].get(name):
                    raise UserError(f"rank {rank} was started with {name} {others.get(name)}, rank 0 with {found[0].get(name)}: "
                                    f"start every rank with the same flags, code, data and weights")

    def print0(self, text: str) -> None:
        """Print once, however many ranks there are, without breaking the progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks. It also tells each rank, at the same place, whether one of them is to stop."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value, bool(self.signals.number)], dtype=torch.float64, device=self.device)
        all_reduce(total)
        value, self.told_to_stop = total.tolist()
        return value

    def max(self, value: float) -> float:
        """The largest of a number over all ranks."""
        return max(self.all_gather({self.rank: value}).values())

    def all_gather(self, found: dict) -> dict:
        """The dicts of all ranks as one."""
        if self.world_size == 1:
            return found
        parts: list[dict] = [{}] * self.world_size
        all_gather_object(parts, found)
        return {key: value for part in parts for key, value in part.items()}

    @property
    def stopping(self) -> bool:
        """Whether a signal asks for the end of the run; all ranks learn it in the same step."""
        return bool(self.signals.number if self.world_size == 1 else self.told_to_stop)


def flag_facts(flags: Mapping[str, Any], prefix: str = "--") -> dict[str, str]:
    """Flags as {"--lr": "0.001", "--train.llm": "full"}."""
    facts: dict[str, str] = {}
    for name, value in flags.items():
        facts.update(flag_facts(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)})
    return facts


def code_fingerprint() -> str:
    """A hash of the program."""
    files = [*ROOT.glob("*.py"), *(ROOT / "model").rglob("*.py"), *(ROOT / "dataset").rglob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]
