"""What happens on the page: functions of what gradio sends, which return what it shows.

In:  the checkpoints (dataset/checkpoints.py) and the examples of the page.  Out: `Page`, whose functions web_demo.py connects.
"""

from __future__ import annotations

import contextlib
import html
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from dataset.bad_rows import BadRow
from dataset.chat import Message
from dataset.checkpoints import Checkpoints, together
from dataset.dialogue import Dialogue
from dataset.images import Picture
from dataset.look import glance, word_at
from dataset.page import views
from dataset.page.examples import Shown, truth
from dataset.page.messages import answer_entries, clicked, entry, escaped, messages, sent, turns, up_to_question
from model.registry import UserError

Update = TypeVar("Update")


def paced(updates: Iterable[Update], seconds: float = 0.1) -> Iterator[Update]:
    """The first, some and the last of many updates: each of them sends the whole conversation to the page."""
    due, skipped = 0.0, []
    for update in updates:
        skipped = [update]
        if time.monotonic() >= due:
            yield skipped.pop()
            due = time.monotonic() + seconds
    yield from skipped


class Page:
    """What happens on the page, as functions of what the page sends.

    history    the conversation, entries of one text or picture each (dataset/page/messages.py)
    settings   the name of a checkpoint, temperature, top_p, tokens of the longest answer
    """

    def __init__(self, checkpoints: Checkpoints, shown: Sequence[Shown]):
        import gradio  # takes seconds, which --help should not need

        self.checkpoints, self.shown, self.gr = checkpoints, shown, gradio

    def dialogue(self, before: Sequence[Message], name: str, temperature: float, top_p: float, length: float) -> Dialogue:
        return self.checkpoints.dialogue(name, before, temperature=temperature, top_p=top_p, max_new_tokens=int(length))

    def about(self, name: str) -> str:
        """What a checkpoint knows."""
        with self.refusals():
            model = self.checkpoints.trained(name).inspector.model
        return views.knowledge(self.checkpoints.folders[name], sum(weight.numel() for weight in model.parameters()), model.config)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Tells on the page what cannot be answered and why, without the paths of this machine; a bug keeps its traceback."""
        try:
            yield
        except (BadRow, UserError) as error:
            reason = re.sub(r"[^\s'(]*[/\\]", "", error.reason if isinstance(error, BadRow) else str(error))
            raise self.gr.Error(html.escape(reason), title="Not sent", print_exception=False) from error

    def busy(self) -> Any:
        return self.gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)

    def free(self) -> Any:
        return self.gr.MultimodalTextbox(interactive=True, submit_btn=True, stop_btn=False)

    # Each function that starts an answer returns the conversation up to the user's message that needs an answer.

    def send(self, message: dict, history: list[dict], *settings: Any) -> tuple:
        return self.accepted(history, sent(message), settings)

    def accepted(self, history: list[dict], added: list[dict], settings: tuple) -> tuple:
        """The conversation with a message more; it is refused as a whole where the model cannot read it."""
        with self.refusals():
            asked = messages(history + added)
            for picture in (part for message in asked[-1:] for part in message.parts if isinstance(part, Picture)):
                picture.load()
            if added:
                self.dialogue([], *settings).prompt(asked)
        return history + added, self.busy()

    def retry(self, history: list[dict]) -> tuple:
        return up_to_question(history), self.busy()

    def undo(self, history: list[dict]) -> tuple:
        question = turns(up_to_question(history))[-1]
        content = [item for entry in question for item in entry["content"]]
        files = [item["file"]["path"] for item in content if item["type"] == "file"]
        text = "".join(html.unescape(item["text"]) for item in content if item["type"] == "text")
        return up_to_question(history)[: -len(question)], {"files": files, "text": text}

    def answer(self, history: list[dict], *settings: Any) -> Iterator[list[dict]]:
        with self.refusals():
            *before, question = messages(history) or [Message("assistant", ())]
            if question.role != "user":
                return  # the message was empty
            dialogue = self.dialogue(before, *settings)
            for text in paced(dialogue.say(question.parts)):
                yield history + answer_entries(text, len(history))
            if dialogue.forgotten:
                self.gr.Info(f"Too long for the model: the first {dialogue.forgotten} question(s) were forgotten")

    def clear(self) -> tuple:
        return [], self.free(), views.HINT

    def compare(self, message: dict, history: list[dict], names: list[str], *sampling: Any) -> Iterator[str]:
        """The message in the box, or else the last question of the chat, answered by several checkpoints."""
        with self.refusals():
            asked = messages(sent(message) or up_to_question(history))
            if not asked or not names:
                raise UserError("write a question, or choose an example, and the checkpoints to compare")
            right = truth(asked[-1], self.shown)
            dialogues = {name: self.dialogue(asked[:-1], name, *sampling) for name in names}
            for answers in paced(together(dialogues, asked[-1].parts)):
                yield views.side_by_side(asked[-1].text, right, answers)

    def look(self, history: list[dict], word: str, *settings: Any) -> tuple:
        """Where the model looked when it wrote the word of an answer that has this id, and what was likeliest there."""
        from dataset.figures.attention import heat_map  # matplotlib takes a second

        with self.refusals():
            if not (found := clicked(history, word)):
                return self.gr.skip(), self.gr.skip()  # a click on something else
            before, answer, character = found
            trained = self.checkpoints.trained(settings[0])
            written = word_at(trained.processor.tokenizer, answer, character)
            conversation, _, _ = self.dialogue([], *settings).recent(before)
            seen = glance(trained, conversation, answer, written)
        drawn = b"" if seen.missing else heat_map(seen.pictures, seen.shares)
        return views.inside(seen, written.text, drawn), self.gr.Tabs(selected="look")

    def edited(self, history: list[dict], place: int, text: str, settings: tuple) -> tuple:
        """The conversation up to a message that was written anew."""
        return self.accepted(history[:place], [entry("user", escaped(text))], settings)
