"""--check_data: every row is read, its pictures are opened, and what was found is told, before any training.

In:  the source of a run, and its processor.  Out: printed counts for each part of the data, and three rows as they are learned.
     UserError, so that the script ends with 1, where more rows are bad than --max_bad allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from dataset.bad_rows import BadRow, BadRows
from dataset.chat import Conversation, Preference
from dataset.images import Picture
from dataset.processor import Processor
from dataset.protocols import Run, Source

SHOWN = 3  # rows of each part
CHUNK = 64  # rows whose pictures are opened together
WORKERS = 8  # threads that open pictures: Pillow decodes outside Python's lock


@dataclass
class Counts:
    """What was found in one part of the data."""

    rows: int = 0
    with_pictures: int = 0
    pictures: int = 0
    turns: int = 0
    tokens: int = 0
    learned: int = 0
    cut: int = 0  # rows that lose learned tokens to --max_length
    held_out: int = 0  # rows that are held out as well
    shown: list[str] = field(default_factory=list)

    def add(self, item: Conversation | Preference, length: tuple[int, int], learned: int) -> None:
        """Count a good row: its length in full, and the learned tokens that are left of it."""
        prompt = item.prompt if isinstance(item, Preference) else item
        self.rows += 1
        self.pictures += len(item.pictures)
        self.with_pictures += bool(item.pictures)
        self.turns += len(prompt.messages) + isinstance(item, Preference)
        self.tokens += length[0]
        self.learned += length[1]
        self.cut += learned < length[1]


def row_key(item: Conversation | Preference) -> bytes:
    """A hash of what a row asks, or, where it asks nothing, says: the same in two sets, they share a row."""
    prompt = item.prompt if isinstance(item, Preference) else item
    messages = [one for one in prompt.messages if one.role == "user"] or prompt.messages
    texts = [(one.role, [part if isinstance(part, str) else part.key for part in one.parts]) for one in messages]
    return hashlib.blake2b(repr(texts).encode(), digest_size=8).digest()


def length(item: Conversation | Preference, processor: Processor) -> tuple[int, int]:
    """(tokens, learned tokens) of a row in full; of a preference, with the longer of its answers."""
    if isinstance(item, Preference):
        longer = max(item.chosen, item.rejected, key=lambda answer: len(processor.tokenizer.encode(answer)))
        learned = len(processor.tokenizer.encode(longer)) + 1  # the end of the turn is learned, too
        return len(processor.prompt(item.prompt)) + learned, learned
    segments = processor.segments(item.id, item.messages)
    return sum(len(one.ids) for one in segments), sum(len(one.ids) for one in segments if one.learn)


class PictureCheck:
    """Opens each picture of files once, several at a time. A drawing of the embedded world cannot be damaged."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(WORKERS)
        self.errors: dict[int, BadRow | None] = {}  # hash of a picture's key -> why it does not open

    def open(self, pictures: list[Picture]) -> None:
        """Open what was not opened yet."""
        new = {hash(one.key): one for one in pictures if one.origin and hash(one.key) not in self.errors}
        self.errors.update(zip(new, self.pool.map(error_of, new.values())))

    def require(self, pictures: tuple[Picture, ...]) -> None:
        """BadRow where one of these did not open."""
        for one in pictures:
            if bad := self.errors.get(hash(one.key)):
                raise BadRow(bad.reason, bad.remedy)


def error_of(picture: Picture) -> BadRow | None:
    """Why a picture does not open."""
    try:
        picture.load()
    except BadRow as bad:
        return bad
    return None


def check_data(source: Source, processor: Processor, render: Callable[[Any], Any], run: Run,
               held_out: Source | None = None) -> None:
    """Print what is in each part of a mixture, or in a source. TooManyBadRows where --max_bad is exceeded.

    render     row -> document or pair, cut to --max_length
    held_out   rows that should not be trained on: those that are, too, are counted
    """
    parts = list(leaves(source))
    limit = run.config.check_rows or None
    total = sum(min(len(part), limit or len(part)) for part in parts)
    bad_rows = BadRows(None, total, run.config.max_bad, check=True)
    keys = {row_key(item) for item in good_rows(held_out)} if held_out is not None else set()
    bar, pictures = tqdm(total=total, unit="row", leave=False, disable=None), PictureCheck()
    for part in parts:
        found, before = Counts(), bad_rows.reasons.copy()
        for item in opened_rows(part, limit, pictures, bad_rows, bar):
            try:
                pictures.require(item.pictures)
                rendered = render(item)
                learned = max(map(sum, (rendered.chosen.learn, rendered.rejected.learn))) if isinstance(
                    item, Preference) else sum(rendered.learn)
                found.add(item, length(item, processor), learned)
            except BadRow as bad:
                bad.where = bad.where or item.id
                bad_rows.add(bad)
                continue
            found.held_out += row_key(item) in keys
            if len(found.shown) < SHOWN:
                found.shown.append(f"{item.id}: {processor.marked(rendered)}")
        tell(name_of(part), found, bad_rows.reasons - before, run.print0, held_out is not None)
    bar.close()
    bad_rows.require_few()


def opened_rows(source: Source, limit: int | None, pictures: PictureCheck, bad_rows: BadRows, bar: Any) -> Iterator[Any]:
    """The rows of a source, in chunks whose pictures were opened; those that are not read are told."""
    count = min(len(source), limit or len(source))
    for start in range(0, count, CHUNK):
        items = []
        for i in range(start, min(start + CHUNK, count)):
            bad_rows.seen += 1
            try:
                items.append(source[i])
            except BadRow as bad:
                bad_rows.add(bad)
        pictures.open([picture for item in items for picture in item.pictures])
        yield from items
        bar.update(min(CHUNK, count - start))


def good_rows(source: Source) -> Iterator[Any]:
    """The rows of a source that are read."""
    for i in range(len(source)):
        try:
            yield source[i]
        except BadRow:
            continue


def leaves(source: Source) -> Iterator[Source]:
    """The parts of a mixture, and of the mixtures in it."""
    for part in getattr(source, "sources", []):
        yield from leaves(part)
    if not hasattr(source, "sources"):
        yield source


def name_of(source: Source) -> str:
    """The path of a file, or of the file that these rows were chosen from."""
    return str(getattr(source, "path", None) or getattr(getattr(source, "source", None), "path", "a task"))


def tell(name: str, found: Counts, reasons: Any, print0: Callable[[str], None], compared: bool) -> None:
    """Print the counts of one part, its bad rows by reason, and rows as they are learned."""
    print0(f"\nchecked {name}: {found.rows:,} good rows, {found.with_pictures:,} with pictures "
           f"({found.pictures:,} pictures), {found.turns:,} turns, {found.tokens:,} tokens, {found.learned:,} of them learned")
    if found.cut:
        print0(f"  {found.cut:,} rows lose learned tokens to --max_length")
    if compared:
        print0(f"  {found.held_out:,} rows ask what a held-out row asks")
    for reason, count in reasons.most_common():
        print0(f"  {count:,} bad: {reason}")
    for row in found.shown:
        print0(f"\n{row}")
