"""Files of tensors (safetensors) that notice damage: finite values alone are written, each tensor with a checksum.

In:  tensors by name, and facts about them.  Out: a file; from a file the same, or UserError with its name and what is wrong.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.registry import UserError

CHECKSUMS = "crc32"  # the fact that holds them


def save(tensors: dict[str, Tensor], file: Path, facts: dict[str, str]) -> None:
    """Write tensors; FloatingPointError for a value that is not finite."""
    if broken := not_finite(tensors):
        raise FloatingPointError(f"{broken[0]} has values that are not finite, so it is not saved; what was saved before stays: "
                                 f"lower --lr, and go on with --resume")
    save_file(tensors, file, {**facts, CHECKSUMS: json.dumps(checksums(tensors))})


def read(file: Path) -> dict[str, Tensor]:
    """All tensors in a file; UserError where it is missing or damaged."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        fault = "damaged" if file.is_file() else "missing"
        raise UserError(f"{file} is {fault}: {error}. Copy it again, or train again") from error


def facts(file: Path) -> dict[str, str]:
    """What a file says about its tensors."""
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def require_sound(file: Path, tensors: dict[str, Tensor], model: dict[str, Tensor]) -> None:
    """UserError for tensors of a file in another precision than the model's, not finite, or with other bytes than were written.

    A file without checksums was written by other hands.
    """
    written = json.loads(facts(file).get(CHECKSUMS, "{}"))
    found = checksums(tensors) if written else {}
    for fault, names in {
        "is of another precision than the model": [name for name in tensors if tensors[name].dtype != model[name].dtype],
        "has values that are not finite": not_finite(tensors),
        "has other bytes than were written": [name for name in found if found[name] != written.get(name)],
    }.items():
        if names:
            raise UserError(f"{file} is damaged, or was changed: {names[0]} {fault}. Copy it again, or train again")


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of tensors that hold an infinity or a NaN."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Name -> CRC-32 of a tensor's bytes."""
    return {name: zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            for name, tensor in sorted(tensors.items())}
