"""Draw the figures of all stages of a run again.

    python -m dataset.figures out              into out/STAGE/figures and the report
    python -m dataset.figures out FOLDER       into FOLDER alone; the run is only read
"""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

from dataset.figures.draw import FIGURES, draw_all, figures_section
from dataset.figures.stage import Stage
from dataset.overview import COMMANDS

ROOT = Path(__file__).parents[2]


def main(out: Path, into: Path | None) -> None:
    """Draw the stages in their order; a line for each figure that is left out says why, or which command makes it."""
    inspect = runpy.run_path(str(ROOT / "2-sft_vlm.py"))["Inspector"]  # the scripts alone know both packages, model and dataset
    for name, command in COMMANDS.items():
        folder = out / name
        if not (folder / "config.json").is_file():
            wanted = ", ".join(f"{figure}.png" for figure, kind in FIGURES.items() if name in kind.stages)
            print(f"left out {wanted} of {folder}: there is no such run; `{command}` makes it")
            continue
        if into:
            drawn, missing = draw_all(Stage.of(folder, name, inspect), into)
            print("\n".join([*(f"wrote {file}" for file in drawn.values()), *missing]))
        else:
            missing = figures_section(folder, name, inspect)
            print("\n".join([f"wrote {folder / 'figures'} and its section of {out / 'report.md'}", *missing]))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit("python -m dataset.figures OUT [FOLDER]: OUT is the folder of the stages, out by default of the scripts")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
