"""The reference's log-probabilities of both answers of preference pairs, computed in the cheapest way.

In:  batches of pairs (dataset/preferences.py).  Out: `reference(batch) -> (answers,)` in nats; chosen and rejected alternate.

    no reference in the loss     zeros
    pairs sampled in each step   computed for each batch, by a copy or with the adapters switched off (model/reference.py)
    pairs known beforehand       computed once and stored in a file, OUT/reference.npz: no second model in training
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import durable
from model.generate import evaluating
from model.losses import sum_by_document
from model.reference import ReferenceModel, only_adapters_train, reference_model
from model.registry import UserError
from model.runtime import Run
from model.vlm import VLM

ReferenceLogps = Callable[[dict], Tensor]  # batch -> (answers,), two per pair


class Stream(Protocol):
    """Micro-batches by index (dataset/collate.py)."""

    def __len__(self) -> int: ...

    def batch(self, index: int) -> dict: ...


@torch.no_grad()
def answer_logps(model: VLM, run: Run, batch: dict) -> Tensor:
    """(answers,): the log-probabilities of a batch's answers under a model in evaluation mode, in the run's precision."""
    with evaluating(model), run.autocast():
        scores = run.score(model, batch)
    return sum_by_document(scores.logps, scores.owner, len(batch["ids"]))[0]


def none(batch: dict) -> Tensor:
    """Zeros, for a loss without a reference."""
    return torch.zeros(len(batch["ids"]), device=batch["input_ids"].device)


def live(reference: ReferenceModel, run: Run) -> ReferenceLogps:
    """A function that computes them batch by batch with the reference model."""

    def logps(batch: dict) -> Tensor:
        with reference() as model:
            return answer_logps(model, run, batch)

    return logps


def precomputed(batches: Stream, steps: int, run: Run, model: VLM, fingerprint: str, file: Path | None) -> ReferenceLogps:
    """The log-probabilities for micro-batches 0..steps-1 of a stream of pairs. Call it before the first step or on resume.

    If only adapters are trained, they are computed live. Else they are stored in `file` together with `fingerprint`, that of the
    policy. An existing `file` is read; the default file, in the run's folder, is read only by a resumed run.
    """
    if only_adapters_train(model):
        if file:
            raise UserError("if only adapters are trained, the reference is the model without them: leave out --reference")
        return live(reference_model(model), run)
    stored = file or run.out / "reference.npz"
    if run.config.resume or (file and file.is_file()):
        reference = StoredLogps.read(stored, fingerprint)
    else:
        count = len(batches) if file else min(len(batches), steps)  # the user's own file holds all pairs, for other runs
        own_batches = range(run.data_ranks.rank, count, run.data_ranks.world_size)
        bar = tqdm(own_batches, desc="reference", unit="batch", disable=not run.is_main)
        reference = StoredLogps(run.all_gather(pair_logps(map(run.to_device, map(batches.batch, bar)), run, model)), fingerprint)
        if run.is_main:
            reference.write(stored)
    return lambda batch: reference.of(batch).to(run.device)


def pair_logps(batches: Iterable[dict], run: Run, model: VLM) -> dict[str, tuple[float, float]]:
    """Key of a pair -> the log-probabilities of its chosen and its rejected answer, in nats."""
    logps: dict[str, tuple[float, float]] = {}
    for batch in batches:
        pairs = answer_logps(model, run, batch).view(-1, 2).tolist()  # (pairs, 2)
        logps.update(zip(batch["keys"], map(tuple, pairs), strict=True))
    return logps


class StoredLogps:
    """Log-probabilities of both answers under the reference, (chosen, rejected) in nats, by the key of the pair.

    They belong to one policy, and the file is refused for any other: with a stale reference, training goes wrong and nothing
    shows it. UserError: from `read` for another policy, from `of` for a pair that the file does not hold.
    """

    def __init__(self, logps: dict[str, tuple[float, float]], fingerprint: str):
        self.logps, self.fingerprint = logps, fingerprint

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as out:
                np.savez(out, fingerprint=self.fingerprint, keys=list(self.logps),
                         logps=np.array(list(self.logps.values()), np.float32))

        durable.write(file, fill)

    @classmethod
    def read(cls, file: Path, fingerprint: str) -> "StoredLogps":
        if not file.is_file():
            raise FileNotFoundError(f"no reference log-probabilities at {file}: start without --resume and --reference")
        try:
            with np.load(file, allow_pickle=False) as opened:
                stored = dict(opened)
                logps = dict(zip(stored["keys"].tolist(), map(tuple, stored["logps"].tolist()), strict=True))
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{file} is damaged ({error}): delete it, and start again without --resume") from error
        if str(stored["fingerprint"]) != fingerprint:
            raise UserError(f"{file} is stale: its log-probabilities were computed with other weights, another tokenizer, "
                            f"template or precision ({stored['fingerprint']}) than the policy starts with now ({fingerprint}). "
                            f"Delete it and start again without --resume, or restore the checkpoint in --init")
        return cls(logps, fingerprint)

    def of(self, batch: dict) -> Tensor:
        """(answers,): the log-probabilities of a batch's answers, in the order of its documents."""
        unknown = [name for name, key in zip(batch["ids"][::2], batch["keys"], strict=True) if key not in self.logps]
        if unknown:
            raise UserError(f"no reference log-probabilities of {', '.join(unknown[:4])}: the data changed "
                            f"since they were computed; start again without --resume and --reference")
        return torch.tensor([self.logps[key] for key in batch["keys"]]).flatten()
