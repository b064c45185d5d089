"""Iterations of DPO, as in RLAIF-V: generate pairs, learn from them, keep the best checkpoint, and start again from it.

In:  a function for one run of DPO, and the flags.  Out: OUT/iteration-1, -2, ..., and the best of them in OUT.
With --iterations 1, the default, this is one plain run.
"""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

from model import durable
from model.best import best_run, copy_checkpoint
from model.registry import UserError
from model.runtime import Run

Learn = Callable[[Any, Run], bool]  # one run of DPO; False for --dry_run and --check_data


def iterate(learn: Learn, config: Any, run: Run) -> bool:
    """Call `learn` once in --out, or --iterations times, each from the result before it. False for --dry_run and --check_data."""
    out, count = config.run.out, getattr(config, "iterations", 1)
    if count < 1:
        raise UserError(f"--iterations is at least 1, not {count}")
    folders = [out] if count == 1 else [out / f"iteration-{k + 1}" for k in range(count)]
    start = config.init
    for k, folder in enumerate(folders):
        finished = config.run.resume and count > 1 and (folder / "best.json").is_file()
        if not finished:
            resume = config.run.resume and (k == 0 or (folder / "resume").is_dir())
            flags = dataclasses.replace(config.run, out=folder, resume=resume, seed=config.run.seed + k)
            iteration = dataclasses.replace(config, init=start, run=flags, **({"reference": None} if k else {}))
            run.restart(flags, iteration)
            if not learn(iteration, run):
                return False
        start = folder  # the best checkpoint of this iteration is the start and the reference of the next
    if run.is_main and count > 1:
        best = best_run(folders)
        run.print0(f"{best.name} of {count} is the best: copied to {out}")
        copy_checkpoint(best, out)
        durable.write(out / "scores.json", partial(shutil.copyfile, best / "scores.json"))
    return True
