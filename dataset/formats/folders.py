"""Which files --data means: a file, the data files of a folder, or a data set of the Hugging Face hub.

In:  a path, or hf:OWNER/NAME, or hf:OWNER/NAME/FILE.  Out: paths of files, each with rows; what is left out is told.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dataset.formats.fields import PICTURE_SUFFIXES
from dataset.formats.json_rows import NoRows, json_rows
from dataset.formats.survey import tell
from dataset.formats.tables import CsvRows, ParquetRows
from dataset.protocols import Source
from model.registry import UserError

Made = TypeVar("Made")

HUB = "hf:"
ROW_FOLDERS = ("data", "train")  # of a folder of data; looked into as well
HELD_OUT = {"test", "testing", "val", "valid", "validation", "dev", "eval"}


class PictureFolder:
    """A folder of pictures with a text beside each: 0.png and 0.txt. Its rows are captions."""

    def __init__(self, folder: Path):
        pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
        self.pictures = [file for file in pictures if file.with_suffix(".txt").is_file()]
        if not self.pictures:
            raise FileNotFoundError(f"no {', '.join(READERS)} file in {folder}, and no pictures with a .txt beside each")
        if missing := len(pictures) - len(self.pictures):
            tell(f"{folder}: {missing} pictures without a .txt beside them are not read")
        if missing := len(list(folder.glob("*.txt"))) - len({file.stem for file in self.pictures}):
            tell(f"{folder}: {missing} .txt files without a picture beside them are not read")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> dict:
        file = self.pictures[i]
        return {"image": [file.name], "text": file.with_suffix(".txt").read_text(encoding="utf-8-sig", errors="replace").strip()}


READERS: dict[str, Callable[[Path], Source]] = {
    ".json": json_rows, ".jsonl": json_rows, ".parquet": ParquetRows, ".csv": CsvRows, ".tsv": CsvRows}  # fmt: skip


def open_rows(path: Path) -> Source:
    """The rows of a file, or of a folder of pictures with texts. UserError or FileNotFoundError name it."""
    if path.is_dir():
        return PictureFolder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no data at {path}; give a file or folder of {', '.join(READERS)}")
    if path.suffix not in READERS:
        raise UserError(f"{path}: unknown format {path.suffix!r}; known: {', '.join(READERS)}")
    return READERS[path.suffix](path)


def is_held_out(name: str) -> bool:
    """Whether a file or folder is named as one that is not for training: test.jsonl, val-00000-of-00001.parquet."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & HELD_OUT) and "train" not in words


def sources(folder: Path, make: Callable[[Path], Made]) -> list[Made]:
    """What `make` makes of each data file of a folder, and of its data/ and train/; of the folder itself, if it holds pictures.

    Files named test, val or dev, and those that hold no rows, are left out with a word.
    """
    places = [folder, *(folder / name for name in ROW_FOLDERS if (folder / name).is_dir())]
    files = [file for place in places for file in sorted(place.iterdir()) if file.suffix in READERS and file.is_file()]
    made = []
    for file in files:
        if is_held_out(file.relative_to(folder).as_posix()):
            tell(f"{file}: not read, for its name says that it is not for training; name it in --data to read it")
            continue
        try:
            made.append(make(file))
        except NoRows:
            tell(f"{file}: not read, for it holds no rows")
    if files and not made:
        raise UserError(f"{folder} holds no file to train on: name one in --data")
    return made or [make(folder)]


def downloaded(spec: str) -> Path:
    """The folder, or one file in it, of a data set on the hub: hf:OWNER/NAME, or hf:OWNER/NAME/FILE. UserError if there is none.

    Beside one file only pictures and zip files are downloaded; beside parquet nothing, because it holds its pictures.
    """
    from huggingface_hub import snapshot_download

    owner, _, rest = spec.removeprefix(HUB).partition("/")
    name, _, file = rest.partition("/")
    pictures = [] if file.endswith(".parquet") else ["*.zip", *(f"*{suffix}" for suffix in PICTURE_SUFFIXES)]
    wanted = [file, *pictures] if file else None
    try:
        folder = Path(snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"the Hugging Face hub gave no data set {owner}/{name}. With a network, `hf download --repo-type dataset "
                        f"{owner}/{name}` fetches it once; without one, name a local folder. The error was: {reason}") from error
    return folder / file
