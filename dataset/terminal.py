"""A chat at the keyboard: messages, pictures and commands, until the end of the input.

In:  a `Dialogue`, and lines that a person types.  Out: answers, printed while they are generated.

    > /image cat.png "my dog.jpg" ~/pictures/*.png      pictures for the next message
    > Which of them is asleep?
"""
from __future__ import annotations

import contextlib
import difflib
import glob
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.bad_rows import BadRow
from dataset.dialogue import Dialogue
from dataset.images import Picture, from_file

COMMANDS = {
    "/image PATH ...": "add pictures to the next message; quotes, ~ and * are understood; Enter alone sends them",
    "/new": "start a new conversation",
    "/help": "show these commands",
    "/quit": "end; so does the end of the input (Ctrl-D)",
}
HELP = "\n".join(f"{command:17}{text}" for command, text in COMMANDS.items())


class Chat:
    """A conversation with the pictures that wait for its next message."""

    def __init__(self, dialogue: Dialogue, pictures: Sequence[Picture] = ()):
        self.dialogue, self.pictures = dialogue, list(pictures)

    def run(self) -> None:
        """Read lines and answer them until /quit or the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # absent from Python on Windows
                import readline  # noqa: F401  arrow keys edit a line and bring back earlier ones
        print("Type a message. /image PATH adds a picture to the next one, /new starts again, /help tells more, /quit ends.")
        while (line := read_line()) is not None and line not in ("/quit", "/exit"):
            try:
                self.obey(line)
            except BadRow as bad:
                print(bad)

    def obey(self, line: str) -> None:
        """Do what a command says, or answer a message. A command is / and letters: /usr/bin is none."""
        command, _, rest = line.partition(" ")
        if not re.fullmatch(r"/[a-z]*", command):
            if line or self.pictures:  # a picture without a word means: what is in it?
                self.say(line)
        elif command == "/new":
            self.dialogue.reset()
            self.pictures = []
        elif command == "/image":
            self.pictures += opened(picture_files(rest.strip()))
            print(f"{len(self.pictures)} picture{'s' * (len(self.pictures) != 1)} for the next message")
        elif command in ("/help", "/"):
            print(HELP)
        else:
            near = difflib.get_close_matches(command, [one.partition(" ")[0] for one in COMMANDS], n=1)
            print(f"unknown command {command}{f'; perhaps you meant {near[0]}' if near else ''}. /help lists the commands")

    def say(self, text: str) -> None:
        """Print the answer to a message while it is generated; Ctrl-C stops it, and the conversation goes on."""
        printed = ""
        with contextlib.suppress(KeyboardInterrupt):
            for longer in self.dialogue.say([*self.pictures, text]):
                print(longer[len(printed):], end="", flush=True)
                printed = longer
        print()
        self.pictures = []
        if self.dialogue.forgotten:
            print(f"(too long for the model: it no longer sees the first {self.dialogue.forgotten} of your messages)")


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
        raise BadRow("no picture is named", "write /image and the path of a picture")
    return [file for word in words for file in matches(word)]


def matches(word: str) -> list[str]:
    """The file of this name, or else all that match the pattern; the word itself where there is none."""
    path = str(Path(word).expanduser())
    return [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True)) or [path]


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
