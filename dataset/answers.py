"""Results that are kept as they come: an interrupted run goes on where it stopped, and processes share the work.

In:  items, a function that prepares a chunk of them, and one that makes their results.
Out: a result for each item, in the order of the items.

A chunk is what is computed together. Its number alone seeds what is sampled in it, so the results are equal, digit for digit,
however often a run was interrupted and however many processes shared it. A thread prepares the next chunk (it opens the
pictures) while the model computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from dataset.ahead import ahead
from dataset.bad_rows import BadRow
from dataset.chat import Conversation
from dataset.formats.files import complete_lines
from dataset.protocols import Ranks
from dataset.tasks import Truncated
from dataset.writing import naming
from model.registry import UserError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Journal:
    """The results of a run, written chunk by chunk into files beside the file that they are for.

    file       the file of all results, which is written by others; parts are FILE.KEY-RANK.partial
    settings   all that results depend on, beside the items: another model or other flags begin anew
    ranks      rank r makes the chunks r, r + w, r + 2w, ...
    size       items of a chunk
    """

    file: Path
    settings: dict[str, Any]
    ranks: Ranks
    size: int
    seed: int

    def of(self, file: Path, **more: Any) -> Journal:
        """The journal of another file, whose results depend on `more` as well."""
        return replace(self, file=file, settings={**self.settings, **more})

    def results(self, items: Sequence[Item], names: Iterable[Any], load: Callable[[list[Item]], Loaded],
                results_of: Callable[[list[Item], Loaded], list[Any]]) -> list[Any]:
        """A result for each item; every rank calls this and gets all of them.

        names      what tells the items apart, in their order: other items begin anew
        load       chunk -> what `results_of` needs of it, in a thread
        What stops it gets a note that says how far it came.
        """  # fmt: skip
        chunks = [list(items[start : start + self.size]) for start in range(0, len(items), self.size)]
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True, default=str).encode())
        for name in names:
            digest.update(repr(name).encode())
        part = self.file.with_name(f"{self.file.name}.{digest.hexdigest()[:12]}-{self.ranks.rank}.partial")
        part.parent.mkdir(parents=True, exist_ok=True)
        done = self.ranks.all_gather(self.read(part.name.rpartition("-")[0]))
        mine = [k for k in range(len(chunks)) if k not in done][self.ranks.rank :: self.ranks.world_size]
        made: dict[int, list] = {}
        with (part.open("a", encoding="utf-8") as out,
              tqdm(total=len(items), initial=sum(map(len, done.values())), unit="answer", leave=False,
                   disable=self.ranks.rank > 0) as bar):  # fmt: skip
            try:
                for k, loaded in ahead(lambda k: load(chunks[k]), mine):
                    torch.manual_seed(self.seed + k)
                    results = results_of(chunks[k], loaded)
                    with naming(part):
                        out.write(json.dumps([k, results], ensure_ascii=False) + "\n")
                        out.flush()
                    made[k] = results
                    bar.update(min(len(chunks[k]) * self.ranks.world_size, len(items) - bar.n))
            except (KeyboardInterrupt, SystemExit) as stop:
                count = sum(map(len, [*done.values(), *made.values()]))
                stop.add_note(f"{count} of {len(items)} answered; the same command goes on")
                raise
        done |= self.ranks.all_gather(made)
        return [result for k in range(len(chunks)) for result in done[k]]

    def read(self, name: str) -> dict[int, list]:
        """Chunk -> its results, from the parts of all ranks with this name. A line that was not finished is made again."""
        found: dict[int, list] = {}
        for part in self.file.parent.glob(f"{name}-*.partial"):
            found.update(json.loads(line) for line in complete_lines(part))
        return found

    def clear(self) -> None:
        """Delete the parts, those of other settings too: `file` holds all results now."""
        for part in self.file.parent.glob(f"{self.file.name}.*.partial"):
            part.unlink()


# ---------------------------------------------------------------- answers


class Model(Protocol):
    """What answers conversations: `Answerer` (dataset/evaluation.py), or `BestOf`."""

    def load(self, conversations: Sequence[Conversation], /) -> Any:
        """What `answers` needs of them: a padded batch, its pictures decoded."""

    def answers(self, loaded: Any, /) -> list[str]:
        """The answer to each."""


def identity(prompt: Conversation) -> tuple:
    """What tells prompts apart: id, words and pictures."""
    return prompt.id, [message.text for message in prompt.messages], [picture.key for picture in prompt.pictures]


def length(prompt: Conversation) -> int:
    """About how long a prompt is: its text in bytes, four of which are a token of English and three one of Chinese."""
    return sum(len(message.text.encode(errors="replace")) for message in prompt.messages) + 1000 * len(prompt.pictures)


def answers(journal: Journal, model: Model, prompts: Sequence[Conversation]) -> list[str]:
    """The answers to all prompts, in their order. A chunk has prompts of similar length, the longest first: a lack of memory
    shows at once. UserError for a picture that does not open."""

    def load(chunk: list[int]) -> Any:
        try:
            return model.load([prompts[k] for k in chunk])
        except BadRow as bad:
            raise UserError(str(bad)) from bad

    def results(chunk: list[int], loaded: Any) -> list[tuple[str, bool]]:
        return [(text, isinstance(text, Truncated)) for text in model.answers(loaded)]

    order = sorted(range(len(prompts)), key=lambda k: -length(prompts[k]))
    found = dict(zip(order, journal.results(order, map(identity, prompts), load, results), strict=True))
    return [(Truncated if cut else str)(text) for text, cut in (found[k] for k in range(len(prompts)))]
