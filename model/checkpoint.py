"""Checkpoints: a folder with config.json, model.safetensors and the tokenizer.

In:  a model and a folder.  Out: the same model, or an error that names every tensor that does not fit.

    out/sft/config.json  model.safetensors  tokenizer.model      the model for inference (tokenizer.json of a pretrained LLM)
    out/sft/adapter.safetensors                                  after LoRA: only the trained tensors
    out/sft/run.json                                             how it was made (model/run_folder.py)
    out/sft/resume/000200/                                       step 200, for --resume (model/resume.py)

A frozen pretrained encoder is not stored: the config names it, and loading compares its fingerprint.
A crash leaves each file as it was (model/durable.py). Weights that are not finite are not saved; each tensor has a checksum in
the file, and loading compares it.
"""

import dataclasses
import hashlib
import shutil
from pathlib import Path

import torch
from torch import nn

from model import lora, tensor_file
from model.config import VLMConfig
from model.durable import write
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
    facts = {"encoder": "stored" if with_encoder else model.encoder.fingerprint()}
    tensor_file.save(weights(tensors, with_encoder), file, facts)


def load(folder: Path, device: torch.device | str = "cpu", template: str = "") -> VLM:
    """The model of a checkpoint, in evaluation mode; `template` replaces the one that it was trained with.

    FileNotFoundError without a checkpoint; UserError for another encoder than in training, or with the names of all tensors
    that are missing, unexpected or of another shape: nothing is filled in silently.
    """
    folder = require(Path(folder))
    model = VLM(read_config(folder))
    model.encoder_was_stored = load_file_into(folder / "model.safetensors", model)
    if template:
        model.config = dataclasses.replace(model.config, template=template)
    return model.to(device).eval()


def load_file_into(file: Path, model: VLM) -> bool:
    """Load a file of weights into a model; returns whether it holds the encoder, too. UserError as `load`."""
    tensors, with_encoder = tensor_file.read(file), holds_encoder(file, model)
    load_weights(model, tensors, str(file), with_encoder)
    tensor_file.require_sound(file, tensors, model.state_dict())
    return with_encoder


def read_config(folder: Path) -> VLMConfig:
    """The config of a checkpoint; UserError where config.json is not one."""
    file = folder / "config.json"
    try:
        return VLMConfig.from_json(file.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged, or not of a checkpoint of Pupil: {error}") from error


def holds_encoder(file: Path, model: VLM) -> bool:
    """Whether a file of weights includes the encoder; UserError if it does not and the model has another encoder."""
    trained_with = tensor_file.facts(file).get("encoder")
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


def fingerprint(folder: Path) -> str:
    """A hash of all that a checkpoint answers with: config, tokenizer and weights."""
    digest = hashlib.sha256()
    for file in (folder / "config.json", tokenizer_file(folder), folder / "model.safetensors"):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
