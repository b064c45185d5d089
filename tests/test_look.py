"""Look inside: words of an answer, where the model looked when it wrote one, and what was likeliest there."""

import pytest
import torch

from dataset.chat import Conversation, Message
from dataset.checkpoints import Checkpoints, Trained, together
from dataset.figures.attention import heat_map
from dataset.images import from_bytes, from_image
from dataset.look import Word, blocks, glance, token_text, word_at, words
from dataset.tasks.world import picture
from dataset.tokenizer import SentencePieceTokenizer
from dataset.world.scenes import sample_scene
from model import checkpoint
from model.generate import stream
from model.inspection import Inspector, beside
from model.registry import UserError
from tests import tiny

TOKENIZER = SentencePieceTokenizer()
SCENES = [picture(sample_scene("test", index)) for index in range(2)]


@pytest.mark.parametrize(("answer", "found"), [
    ("A bus and two foxes.", ["A", "bus", "and", "two", "foxes", "."]), ("", []), ("  ", []),
    ("12+3=15", ["12", "+", "3", "=", "15"]), ("<think>1+1</think><answer>2</answer>", ["1", "+", "1", "2"]),
    ("a xylophonist", ["a", "xylophonist"]),
    ("é naïve", ["é", "naïve"]),
    ("a <b> c", ["a", "<", "b", ">", "c"]), ("ok 😀!", ["ok", "😀", "!"]),
])  # fmt: skip
def test_an_answer_is_cut_into_its_words(answer, found):
    cut = words(TOKENIZER, answer)
    assert [word.text for word in cut] == found
    ids = TOKENIZER.encode(answer)
    assert all(TOKENIZER.decode(ids[word.first : word.end]).strip() == word.text for word in cut)
    assert all(answer[word.at:].startswith(word.text) for word in cut)
    assert all(word_at(TOKENIZER, answer, word.at + len(word.text) - 1) == word for word in cut)
    assert all(before.end <= after.first for before, after in zip(cut, cut[1:], strict=False))


@pytest.mark.parametrize("character", [1, 5])
def test_a_blank_or_a_tag_is_no_word(character):
    with pytest.raises(UserError, match="choose another word"):
        word_at(TOKENIZER, "A <answer>", character)


def test_chinese_is_cut_into_its_tokens():
    cut = words(TOKENIZER, "两个公交车和狐狸。")
    assert "".join(word.text for word in cut) == "两个公交车和狐狸。" and len(cut) > 4


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Checkpoints of two stages and of a run of somebody's own, and folders of other programs."""
    root = tmp_path_factory.mktemp("look") / "out"
    for name in ("mine", "sft", "pretrain"):
        checkpoint.save(root / name, tiny.nano(), TOKENIZER.file)
    (root / "exported").mkdir()
    (root / "exported" / "config.json").write_text('{"architectures": ["LlavaForConditionalGeneration"]}')
    (root / "features").mkdir()
    return root


@pytest.fixture(scope="module")
def trained(out) -> Trained:
    return Trained.of(Inspector(out / "sft"))


def asked(*parts) -> Conversation:
    return Conversation("a", (Message("user", parts),))


@pytest.mark.parametrize("pictures", [1, 2])
def test_the_shares_are_the_weights_of_one_position_that_writes_the_word(trained, pictures):
    conversation, answer = asked(*SCENES[:pictures], "What is it?"), "A violin and a bus."
    word = next(word for word in words(TOKENIZER, answer) if word.text == "violin")
    seen = glance(trained, conversation, answer, word)
    assert seen.shares.shape == (pictures, 3, 3) and float(seen.shares.sum()) == pytest.approx(1) and not seen.missing
    assert [image.size for image in seen.pictures] == [(96, 96)] * pictures and 0 < seen.weight < 1
    document = trained.processor.prompt(conversation)
    answered = trained.processor.with_answer(conversation, answer, 1000)
    weights = trained.inspector.attention(trained.processor.batch([answered]))[0].mean(0)
    is_image = torch.tensor(answered.input_ids) == TOKENIZER.image
    writers = weights[len(document) - 1 + word.first : len(document) - 1 + word.end, is_image]
    best = writers[writers.sum(1).argmax()]
    assert seen.weight == pytest.approx(float(best.sum()))
    torch.testing.assert_close(seen.shares.flatten(), best / best.sum())


