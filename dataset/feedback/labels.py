"""Claims to labels: which of the things that an answer states are true.

In:  `ClaimQuestion`s, claims about the pictures of an item.
Out: a margin for each from a `Labeler`, above 0 where the claim is accepted: `TRUTH` (the scene is known), `by_model` (the model
that answered, or another; `YesNo` reads its logits), `by_judge` (an OpenAI-compatible endpoint).

This is the "conquer" step of RLAIF-V (arXiv 2405.17220): a claim is accepted iff p(yes) + p(Yes) > p(no) + p(No). A tie rejects.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dataset.chat import Conversation, Message
from dataset.feedback.claims import Claim, Item
from dataset.images import Picture
from dataset.judge import Failure, Judge, data_url
from dataset.processor import Processor
from dataset.world.scenes import Scene
from model.registry import UserError


@dataclass(frozen=True)
class ClaimQuestion:
    """A claim, and the item whose pictures it is about."""

    claim: Claim
    item: Item


@dataclass(frozen=True)
class Labeler:
    """A source of margins, yes minus no, one per claim. A margin above 0 accepts the claim; a tie rejects it."""

    name: str
    margins: Callable[[Sequence[ClaimQuestion]], list[float | Failure]]


PLEASE = {"en": " Please answer yes or no.", "zh": "请回答是或否。"}
YES, NO = ("yes", "Yes", "是"), ("no", "No", "否")


def untrue(claim: Claim, scene: Scene) -> int:
    """How many of the objects of a claim are not in the scene, or not in their cell; 1 for a malformed claim."""
    if claim.malformed:
        return 1
    present = {(obj.category.en, cell) for obj in scene.objects for cell in (obj.cell, None)}
    return sum(obj not in present for obj in claim.objects)


def true_margin(question: ClaimQuestion) -> float | Failure:
    if question.item.scene is None or not question.claim.objects:
        return Failure("the truth is known only for scenes of the world that the rule can divide: choose a model as labeler")
    return -1.0 if untrue(question.claim, question.item.scene) else 1.0


TRUTH = Labeler("truth", lambda questions: [true_margin(question) for question in questions])


def prompt(question: ClaimQuestion, suffix: str = "") -> Conversation:
    """The question of a claim, with the item's pictures, as a conversation."""
    parts: tuple[str | Picture, ...] = (*question.item.prompt.pictures, question.claim.question + suffix)
    return Conversation(question.item.prompt.id, (Message("user", parts),))


def by_model(name: str, yes_no: Callable[[list[Conversation]], list[float]]) -> Labeler:
    """Labels of a model: the one that answered (self-feedback) or another. `name` must differ between different weights."""
    return Labeler(name, lambda questions: [*yes_no([prompt(question) for question in questions])])


def by_judge(judge: Judge) -> Labeler:
    """Labels of a model that sees pictures, behind an OpenAI-compatible endpoint: 1 for yes, -1 for no, else a failure."""

    def margins(questions: Sequence[ClaimQuestion]) -> list[float | Failure]:
        replies = judge.ask([with_pictures(prompt(question, PLEASE[question.item.language])) for question in questions])
        return [reply if isinstance(reply, Failure) else yes_or_no(reply) for reply in replies]

    return Labeler(judge.model, margins)


def with_pictures(conversation: Conversation) -> list[dict]:
    """A conversation as messages of the OpenAI chat API, with its pictures as PNG inside."""
    return [{"role": message.role, "content": [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in message.parts]} for message in conversation.messages]


def yes_or_no(reply: str) -> float | Failure:
    """1.0 or -1.0 by the first word of a reply; a failure where it is neither yes nor no."""
    match = re.match(r"\W*(?:(yes\b|是(?!否)|有|对(?!不))|(no\b(?! idea| way)|否|不是|不对|没有|不\b))", reply, re.IGNORECASE)
    if not match:
        return Failure(f"neither yes nor no: {reply[:200]!r}")
    return 1.0 if match[1] else -1.0


@dataclass(frozen=True)
class YesNo:
    """Conversations -> p(yes) - p(no) at the first token of the answer, over all spellings: the `yes_no` of `by_model`.

    next_logits   a padded batch of prompts -> logits (B, V) of the next token
    """

    processor: Processor
    next_logits: Callable[[dict], torch.Tensor]
    batch_size: int = 256

    def __post_init__(self) -> None:
        if self.processor.template.drop_user_text:
            raise UserError("this template drops the questions: only a model that was fine-tuned to answer them can label")

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        encode = self.processor.tokenizer.encode
        yes, no = ({encode(word)[0] for word in words} for words in (YES, NO))
        if yes & no:
            raise UserError(f"this tokenizer begins yes and no with the same tokens {sorted(yes & no)}: choose another labeler")

        def margins(batch: dict) -> list[float]:
            probabilities = self.next_logits(batch).float().softmax(-1)  # (B, V)
            return (probabilities[:, sorted(yes)].sum(-1) - probabilities[:, sorted(no)].sum(-1)).tolist()

        return self.processor.map([self.processor.prompt(question) for question in conversations], margins, self.batch_size)
