"""A run in Weights & Biases: its curves while it runs, and at the end its pictures and its scores.

In:  --wandb PROJECT or PROJECT/NAME.  Out: a session of the library wandb, with what log.jsonl, PNG files and scores.json hold.

The library's own variables count as well: WANDB_NAME names the run, WANDB_ENTITY the account, WANDB_MODE=offline sends nothing.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any


def start(wanted: str, stage: str, settings: Any, out: Path) -> Any:
    """A session. The name of the run is that of the flag, else WANDB_NAME, else the stage."""
    import wandb

    project, _, name = wanted.partition("/")
    return wandb.init(project=project, name=name or os.environ.get("WANDB_NAME") or stage, config=dataclasses.asdict(settings),
                      dir=out)


def finish(session: Any, out: Path) -> None:
    """Send the pictures in a run's folder, the scores as a table, and close the session."""
    import wandb

    pictures = [*sorted(out.glob("*.png")), *sorted(out.glob("figures/*.png"))]
    session.log({path.relative_to(out).with_suffix("").as_posix(): wandb.Image(str(path)) for path in pictures})
    scores = out / "scores.json"
    if scores.is_file():
        rows = sorted(json.loads(scores.read_text(encoding="utf-8")).items())
        session.log({"scores": wandb.Table(columns=["metric", "value"], data=[list(row) for row in rows])})
    session.finish()
