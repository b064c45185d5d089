"""Iterations of DPO, as RLAIF-V has them: generate pairs, learn from them, keep the best checkpoint, and again from there.

In:  what one run of DPO is, a function, and the flags.  Out: OUT/iteration-1, -2, ..., and the best of them in OUT.
With --iterations 1, the default, this is the plain run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.best import best_run, copy_checkpoint
from model.registry import UserError
from model.runtime import Run

Learn = Callable[[Any, Run], bool]  # one run of DPO; False where it only looked


def iterate(learn: Learn, config: Any, run: Run) -> bool:
    """`learn` once in --out, or --iterations times, each from the one before it. False where it only looked."""
    out, count = config.run.out, getattr(config, "iterations", 1)
    if count < 1:
        raise UserError(f"--iterations is at least 1, not {count}")
    folders = [out] if count == 1 else [out / f"iteration-{k + 1}" for k in range(count)]
    old = [] if config.run.resume else sorted(out.glob("iteration-*"))
    require_other_folders(config, old)
    if not config.run.resume:  # removed when the first run really begins
        run.stale = [*(folder for folder in old if folder != folders[0]), folders[0] / "best.json", out / "scores.json"]
    start = config.init
    for k, folder in enumerate(folders):
        finished = config.run.resume and count > 1 and (folder / "best.json").is_file()
        if not finished:
            resume = config.run.resume and (k == 0 or (folder / "resume").is_dir())
            flags = dataclasses.replace(config.run, out=folder, resume=resume, seed=config.run.seed + k)
            one = dataclasses.replace(config, init=start, run=flags, **({"reference": None} if k else {}))
            run.restart(flags, one)
            if not learn(one, run):
                return False
        start = folder  # the next one begins with, and is compared with, what this one kept
    if run.is_main and count > 1:
        best = best_run(folders)
        run.print0(f"{best.name} of {count} is kept")
        copy_checkpoint(best, out)
        (out / "scores.json").write_text((best / "scores.json").read_text())
    return True


def require_other_folders(config: Any, folders: list[Path]) -> None:
    """UserError where a run would remove what it begins from."""
    given = (config.init, getattr(config, "reference", None), getattr(config, "labeler", None))
    for path in map(Path, filter(None, given)):
        if any(folder.resolve() in (path.resolve(), *path.resolve().parents) for folder in folders):
            raise UserError(f"{path} is of an earlier run into {config.run.out}, which this one would replace: name another "
                            f"--out")
