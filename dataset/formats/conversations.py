"""Rows to conversations, in every form that is read: the one reader of rows for all stages.

In:  a row: turns, a question and its answer, a caption, or a text (dataset/README.md lists the forms).
Out: a `Conversation`, or `BadRow` with the reason and the remedy.

A row means the same in every stage. What differs is what it is for: to learn from (pretraining, SFT), or to be asked (RL,
inference). A `text` alone, or beside a picture, is learned as it stands, and asked as the user's question.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from dataset.bad_rows import BadRow, require_unicode
from dataset.chat import Conversation, Message, Prefill
from dataset.formats.fields import (
    ANSWER,
    CAPTION,
    CHOSEN,
    GOLD,
    NO_READER,
    QUESTION,
    REJECTED,
    SOLUTION,
    SYSTEM,
    TURNS,
    Fields,
    decode,
)
from dataset.formats.gold_answers import gold_text
from dataset.formats.row_pictures import PLACEHOLDER, SLOT, Find, Turn, fill, split
from dataset.formats.turns import check_order, turn


def conversation(row: Any, id: str, find: Find, need_answer: bool) -> Conversation:
    """The conversation of a row (an object, or its `Fields`) in any known form; raises BadRow.

    need_answer   the row is to learn from: it ends with an answer, and its `answer` is learned where it ends with a question.
                  False: it is to be asked, and has a user's turn; its `answer` is the gold answer
    """
    fields = row if isinstance(row, Fields) else Fields(row)
    raw = raw_turns(fields, need_answer)
    if raw is None:
        caption = caption_parts(fields, find, need_answer)
        return finished([("assistant", caption)], None, id, fields, find)
    turns = [turn(one, find, fields, need_answer) for one in raw]
    complete = bool(turns) and turns[-1][0] == "assistant"
    gold, answer = gold_and_answer(fields, complete, need_answer)
    if answer is not None:
        turns.append(("assistant", [answer]))
    turns = with_system(turns, fields)
    check_order([role for role, _ in turns])
    if need_answer and turns[-1][0] != "assistant":
        raise BadRow(f"the last turn is not the assistant's in a row of {fields.named()}", "add the answer, or remove the turn")
    return finished(turns, gold, id, fields, find)


def finished(turns: list[Turn], gold: str | None, id: str, fields: Fields, find: Find) -> Conversation:
    """The conversation of these turns with the row's pictures. BadRow for an empty turn, half a character, or a sound."""
    if fields.has(NO_READER) and fields.take(NO_READER):
        raise BadRow("the row has a sound, which is not read", "write its words in its place, or remove the row")
    fill(turns, fields, find)
    messages = tuple(Message(role, tuple(parts)) for role, parts in turns)
    texts = [message.text for message in messages]
    require_unicode("".join(texts) + (gold or ""))
    learned, answered = False, False
    for (role, parts), text in zip(turns, texts):
        if role == "assistant":
            answered, learned = True, learned or not all(isinstance(part, Prefill) for part in parts)
        if role != "system" and not text.strip() and (role == "assistant" or not parts or isinstance(parts[0], str)):
            raise BadRow(f"empty {'answer' if role == 'assistant' else 'question'}", "write it, or remove the row")
    if answered and not learned:
        raise BadRow("nothing to learn: no answer has a weight", "give one answer the weight 1, or remove the row")
    return Conversation(id, messages, gold)


# ---------------------------------------------------------------- which turns a row has


def raw_turns(fields: Fields, need_answer: bool) -> list | None:
    """The turns of a row as it writes them; None for a caption or a text, which has none."""
    if fields.has(TURNS):
        return turn_list(fields)
    if (texts := fields.values.get("texts")) and isinstance(texts[1], list) and isinstance(next(iter(texts[1]), None), dict):
        return of_texts(fields)
    if fields.has(QUESTION):
        return of_question(fields)
    if "text" in fields and (not need_answer or fields.has(GOLD)):
        return [{"role": "user", "content": not_a_preference(fields.take(("text",)))}]
    if fields.has((*CAPTION, "texts")):
        return None
    if "error" in fields:  # a line of predictions that has none
        raise BadRow(f"the row had no answer: {fields.take(('error',))}", "repair it in the file that was answered")
    if fields.has(CHOSEN + REJECTED):
        raise BadRow("the row is a preference", "learn from it with 3-rl_vlm.py --algo dpo")
    hint = "a question" if fields.has(GOLD) else "conversations"
    raise BadRow(f"missing {hint} in a row of {fields.named()}",
                 'a row has "conversations", "messages", "question", "caption" or "text"')


def turn_list(fields: Fields) -> list:
    """The turns of a row that has a list of them, also as a JSON string."""
    name = next(name for name in TURNS if name in fields)
    turns = fields.take((name,))
    if isinstance(turns, str):
        turns = decode(turns, name)
    if not isinstance(turns, list):
        raise BadRow(f"{name} is a {type(turns).__name__}, not a list", "write a list of turns")
    if not turns:
        raise BadRow(f"empty {name}", "remove the row")
    return turns


