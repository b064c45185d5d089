"""Preference pairs: published formats as they are, bad rows named, and two documents that differ in the answer alone."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.bad_rows import BadRow, BadRows
from dataset.batches import Batches
from dataset.chat import Conversation, Message, Preference
from dataset.collate import IGNORE, collate
from dataset.feedback.pair_streams import StoredPairs
from dataset.images import Picture
from dataset.preferences import load_preferences, preference_mixture
from dataset.tokenizer import SentencePieceTokenizer
from model.dpo.reference import StoredLogps
from model.losses import next_token_targets
from model.reference import fingerprint
from model.registry import TEMPLATES
from tests import tiny
from tests.miniatures import lines, picture

TOKENIZER = SentencePieceTokenizer()
GOOD, WRONG = "A red square.", "A red square and two dogs."
OFFICIAL = ("rlaif_v.parquet", "rlhf_v.parquet", "trl.parquet", "trl.jsonl", "pipeline.jsonl")


def write_official(folder: Path) -> Path:
    """A file of four rows in each official format, with the columns of the real one."""
    import pyarrow
    from pyarrow import parquet

    files = [picture(folder / f"{colour}.png", colour) for colour in ("red", "green", "blue", "black")]
    data = [file.read_bytes() for file in files]
    question, split = "What is in the picture?", json.dumps({"model": "m", "type": "detailed_description"})
    parquet.write_table(pyarrow.Table.from_pylist([
        {"ds_name": "RLAIF-V", "image": {"bytes": data[i], "path": f"{i}.jpg"}, "question": question, "chosen": GOOD,
         "rejected": WRONG, "origin_dataset": "COCO", "origin_split": split, "idx": i, "image_path": f"/elsewhere/{i}.jpg",
         "logps": json.dumps({"logps": [[-1.0], -20.0, -1.0, [-2.0], -30.0, -1.5]})} for i in range(4)
    ]), folder / "rlaif_v.parquet", row_group_size=2)  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([
        {"ds_name": "RLHF-V", "image": {"bytes": data[i], "path": None}, "origin_dataset": "VQAv2", "origin_split": "train",
         "text": json.dumps({"question": question, "chosen": GOOD, "rejected": WRONG}), "idx": i, "image_path": f"{i}.jpg"}
        for i in range(4)]), folder / "rlhf_v.parquet", row_group_size=3)  # fmt: skip
    trl = {"prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]}],
           "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
           "rejected": [{"role": "assistant", "content": [{"type": "text", "text": WRONG}]}]}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(
        [{"images": [{"bytes": data[i], "path": None}], **trl} for i in range(4)]), folder / "trl.parquet")  # fmt: skip
    plain = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", GOOD), ("rejected", WRONG))}
    lines(folder / "trl.jsonl", [{"images": [files[i].name], **(trl if i % 2 else {**trl, **plain})} for i in range(4)])
    lines(folder / "pipeline.jsonl", [
        {key: value, "question": question, "chosen": GOOD, "rejected": WRONG, "scores": [0, -1], "idx": 7}
        for key, value in (("image_path", files[0].name), ("image", files[1].name),
                           ("image", base64.b64encode(data[2]).decode()),
                           ("image", "data:image/png;base64," + base64.b64encode(data[3]).decode()))])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    return write_official(tmp_path_factory.mktemp("official"))


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("name", OFFICIAL)
def test_each_official_format_is_read_as_it_is(official, name):
    source = load_preferences(official / name)
    assert len(source) == 4
    for row, colour in enumerate(((255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0))):
        found = source[row]
        assert (found.chosen, found.rejected, found.id) == (GOOD, WRONG, f"{official / name}:{row + 1}")
        (message,) = found.prompt.messages
        shown, asked = message.parts
        assert (message.role, asked) == ("user", "What is in the picture?")
        assert shown.load().getpixel((5, 5)) == colour


def test_a_parquet_file_is_read_by_row_group(official):
    assert load_preferences(official / "rlaif_v.parquet").blocks().tolist() == [0, 0, 1, 1]


def test_a_folder_and_weights_mix_files(official):
    assert len(load_preferences(official)) == 20
    where = SimpleNamespace(image_folder=None, allow_urls=False)
    mixed = preference_mixture([f"{official}/trl.jsonl:2", f"{official}/pipeline.jsonl:0.5"], where)
    assert len(mixed) == 10
    names = [mixed[i].id.rpartition("/")[2].partition(":")[0] for i in range(10)]
    assert names == ["trl.jsonl"] * 8 + ["pipeline.jsonl"] * 2


def row(tmp_path, **changes) -> Preference:
    """The preference of a pipeline row with these changes; None takes a key away."""
    picture(tmp_path / "a.png", "red")
    values = {"image": "a.png", "question": "What?", "chosen": GOOD, "rejected": WRONG, **changes}
    return load_preferences(lines(tmp_path / "rows.jsonl", [{k: v for k, v in values.items() if v is not None}]))[0]


def test_several_pictures_stand_where_the_placeholders_are(tmp_path):
    picture(tmp_path / "b.png", "blue")
    found = row(tmp_path, image=None, images=["a.png", "b.png"], question="From <image> to <image>?")
    assert [part if isinstance(part, str) else part.load().getpixel((0, 0)) for part in found.prompt.messages[0].parts] == [
        "From ", (255, 0, 0), " to ", (0, 0, 255), "?"]  # fmt: skip


def test_a_prompt_may_have_earlier_turns_and_no_picture(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
              {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "What is red?"}]  # fmt: skip
    found = row(tmp_path, image=None, question=None, prompt=prompt)
    assert [message.role for message in found.prompt.messages] == ["system", "user", "assistant", "user"]
    assert found.pictures == ()


def test_extra_keys_are_ignored_whatever_their_names(tmp_path):
    found = row(tmp_path, prompt="world/17", text="not JSON", scores=[0, -1], logps="{}", answer="gold")
    assert found.prompt.messages[0].text == "What?"


@pytest.mark.parametrize(("changes", "message"), [
    ({"chosen": None}, "missing chosen"), ({"question": None}, "missing question"), ({"rejected": " "}, "empty rejected"),
    ({"chosen": 3}, "chosen is a int"), ({"rejected": GOOD + " "}, "chosen and rejected are the same answer"),
    ({"image": "gone.png"}, "image file missing"), ({"image": "../a.png"}, "leaves the image folder"),
    ({"image": "iVBORw0KGgo="}, None), ({"image": "iVBORw0*"}, "bad base64"), ({"question": 5}, "user value is a int"),
    ({"question": "<image> and <image>?"}, "2 <image> placeholders but 1 images"),
    ({"image": "https://example.com/a.png"}, "image is a URL"),
    ({"chosen": [{"role": "user", "content": "no"}]}, "chosen is not one message of the assistant"),
    ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "chosen holds more than text"),
    ({"question": None, "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
     "does not end with the user's turn"),
    ({"chosen": None, "rejected": None, "text": "{broken"}, "text is not JSON"),
    ({"chosen": None, "rejected": None, "text": "[1]"}, "missing chosen, rejected"),
])  # fmt: skip
def test_a_bad_row_says_where_why_and_what_to_do(tmp_path, changes, message):
    if message is None:  # decodes, and is not a picture: found when it is opened
        with pytest.raises(BadRow, match="cannot be opened"):
            row(tmp_path, **changes).pictures[0].load()
        return
    with pytest.raises(BadRow) as bad:
        row(tmp_path, **changes)
    assert message in str(bad.value) and str(bad.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: ") and bad.value.remedy


def test_a_row_that_is_not_an_object_is_a_bad_row(tmp_path):
    with pytest.raises(BadRow, match="the row is a list"):
        load_preferences(lines(tmp_path / "rows.jsonl", [[1, 2]]))[0]


# ---------------------------------------------------------------- two documents


def preference(chosen=GOOD, rejected=WRONG, pictures=1, turns=()) -> Preference:
    shown = tuple(Picture(f"p{k}", lambda: None) for k in range(pictures))
    return Preference("row", Conversation("row", (*turns, Message("user", (*shown, "What is it?")))), chosen, rejected)


class ByKey(tiny.Images):
    """In the place of an image processor: the features of picture "p7" are sevens."""

    def __call__(self, pictures):
        return torch.stack([torch.full((3, 4), float(picture.key[1:])) for picture in pictures])


PROCESSOR = tiny.processor(image_tokens=3, images=ByKey())


def rendered(row: Preference, max_length: int = 1000, template: str = "pupil"):
    return tiny.processor(template, 3).pair(row, max_length)


def learned(document) -> list[int]:
    return [number for number, learn in zip(document.input_ids, document.learn) if learn]


@pytest.mark.parametrize("template", ["pupil", "pretrain"])
def test_exactly_the_answer_and_its_end_of_turn_are_learned(template):
    """`prompt or image tokens in the sum`; `the first answer token or the end token left out`."""
    stop = TOKENIZER.id(TEMPLATES.make(template).stop)
    pair = rendered(preference(), template=template)
    for document, text in ((pair.chosen, GOOD), (pair.rejected, WRONG)):
        assert learned(document) == [*TOKENIZER.encode(text), stop]
        assert TOKENIZER.image not in learned(document)


def test_the_answer_of_an_earlier_turn_is_read_and_not_learned():
    pair = rendered(preference(turns=(Message("user", ("Hello",)), Message("assistant", ("Good day.",)))))
    assert learned(pair.chosen) == [*TOKENIZER.encode(GOOD), TOKENIZER.end]
    assert TOKENIZER.decode(pair.chosen.input_ids).count("Good day.") == 1


def test_there_is_one_beginning_and_the_prompt_is_tokenised_as_for_generation():
    """`double BOS`; `prompt tokenised jointly in one place and separately in another`."""
    pair = rendered(preference())
    prompt = PROCESSOR.prompt(preference().prompt).input_ids
    for document, text in ((pair.chosen, GOOD), (pair.rejected, WRONG)):
        assert document.input_ids == [*prompt, *TOKENIZER.encode(text), TOKENIZER.end]
        assert document.input_ids.count(TOKENIZER.bos) == 1
        talk = Conversation("row", (*preference().prompt.messages, Message("assistant", (text,))))
        assert document == PROCESSOR.document(talk, 1000)  # as in fine-tuning


def test_both_sides_are_truncated_at_the_same_token_and_the_prompt_never():
    """`truncating only one side`."""
    row = preference(chosen="bus here " * 20, rejected="cat there " * 30)
    full = rendered(row)
    prompt = full.chosen.learn.index(True)
    for length in range(prompt + 1, len(full.rejected) + 2):
        pair = rendered(row, max_length=length)
        for document, whole in ((pair.chosen, full.chosen), (pair.rejected, full.rejected)):
            assert document.input_ids == whole.input_ids[:length]
            assert document.learn.index(True) == prompt
        assert tiny.processor(image_tokens=3, context_length=length).pair(row, 1000) == pair  # all that the model can read
    for max_length, context_length in ((prompt, 1000), (1000, prompt)):
        with pytest.raises(BadRow, match=f"the prompt alone takes the {prompt} tokens"):
            tiny.processor(image_tokens=3, context_length=context_length).pair(row, max_length)


def test_answers_that_differ_only_where_they_are_truncated_are_not_a_pair():
    row = preference(chosen="a bus " * 20 + "x", rejected="a bus " * 20 + "y")
    with pytest.raises(BadRow, match="the first 30 tokens of chosen and rejected are the same"):
        rendered(row, max_length=30)


def test_policy_and_reference_read_the_same_pictures_on_both_sides():
    """`policy and reference given different images`: the two documents show one prompt's pictures, in one order."""
    pair = rendered(preference(pictures=2))
    assert pair.chosen.pictures == pair.rejected.pictures == preference(pictures=2).pictures


