"""Look inside: where the model looked on the pictures when it wrote a word, and which tokens were likeliest there.

In:  a checkpoint (dataset/checkpoints.py), a conversation, an answer and one of its words.  Out: a `Glance`.

Shown is the attention of the last block, the mean over its heads. Of the positions that write the word it is the one that looks
at the pictures most: in "a bus" the position that writes "bus", not the one that writes "a".
Legend: T tokens, N pictures and tiles.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image

from dataset.chat import Conversation, Document
from dataset.checkpoints import Trained
from dataset.dialogue import complete_characters
from dataset.images import resized
from dataset.tokenizer import Tokenizer
from model.registry import UserError

LIKELIEST = 5  # tokens
SHADES = " ░▒▓█"


class Word(NamedTuple):
    """A word of an answer: the tokens first, first + 1, ..., end - 1; its first character is number `at` of the answer."""

    text: str
    first: int
    end: int
    at: int


@dataclass(frozen=True)
class Glance:
    """What happened inside the model when it wrote a word.

    pictures   each picture or tile as the encoder takes it
    shares     (N, edge, edge): which part of the attention that fell on pictures fell on each square; the sum is 1
    weight     how much attention fell on pictures, of 1; the rest fell on the text
    missing    why there is no map; "" where there is one
    likeliest  (token, probability) of the tokens that were likeliest at the beginning of the word
    """

    pictures: Sequence[Image.Image]
    shares: torch.Tensor
    weight: float
    missing: str
    likeliest: list[tuple[str, float]]


def words(tokenizer: Tokenizer, answer: str) -> list[Word]:
    """The words of an answer, without the tags of reasoning. A Chinese token is a word, and so is a sign."""
    ids = tokenizer.encode(answer)
    tags = [tag.span() for tag in re.finditer("</?(think|answer)>", answer)]
    found: list[Word] = []
    before, first = "", 0
    for end in range(1, len(ids) + 1):
        text = complete_characters(tokenizer.decode(ids[:end]))
        piece = text[len(before):]
        if not piece.strip():
            continue  # a blank, or a part of a character: it belongs to what follows
        if not any(opens < len(text) and len(text) - len(piece.lstrip()) < closes for opens, closes in tags):
            if found and found[-1].end == first and continues(before[-1], piece[0]):
                found[-1] = found[-1]._replace(text=found[-1].text + piece, end=end)
            else:
                found.append(Word(piece.strip(), first, end, len(text) - len(piece.lstrip())))
        before, first = text, end
    return found


def word_at(tokenizer: Tokenizer, answer: str, character: int) -> Word:
    """The word of an answer to which this character belongs; UserError where it is in none."""
    for word in words(tokenizer, answer):
        if word.at <= character < word.at + len(word.text):
            return word
    raise UserError("choose another word")


def continues(last: str, following: str) -> bool:
    """Whether two characters side by side belong to one word."""
    return all(character.isalnum() and character < "\u2e80" for character in (last, following))


def glance(trained: Trained, conversation: Conversation, answer: str, word: Word) -> Glance:
    """Inside the model while it writes a word of its answer to a conversation."""
    processor, inspector = trained.processor, trained.inspector
    document = processor.with_answer(conversation, answer, processor.context_length)
    batch = processor.batch([document])
    before = document.learn.index(True) - 1  # the position that writes the first token of the answer
    tokens = inspector.likeliest(batch, LIKELIEST, processor.banned)[word.first]
    likeliest = [(token_text(processor.tokenizer, token), probability) for token, probability in tokens]
    pictures, shares, weight, missing = [], torch.zeros(0, 1, 1), 0.0, ""
    try:
        edge = grid(trained)
        if not document.pictures:
            raise UserError("there is no picture in this conversation")
        weights = inspector.attention(batch)[0].mean(0)  # (T, T)
        shares, weight = on_pictures(trained, document, weights[before + word.first:before + word.end], edge)
        images = processor.images
        pictures = [resized(picture.load(), images.encoder.size, images.encoder.mean, images.fit)
                    for picture in document.pictures]  # fmt: skip
    except UserError as error:
        missing = str(error)
    return Glance(pictures, shares, weight, missing, likeliest)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a person can read it: its text with the blank in front of it shown, or its name, such as <|end|>."""
    text = tokenizer.decode_all([token])
    return text.replace(" ", "␣").replace("\n", "⏎") or f"token {token}"


def grid(trained: Trained) -> int:
    """Squares along an edge of a picture, one token each; UserError where tokens are not squares of it."""
    count, encoder = trained.processor.image_tokens, trained.inspector.model.encoder
    patches = encoder.tokens - encoder.has_cls
    with_cls = count == encoder.tokens and encoder.has_cls
    edge = math.isqrt(count - with_cls)
    if edge**2 != count - with_cls or patches % edge**2:
        raise UserError(f"the connector's {count} tokens are not squares of the picture")
    return edge


def on_pictures(trained: Trained, document: Document, weights: torch.Tensor, edge: int) -> tuple[torch.Tensor, float]:
    """Attention weights of some positions (positions, T) -> the shares of the squares (N, edge, edge), and their sum before.

    They are those of the one position that looks at the pictures most.
    """
    processor = trained.processor
    is_image = torch.tensor(document.input_ids) == processor.tokenizer.image
    tokens = weights.cpu()[:, is_image].unflatten(1, (-1, processor.image_tokens))  # (positions, N, image tokens)
    squares = tokens[..., -(edge**2):]  # without a CLS token
    squares = squares[squares.sum((1, 2)).argmax()]
    return (squares / squares.sum()).unflatten(1, (edge, edge)), float(squares.sum())


def blocks(shares: torch.Tensor, most: float) -> str:
    """(edge, edge) shares as lines of text: a block, the darker the nearer to the most, and the share in percent."""
    return "\n".join("  ".join(f"{SHADES[round(4 * share / most)] * 2}{100 * share:3.0f} %" for share in row)
                     for row in shares.tolist())  # fmt: skip