def of_texts(fields: Fields) -> list[dict]:
    """The turns of the_cauldron: [{"user", "assistant"}, ...]."""
    turns = []
    for exchange in fields.take(("texts",)):
        if not isinstance(exchange, dict) or not {"user", "assistant"} <= exchange.keys():
            raise BadRow("texts is not a list of exchanges", 'write {"user": ..., "assistant": ...}')
        turns += [{"role": role, "content": exchange[role]} for role in ("user", "assistant")]
        for key in exchange.keys() - {"user", "assistant"}:
            fields.skip(f"texts.{key}")
    return turns


def of_question(fields: Fields) -> list[dict]:
    """The turns of a question, with Alpaca's `input` below it and earlier (question, answer) pairs of `history` before it.

    TRL writes turns as `prompt` and `completion`: lists of them.
    """
    instruction = "instruction" in fields
    question = fields.take(QUESTION)
    if isinstance(question, list):
        completion = next((name for name in SOLUTION if isinstance(fields.values.get(name, ("", None))[1], list)), None)
        return [*question, *(fields.take((completion,)) if completion else [])]
    if instruction and isinstance(question, str) and isinstance(more := fields.take(("input",)), str) and more:
        question = f"{question}\n{more}"
    turns = []
    history = fields.take(("history",)) or []
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRow("history is not a list of pairs", "write [[question, answer], ...]")
        turns += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), exchange)]
    return [*turns, {"role": "user", "content": question}]


def caption_parts(fields: Fields, find: Find, need_answer: bool) -> list:
    """The parts of a caption or a text: all of it is learned."""
    value = fields.take((*CAPTION, "texts"))
    if not need_answer:
        raise BadRow("a caption and no question", 'write the question as "question", or as "text"')
    if isinstance(value, list) and value:
        if len(value) > 1:
            fields.skip("captions[1:]")
        value = value[0]
    if not isinstance(value, str):
        raise BadRow(f"the caption is a {type(value).__name__}, not a string", "write it as text")
    not_a_preference(value)
    if fields.images() is not None or fields.videos() is not None:
        return split(value, find)
    if SLOT.search(value) and len(fields.keys) > 1 + ("id" in fields):  # a text on its own is free to speak of <image>
        raise BadRow(f"{PLACEHOLDER} but no image in a row of {fields.named()}", "name the picture in the field image")
    return [value]


def not_a_preference(text: Any) -> Any:
    """The text itself; BadRow for the JSON that RLHF-V has in its place."""
    if isinstance(text, str) and text.startswith("{") and '"chosen"' in text:
        raise BadRow("the row is a preference", "learn from it with 3-rl_vlm.py --algo dpo")
    return text


def with_system(turns: list[Turn], fields: Fields) -> list[Turn]:
    """The turns behind the row's `system`, if it has one."""
    text = fields.take(SYSTEM) if fields.has(SYSTEM) else None
    if not text:
        return turns
    if not isinstance(text, str):
        raise BadRow(f"system is a {type(text).__name__}, not a string", "write it as text")
    if turns and turns[0][0] == "system":
        raise BadRow("two systems: a field beside the turns and a turn", "remove one of them")
    return [("system", [text]), *turns]


# ---------------------------------------------------------------- gold answers


def gold_and_answer(fields: Fields, complete: bool, need_answer: bool) -> tuple[str | None, str | None]:
    """(gold answer, answer to learn) of a row; the latter where its turns do not end with one.

    A solution beside the answer is what is learned, and the answer what is compared.
    """
    if not fields.has(GOLD):
        return None, None
    value = fields.take(ANSWER)
    solution = None if complete or (value is not None and not need_answer) else fields.take(SOLUTION)
    gold = text_of_answer(solution if value is None else value)
    if complete or not need_answer or (value is None and solution is None):
        return gold, None
    learned = solution if solution is not None else value
    if isinstance(learned, list):  # several people's answers: what most of them said
        learned = Counter(map(text_of_answer, learned)).most_common(1)[0][0] if learned else ""
    return gold, text_of_answer(learned) or ""


def text_of_answer(value: Any) -> str | None:
    """An answer as text; of several any is right: a JSON list. BadRow where it is no text and no number."""
    several = value if isinstance(value, list) else [value]
    texts = [one["answer"] if isinstance(one, dict) and one.get("answer") is not None else one for one in several]
    if value and isinstance(value, list) and not any(isinstance(one, list) for one in texts):
        texts = list(dict.fromkeys(map(gold_text, texts)))
    value = texts[0] if len(texts) == 1 and not isinstance(texts[0], list) else texts
    return None if value is None else gold_text(value)
