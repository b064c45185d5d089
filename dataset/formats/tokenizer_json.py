"""The tokenizer of a pretrained language model, tokenizer.json, behind the same interface as dataset/tokenizer.py.

In:  any text.  Out: the ids that the model was trained with, and one more token, <image>, where the file has none.

Control tokens are those that the file calls special; in a text they stay ordinary letters, as with our own tokenizer. A text
comes back from its ids as the model's own normalisation leaves it (Qwen's: "e" and an accent become one character).
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

IMAGE = "<image>"


class JsonTokenizer:
    """A tokenizer.json with a name for its placeholder.

    `bos`, `pad`, `image`: ids of what begins a document (where the model has such a token), of padding, and of one visual token.
    Padding is never read, so it may be any token that is never said: it is the placeholder.
    Raises FileNotFoundError where the file is missing, KeyError from `id` for an unknown piece.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        if not self.file.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {self.file.parent}; transformers makes it of other forms: "
                                    f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)")
        self.model = tokenizers.Tokenizer.from_str(json.dumps(plain(json.loads(self.file.read_text(encoding="utf-8")))))
        self.model.add_special_tokens([IMAGE])
        self.model.encode_special_tokens = True  # what a text spells stays text
        self.image = self.pad = self.id(IMAGE)
        self.vocab_size = max(self.model.get_vocab().values()) + 1
        begins = self.model.encode("").ids  # what the model puts before every text
        self.bos = begins[0] if begins else self.pad
        added = self.model.get_added_tokens_decoder()
        self.controls = {number: token.content for number, token in added.items() if token.special}

    def id(self, piece: str) -> int:
        """The id of a piece, control tokens included."""
        number = self.model.token_to_id(piece)
        if number is None:
            raise KeyError(f"the tokenizer {self.file} has no piece {piece!r}")
        return number

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; control tokens spelled out in the text stay ordinary text."""
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; control tokens leave no trace."""
        return self.model.decode([int(number) for number in ids])

    def decode_all(self, ids: Sequence[int]) -> str:
        """The text with its control tokens spelled out, for people to look at."""
        text = ""
        run: list[int] = []
        for number in ids:
            if number in self.controls:
                text, run = text + self.decode(run) + self.controls[number], []
            else:
                run.append(number)
        return text + self.decode(run)


def plain(description: dict) -> dict:
    """A tokenizer.json whose texts begin with nothing: a conversation is encoded piece by piece, and the space that Llama's
    first tokenizers put before a text, and take from it again, belongs before none of them. Nor does it cut or pad."""
    unwanted = {"normalizer": "Prepend", "pre_tokenizer": None, "decoder": "Strip"}
    steps = {part: without(description.get(part), name) for part, name in unwanted.items()}
    return {**description, **steps, "truncation": None, "padding": None}


def without(step: dict | None, unwanted: str | None) -> dict | None:
    """A step of a tokenizer.json, or a sequence of them, without those of a type and without Metaspace's first space."""
    if step is None or step["type"] == unwanted:
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "Sequence":
        (key,) = step.keys() - {"type"}
        return {**step, key: [kept for inner in step[key] if (kept := without(inner, unwanted))]}
    return step
