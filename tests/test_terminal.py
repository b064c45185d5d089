"""The chat at the keyboard: commands, pictures by name and pattern, and what is answered."""

import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.checkpoints import Checkpoints
from dataset.terminal import COMMANDS, Chat, matches, opened, picture_files
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import checkpoint
from model.inspection import Inspector, beside
from tests import tiny


class Echo:
    """A dialogue that answers with what it was sent."""

    forgotten = 0

    def __init__(self):
        self.sent, self.resets = [], 0

    def say(self, parts):
        self.sent.append([Path(part.key.split(":")[0]).name if hasattr(part, "key") else part for part in parts])
        yield "an"
        yield "answer"

    def reset(self):
        self.resets += 1


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("cat.png", "my dog.png", "b1.png", "b2.png", "it's.png", "蘋果.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("text", "names"), [
    ("cat.png", ["cat.png"]), ("my dog.png", ["my dog.png"]), ('"my dog.png"', ["my dog.png"]), ("'my dog.png' cat.png", 2),
    (r"my\ dog.png", ["my dog.png"]), ("~/cat.png", ["cat.png"]), ("b*.png", ["b1.png", "b2.png"]), ("~/b?.png cat.png", 3),
    ("it's.png", ["it's.png"]), ("蘋果.png", ["蘋果.png"]), ("[bc]*.png", 3), ("~/my dog.png", ["my dog.png"]),
])  # fmt: skip
def test_pictures_are_named_as_in_a_shell(text, names, folder):
    found = [Path(file).name for file in picture_files(text)]
    assert found == names if isinstance(names, list) else len(found) == names
    assert len(opened(picture_files(text))) == len(found)


@pytest.mark.parametrize(("text", "message"), [
    ("", "no picture is named"), ("gone.png", "image file missing: gone.png"), ("cat.png gone*.png", "image file missing: gone"),
    ('"cat.png', "close the quotes, or name one file"), (".", "image file missing: ."),
])  # fmt: skip
def test_a_picture_that_is_not_there_is_told(text, message, folder):
    with pytest.raises(BadRow, match=message.replace("*", r"\*").replace(".", r"\.")):
        opened(picture_files(text))


def chat(lines: list[str], monkeypatch, capsys) -> tuple[Echo, str]:
    dialogue, typed = Echo(), iter(lines)

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    Chat(dialogue).run()
    return dialogue, capsys.readouterr().out


def test_pictures_go_with_the_next_message_and_with_no_other(folder, monkeypatch, capsys):
    dialogue, out = chat(["/image cat.png b*.png", "what?", "and now?", "/image cat.png", ""], monkeypatch, capsys)
    assert dialogue.sent == [["cat.png", "b1.png", "b2.png", "what?"], ["and now?"], ["cat.png", ""]]
    assert "3 pictures for the next message" in out and "1 picture for the next message" in out
    assert out.count("answer") == 3 and "anan" not in out


@pytest.mark.parametrize(("line", "told"), [
    ("/imge cat.png", "unknown command /imge; perhaps you meant /image. /help lists the commands"),
    ("/reset", "unknown command /reset"), ("/help", "Enter alone sends them"), ("/", "/new"),
    ("/image gone.png", "image file missing"),
])  # fmt: skip
def test_a_command_is_obeyed_or_told_and_never_a_message(line, told, folder, monkeypatch, capsys):
    dialogue, out = chat([line], monkeypatch, capsys)
    assert dialogue.sent == [] and told in out


def test_help_lists_every_command(folder, monkeypatch, capsys):
    _, out = chat(["/help"], monkeypatch, capsys)
    assert all(text in out for item in COMMANDS.items() for text in item)


def test_a_path_or_a_fraction_in_a_message_is_no_command(folder, monkeypatch, capsys):
    dialogue, _ = chat(["/usr/bin is a folder?", "1/2?", "/2 of it", "/quit", "no"], monkeypatch, capsys)
    assert dialogue.sent == [["/usr/bin is a folder?"], ["1/2?"], ["/2 of it"]]


def test_a_new_conversation_has_no_pictures_left(folder, monkeypatch, capsys):
    dialogue, _ = chat(["/image cat.png", "/new", "hello"], monkeypatch, capsys)
    assert dialogue.resets == 1 and dialogue.sent == [["hello"]]


def test_ctrl_c_stops_an_answer_and_not_the_chat(folder, monkeypatch, capsys):
    def stopped(self, parts):
        self.sent.append(parts)
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Echo, "say", stopped)
    dialogue, out = chat(["one", "two"], monkeypatch, capsys)
    assert dialogue.sent == [["one"], ["two"]] and out.count("half\n") == 2


def test_what_was_forgotten_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(Echo, "forgotten", 3)
    assert "no longer sees the first 3 of your messages" in chat(["hello"], monkeypatch, capsys)[1]


@pytest.fixture
def looking(tmp_path, monkeypatch):
    """A chat with a tiny model, and with two of its kind beside it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("pretrain", "sft"):
        checkpoint.save(tmp_path / "out" / name, tiny.nano(), MODEL_FILE)

    def told(model, batch, **options):
        yield from SentencePieceTokenizer().encode("A bus.")

    checkpoints = Checkpoints(beside(tmp_path / "out" / "sft"), Inspector, told)
    talks = {name: partial(checkpoints.dialogue, name, max_new_tokens=9) for name in checkpoints.folders}
    return lambda: Chat(talks["sft"](), (), talks, partial(checkpoints.trained, "sft"))


def typed(chat, lines: list[str], capsys) -> str:
    for line in lines:
        try:
            chat.obey(line)
        except BadRow as bad:
            print(bad)
    return capsys.readouterr().out


def test_compare_prints_the_answers_of_all_and_leaves_the_conversation_as_it_was(looking, folder, capsys):
    chat = looking()
    out = typed(chat, ["/compare", "/image cat.png b1.png", "/compare What is it?", "What is it?"], capsys)
    assert "nothing is asked" in out and "pretrain: A bus.\nsft:      A bus.\n" in out
    assert len(chat.dialogue.messages) == 2 and len(chat.dialogue.messages[0].parts) == 3, "the pictures were waiting still"


def test_look_shows_where_the_model_looked_as_blocks_and_in_a_file(looking, folder, capsys, tmp_path):
    out = typed(looking(), ["/look bus", "/image cat.png b1.png", "What?", "/look cow", "/look BUS"], capsys)
    assert "there is no answer yet" in out and "cow is not in the last answer; choose one of: A bus ." in out
    assert "likeliest: " in out and "of the attention fell on the pictures" in out
    assert len([line for line in out.splitlines() if line.count(" %") == 3 and "likeliest" not in line]) == 6, "3 lines a picture"
    with Image.open(Path(out.strip().splitlines()[-1].removeprefix("wrote "))) as image:
        assert image.format == "PNG" and image.width > 400


def test_a_pattern_on_the_command_line_is_a_pattern_too(folder):
    assert [os.path.basename(file) for file in matches("b*.png")] == ["b1.png", "b2.png"] and matches("gone") == ["gone"]
