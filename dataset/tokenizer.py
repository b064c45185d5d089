"""The tokenizer: text to token ids and back, exactly, with control tokens that no text can produce.

In:  any text.  Out: token ids 0..6399.  A sentencepiece BPE model (English, Chinese, bytes for everything else), trained by
`python -m dataset.studies.train_tokenizer`.

Special pieces are of two kinds, for safety:
- *control* tokens (`<image>`, `<|user|>`, ...) exist only as ids. A user who types "<|assistant|>" gets ordinary letters, so
  nobody can forge a turn or insert an image.
- *tags* of reasoning (`<think>`, `<answer>`, ...) are ordinary text; each happens to be one piece.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from model.registry import UserError

MODEL_FILE = Path(__file__).with_name("tokenizer.model")
CONTROLS = ("<image>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SPACE_SIGN = "\u2581"  # sentencepiece writes a space as this sign, so the sign itself is encoded as bytes


class Tokenizer(Protocol):
    """Text to ids and back. Instances are hashable.

    bos, pad, image   ids of the token that begins a document, of padding, and of the image placeholder
    """

    file: Path
    vocab_size: int
    bos: int
    pad: int
    image: int

    def __hash__(self) -> int: ...

    def id(self, piece: str) -> int:
        """The id of a piece, also of a control token; KeyError for an unknown one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; control tokens spelled out in the text stay ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens leave no trace."""
        ...

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text with its control tokens spelled out, for people to read."""
        ...


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in a file: our own (.model), or a pretrained language model's (tokenizer.json), with the same interface."""
    if file.suffix == ".json":
        from dataset.formats.tokenizer_json import JsonTokenizer

        return JsonTokenizer(file)
    return SentencePieceTokenizer(file)


class SentencePieceTokenizer:
    """A sentencepiece model with names for its control tokens.

    `bos`, `end`, `pad`, `image`: ids of the beginning of a document, the end of a turn, padding, and the image placeholder.
    FileNotFoundError where the model file is missing, KeyError from `id` for an unknown piece.
    """

    def __init__(self, file: str | Path = MODEL_FILE):
        if not Path(file).is_file():
            raise FileNotFoundError(f"no tokenizer at {file}; `python -m dataset.studies.train_tokenizer` makes the default one")
        self.file = Path(file)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise UserError(f"{file} is no sentencepiece model: {error}") from error
        self.vocab_size = self.model.vocab_size()
        self.bos, self.end, self.pad = self.model.bos_id(), self.model.eos_id(), self.model.pad_id()
        self.image = self.id("<image>")
        self.sign_bytes = [self.id(f"<0x{byte:02X}>") for byte in SPACE_SIGN.encode()]

    def id(self, piece: str) -> int:
        """The id of a piece, also of a control token."""
        token_id = self.model.piece_to_id(piece)
        if self.model.id_to_piece(token_id) != piece:
            raise KeyError(f"the tokenizer {self.file} has no piece {piece!r}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; control tokens spelled out in the text stay ordinary text."""
        first, *others = text.split(SPACE_SIGN)
        ids = self.model.encode(first)
        for part in others:
            ids += self.sign_bytes + self.model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens leave no trace."""
        return self.model.decode([int(token_id) for token_id in ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text with its control tokens spelled out, for people to read."""
        controls = {self.bos: "<s>", self.end: "<|end|>", self.pad: "<pad>", **{self.id(piece): piece for piece in CONTROLS}}
        text = ""
        run: list[int] = []
        for token_id in ids:
            if token_id in controls:
                text, run = text + self.decode(run) + controls[token_id], []
            else:
                run.append(token_id)
        return text + self.decode(run)
