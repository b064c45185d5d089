"""The memory of a process that trains as the scripts do and does nothing else, to set beside a peer's.

    python -m tests.speed.alone '{"preset": "small"}' sft       bytes; the flags of tests.speed as JSON
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.speed.measuring import peak_memory


def memory_alone(config: Any, stage: str) -> float:
    """The most bytes that a process holds which takes two steps of a stage with stored features."""
    command = [sys.executable, "-m", "tests.speed.alone", json.dumps(asdict(config), default=str), stage]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout)


def main(settings: dict[str, Any], stage: str) -> None:
    from tests.speed.__main__ import Config, make_legs, model_config
    from tests.speed.legs import OURS

    config = Config(**settings)
    (leg,) = make_legs(config, stage, model_config(config), (OURS,))
    for _ in range(2):
        leg.step(leg.batches[0])
    print(peak_memory(leg.device))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
