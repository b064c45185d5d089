"""Claims to labels: which of the things that an answer says are true.

In:  `Asked`, a claim about the pictures of an item.
Out: a margin each from a `Labeler`, above 0 where the claim is accepted: `TRUTH` (the scene is known), `by_model` (the one that
answered, or another: `YesNo` asks it), `by_judge` (an OpenAI-compatible endpoint).

The "conquer" of RLAIF-V (arXiv 2405.17220): a claim is accepted iff p(yes) + p(Yes) > p(no) + p(No), so a tie rejects it.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dataset.chat import Conversation, Message, Template, render_prompt
from dataset.collate import pad
from dataset.feedback.claims import Claim, Failed, Item, as_replies
from dataset.judge import data_url
from dataset.vision.image_processor import Eyes
from dataset.world.scenes import Scene


@dataclass(frozen=True)
class Asked:
    """A claim about the pictures of an item."""

    claim: Claim
    item: Item


@dataclass(frozen=True)
class Labeler:
    """Who accepts claims: a margin each, yes less no; only one above 0 accepts, so a tie rejects."""

    name: str
    margins: Callable[[Sequence[Asked]], list[float | Failed]]


PLEASE = {"en": " Please answer yes or no.", "zh": "请回答是或否。"}
YES, NO = ("yes", "Yes", "是"), ("no", "No", "否")


def untrue(claim: Claim, scene: Scene) -> int:
    """How many of the things that a claim needs are not in the scene, or not in their cell; of a malformed one 1."""
    if claim.malformed:
        return 1
    present = {(obj.category.en, cell) for obj in scene.objects for cell in (obj.cell, None)}
    return sum(obj not in present for obj in claim.objects)


def true_margin(asked: Asked) -> float | Failed:
    if asked.item.scene is None or not asked.claim.objects:
        return Failed("the truth is known of scenes of the world and what the rule divides: this needs a model as labeler")
    return -1.0 if untrue(asked.claim, asked.item.scene) else 1.0


TRUTH = Labeler("truth", lambda asked: [true_margin(one) for one in asked])


def prompt(asked: Asked, please: bool) -> Conversation:
    """The question of a claim about the item's pictures; `please` adds what a model not trained on the bare question needs."""
    text = asked.claim.question + (PLEASE[asked.item.language] if please else "")
    return Conversation(asked.item.prompt.id, (Message("user", (*asked.item.prompt.pictures, text)),))


def by_model(name: str, yes_no: Callable[[list[Conversation]], list[float]], please: bool = False) -> Labeler:
    """Labels of a model, the one that answered (self-feedback) or another; `name` tells its weights from any other's."""
    return Labeler(f"{name},please={please}", lambda asked: yes_no([prompt(one, please) for one in asked]))


def by_judge(judge, please: bool = True) -> Labeler:
    """Labels of a model behind an OpenAI-compatible endpoint that sees pictures: 1 for yes, -1 for no, else it failed."""

    def margins(asked: Sequence[Asked]) -> list[float | Failed]:
        replies = judge.ask([with_pictures(prompt(one, please)) for one in asked])
        return [reply if isinstance(reply, Failed) else yes_or_no(reply) for reply in as_replies(replies)]

    return Labeler(f"{judge.model},please={please}", margins)


def with_pictures(conversation: Conversation) -> list[dict]:
    """A conversation as messages of the OpenAI chat API, pictures inside as PNG."""
    return [{"role": message.role, "content": [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in message.parts]} for message in conversation.messages]


def yes_or_no(reply: str) -> float | Failed:
    """The first word of a reply: 1.0, -1.0, or neither."""
    found = re.match(r"\W*(?:(yes\b|是(?!否)|有|对(?!不))|(no\b(?! idea| way)|否|不是|不对|没有|不\b))", reply, re.IGNORECASE)
    if not found:
        return Failed(f"neither yes nor no: {reply[:200]!r}")
    return 1.0 if found[1] else -1.0


@dataclass(frozen=True)
class YesNo:
    """Conversations -> p(yes) - p(no) of each at the first token of the answer, all spellings together (`by_model`'s yes_no).

    `first_logits` makes the logits (B, V) of the next token of a padded batch of prompts.
    """

    template: Template
    tokenizer: object
    image_tokens: int
    eyes: Eyes
    first_logits: Callable[[dict], torch.Tensor]
    batch_size: int = 256

    def __post_init__(self):
        if self.template.drop_user_text:
            raise ValueError("this template drops the questions: only a model that was fine-tuned to answer them can label")

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        yes, no = ({self.tokenizer.encode(word)[0] for word in words} for words in (YES, NO))
        if yes & no:
            raise ValueError(f"this tokenizer begins yes and no with the same tokens {sorted(yes & no)}: choose another labeler")
        self.eyes.prepare(picture for conversation in conversations for picture in conversation.pictures)
        prompts = [render_prompt(asked, self.template, self.tokenizer, self.image_tokens, views=self.eyes.views)
                   for asked in conversations]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        margins = [0.0] * len(prompts)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start:start + self.batch_size]
            batch = pad([prompts[i] for i in chosen], self.eyes, self.tokenizer.pad)
            probabilities = self.first_logits(batch).float().softmax(-1)  # (B, V)
            margin = probabilities[:, sorted(yes)].sum(-1) - probabilities[:, sorted(no)].sum(-1)
            for i, value in zip(chosen, margin.tolist(), strict=True):
                margins[i] = value
        return margins
