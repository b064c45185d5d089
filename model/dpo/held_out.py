"""How well a policy tells held-out pairs apart: pairs of one's own that no step learns from.

In:  micro-batches of held-out pairs (dataset/held_out.py).  Out: the share whose chosen answer has the higher implied reward.
"""

from collections.abc import Iterable
from functools import partial

import torch

from model.best import BestCheckpoint, HeldOutCheck, HeldOutRows
from model.dpo.losses import Pairs, PreferenceLoss
from model.dpo.reference import ReferenceLogps, StoredLogps, live, none, pair_logps
from model.generate import evaluating
from model.losses import score, sum_by_document
from model.reference import only_adapters_train, reference_model
from model.runtime import Run
from model.vlm import VLM


def held_out_pairs(run: Run, rows: HeldOutRows | None, steps: int, model: VLM, fingerprint: str, algo: PreferenceLoss,
                   best: BestCheckpoint) -> HeldOutCheck:
    """The check of a run on held-out pairs, which does nothing without them. Call this before the first step or on resume."""
    reference: ReferenceLogps = none
    if rows and algo.uses_reference and run.is_main:  # the first rank alone measures them
        reference = reference_of(rows, run, model, fingerprint)
    return HeldOutCheck(run, rows, steps, partial(pair_accuracy, model, run, algo, reference), best)


def reference_of(rows: HeldOutRows, run: Run, model: VLM, fingerprint: str) -> ReferenceLogps:
    """The reference of held-out pairs. A resumed run, whose model has moved, reads what the run began with."""
    if only_adapters_train(model):
        return live(reference_model(model), run)
    stored = run.out / "reference_held_out.npz"
    if not run.config.resume:
        StoredLogps(pair_logps(map(run.move, rows.batches()), run, model), fingerprint).write(stored)
    reference = StoredLogps.read(stored, fingerprint)
    return lambda batch: reference.of(batch).to(run.device)


@torch.no_grad()
def pair_accuracy(model: VLM, run: Run, algo: PreferenceLoss, reference: ReferenceLogps,
                  batches: Iterable[dict]) -> dict[str, float]:
    """held_out/accuracy: the share of pairs whose chosen answer has the higher implied reward; held_out/margin: by how much."""
    accuracy: list[float] = []
    margin: list[float] = []
    for batch in map(run.move, batches):
        with evaluating(model), run.autocast():
            scores = score(model, batch)
        logps, lengths = sum_by_document(scores.logps, scores.owner, len(batch["ids"]))  # (2N,) chosen, rejected, chosen, ...
        before = reference(batch)  # (2N,) the same before training
        found = algo.log(Pairs(logps[0::2], logps[1::2], before[0::2], before[1::2], lengths[0::2], lengths[1::2]))
        accuracy += found["reward_accuracy"].tolist()
        margin += found["margin"].tolist()
    if not accuracy:
        return {}
    return {"held_out/accuracy": sum(accuracy) / len(accuracy), "held_out/margin": sum(margin) / len(margin),
            "held_out/n": len(accuracy)}
