"""Everything that computes on tensors: language model, encoder, connector, losses, generation, and what runs them on devices."""

import importlib.util
import os
import sys

if sys.version_info < (3, 11):  # said here, because every script imports this package first
    raise SystemExit(f"Pupil needs Python 3.11 or newer, and this is {sys.version.split()[0]}: start it with that one")
if importlib.util.find_spec("tyro") is None:
    raise SystemExit("what Pupil needs is not installed in this Python: run `python -m pip install -r requirements.txt` first")

# Read once, when torch is loaded. By default OpenMP's threads spin for long while they wait for each other; beside any other
# process they then wait for threads that do not run, and training takes two to four times as long. Threads that sleep at once
# cost a sixth when nothing else runs, because a small step has a thousand operations. So they spin for some microseconds first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps what it compiled for each of the last 1,024 shapes. Here the number of tokens differs in every step, so that this
# would hold gigabytes and be used hardly ever.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "16")