def test_a_batch_is_chosen_and_rejected_in_turn_with_the_pictures_of_each():
    pairs = [rendered(preference(pictures=2)), rendered(preference(chosen="No.", pictures=0))]
    batch = PROCESSOR.pair_batch(pairs)
    expected = collate([pairs[0].chosen, pairs[0].rejected, pairs[1].chosen, pairs[1].rejected], ByKey())
    assert batch.keys() == {*expected, "keys"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected if name != "ids")
    assert batch["features"][:, 0, 0].tolist() == [0, 1, 0, 1]
    assert batch["keys"] == [pair.key for pair in pairs] and len(set(batch["keys"])) == 2
    targets = next_token_targets(batch["labels"], batch["document_ids"])
    counts = torch.bincount(batch["document_ids"][targets != IGNORE])
    assert counts.tolist() == [len(TOKENIZER.encode(text)) + 1 for text in (GOOD, WRONG, "No.", WRONG)]


def test_bad_rows_are_skipped_named_and_counted_and_the_rest_is_seen(tmp_path):
    picture(tmp_path / "a.png", "red")
    good = [{"image": "a.png", "question": f"What {i}?", "chosen": GOOD, "rejected": WRONG} for i in range(6)]
    bad = [{**good[0], "rejected": GOOD}, {**good[0], "image": "gone.png"}, {**good[0], "chosen": ""}]
    source = load_preferences(lines(tmp_path / "rows.jsonl", [*good[:3], *bad, *good[3:]]))
    rows = BadRows(tmp_path / "bad_rows.jsonl", len(source), 0.5)
    batches = Batches(source, rendered, tiny.processor().pair_batch, batch_size=2, seed=0, bad_rows=rows)
    seen = {}
    for epoch_batch in range(len(batches)):
        try:
            batch = batches.batch(epoch_batch)
        except RuntimeError:  # two bad rows fell into one batch
            continue
        seen.update(zip(batch["ids"][::2], batch["keys"]))
        assert batch["ids"][::2] == batch["ids"][1::2]
    assert {int(name.rpartition(":")[2]) for name in seen} == {1, 2, 3, 7, 8, 9}
    named = {json.loads(line)["row"].rpartition(":")[2]: json.loads(line)["reason"]
             for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()}  # fmt: skip
    assert named.keys() == {"4", "5", "6"} and "same answer" in named["4"]


