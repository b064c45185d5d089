"""The tokenizer of a pretrained language model, tokenizer.json, behind the same interface as dataset/tokenizer.py.

In:  any text.  Out: the ids that the model was trained with, and one more token, <image>, where the file lacks it.

Control tokens are those that the file calls special; inside a text they stay ordinary letters, as with our own tokenizer.
Decoding returns a text as the model's normalisation leaves it (Qwen's: "e" and an accent become one character).
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

IMAGE = "<image>"


class JsonTokenizer:
    """A tokenizer.json with a name for its placeholder.

    `bos`, `pad`, `image`: ids of the token that begins a document (if the model has one), of padding, and of the placeholder.
    Padding is never read, so it may be any token that no answer contains: it is the placeholder.
    FileNotFoundError where the file is missing, KeyError from `id` for an unknown piece.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {self.file.parent}; transformers makes it from other forms: "
                                    f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        self.model = tokenizers.Tokenizer.from_str(json.dumps(plain(json.loads(self.file.read_text(encoding="utf-8")))))
        self.model.add_special_tokens([IMAGE])
        self.model.encode_special_tokens = True  # in a text, the letters of a special token stay text
        self.image = self.pad = self.id(IMAGE)
        self.vocab_size = max(self.model.get_vocab().values()) + 1
        begins = self.model.encode("").ids  # tokens that the model puts before every text
        self.bos = begins[0] if begins else self.pad
        added = self.model.get_added_tokens_decoder()
        self.controls = {token_id: token.content for token_id, token in added.items() if token.special}

    def id(self, piece: str) -> int:
        """The id of a piece, also of a control token."""
        token_id = self.model.token_to_id(piece)
        if token_id is None:
            raise KeyError(f"the tokenizer {self.file} has no piece {piece!r}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; control tokens spelled out in the text stay ordinary text."""
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens leave no trace."""
        return self.model.decode([int(token_id) for token_id in ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text with its control tokens spelled out, for people to read."""
        text = ""
        run: list[int] = []
        for token_id in ids:
            if token_id in self.controls:
                text, run = text + self.decode(run) + self.controls[token_id], []
            else:
                run.append(token_id)
        return text + self.decode(run)


def plain(description: dict) -> dict:
    """A tokenizer.json that adds nothing before a text, and neither truncates nor pads. A conversation is encoded piece by piece,
    so the space that Llama's first tokenizers add before a text, and remove again, belongs before none of them."""
    unwanted = {"normalizer": "Prepend", "pre_tokenizer": None, "decoder": "Strip"}
    steps = {part: without(description.get(part), name) for part, name in unwanted.items()}
    return {**description, **steps, "truncation": None, "padding": None}


def without(step: dict | None, unwanted: str | None) -> dict | None:
    """A step of a tokenizer.json, or a sequence of steps, without those of one type and without Metaspace's first space."""
    if step is None or step["type"] == unwanted:
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "Sequence":
        (key,) = step.keys() - {"type"}
        return {**step, key: [rest for inner in step[key] if (rest := without(inner, unwanted))]}
    return step