def test_the_likeliest_tokens_are_those_that_greedy_decoding_would_take(trained):
    processor, inspector = trained.processor, trained.inspector
    conversation = asked(SCENES[0], "What is it?")
    batch = processor.padded([processor.prompt(conversation)])
    (greedy,) = inspector.sample(batch, 1, temperature=0.0, max_new_tokens=1, **processor.sampling)
    seen = glance(trained, conversation, "A bus.", Word("A", 0, 1, 0))
    shares = [share for _, share in seen.likeliest]
    assert seen.likeliest[0][0] == token_text(TOKENIZER, greedy.tokens[0])
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1


def test_without_a_picture_there_is_no_map_but_likely_tokens(trained):
    seen = glance(trained, asked("What is it?"), "A bus.", Word("A", 0, 1, 0))
    assert "no picture" in seen.missing and len(seen.likeliest) == 5 and not len(seen.shares)


def test_a_connector_whose_tokens_are_no_squares_says_so(tmp_path):
    model = tiny.nano()
    config = model.config.__class__(**{**vars(model.config), "connector": "resampler:queries=5"})
    checkpoint.save(tmp_path / "sft", type(model)(config), TOKENIZER.file)
    seen = glance(Trained.of(Inspector(tmp_path / "sft")), asked(SCENES[0], "?"), "A bus.", Word("A", 0, 1, 0))
    assert "not squares of the picture" in seen.missing


def test_a_map_is_drawn_in_a_file_and_in_blocks(trained):
    seen = glance(trained, asked(*SCENES, "?"), "A bus.", Word("A", 0, 1, 0))
    image = from_bytes(heat_map(seen.pictures, seen.shares)).load()
    assert image.width > 1.8 * image.height
    lines = blocks(torch.tensor([[0.5, 0.0], [0.25, 0.25]]), 0.5).splitlines()
    assert lines == ["██ 50 %      0 %", "▒▒ 25 %  ▒▒ 25 %"]


# ---------------------------------------------------------------- checkpoints side by side


def test_the_checkpoints_beside_one_are_those_of_the_stages_in_order_then_the_others(out):
    assert list(beside(out / "sft")) == list(beside(out / "mine")) == ["pretrain", "sft", "mine"]
    assert beside(out / "sft")["mine"].samefile(out / "mine")


def test_a_checkpoint_is_opened_once_and_answers_as_it_does_alone(out):
    opened = []

    def inspect(folder):
        opened.append(folder.name)
        return Inspector(folder)

    checkpoints = Checkpoints(beside(out / "sft"), inspect, stream)
    options = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0}
    talks = {name: checkpoints.dialogue(name, **options) for name in ("sft", "pretrain")}
    *_, last = together(talks, [SCENES[0], "What?"])
    alone = {name: list(checkpoints.dialogue(name, **options).say([SCENES[0], "What?"]))[-1] for name in talks}
    assert last == alone and opened == ["sft", "pretrain"]
    assert all(len(talk.messages) == 2 for talk in talks.values())


def test_a_look_during_an_answer_records_nothing_of_it(trained):
    import threading

    from model.inspection import recorded

    batch = trained.processor.batch([trained.processor.document(asked_and_answered(), 100)])
    with recorded(trained.inspector.model) as seen:
        other = threading.Thread(target=trained.inspector.answer_logps, args=(batch,))
        other.start()
        other.join()
        assert not seen
        trained.inspector.answer_logps(batch)
        assert len(seen) == 2


def asked_and_answered() -> Conversation:
    return Conversation("a", (Message("user", (from_image(SCENES[0].load()), "?")), Message("assistant", ("A bus.",))))
