"""What others have published: a local folder, or a download from the Hugging Face hub, and the tensors in it.

In:  a folder, a file of weights, or OWNER/NAME on the hub.  Out: the folder on this disk; its tensors by name.
"""

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.registry import UserError

PATTERNS = ["*.json", "*.jinja", "*.safetensors", "pupil_tokenizer.model"]  # of a model: settings, chat template, weights
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")


def reachable() -> bool:
    """Whether the hub's host answers within three seconds; True behind a proxy, which the download itself has to try."""
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    if url.scheme in getproxies():
        return True
    try:
        socket.create_connection((str(url.hostname), url.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside, a download fails at once where the hub cannot be reached, instead of after half a minute of attempts per file.

    What is in the cache is used either way.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of a library's error, its blanks and line ends as single blanks, cut to `longest` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= longest else f"{text[:longest]} ..."


def local_folder(source: str) -> Path:
    """The folder itself, the one of a file of weights, or a hub name's after a download.

    FileNotFoundError says what to do without a network.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        return Path(source).parent
    from huggingface_hub import snapshot_download

    try:
        with at_once():
            folder = Path(snapshot_download(source, allow_patterns=PATTERNS))
            if not any(folder.glob("*.safetensors")):
                snapshot_download(source, allow_patterns=["*.bin", "*.pth"])
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and the Hugging Face hub gave no model of that name. With a network, "
            f"`hf download {source}` fetches it once; without one, name a local folder. The error was: {one_line(error)}"
        ) from error
    return folder


def read_json(file: Path) -> dict:
    """A JSON object; UserError names a damaged file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds one {type(values).__name__}, not the settings of a model")
    return values


def read_tensors(source: Path) -> dict[str, Tensor]:
    """All weights of a folder, in any of the stored forms, or of one file.

    FileNotFoundError if there are none, or a shard is missing.
    """
    if source.is_file():
        return read_file(source)
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = source / f"{stem}.{suffix}.index.json", source / f"{stem}.{suffix}"
        if index.is_file():
            names = sorted(set(read_json(index)["weight_map"].values()))
            if absent := [name for name in names if not (source / name).is_file()]:
                raise FileNotFoundError(f"{index} names {', '.join(absent)}, not in the folder: fetch the rest of the model")
            return {key: tensor for name in names for key, tensor in read_file(source / name).items()}
        if single.is_file():
            return read_file(single)
    files = sorted(source.glob("*.pth"))
    if len(files) != 1:
        raise FileNotFoundError(f"{source} holds no model.safetensors, no pytorch_model.bin and {len(files)} .pth files: it "
                                f"should hold the weights of one model, or name the file itself")
    return read_file(files[0])


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, read without running code; UserError names a damaged file, or one that holds more than tensors."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is damaged, or not a file of weights, or holds more than tensors (it is read weights-only, so "
                        f"that no code runs; torch.save(model.state_dict(), FILE) writes tensors alone): {one_line(error, 100)}"
                        ) from error  # fmt: skip
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file} holds more than tensors by name: save model.state_dict() alone")
    return tensors
