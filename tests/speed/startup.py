"""What a run costs before it learns: processor seconds and memory up to the end of the first training step.

In:  1-pretrain_vlm.py, each time as a process of its own that ends right after its first step.
Out: printed and returned, for each case: processor seconds (user + system, of all its threads), seconds, the most memory.

    python -m tests.speed.startup                       about two minutes
    python -m tests.speed.startup --rows 20000 --rounds 1

    help, own_help      --help, and --help with rows of one's own
    nano                the default way: the embedded world
    large               a file of captions with pictures, in the form of LLaVA's 595,000; features are stored, up to a bound
    large_every_step    the same, with the encoder at every step

Pictures of the large file are few, and rows share them by name; so the cases do not measure how fast pictures are encoded.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model import cli
from model.devices import memory
from tests.speed import measuring
from tests.speed.loading import photo
from tests.speed.measuring import CPU, spread

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "1-pretrain_vlm.py"
# A program that runs a script until its optimizer has made one step.
UNTIL_FIRST_STEP = """
import os, runpy, sys
from model.optimizer import OptimizerGroup
step = OptimizerGroup.step
def first_step(*args):
    step(*args)
    print("first step", flush=True)
    os._exit(0)
OptimizerGroup.step = first_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WORDS = "a red apple on the wooden table near two small dogs and one large green tree under a blue sky with many people".split()


@dataclass
class Config:
    rows: int = 595_000  # of the large file
    pictures: int = 2_000  # of the large file; rows share them
    rounds: int = 3  # runs of each case; the cases alternate
    cases: tuple[str, ...] = ("help", "own_help", "nano", "large", "large_every_step")
    threads: int = 2  # of PyTorch; 1 when anything else runs on the machine
    results: Path | None = measuring.RESULTS  # where a line of results goes; None: nowhere


@dataclass(frozen=True)
class Cost:
    """What a process took: `processor` and `wall` in seconds, `memory` in bytes, the most at once.

    A child begins as a copy of this process, which counts, too; so memory is nan where it is not more than what this one held.
    """

    processor: float
    wall: float
    memory: float


def cost(command: list[str], threads: int, expected: str) -> Cost:
    """What a command takes from its start to its end; RuntimeError where it does not print what is expected."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        output.seek(0)
        text = output.read()
    if process.returncode or expected not in text:
        raise RuntimeError(f"{' '.join(command[-8:])} ended with {process.returncode}: {text[-2000:]}")
    most = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost(usage.ru_utime + usage.ru_stime, wall, most if most > memory(CPU) else float("nan"))


def write_llava(folder: Path, rows: int, pictures: int) -> Path:
    """rows.json as LLaVA publishes its captions, an array on one line, and small JPEG files that the rows name in turn."""
    generator, rng = np.random.default_rng(0), random.Random(0)
    names = [f"GCC_train_{1000 * number:09d}.jpg" for number in range(min(rows, pictures))]
    for name in names:
        photo(64, 48, generator).save(folder / name, quality=90)
    captions = ({"id": f"GCC_train_{number:09d}", "image": names[number % len(names)], "conversations": [
        {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
        {"from": "gpt", "value": " ".join(rng.choices(WORDS, k=rng.randint(5, 15)))}]} for number in range(rows))  # fmt: skip
    file = folder / "rows.json"
    with file.open("w") as out:
        out.write("[" + json.dumps(next(captions)))
        for row in captions:
            out.write(", " + json.dumps(row))
        out.write("]")
    return file


def commands(folder: Path, file: Path) -> dict[str, tuple[list[str], str]]:
    """Case -> (a command, what it prints if all is well)."""
    own = ["--data", str(file)]
    step = ["-c", UNTIL_FIRST_STEP, SCRIPT, "--out", str(folder / "out"), "--feature_cache", str(folder / "features"),
            "--max_steps", "1", "--device", "cpu"]
    return {
        "help": ([SCRIPT, "--help"], "--batch_size"),
        "own_help": ([SCRIPT, *own, "--help"], "--batch_size"),
        "nano": (step, "first step"),
        "large": ([*step, *own], "first step"),
        "large_every_step": ([*step, *own, "--feature_cache_gb", "0"], "first step"),
    }


def measure(config: Config) -> dict[str, Any]:
    """{case: {"processor": [seconds of each run], "wall": [seconds], "memory": [bytes]}}."""
    costs: dict[str, list[Cost]] = {name: [] for name in config.cases}
    for number in range(config.rounds):
        with tempfile.TemporaryDirectory() as name:  # new for each round, so that features are computed each time
            folder = Path(name)
            large = any(case.startswith("large") for case in config.cases)
            file = write_llava(folder, config.rows if large else 20, config.pictures)
            for case in config.cases:
                command, expected = commands(folder / case, file)[case]
                costs[case].append(cost(command, config.threads, expected))
                print(f"round {number + 1}: {case} {costs[case][-1]}", flush=True)
    return {case: {kind: [getattr(one, kind) for one in found] for kind in ("processor", "wall", "memory")}
            for case, found in costs.items()}


def main(config: Config) -> None:
    found = measure(config)
    print(f"until the first step of {SCRIPT}, {config.threads} thread(s); medians [range] of {config.rounds} runs:\n"
          f"{'':18}processor seconds   seconds               memory, GB")
    for case, costs in found.items():
        gigabytes = spread([one / 1e9 for one in costs["memory"]], 2)
        print(f"{case:18}{spread(costs['processor'], 2):20}{spread(costs['wall'], 1):22}{gigabytes}")
    measuring.add_result(config.results, "startup", asdict(config), found)


if __name__ == "__main__":
    main(cli.parse(Config))
