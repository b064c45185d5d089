"""A chat at the keyboard: messages, pictures and commands, until the end of the input.

In:  a `Dialogue`, the checkpoints beside it, and lines that a person types.  Out: answers, printed while they are generated.

    > /image cat.png "my dog.jpg" ~/pictures/*.png      pictures for the next message
    > Which of them is asleep?
    > /video clip.mp4 then.gif:frames=8                 some frames of each, behind their times (dataset/vision/video.py)
    > /look dog                                         where the model looked when it wrote "dog" in its answer
    > /compare Which is older?                          the answers of all checkpoints, which see the conversation so far
"""
from __future__ import annotations

import contextlib
import difflib
import glob
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dataset.bad_rows import BadRow
from dataset.checkpoints import Trained
from dataset.dialogue import Dialogue
from dataset.images import Picture, from_file
from dataset.look import Glance, blocks, glance, words
from dataset.vision import video
from model.registry import UserError

COMMANDS = {
    "/image PATH ...": "add pictures to the next message; quotes, ~ and * are understood; Enter alone sends them",
    "/video PATH ...": "the same for videos: four frames of each, or as many as PATH:frames=8 says",
    "/compare QUESTION": "the answers of the checkpoints beside this one, under one another; they do not join the conversation",
    "/look WORD": "where the model looked on the pictures when it wrote a word of its last answer, and what else was likely",
    "/new": "start a new conversation",
    "/help": "show these commands",
    "/quit": "end; so does the end of the input (Ctrl-D)",
}
HELP = "\n".join(f"{command:19}{text}" for command, text in COMMANDS.items())


class Chat:
    """A conversation with the pictures, and the times of frames, that wait for its next message.

    others    name -> a function that continues the conversation with that checkpoint, for /compare
    trained   opens the checkpoint itself, for /look
    """

    def __init__(self, dialogue: Dialogue, pictures: Sequence[str | Picture] = (),
                 others: Mapping[str, Callable[[list], Dialogue]] | None = None, trained: Callable[[], Trained] | None = None):
        self.dialogue, self.pictures = dialogue, list(pictures)
        self.others, self.trained = others or {}, trained

    def run(self) -> None:
        """Read lines and answer them until /quit or the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # absent from Python on Windows
                import readline  # noqa: F401  arrow keys edit a line and bring back earlier ones
        print("Type a message. /image PATH adds a picture to the next one, /new starts again, /help tells more, /quit ends.")
        while (line := read_line()) is not None and line not in ("/quit", "/exit"):
            try:
                self.obey(line)
            except (BadRow, UserError) as error:
                print(error)

    def obey(self, line: str) -> None:
        """Do what a command says, or answer a message. A command is / and letters: /usr/bin is none."""
        command, _, rest = line.partition(" ")
        if not re.fullmatch(r"/[a-z]*", command):
            if line or self.pictures:  # a picture without a word means: what is in it?
                self.say(line)
        elif command == "/new":
            self.dialogue.reset()
            self.pictures = []
        elif command in ("/image", "/video"):
            files = picture_files(rest.strip())
            self.pictures += opened(files) if command == "/image" else videos(files)
            number = sum(isinstance(part, Picture) for part in self.pictures)
            print(f"{number} picture{'s' * (number != 1)} for the next message")
        elif command == "/compare":
            self.compare(rest.strip())
        elif command == "/look":
            self.look(rest.strip())
        elif command in ("/help", "/"):
            print(HELP)
        else:
            near = difflib.get_close_matches(command, [one.partition(" ")[0] for one in COMMANDS], n=1)
            print(f"unknown command {command}{f'; perhaps you meant {near[0]}' if near else ''}. /help lists the commands")

    def say(self, text: str) -> None:
        """Print the answer to a message while it is generated; Ctrl-C stops it, and the conversation goes on."""
        with contextlib.suppress(KeyboardInterrupt):
            show(self.dialogue.say([*self.pictures, text]))
        print()
        self.pictures = []
        if self.dialogue.forgotten:
            print(f"(too long for the model: it no longer sees the first {self.dialogue.forgotten} of your messages)")


    def compare(self, text: str) -> None:
        """Print the answer of every checkpoint to a message with the waiting pictures, which go on waiting."""
        if not (text or self.pictures):
            raise BadRow("nothing is asked", "write /compare and a question, or name a picture with /image first")
        with contextlib.suppress(KeyboardInterrupt):
            for name, continued in self.others.items():
                print(f"{name + ':':10}", end="", flush=True)
                show(continued(self.dialogue.messages).say([*self.pictures, text]))
                print()

    def look(self, text: str) -> None:
        """Print where the model looked when it wrote a word of its last answer, as blocks and as a picture in a file."""
        if not self.trained or len(self.dialogue.messages) < 2:
            raise BadRow("there is no answer yet", "ask something about a picture first")
        *before, answer = self.dialogue.messages
        trained = self.trained()
        found = words(trained.processor.tokenizer, answer.text)
        word = next((word for word in found if word.text.lower() == text.lower()), None)
        if not word:
            raise BadRow(f"{text or 'no word'} is not in the last answer", f"choose one of: {' '.join(w.text for w in found)}")
        seen = glance(trained, self.dialogue.recent(before)[0], answer.text, word)
        print("likeliest: " + ", ".join(f"{token} {100 * share:.0f} %" for token, share in seen.likeliest))
        print(f"no map: {seen.missing}" if seen.missing else f"{100 * seen.weight:.0f} % of the attention fell on the pictures:")
        for shares in seen.shares:
            print(f"{blocks(shares, float(seen.shares.max()))}\n")
        if not seen.missing:
            print(f"wrote {drawn(seen)}")


def drawn(seen: Glance) -> Path:
    """The heat map in a file."""
    from dataset.figures.attention import heat_map  # matplotlib takes a second

    with tempfile.NamedTemporaryFile(prefix="look-", suffix=".png", delete=False) as file:
        file.write(heat_map(seen.pictures, seen.shares))
    return Path(file.name)


def show(answer: Iterable[str]) -> None:
    """Print an answer while it grows."""
    printed = ""
    for longer in answer:
        print(longer[len(printed):], end="", flush=True)
        printed = longer


def read_line() -> str | None:
    """A typed line, or None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def picture_files(text: str) -> list[str]:
    """The files that are meant by what stands behind /image; BadRow where one is missing.

    One path with blanks needs no quotes; several are split as a shell would, with ~ and patterns.
    """
    if Path(text).expanduser().is_file():
        return [str(Path(text).expanduser())]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadRow(f"{text}: {error}", "close the quotes, or name one file") from error
    if not words:
        raise BadRow("no picture is named", "write the command and a path, as in /image cat.png")
    return [file for word in words for file in matches(word)]


def matches(word: str) -> list[str]:
    """The file of this name, or else all that match the pattern; the word itself where there is none."""
    path = str(Path(word).expanduser())
    return [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True)) or [path]


def videos(paths: Iterable[Path | str]) -> list[str | Picture]:
    """The frames of videos in files, each behind its time. BadRow now, if one does not open."""
    return [part for path in paths for part in video.parts(path)]


def opened(paths: Iterable[Path | str]) -> list[Picture]:
    """The pictures in files. BadRow now, if one does not open, and not with every message that contains it."""
    pictures = []
    for path in paths:
        try:
            picture = from_file(path)
            picture.load()
        except BadRow as bad:
            raise BadRow(bad.reason, "give the path of a picture") from bad
        pictures.append(picture)
    return pictures
