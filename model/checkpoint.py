"""Checkpoints: a folder with config.json, model.safetensors and the tokenizer, and the state that resuming needs.

In:  a model and a folder.  Out: the same model, or an error that names every tensor that does not fit.

    out/sft/config.json  model.safetensors  tokenizer.model      the model for inference (tokenizer.json of a pretrained LLM)
    out/sft/adapter.safetensors                                  after LoRA: only the trained tensors
    out/sft/run.json                                             how it was made (model/run_folder.py)
    out/sft/resume/000200/                                       step 200: weights, optimizer, random states, data position

A frozen pretrained encoder is not stored: the config names it, and loading compares its fingerprint.
Every file or folder is written under a temporary name and renamed when it is complete, so a crash leaves the last good one.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from model import lora
from model.config import VLMConfig
from model.optimizer import OptimizerGroup
from model.registry import UserError
from model.vlm import VLM

STAGES = {  # folder under out/, last stage first: the command that writes it
    "grpo": "python 3-rl_vlm.py", "dpo": "python 3-rl_vlm.py --algo dpo", "sft": "python 2-sft_vlm.py",
    "pretrain": "python 1-pretrain_vlm.py",
}  # fmt: skip

TOKENIZERS = (".model", ".json")  # our own; of a pretrained language model


def latest(root: Path = Path("out")) -> Path:
    """The folder of the last stage that has a checkpoint; FileNotFoundError names the command to run first."""
    for stage in STAGES:
        if (root / stage / "config.json").is_file():
            return root / stage
    raise FileNotFoundError(f"no trained model in {root}/: run `{STAGES['pretrain']}`, then `{STAGES['sft']}`")


def require(folder: Path) -> Path:
    """The folder, if it holds a checkpoint; FileNotFoundError names the command that writes one."""
    if not (folder / "config.json").is_file():
        command = STAGES.get(folder.name, STAGES["pretrain"])
        raise FileNotFoundError(f"no checkpoint in {folder}: run `{command}` first, or name a folder that has one")
    return folder


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a checkpoint: tokenizer.model, or tokenizer.json of a pretrained language model."""
    files = [file for suffix in TOKENIZERS if (file := folder / f"tokenizer{suffix}").is_file()]
    if len(files) != 1:
        raise FileNotFoundError(f"{folder} should hold one of tokenizer{' and tokenizer'.join(TOKENIZERS)}, not {len(files)}")
    return files[0]


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer into a checkpoint, replacing that of an earlier run."""
    write(folder / f"tokenizer{source.suffix}", lambda file: shutil.copyfile(source, file))
    for suffix in TOKENIZERS:
        if suffix != source.suffix:
            (folder / f"tokenizer{suffix}").unlink(missing_ok=True)


def stores_encoder(model: VLM) -> bool:
    """Whether the checkpoint must hold the encoder: it was trained in this or an earlier stage, so no name restores it."""
    trained = any(p.requires_grad for p in model.encoder.parameters())
    return trained or "clip_random" in model.config.encoder or getattr(model, "encoder_was_stored", False)


def weights(tensors: dict[str, torch.Tensor], with_encoder: bool) -> dict[str, torch.Tensor]:
    """The tensors of a model that a checkpoint holds."""
    return {name: tensor.contiguous() for name, tensor in tensors.items() if with_encoder or not name.startswith("encoder.")}


def save(folder: Path, model: VLM, tokenizer_file: Path) -> None:
    """Write the model for inference, LoRA merged and without ppo's value head; each file replaces the old one in one move.

    LoRA adapters are also written by themselves, as adapter.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in lora.merged(model).items() if not name.startswith("value_head.")}
    write(folder / "model.safetensors", lambda file: save_weights(model, tensors, file))
    copy_tokenizer(tokenizer_file, folder)
    write(folder / "config.json", lambda file: file.write_text(model.config.to_json(), encoding="utf-8"))
    if lora.adapters(model):
        write(folder / "adapter.safetensors", lambda file: lora.save(model, file))
    else:
        (folder / "adapter.safetensors").unlink(missing_ok=True)  # of an earlier run


