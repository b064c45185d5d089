"""A dialogue remembers every message and picture, streams whole characters, and keeps what was said when stopped."""

import time
from functools import partial

import pytest
import torch
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.chat import Message, pupil
from dataset.dialogue import Dialogue, load, split
from dataset.images import from_bytes, from_image
from dataset.processor import Processor
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from dataset.vision.image_processor import OneRank
from model import checkpoint
from model.config import VLMConfig
from model.generate import stream
from model.vlm import VLM
from tests import tiny
from tests.tiny import IMAGE_TOKENS, llm_config

TOKENIZER = SentencePieceTokenizer()
RED, BLUE, GREEN = (from_image(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue", "green"))


def look(pictures) -> torch.Tensor:
    """(N, 3, 8, 8): the colour of each picture, which tells them apart."""
    return torch.tensor([picture.load().getpixel((0, 0)) for picture in pictures]).reshape(-1, 3, 1, 1).expand(
        -1, 3, 8, 8) / 255  # fmt: skip


class Model:
    """Says what it is told to say, and remembers what it was shown."""

    def __init__(self, *answers: str):
        self.answers, self.batches = list(answers), []
        self.spoken = []  # for every token that was made, the number of its answer
        self.seconds = 0.0  # per token

    def __call__(self, batch: dict):
        self.batches.append(batch)
        number = len(self.batches)
        for token in TOKENIZER.encode(self.answers.pop(0)):
            time.sleep(self.seconds)
            self.spoken.append(number)
            yield token

    def prompt(self) -> list[str]:
        """The pieces of the last prompt."""
        return [TOKENIZER.model.id_to_piece(token) for token in self.batches[-1]["input_ids"][0].tolist()]


class Colours(tiny.Images):
    """In the place of an image processor: of every picture its colour."""

    __call__ = staticmethod(look)


def dialogue(model, max_prompt_tokens: int = 1000, messages=()) -> Dialogue:
    return Dialogue(model, tiny.processor(tokenizer=TOKENIZER, images=Colours()), max_prompt_tokens, messages)


def test_the_second_message_is_answered_in_view_of_the_first_and_of_every_picture():
    model = Model("A bus.", "A fox.")
    talk = dialogue(model)
    list(talk.say([RED, BLUE, "What is this?"]))
    list(talk.say(["And ", GREEN, "that?"]))
    expected = pupil_ids("What is this?", 2) + encode("<|assistant|>", "A bus.", "<|end|>", "<|user|>", "And ")
    expected += encode("3") + [TOKENIZER.image] * IMAGE_TOKENS + encode("that?", "<|assistant|>")
    assert model.batches[1]["input_ids"][0].tolist() == expected
    assert torch.equal(model.batches[1]["pixels"], look([RED, BLUE, GREEN]))
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2


def pupil_ids(question: str, images: int) -> list[int]:
    """The beginning of a conversation, each picture after its number."""
    shown = [n for k in range(1, images + 1) for n in (*encode(str(k)), *[TOKENIZER.image] * IMAGE_TOKENS)]
    return encode("<s>", "<|user|>") + shown + encode(question)


def encode(*pieces: str) -> list[int]:
    """Ids of texts and control tokens."""
    control = pupil().control
    return [n for piece in pieces for n in ([TOKENIZER.id(piece)] if piece in control else TOKENIZER.encode(piece))]


@pytest.mark.parametrize("answer", ["A bus and two foxes.", "两个公交车和狐狸。", "😀🦊 鱻龘", "<think>1+1</think>2"])
def test_the_answer_grows_and_never_shows_half_a_character(answer):
    texts = list(dialogue(Model(answer)).say(["?"]))
    assert texts[-1] == answer
    assert len(texts) > 1
    for shorter, longer in zip(texts, texts[1:], strict=False):
        assert longer.startswith(shorter) and len(longer) > len(shorter)
    assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts)


def test_the_characters_of_that_test_really_come_in_several_tokens():
    assert len(TOKENIZER.encode("😀")) > 1
    assert "\N{REPLACEMENT CHARACTER}" in TOKENIZER.decode(TOKENIZER.encode("😀")[:-1])


def test_stopping_early_stops_the_model_and_keeps_what_was_said():
    model = Model("one two three four five six seven", "ok")
    talk = dialogue(model)
    answer = talk.say(["count"])
    next(answer)
    said = next(answer)
    answer.close()
    assert len(model.spoken) < len(TOKENIZER.encode("one two three four five six seven"))
    assert talk.messages == [Message("user", ("count",)), Message("assistant", (said,))]
    list(talk.say(["go on"]))
    assert model.batches[-1]["input_ids"][0].tolist() == encode(
        "<s>", "<|user|>", "count", "<|assistant|>", said, "<|end|>", "<|user|>", "go on", "<|assistant|>"
    )


def test_an_answer_stopped_within_a_character_ends_before_it():
    talk = dialogue(lambda batch: iter(TOKENIZER.encode("ok 😀")[:-1]))
    assert list(talk.say(["?"]))[-1].rstrip() == "ok"
    assert "\N{REPLACEMENT CHARACTER}" not in talk.messages[-1].text


def test_a_model_that_ends_at_once_still_answers():
    assert list(dialogue(Model("")).say(["?"])) == [""]


def test_what_no_longer_fits_is_left_out_by_whole_exchanges_the_oldest_first():
    model = Model(*"abcdef")
    talk = dialogue(model, max_prompt_tokens=40)
    forgotten = []
    for number in range(6):
        list(talk.say([(RED, BLUE, GREEN)[number % 3], f"question {number}"]))
        forgotten.append(talk.forgotten)
    length = len(encode("<|user|>", "question 0", "<|assistant|>", "a", "<|end|>")) + IMAGE_TOKENS
    kept = (40 - 1 + 2) // length  # <s> in front; the last question has no answer and no end yet
    assert 1 < kept < 6, "the test is about a conversation that is cut"
    assert forgotten == [max(0, number + 1 - kept) for number in range(6)]
    pieces = model.prompt()
    assert len(pieces) <= 40
    assert pieces[:2] == ["<s>", "<|user|>"] and pieces.count("<|user|>") == kept
    assert pieces.count("<image>") == kept * IMAGE_TOKENS
    assert torch.equal(model.batches[-1]["pixels"], look([RED, BLUE, GREEN] * 2)[-kept:])
    assert len(talk.messages) == 12, "the record itself is whole"


def test_a_long_history_is_rendered_as_far_as_it_may_fit_and_no_further(monkeypatch):
    talk = dialogue(Model("a"), max_prompt_tokens=60)
    history = [Message(role, (f"message {number}",)) for number in range(300) for role in ("user", "assistant")]
    rendered = []
    segments = talk.processor.segments

    def counted(name, messages):
        rendered.append(len(messages))
        return segments(name, messages)

    monkeypatch.setattr(talk.processor, "segments", counted)
    document, forgotten = talk.prompt([*history, Message("user", ("now?",))])
    assert sum(rendered) < 40 and forgotten > 290 and 40 < len(document) <= 60
    more = [*history[2 * (forgotten - 1) :], Message("user", ("now?",))]
    assert talk.prompt(more)[1] == 1, "one exchange more is too long"


def test_what_the_system_said_is_never_left_out():
    model = Model("a", "b")
    talk = dialogue(model, max_prompt_tokens=20, messages=[Message("system", ("be brief",))])
    list(talk.say(["one two three four five"]))
    list(talk.say(["six seven eight nine ten"]))
    assert talk.forgotten == 1
    assert model.prompt()[:2] == ["<s>", "<|system|>"]
    talk.reset()
    assert talk.messages == [Message("system", ("be brief",))] and talk.forgotten == 0


@pytest.mark.parametrize("parts", [[RED, RED, RED, "too many pictures"], [from_bytes(b"no image"), "what is this?"]])
def test_a_message_that_cannot_be_used_is_refused_and_changes_nothing(parts):
    model = Model("a", "b")
    talk = dialogue(model, max_prompt_tokens=18)
    list(talk.say(["hello"]))
    before = list(talk.messages)
    with pytest.raises(BadRow, match="cannot be opened|tokens long"):
        list(talk.say(parts))
    assert talk.messages == before and len(model.batches) == 1


def test_reset_begins_again():
    model = Model("a", "b")
    talk = dialogue(model)
    list(talk.say([RED, "one"]))
    talk.reset()
    list(talk.say(["two"]))
    assert model.batches[-1]["input_ids"][0].tolist() == encode("<s>", "<|user|>", "two", "<|assistant|>")
    assert "pixels" not in model.batches[-1]


def test_exchanges_begin_with_what_the_user_says():
    roles = ["system", "assistant", "user", "assistant", "assistant", "user", "user"]
    system, exchanges = split([Message(role, (str(number),)) for number, role in enumerate(roles)])
    assert [message.text for message in system] == ["0"]
    assert [[message.text for message in exchange] for exchange in exchanges] == [["1"], ["2", "3", "4"], ["5"], ["6"]]


def test_a_real_model_talks_over_two_turns_with_pictures_in_both():
    torch.manual_seed(0)
    spec = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"
    config = VLMConfig(llm_config(vocab_size=TOKENIZER.vocab_size), spec, "linear", TOKENIZER.image)
    model = VLM(config)
    processor = Processor.of(model, TOKENIZER, OneRank())
    talk = Dialogue(partial(stream, model, max_new_tokens=6, temperature=1.0, **processor.sampling), processor, 100)
    first = list(talk.say([RED, BLUE, "?"]))[-1]
    second = list(talk.say([GREEN, "?"]))[-1]
    assert [message.text for message in talk.messages] == ["?", first, "?", second]


# ---------------------------------------------------------------- in Python


def test_a_message_is_pictures_and_then_words_and_the_answer_comes_whole(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    model = Model("A red square.", "Two.", "Hello.")
    chat = dialogue(model)
    assert chat(tmp_path / "red.png", Image.new("RGB", (8, 8), "blue"), "What is this?") == "A red square."
    assert chat(str(tmp_path / "red.png"), GREEN, "And now?") == "Two."
    colours = model.batches[1]["pixels"][:, :, 0, 0].tolist()
    assert colours == [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, pytest.approx(128 / 255), 0]]
    chat.reset()
    assert chat("Hi!") == "Hello." and "pixels" not in model.batches[2]
    with pytest.raises(BadRow, match="image file missing"):
        chat("nowhere.png", "What?")


def test_a_checkpoint_talks_in_three_lines_as_the_script_answers(tmp_path, run_script):
    model = tiny.nano()
    checkpoint.save(tmp_path / "out" / "dpo", model, MODEL_FILE)
    Image.new("RGB", (96, 96), "red").save(tmp_path / "picture.png")
    chat = load(tmp_path / "out" / "dpo", max_new_tokens=5)
    answer = chat(tmp_path / "picture.png", "What is this?")
    asked = ("--image", "picture.png", "--prompt", "What is this?", "--max_new_tokens", 5, "--device", "cpu")
    assert run_script("4-eval_chat.py", *asked, cwd=tmp_path).out == f"{answer}\n"
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load(tmp_path / "nothing")