def test_a_step_is_as_many_micro_batches_as_are_accumulated_and_a_stored_position_goes_on_behind_it(tmp_path):
    rows = [preference(chosen=f"{k}.", pictures=0) for k in range(10)]
    batches = Batches(rows, rendered, PROCESSOR.pair_batch, batch_size=2, seed=0, bad_rows=BadRows(tmp_path / "bad", 10, 0))
    expected = [batches.batch(number)["keys"] for number in range(8)]

    def keys(pairs: StoredPairs) -> list[list[str]]:
        return [batch["keys"] for batch in pairs.next()]

    pairs = StoredPairs(batches, 2, tiny.Ranks())
    for step in range(3):
        assert pairs.position == 2 * step and pairs.stats == {}
        assert keys(pairs) == expected[2 * step : 2 * step + 2]
    again = StoredPairs(batches, 2, tiny.Ranks())
    again.position = 4
    assert keys(again) == expected[4:6] and again.position == 6
    ranks = [StoredPairs(batches, 2, tiny.Ranks(rank, 2)) for rank in (0, 1)]
    assert [keys(rank) for rank in ranks] == [[expected[0], expected[2]], [expected[1], expected[3]]]
    assert [rank.position for rank in ranks] == [4, 4]


# ---------------------------------------------------------------- the reference's log-probabilities, stored


