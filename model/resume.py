"""The states that --resume goes on from: all that the next step depends on, of the last steps that were saved.

In:  a model, its optimizer, and what a script counts.  Out: OUT/resume/STEP, complete or not at all; the same put back.

    000200/model.safetensors    the weights, LoRA not merged
    000200/optimizer.pt         the memory of the optimizer
    000200/random-0.pt          the random numbers of rank 0, and a file for every other rank
    000200/state.json           step, position in the data, counters of the script
    000200/SHA256SUMS           a hash of each file; `sha256sum -c SHA256SUMS` compares them, and so does loading

A state is written under a temporary name, reaches the disk, and is renamed. The newest `keep` of them stay.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch

from model import checkpoint, durable
from model.optimizer import OptimizerGroup
from model.registry import UserError
from model.vlm import VLM

SUMS = "SHA256SUMS"


def barrier(world_size: int) -> None:
    """Wait for the other ranks, if there are any."""
    if world_size > 1:
        torch.distributed.barrier()


def saved_steps(folder: Path) -> list[Path]:
    """The folders of the states of a run, the newest last."""
    return sorted((path for path in (folder / "resume").glob("*") if path.name.isdigit() and path.is_dir()),
                  key=lambda path: int(path.name))


def save_resume(folder: Path, model: VLM, optimizer: OptimizerGroup, state: dict, rank: int, world_size: int,
                keep: int = 1) -> None:
    """Write all that the next step depends on as resume/STEP, complete or not at all. Every rank calls this.

    `state` is small and plain: step, data position, counters of the script. Each rank writes its own random states.
    """
    step, parent = f"{state['step']:06d}", folder / "resume"
    temporary, optimizer_state = parent / f"{step}.tmp", optimizer.state_dict()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        durable.write(temporary / "model.safetensors", lambda file: checkpoint.save_weights(model, model.state_dict(), file))
        durable.write(temporary / "optimizer.pt", lambda file: torch.save(optimizer_state, file))
        text = json.dumps({**state, "world_size": world_size})
        durable.write(temporary / "state.json", lambda file: file.write_text(text, encoding="utf-8"))
    barrier(world_size)
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    durable.write(temporary / f"random-{rank}.pt", lambda file: torch.save(random_states, file))
    barrier(world_size)
    if rank == 0:
        sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(temporary.iterdir()))
        durable.write(temporary / SUMS, lambda file: file.write_text(sums, encoding="utf-8"))
        if (parent / step).is_dir():  # of an earlier run: a folder with files cannot be replaced
            os.replace(parent / step, parent / f"{step}.old.tmp")
        os.replace(temporary, parent / step)
        durable.flush(parent)
        for path in saved_steps(folder)[:-keep]:
            drop(path)
        durable.remove_temporary(parent)
    barrier(world_size)


def drop(state: Path) -> None:
    """Remove a state. It loses its name first, so that half of one never has it."""
    old = state.with_name(f"{state.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(state, old)
    shutil.rmtree(old)


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def require_whole(state: Path) -> None:
    """UserError for a file of a state that is missing or has other bytes than were written."""
    file = state / SUMS
    try:
        lines = [line.split("  ", 1) for line in file.read_text(encoding="utf-8").splitlines()]
        wrong = [name for value, name in lines if not (state / name).is_file() or sha256(state / name) != value]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged: {remedy(state)}") from error
    if wrong:
        raise UserError(f"{state / wrong[0]} is missing, or has other bytes than {file} says: {remedy(state)}")
    if not lines:
        raise UserError(f"{file} is damaged: {remedy(state)}")


def remedy(state: Path) -> str:
    """What helps where a state cannot be read."""
    older = [path for path in saved_steps(state.parents[1]) if int(path.name) < int(state.name)]
    return f"remove {state}, and --resume goes on at step {int(older[-1].name)}" if older else \
        f"no other state was saved in {state.parent}: start again with --overwrite instead of --resume"


def load_resume(folder: Path, model: VLM, optimizer: OptimizerGroup, rank: int, world_size: int) -> dict:
    """Restore the newest state and return what its run counted. UserError names the file that is damaged, and the remedy."""
    steps = saved_steps(folder)
    if not steps:
        raise FileNotFoundError(f"nothing to resume in {folder}: no step was saved yet; start without --resume")
    newest = steps[-1]
    if rank == 0:
        require_whole(newest)
    try:
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        saved_by = state.pop("world_size")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{newest / 'state.json'} is missing or damaged: {remedy(newest)}") from error
    if saved_by != world_size:
        raise UserError(f"{newest} was saved by another number of processes than {world_size}: resume with the same number")
    checkpoint.load_file_into(newest / "model.safetensors", model)
    optimizer.load_state_dict(read(newest / "optimizer.pt"))
    random_states = read(newest / f"random-{rank}.pt")
    torch.set_rng_state(random_states["cpu"])
    if "cuda" in random_states:
        torch.cuda.set_rng_state(random_states["cuda"])
    return state


def read(file: Path) -> dict:
    """What torch.save wrote; UserError where torch cannot read it."""
    try:
        return torch.load(file, "cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} is damaged: {remedy(file.parent)}") from error
