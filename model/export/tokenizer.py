"""The tokenizer and the template of a checkpoint as transformers reads them: tokenizer.json and a Jinja program.

In:  tokenizer.model of ours (sentencepiece) or tokenizer.json of a pretrained language model, and a `Template`.
Out: the values of tokenizer.json, and the text of chat_template.jinja. Ids are the same for every text.

transformers writes a conversation as one text and looks for control tokens in it, so a user who types "<|assistant|>" would forge
a turn. Therefore every control token is stored with a mark before its name, a character that nobody types (Unicode leaves it to
private use), and the template removes it from what people write. Typed names stay ordinary text, as in our chat.
"""

import json
from pathlib import Path
from typing import Any

from model.registry import UserError

MARK = "\ue000"
IMAGE = "<image>"
SPACE_SIGN = "\u2581"  # sentencepiece's space; a blank stands for it here, so that the sign itself is encoded as bytes
PROBES = ("", " ", "a  b ", "\n\n\t", "What is it?", "1,234", "你好，世界", "🦊🏳️‍🌈", SPACE_SIGN, "<0x41>", "\u00a0é", "ｆｕｌｌ")


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """The values of tokenizer.json; UserError for a sentencepiece model that it cannot hold exactly.

    tokenizer   that of the checkpoint (dataset/tokenizer.py): its `model` is sentencepiece's, or a tokenizers.Tokenizer
    """
    values = from_sentencepiece(tokenizer) if tokenizer.file.suffix == ".model" else json.loads(tokenizer.model.to_str())
    names = {token["content"]: MARK + token["content"] for token in values["added_tokens"] if token["special"]}
    for token in values["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    pieces = values["model"]["vocab"]
    if isinstance(pieces, dict):
        values["model"]["vocab"] = {names.get(piece, piece): index for piece, index in pieces.items()}
    else:  # Unigram's: a list of pieces with their scores
        values["model"]["vocab"] = [[names.get(piece, piece), score] for piece, score in pieces]
    return {**values, "post_processor": None}  # what begins a document stands in the template


def from_sentencepiece(tokenizer: Any) -> dict[str, Any]:
    """A BPE model of sentencepiece as one of `tokenizers`.

    A merge is any pair of pieces that makes a piece; they are ordered by its score. UserError where the ids of a few difficult
    texts differ: the model is not BPE, or changes a text before it splits it.
    """
    import tokenizers

    model = tokenizer.model
    pieces = [model.id_to_piece(index) for index in range(model.vocab_size())]
    first_byte = next((index for index in range(len(pieces)) if model.is_byte(index)), 0)
    named, learned = pieces[:first_byte], range(first_byte + 256, len(pieces))  # symbols with a name stand before the 256 bytes
    vocab = {piece.replace(SPACE_SIGN, " ") if index in learned else piece: index for index, piece in enumerate(pieces)}
    vocab[model.decode([model.unk_id()])] = vocab.pop(model.id_to_piece(model.unk_id()))  # no text holds it; so it is decoded
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if index in learned]
        merges += [(-model.get_score(index), vocab[left], vocab[right], left, right) for left, right in halves
                   if left in vocab and right in vocab]  # fmt: skip
    added = [{"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": model.is_control(index)} for index, piece in enumerate(named) if not model.is_unknown(index)]
    values = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "fuse_unk": False,
                  "end_of_word_suffix": None, "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
                  "merges": [[left, right] for *_, left, right in sorted(merges)]},
    }  # fmt: skip
    converted = tokenizers.Tokenizer.from_str(json.dumps(values))
    if different := [text for text in PROBES if converted.encode(text).ids != tokenizer.encode(text)]:
        raise UserError(f"{tokenizer.file} cannot become a tokenizer.json with the same ids: {different} differ. It has to be "
                        f"BPE with byte fallback, and leave a text as it is: `python -m dataset.studies.train_tokenizer` does so")
    return values


def chat_template(template: Any) -> str:
    """The Jinja program of a `Template` (dataset/chat.py).

    The content of a message may be a list of parts, whose texts stay text, or a string, in which <image> is a picture's place.
    """
    before, after = template.picture.partition("{n}")[::2] if "{n}" in template.picture else (template.picture, "")
    number = "ns.n ~ " if "{n}" in template.picture else ""
    turns = {role: getattr(template, role) for role in ("system", "user", "assistant")}

    def quoted(text: str) -> str:
        for token in template.control:
            text = text.replace(token, MARK + token)
        return json.dumps(text)

    def either(side: int) -> str:
        return "{" + ", ".join(f"{json.dumps(role)}: {quoted(strings[side])}" for role, strings in turns.items()) + "}"

    text = (Path(__file__).parent / "files" / "chat_template.jinja").read_text(encoding="utf-8")
    for name, value in {"BEGIN": quoted(template.begin), "BEFORE": either(0), "AFTER": either(1), "STOP": quoted(template.stop),
                        "ASSISTANT": quoted(template.assistant[0]), "MARK": json.dumps(MARK + "<"),
                        "PICTURE": f"{quoted(before)} ~ {number}{quoted(after)} ~ {json.dumps(MARK + IMAGE)}",
                        "USER_TEXT": json.dumps(not template.drop_user_text)}.items():  # fmt: skip
        text = text.replace(f"${name}$", value)
    return text
