"""The curves of a run: a small plot of every metric in its log.

In:  the lines of log.jsonl.  Out: curves.png.
"""

import math
from collections import Counter
from pathlib import Path

FIRST = ("reward", "accuracy", "length_right", "length_wrong")  # panels of curves.png, in this order


def draw_curves(history: list[dict], file: Path) -> None:
    """A PNG with one small plot for every metric that was logged more than once; for all, if none was.

    Those that stayed the same are left out; reward, accuracy and the length of answers come first.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    logged = Counter(key for row in history for key in row if key not in ("step", "seconds"))
    values = {name: [row[name] for row in history if name in row] for name in logged}
    again = [name for name, times in logged.items() if times > 1] or list(logged)
    names = [name for name in again if not math.isclose(min(values[name]), max(values[name]), rel_tol=1e-3)] or again
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    width, height = 4 * columns, 2.6 * rows  # inches
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for axis, name in zip(axes.flat, names):
        points = [(row["step"], row[name]) for row in history if name in row]
        axis.plot(*zip(*points), linewidth=1, marker="." if len(points) < 20 else None)
        axis.set_title(name, fontsize=9)
        axis.locator_params(nbins=4)  # most of the time goes into ticks
    for axis in axes.flat[len(names):]:
        axis.set_axis_off()
    figure.supxlabel("step", fontsize=9)
    figure.subplots_adjust(left=0.75 / width, right=1 - 0.15 / width, top=1 - 0.4 / height, bottom=0.5 / height, wspace=0.3,
                           hspace=0.35)  # tight_layout would draw everything once more to find these
    figure.savefig(file, dpi=80)
    plt.close(figure)