def save_weights(model: VLM, tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write the tensors of the model, and either its encoder or the fingerprint of the encoder that is left out."""
    with_encoder = stores_encoder(model)
    save_file(weights(tensors, with_encoder), file, {"encoder": "stored" if with_encoder else model.encoder.fingerprint()})


def write(file: Path, fill: Callable[[Path], Any]) -> None:
    """`fill` a temporary file, then rename it to `file`. Others may read it as far as the umask allows."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode
    fill(temporary)
    temporary.chmod(mode)  # safetensors writes files that only their owner may read
    os.replace(temporary, file)


def load(folder: Path, device: torch.device | str = "cpu", template: str = "") -> VLM:
    """The model of a checkpoint, in evaluation mode; `template` replaces the one that it was trained with.

    FileNotFoundError without a checkpoint; UserError for another encoder than in training, or with the names of all tensors
    that are missing, unexpected or of another shape: nothing is filled in silently.
    """
    folder = require(Path(folder))
    model, file = VLM(read_config(folder)), folder / "model.safetensors"
    tensors = read_tensors(file)
    model.encoder_was_stored = holds_encoder(file, model)
    load_weights(model, tensors, str(file), model.encoder_was_stored)
    if template:
        model.config = dataclasses.replace(model.config, template=template)
    return model.to(device).eval()


def read_config(folder: Path) -> VLMConfig:
    """The config of a checkpoint; UserError where config.json is not one."""
    file = folder / "config.json"
    try:
        return VLMConfig.from_json(file.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged, or not of a checkpoint of Pupil: {error}") from error


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors in a file; UserError where it is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: {error}. Copy it again, or train again") from error


def holds_encoder(file: Path, model: VLM) -> bool:
    """Whether a file of weights includes the encoder; UserError if it does not and the model has another encoder."""
    with safe_open(file, "pt") as opened:
        trained_with = (opened.metadata() or {}).get("encoder")
    if trained_with != "stored" and trained_with != model.encoder.fingerprint():
        raise UserError(f"{file} was trained with another {model.config.encoder} than the one installed here "
                         f"({trained_with} != {model.encoder.fingerprint()}): train it again, or restore those weights")
    return trained_with == "stored"


def load_weights(model: nn.Module, tensors: dict[str, torch.Tensor], source: str, with_encoder: bool) -> int:
    """Copy tensors into the model and return how many matched; UserError unless all names and shapes agree."""
    expected = weights(model.state_dict(), with_encoder)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = [f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
             for name in sorted(expected.keys() & tensors.keys()) if tensors[name].shape != expected[name].shape]
    matched = len(expected) - len(missing) - len(wrong)
    if missing or unexpected or wrong:
        raise UserError(f"{source} does not fit the model: {matched} tensors match, {len(missing)} missing {missing[:8]}, "
                         f"{len(unexpected)} unexpected {unexpected[:8]}, {len(wrong)} of another shape {wrong[:8]}. "
                         f"It was saved with another config: use the config.json beside it")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    return matched


# ---------------------------------------------------------------- resuming

def save_resume(folder: Path, model: VLM, optimizer: OptimizerGroup, state: dict, rank: int, world_size: int) -> None:
    """Write all that the next step depends on as resume/STEP, complete or not at all. Every rank calls this.

    `state` is small and plain: step, data position, counters of the script. Each rank writes its own random states.
    """
    step, parent = f"{state['step']:06d}", folder / "resume"
    temporary, optimizer_state = parent / f"{step}.tmp", optimizer.state_dict()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary / "model.safetensors", lambda file: save_weights(model, model.state_dict(), file))  # LoRA not merged
        torch.save(optimizer_state, temporary / "optimizer.pt")
        (temporary / "state.json").write_text(json.dumps({**state, "world_size": world_size}))
    barrier(world_size)
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    torch.save(random_states, temporary / f"random-{rank}.pt")
    barrier(world_size)
    if rank == 0:
        if (parent / step).is_dir():  # of an earlier run: a folder with files cannot be replaced
            os.replace(parent / step, parent / f"{step}.old.tmp")
        os.replace(temporary, parent / step)
        for path in parent.iterdir():
            if path.name != step:
                shutil.rmtree(path)
    barrier(world_size)


def saved_steps(folder: Path) -> list[Path]:
    """The folders of the complete steps that a run has saved for resuming, the newest last."""
    return sorted(path for path in (folder / "resume").glob("*") if path.suffix != ".tmp" and path.is_dir())


def load_resume(folder: Path, model: VLM, optimizer: OptimizerGroup, rank: int, world_size: int) -> dict:
    """Restore the newest complete step and return its `state`."""
    steps = saved_steps(folder)
    if not steps:
        raise FileNotFoundError(f"nothing to resume in {folder}: no step was saved yet; start without --resume")
    state = json.loads((steps[-1] / "state.json").read_text())
    if state.pop("world_size") != world_size:
        raise UserError(f"{steps[-1]} was saved by another number of processes than {world_size}: resume with the same number")
    file = steps[-1] / "model.safetensors"
    load_weights(model, read_tensors(file), str(file), holds_encoder(file, model))
    optimizer.load_state_dict(torch.load(steps[-1] / "optimizer.pt", "cpu", weights_only=True))
    random_states = torch.load(steps[-1] / f"random-{rank}.pt", weights_only=True)
    torch.set_rng_state(random_states["cpu"])
    if "cuda" in random_states:
        torch.cuda.set_rng_state(random_states["cuda"])
    return state


def barrier(world_size: int) -> None:
    """Wait for the other ranks, if there are any."""
    if world_size > 1:
        torch.distributed.barrier()
