"""Preference pairs: one prompt, a chosen and a rejected answer, from every published format.

In:  files of preferences, in the forms that dataset/README.md lists.
Out: a source: `len(source)` and `source[i]`, a `Preference` (dataset/chat.py); dataset/processor.py makes pairs of documents.

    RLAIF-V           image {bytes, path}, question, chosen, rejected; so the feedback pipeline's jsonl
    RLHF-V            image {bytes, path}, text: a JSON string {question, chosen, rejected}
    TRL               images, prompt, chosen, rejected: lists of messages or strings; without a prompt, the messages with which
                      chosen and rejected both begin (MiniMind's dpo.jsonl)
    LLaMA-Factory     conversations, chosen {from, value}, rejected {from, value}
    ms-swift          messages, of which the last is the chosen answer, and rejected_response, or rejected_messages
Stored log-probabilities are not read, because they belong to another model.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from dataset.bad_rows import BadRow, require_unicode
from dataset.chat import Preference
from dataset.formats.conversations import finished, raw_turns, with_system
from dataset.formats.fields import ANSWER, CHOSEN, QUESTION, REJECTED, SOLUTION, TURNS, Fields, decode
from dataset.formats.files import FileSource
from dataset.formats.row_pictures import Find
from dataset.formats.survey import named
from dataset.formats.turns import CONTENT, ROLE, ROLE_NAMES, check_order, turn
from dataset.formats.turns import first as first_of
from dataset.mixture import Mixture, load, name_and_weight

EXAMPLE = '{"question", "chosen", "rejected"}'


def preference(row: Any, id: str, find: Find) -> Preference:
    """The preference of a row (an object, or its `Fields`) in any known form; BadRow for a row that has none."""
    fields = row if isinstance(row, Fields) else Fields(row, EXAMPLE)
    if not fields.has(CHOSEN + REJECTED) and "text" in fields:  # RLHF-V
        text = fields.take(("text",))
        text = decode(text, "text") if isinstance(text, str) else text
        if isinstance(text, dict):
            fields.update(text)
    turns, chosen, rejected = parts(fields)
    prompt = with_system([turn(one, find, fields, learn=False) for one in turns], fields)
    check_order([role for role, _ in prompt])
    if prompt[-1][0] != "user":
        raise BadRow("the prompt does not end with the user's turn", "leave both answers out of the prompt")
    better, worse = answer(chosen, "chosen", fields), answer(rejected, "rejected", fields)
    require_unicode(better + worse)
    if better.strip() == worse.strip():
        raise BadRow("chosen and rejected are the same answer", "remove the row: it states no preference")
    return Preference(id, finished(prompt, None, id, fields, find), better, worse)


def parts(fields: Fields) -> tuple[list, Any, Any]:
    """(turns of the prompt, chosen, rejected) as the row writes them."""
    chosen, rejected = fields.take(CHOSEN), fields.take(REJECTED)
    chosen, rejected = ([one] if isinstance(one, dict) else one for one in (chosen, rejected))
    turns = list(raw_turns(fields, need_answer=True) or []) if fields.has(TURNS + QUESTION) else []
    if chosen is None and isinstance(rejected, list) and rejected and role_of(rejected[0]) != "assistant":
        turns, chosen = [], turns  # ms-swift's rejected_messages: both are whole conversations
    elif chosen is None and rejected is not None:  # the prompt goes on with the chosen answer
        chosen = [turns.pop()] if turns and role_of(turns[-1]) == "assistant" else fields.take(SOLUTION + ANSWER)
    if isinstance(chosen, list) and isinstance(rejected, list) and chosen and role_of(chosen[0]) != "assistant":
        common = [left for left, _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))]
        if turns and not (common and turns[-1] in common or repeats(turns, common)):
            raise BadRow("the prompt is not the beginning of chosen and rejected", "leave the prompt out, or the beginning")
        turns, chosen, rejected = common, chosen[len(common):], rejected[len(common):]
    missing = {"question": not turns, "chosen": chosen is None, "rejected": rejected is None}
    if any(missing.values()):
        raise BadRow(f"missing {', '.join(name for name in missing if missing[name])} in a row of {fields.named()}",
                     "a row has a question (or a prompt), chosen and rejected")
    return turns, chosen, rejected


def role_of(message: Any) -> str | None:
    """The role of a message, None where it has none that is known."""
    name = first_of(message, ROLE) if isinstance(message, dict) else None
    return ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None


def repeats(turns: list, common: list) -> bool:
    """Whether the prompt is the text of the last turn with which both answers begin."""
    return bool(turns and common) and first_of(turns[-1], CONTENT) == first_of(common[-1], CONTENT)


def answer(value: Any, field: str, fields: Fields) -> str:
    """The text of an answer: a string, or a list with one message of the assistant."""
    if isinstance(value, list):
        if len(value) != 1 or role_of(value[0]) != "assistant":
            raise BadRow(f"{field} is not one message of the assistant", "put earlier turns into the prompt")
        _, texts = turn(value[0], named, fields, learn=False)
        if not all(isinstance(text, str) for text in texts):
            raise BadRow(f"{field} holds more than text", "an answer is text alone")
        value = "".join(texts)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"empty {field}" if isinstance(value, str) else f"{field} is a {type(value).__name__}", "write the answer")
    return value


class PreferenceFile(FileSource):
    """The preferences of one file, each row parsed on access."""

    def parse(self, fields: Fields, where: str, find: Find) -> Preference:
        return preference(fields, where, find)


class OwnPreferences(PreferenceFile):
    """The pairs of a run's own answers, a file of dataset/feedback/pairs.py: what training does not read of it is no news."""

    def __init__(self, path: Path):
        super().__init__(path, path.parent, allow_urls=False, need_answer=True)
        self.told = {"scores", "answers", "prompt_id"}


load_preferences = partial(load, kind=PreferenceFile)  # the preferences of a file, or of every data file in a folder


class FileFlags(Protocol):
    """Where pictures are stored (model/cli.py)."""

    image_folder: Path | None
    allow_urls: bool


def preference_mixture(specs: Sequence[str], flags: FileFlags) -> Mixture:
    """Files and folders of preferences, mixed by weight: "pairs.jsonl", "rlaif-v:0.5"."""
    parts = [name_and_weight(spec) for spec in specs]
    return Mixture([(load_preferences(name, flags.image_folder, flags.allow_urls), weight) for name, weight in parts])
