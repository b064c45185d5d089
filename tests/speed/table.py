"""What was measured of each leg, as a table to print and as numbers for the file of results.

In:  the times of every round, and memory.  Out: rows/s, and how many times as fast the scripts' ways are, each with its range.
"""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from tests.speed.legs import EVERY_STEP, OURS, Times
from tests.speed.measuring import spread


@dataclass
class Measured:
    """One leg over all rounds."""

    name: str
    added: float  # bytes that a step adds
    peak: float = math.nan  # the most bytes of a process that does nothing else
    times: list[Times] = field(default_factory=list)

    def speeds(self, batch_size: int) -> list[float]:
        """Rows a second of each round."""
        return [times.samples_per_second(batch_size) for times in self.times]


def ratios(measured: list[Measured], batch_size: int) -> dict[str, dict[str, list[float]]]:
    """Leg -> a way of the scripts -> how many times as fast that was, in each round."""
    speeds = {leg.name: leg.speeds(batch_size) for leg in measured}
    ways = [form.name for form in (EVERY_STEP, OURS) if form.name in speeds]
    return {name: {way: [a / b for a, b in zip(speeds[way], speed)] for way in ways} for name, speed in speeds.items()}


def print_table(measured: list[Measured], batch_size: int) -> None:
    """A row of markdown for each leg: medians [range] of the rounds."""
    ratio = ratios(measured, batch_size)
    ways = [f"{way.removeprefix('packed, ')} / it" for way in ratio[OURS.name]]
    titles = ["", "rows/s", *ways, "a step adds", "process peak"]
    rows = [titles, ["---"] * len(titles)]
    for leg in measured:
        memory = ["" if math.isnan(size) else f"{size / 1e9:.2f} GB" for size in (leg.added, leg.peak)]
        times_as_fast = [f"x {spread(values, 2)}" for values in ratio[leg.name].values()]
        rows.append([leg.name, spread(leg.speeds(batch_size), 2), *times_as_fast, *memory])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


def numbers(measured: list[Measured], batch_size: int) -> dict[str, dict[str, Any]]:
    """Leg -> medians, the range of its speed, and memory in GB, None where it is not known."""
    ratio = ratios(measured, batch_size)

    def legible(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 3)

    return {leg.name: {
        "rows_per_second": legible(statistics.median(leg.speeds(batch_size))),
        "range": [legible(value) for value in (min(leg.speeds(batch_size)), max(leg.speeds(batch_size)))],
        "ratios": {way: legible(statistics.median(values)) for way, values in ratio[leg.name].items()},
        "step_gb": legible(leg.added / 1e9), "peak_gb": legible(leg.peak / 1e9)} for leg in measured}  # fmt: skip
