"""What a run began with: the model before its first step, which the policy is compared with and held to.

In:  a model before its first step.  Out: the same for as long as it is wanted, or what it thinks of pairs, kept in a file.

    lora:R alone    the adapters switched off: no second model, no file
    else            a copy (answers that are sampled in every step are not known beforehand), or
                    `Reference`: the log-probabilities of pairs that are, computed once and kept
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import checkpoint, lora
from model.by_preferences import sums_now
from model.losses import WITHOUT_REFERENCE
from model.runtime import Run
from model.vlm import VLM

# ---------------------------------------------------------------- which model it is


def fingerprint(*parts: str | bytes | dict[str, Tensor]) -> str:
    """A hash of everything that a log-probability depends on besides the pair: config, tokenizer, weights, ..."""
    digest = hashlib.sha256()
    for part in parts:
        for name, tensor in sorted(part.items()) if isinstance(part, dict) else ():
            digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
        if not isinstance(part, dict):
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:32]


def made_by(model: VLM, tokenizer, run: Run) -> str:
    """Tells what a model says from what any other says."""
    return fingerprint(model.config.to_json(), tokenizer.file.read_bytes(), str(run.dtype), lora.merged(model))


def require_same_start(run: Run, made_by: str) -> None:
    """ValueError where a run is resumed that began with other weights: what it compares with would be another model."""
    if run.state.get("made_by", made_by) != made_by:
        raise ValueError(f"{run.out} was started from other weights than those of {run.config.init} now: restore them, or start "
                         f"again without --resume")


# ---------------------------------------------------------------- the model itself

Start = Callable[[], AbstractContextManager[VLM]]


def adapters_alone(model: VLM) -> bool:
    """Whether nothing but adapters is trained."""
    return all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def at_start(model: VLM) -> Start:
    """The model as it is now, for as long as is wanted: `with start() as model`. Called before the first step.

    Where adapters alone are trained it is the model with these switched off, at no memory; else a copy.
    """
    if not adapters_alone(model):
        kept = copy.deepcopy(model).requires_grad_(False).eval()
        return lambda: nullcontext(kept)

    @contextmanager
    def switched_off() -> Iterator[VLM]:
        with lora.switched_off(model):
            yield model

    return switched_off


# ---------------------------------------------------------------- what it thinks of pairs


def live(start: Start, run: Run) -> Callable[[dict], Tensor]:
    """Batch -> (2N,), the log-probabilities of its answers under the model that the run began with, computed when asked for."""

    def sums(batch: dict) -> Tensor:
        with start() as model:
            return sums_now(model, run, batch)

    return sums


def of_pairs(batches, count: int, algo: str, run: Run, model: VLM, made_by: str, given: Path | None,
             resume: bool) -> Callable[[dict], Tensor]:
    """The same for micro-batches 0..count-1 of a stream of pairs that are there beforehand, in the cheapest way.

    Called before the first step, or in a resumed run. Where adapters alone are trained: live. Else they are computed once and
    kept in a file that says what they were made by, a hash of config, tokenizer, precision and weights. `given` names it, to be
    read where it exists; the default, in the run's folder, is read by a resumed run alone.
    """
    if given and (algo in WITHOUT_REFERENCE or adapters_alone(model)):
        raise ValueError("without a reference, and where adapters alone are trained, no log-probabilities are kept in a file: "
                         "leave out --reference")
    if algo in WITHOUT_REFERENCE:
        return lambda batch: torch.zeros(len(batch["ids"]), device=run.device)
    if adapters_alone(model):
        return live(at_start(model), run)
    file = given or run.out / "reference.npz"
    if resume or (given and file.is_file()):
        known = Reference.read(file, made_by)
    else:
        logps = {}
        wanted = len(batches) if given else min(len(batches), count)  # an epoch shows every pair; a file of one's own holds all
        mine = range(run.rank, wanted, run.world)
        for number in tqdm(mine, desc="reference", unit="batch", disable=not run.first):
            batch = run.to_device(batches.batch(number))
            logps.update(zip(batch["keys"], map(tuple, sums_now(model, run, batch).view(-1, 2).tolist()), strict=True))
        known = Reference(run.union(logps), made_by)
        if run.first:
            known.write(file)
    return lambda batch: known.of(batch).to(run.device)


class Reference:
    """Log-probabilities of both answers under the reference, (chosen, rejected) in nats, by the key of the pair.

    They were computed once by one policy, and a file of them is refused for any other: a stale reference trains towards nonsense
    without a sign. Raises ValueError, from `read` for another policy and from `of` for a pair that the file does not hold.
    """

    def __init__(self, logps: dict[str, tuple[float, float]], made_by: str):
        self.logps, self.made_by = logps, made_by

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as out:
                np.savez(out, made_by=self.made_by, keys=list(self.logps), logps=np.array(list(self.logps.values()), np.float32))

        checkpoint.write(file, fill)

    @classmethod
    def read(cls, file: Path, made_by: str) -> "Reference":
        if not file.is_file():
            raise FileNotFoundError(f"no reference log-probabilities at {file}: start without --resume and --reference")
        with np.load(file, allow_pickle=False) as stored:
            if str(stored["made_by"]) != made_by:
                raise ValueError(
                    f"{file} is stale: its log-probabilities were computed with other weights, another tokenizer, template or "
                    f"precision ({stored['made_by']}) than the policy starts with now ({made_by}). Delete it and start again "
                    f"without --resume, or restore the checkpoint in --init"
                )
            return cls(dict(zip(stored["keys"].tolist(), map(tuple, stored["logps"].tolist()), strict=True)), made_by)

    def of(self, batch: dict) -> Tensor:
        """(2N,): the sums of a batch's documents, in their order."""
        unknown = [name for name, key in zip(batch["ids"][::2], batch["keys"], strict=True) if key not in self.logps]
        if unknown:
            raise ValueError(f"the reference log-probabilities hold nothing about {', '.join(unknown[:4])}: the data changed "
                             f"since they were computed; start again without --resume and --reference")
        return torch.tensor([self.logps[key] for key in batch["keys"]]).flatten()