def test_reference_log_probabilities_come_back_exactly_in_the_order_of_the_documents(tmp_path):
    pairs = [rendered(preference()), rendered(preference(chosen="No."))]
    numbers = {pairs[0].key: (-1.5, -0.1234567), pairs[1].key: (-3.25, -40.0)}
    StoredLogps(numbers, "made").write(tmp_path / "deep" / "reference.npz")
    back = StoredLogps.read(tmp_path / "deep" / "reference.npz", "made")
    expected = torch.tensor([-3.25, -40.0, -1.5, -0.1234567])
    assert torch.equal(back.of(PROCESSOR.pair_batch(pairs[::-1])), expected)


def test_a_stale_reference_is_refused_with_the_remedy(tmp_path):
    StoredLogps({"k": (-1.0, -2.0)}, "weights a").write(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match="stale.*other weights, another tokenizer, template or precision.*Delete it"):
        StoredLogps.read(tmp_path / "reference.npz", "weights b")
    with pytest.raises(FileNotFoundError, match="no reference log-probabilities.*without --resume"):
        StoredLogps.read(tmp_path / "none.npz", "weights a")


def test_a_pair_that_the_stored_reference_does_not_hold_is_refused_by_name():
    pair = rendered(preference())
    known = StoredLogps({pair.key: (-1.0, -2.0)}, "made")
    for changed in (preference(chosen="A blue square."), preference(pictures=2)):
        with pytest.raises(ValueError, match="no reference log-probabilities of row: the data changed"):
            known.of(PROCESSOR.pair_batch([pair, rendered(changed)]))


def test_another_picture_with_the_same_words_is_another_pair():
    row = preference()
    other = Preference("row", Conversation("row", (Message("user", (Picture("p9", lambda: None), "What is it?")),)), GOOD, WRONG)
    assert rendered(row).key != rendered(other).key


def test_the_fingerprint_changes_with_every_part():
    weights = {"a": torch.zeros(2), "b": torch.ones(1)}
    parts = ("config", b"tokenizer", "fp32", weights)
    prints = {fingerprint(*parts), fingerprint("other", *parts[1:]), fingerprint(parts[0], b"other", *parts[2:]),
              fingerprint(*parts[:2], "bf16", weights), fingerprint(*parts[:3], {**weights, "b": torch.ones(1) + 1e-6})}
    assert len(prints) == 5
    assert fingerprint(*parts) == fingerprint(*parts[:3], dict(reversed(weights.items())))


def test_nothing_in_the_file_can_run_code(tmp_path):
    np.savez(tmp_path / "reference.npz", fingerprint="made", keys=np.array([{"a": 1}], dtype=object), logps=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="allow_pickle"):
        StoredLogps.read(tmp_path / "reference.npz", "made")
