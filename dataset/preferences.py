"""Preferences: two answers to one prompt, of which one is better."""
from __future__ import annotations

from dataclasses import dataclass

from dataset.chat import Conversation


@dataclass(frozen=True)
class Preference:
    """A prompt, the better answer, and the worse one."""

    id: str
    prompt: Conversation
    chosen: str
    rejected: str
