"""The tokenizer: every text comes back exactly, and no text can produce a control token."""

import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.tokenizer import CONTROLS, MODEL_FILE, TAGS, SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer()
CONTROL_IDS = {TOKENIZER.bos, TOKENIZER.end, TOKENIZER.pad, *map(TOKENIZER.id, CONTROLS)}
SPELLED = ("<s>", "<|end|>", "</s>", "<pad>", "<unk>", "<0x41>", *CONTROLS)

# Surrogates are not characters: a str that holds one cannot be written to a file either.
anything = st.text(st.characters(exclude_categories=["Cs"]))
awkward = st.lists(st.sampled_from(["\u2581", "\0", "\r\n", "\n", "\t", " ", "  ", "\u3000", "\u00a0", "\ufeff", "\u200d",
                                    "👩‍🚀", "🐻‍❄️", "é", "e\u0301", "ﬁ", "１", "猫", "cat", "42", *TAGS,
                                    *SPELLED])).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None)
@given(anything | awkward)
def test_any_text_comes_back_exactly_and_holds_no_control_token(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not CONTROL_IDS & set(ids)


@pytest.mark.parametrize("text", [
    "", " ", "  two  spaces  ", "\u2581", "a\u2581b\u2581\u2581", "\0", "a\0b", "line\r\nline\n", "\n\n", "👩‍🚀 🏳️‍🌈", "𠮷野家",
    "e\u0301 é", "Ｆｕｌｌ　ｗｉｄｔｈ", "ﬁ ½ ①", "ไทย עברית العربية", "\ufffd",
])  # fmt: skip
def test_awkward_texts_come_back_exactly(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize("text", SPELLED)
def test_a_control_token_that_a_user_types_stays_text(text):
    ids = TOKENIZER.encode(f"hello {text} you")
    assert len(ids) > 4
    assert not CONTROL_IDS & set(ids)
    assert TOKENIZER.decode(ids) == f"hello {text} you"


def test_control_tokens_leave_no_trace_in_decoded_text():
    ids = [TOKENIZER.bos, TOKENIZER.image, *TOKENIZER.encode("a cat"), TOKENIZER.end, TOKENIZER.pad, TOKENIZER.id("<|user|>")]
    assert TOKENIZER.decode(ids) == "a cat"


def test_people_see_the_control_tokens():
    ids = [TOKENIZER.bos, TOKENIZER.id("<|user|>"), TOKENIZER.image, TOKENIZER.image, *TOKENIZER.encode("猫 <think>"),
           TOKENIZER.id("<|assistant|>"), TOKENIZER.id("<|system|>"), TOKENIZER.end, TOKENIZER.pad]  # fmt: skip
    assert TOKENIZER.decode_all(ids) == "<s><|user|><image><image>猫 <think><|assistant|><|system|><|end|><pad>"


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_of_reasoning_is_one_ordinary_piece_wherever_it_stands(tag):
    assert TOKENIZER.encode(tag) == [TOKENIZER.id(tag)]
    assert TOKENIZER.encode(f"so{tag}1").count(TOKENIZER.id(tag)) == 1
    assert TOKENIZER.decode([TOKENIZER.id(tag)]) == tag


def test_numbers_are_their_digits():
    digits = {digit: TOKENIZER.id(digit) for digit in "0123456789"}
    assert TOKENIZER.encode("1234567890") == [digits[digit] for digit in "1234567890"]
    assert [number for number in TOKENIZER.encode("a17+25=42") if number in digits.values()] == [digits[d] for d in "172542"]


def test_there_are_6400_pieces_with_every_byte_and_every_control_token_once():
    assert TOKENIZER.vocab_size == 6400
    assert len(CONTROL_IDS) == 3 + len(CONTROLS)
    assert len({TOKENIZER.id(f"<0x{byte:02X}>") for byte in range(256)}) == 256


def test_end_of_turn_padding_and_beginning_are_three_tokens():
    assert len({TOKENIZER.bos, TOKENIZER.end, TOKENIZER.pad}) == 3
    assert TOKENIZER.model.unk_id() not in {TOKENIZER.bos, TOKENIZER.end, TOKENIZER.pad}


def test_an_unknown_piece_or_file_is_an_error(tmp_path):
    with pytest.raises(KeyError, match="no piece '<|bot|>'"):
        TOKENIZER.id("<|bot|>")
    with pytest.raises(FileNotFoundError, match="python -m dataset.studies.train_tokenizer"):
        SentencePieceTokenizer(tmp_path / "none.model")


def test_a_copy_beside_a_checkpoint_is_the_same_tokenizer(tmp_path):
    copy = SentencePieceTokenizer(shutil.copy(MODEL_FILE, tmp_path))
    assert copy.encode("two pears 两个梨") == TOKENIZER.encode("two pears 两个梨")


def test_the_words_of_the_world_are_short():
    assert len(TOKENIZER.encode("A bus, two foxes and a key.")) <= 10
    assert len(TOKENIZER.encode("图里有什么？")) <= 5
