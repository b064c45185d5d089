"""Rows as people bring them: each kind that was once half understood is read as meant, or is a bad row with a name."""

import base64
import io
import json
import re
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dataset.bad_rows import BadRow, BadRows, TooManyBadRows
from dataset.chat import Conversation, Message, Prefill
from dataset.formats.pass_rates import by_pass_rate
from dataset.mixture import load
from dataset.preferences import load_preferences
from dataset.problems import of_rows
from model.registry import UserError
from tests import tiny
from tests.miniatures import OPENAI, lines, llava, png, talk
from tests.test_conversations import ANSWERED, contents

QUESTION = llava("<image>\nWhat?")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "b.png").write_bytes(png("blue"))
    return tmp_path


def one(folder: Path, row: dict, need_answer: bool = True) -> Conversation:
    return load(lines(folder / "rows.jsonl", [row]), need_answer=need_answer)[0]


# ---------------------------------------------------------------- pictures under other keys, and none


@pytest.mark.parametrize("key", ["image_path", "img", "image_url", "file_name", "image_file", "Image", "images", "picture",
                                 "photo", "img_path", "imagePath", "image_name", "image_base64", "jpg", "PNG", "image_urls",
                                 "filename"])  # fmt: skip
def test_a_picture_under_a_common_key_is_seen(folder, key):
    assert contents(one(folder, {key: "a.png", **QUESTION})) == [("user", ["RED", "What?"]), ANSWERED]


def test_a_comma_in_the_name_of_one_picture_does_not_divide_it(folder):
    (folder / "red, square.png").write_bytes(png("red"))
    assert contents(one(folder, {"image": "red, square.png", **QUESTION}))[0] == ("user", ["RED", "What?"])


@pytest.mark.parametrize("row", [
    {"pic_no": "a.png", **QUESTION}, {"frame": "a.png", "text": "<image>\nA red square."}, {"image": "", **QUESTION},
    {"image": None, "question": "<image> What?", "answer": "Red."}, {"image": float("nan"), **QUESTION},
])  # fmt: skip
def test_a_placeholder_without_a_picture_is_a_bad_row_that_names_the_keys(folder, row):
    with pytest.raises(BadRow, match="<image>.* in a row of `") as bad:
        one(folder, row)
    assert all(f"`{key}`" in bad.value.reason for key, value in row.items() if value == value and value is not None)


def test_what_is_not_read_is_told_once_a_file_with_counts(folder, capsys):
    rows = [{**(QUESTION if i < 38 else llava("Hi")), **({"image": "a.png", "score": 1} if i < 38 else {"source": "x"})}
            for i in range(40)]  # fmt: skip
    file = lines(folder / "rows.jsonl", rows)
    for _ in range(2):
        assert len(list(load(file))) == 40
    assert capsys.readouterr().out == (f"{file}: 40 rows, 38 with pictures, 40 with answers; "
                                       f"not read: `score` (in 38), `source` (in 2)\n")


def test_a_field_that_comes_up_late_is_told_when_its_row_is_read(folder, capsys):
    file = lines(folder / "rows.jsonl", [llava("Hi")] * 1001 + [llava("Hi", mood="good")])
    source = load(file)
    assert capsys.readouterr().out == f"{file}: 1,002 rows; of the first 1,000: 0 with pictures, 1,000 with answers\n"
    assert len(list(source)) == 1002 and capsys.readouterr().out == f"{file}:1002: not read: `mood`\n"


@pytest.mark.parametrize(("row", "part"), [
    ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Yes."}]}, "turn.name"),
    ({"image": "a.png", "captions": ["One.", "Two."]}, "captions[1:]"),
    ({"images": ["a.png"], "texts": [{"user": "Hi", "assistant": "Yes.", "source": "x"}]}, "texts.source"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", "mood": 1}]},
                   {"role": "assistant", "content": "Yes."}]}, "content.mood"),
])  # fmt: skip
def test_parts_of_values_that_are_not_read_are_told(folder, capsys, row, part):
    one(folder, row)
    assert f"not read: `{part}`\n" in capsys.readouterr().out


def test_rows_that_a_table_fills_with_nulls_are_read_as_if_they_had_no_such_fields(folder):
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image", "image": "a.png"}]}]
    rows = [{"image": "a.png", **QUESTION, "answer": None, "messages": None}, {"messages": messages, "answer": "An apple."},
            {"image": "b.png", "question": "What?", "answer": "An apple."}, {"text": "Once."}]  # fmt: skip
    columns = dict.fromkeys(key for row in rows for key in row)
    table = pa.Table.from_pylist([{column: row.get(column) for column in columns} for row in rows])
    parquet.write_table(table, folder / "rows.parquet")
    assert [contents(row) for row in load(folder / "rows.parquet")] == [
        [("user", ["RED", "What?"]), ANSWERED], [("user", ["What?", "RED"]), ANSWERED],
        [("user", ["BLUE", "What?"]), ANSWERED], [("assistant", ["Once."])]]  # fmt: skip


# ---------------------------------------------------------------- questions for RL and inference


@pytest.mark.parametrize("row", [
    {"question_id": 0, "image": "a.png", "text": "Is it red?", "category": "x"},
    {"image": "a.png", "text": "Is it red?", "answer": "yes"},
    {"image_file": "a.png", "text": "Is it red?"}, {"image": "a.png", "question": "Is it red?"},
    {"image": "a.png", "prompt": "Is it red?", "text": "other"},
])  # fmt: skip
def test_a_text_beside_a_picture_is_the_users_question_where_rows_are_asked(folder, row):
    assert contents(one(folder, row, need_answer=False)) == [("user", ["RED", "Is it red?"])]


@pytest.mark.parametrize(("row", "reason"), [
    ({"image": "a.png", "caption": "A red square."}, "a caption and no question"), ({"question": " "}, "empty question"),
    ({"image": "a.png"}, "missing conversations in a row of `image`"), ({"image": "a.png", "answer": "4"}, "missing a question"),
    ({"messages": [{"role": "system", "content": "Hi"}]}, "no turn but"), ({"text": ""}, "empty question"),
    ({"id": "x:1", "error": "rows.jsonl:1: image file missing"}, "the row had no answer: rows.jsonl:1: image file missing"),
    ({"image": "a.png", "chosen": "a", "rejected": "b"}, "the row is a preference"),
    ({"image": "a.png", "text": '{"question": "?", "chosen": "a", "rejected": "b"}'}, "the row is a preference"),
])  # fmt: skip
def test_a_row_that_asks_nothing_is_a_bad_row(folder, row, reason):
    with pytest.raises(BadRow, match=reason):
        one(folder, row, need_answer=False)


@pytest.mark.parametrize(("answer", "gold"), [
    (4, "4"), ("4", "4"), ([4], "4"), (["4", "four", 4], '["4", "four"]'), (0.5, "0.5"), ([{"answer": "net"}], "net"),
])  # fmt: skip
def test_a_gold_answer_is_a_text_or_a_number_or_a_list_of_them(folder, answer, gold):
    assert one(folder, {"question": "2 + 2?", "answer": answer}, need_answer=False).answer == gold


@pytest.mark.parametrize(("answer", "name"), [
    (float("nan"), "nan, not"), (float("inf"), "inf, not"), (True, "True, a bool"), ({"x": 1}, "{'x': 1}, a dict"),
    ([None, False], "None, a NoneType"), ([], "[], a list"), ([["3"]], "[['3']], a list"),
])  # fmt: skip
def test_other_gold_answers_are_refused_by_name(folder, answer, name):
    for need_answer in (True, False):
        with pytest.raises(BadRow, match=re.escape(f"the gold answer is {name}")):
            one(folder, {"question": "2 + 2?", "answer": answer}, need_answer)


def test_a_solution_is_learned_and_the_answer_beside_it_is_compared(folder):
    row = {"problem": "2 + 2?", "solution": "It is 4.", "answer": "4"}
    assert contents(one(folder, row))[-1] == ("assistant", ["It is 4."]) and one(folder, row).answer == "4"
    assert one(folder, row, need_answer=False).messages[-1].role == "user"


def test_rl_asks_the_text_beside_a_picture_and_skips_what_has_no_answer(folder):
    rows = [{"image": "a.png", "text": "Is it red?", "answer": "yes"}, {"id": "1", "error": "no such picture"}]
    bad_rows = BadRows(None, 2, 1.0)
    (problem,) = of_rows(load(lines(folder / "rows.jsonl", rows), need_answer=False), 2, None, bad_rows)
    assert contents(problem.prompt) == [("user", ["RED", "Is it red?"])] and problem.example.answer == "yes"
    assert bad_rows.reasons == {"the row had no answer": 1}


def test_a_pass_rate_that_is_no_share_is_a_bad_row_where_it_counts(folder):
    rows = [{"question": "2 + 2?", "answer": "4", "pass_rate": rate} for rate in (0.5, 7, "high", 1.0)]
    selected = by_pass_rate(load(lines(folder / "rows.jsonl", rows), need_answer=False), 0.1, 0.9)
    assert len(selected) == 3 and selected[0].answer == "4"
    for i in (1, 2):
        with pytest.raises(BadRow, match="is not a share") as bad:
            selected[i]
        assert bad.value.where == f"{folder / 'rows.jsonl'}:{i + 1}"


# ---------------------------------------------------------------- fields that were dropped


@pytest.mark.parametrize("key", ["system", "system_prompt", "System"])
def test_a_system_beside_the_turns_is_the_first_turn(folder, key):
    row = {"image": "a.png", key: "Be short.", **QUESTION}
    assert contents(one(folder, row)) == [("system", ["Be short."]), ("user", ["RED", "What?"]), ANSWERED]


@pytest.mark.parametrize("weight", [{"weight": 0}, {"loss": False}, {"train": False}])
def test_a_turn_without_weight_is_read_and_not_learned(folder, weight):
    turns = [*talk("What?", "Wrong.", OPENAI), *talk("No.", "An apple.", OPENAI)]
    turns[1].update(weight)
    conversation = one(folder, {"messages": turns})
    assert [isinstance(message.parts[0], Prefill) for message in conversation.messages] == [False, True, False, False]
    whole, last = (tiny.processor().document(Conversation("", messages), 1000)
                   for messages in (conversation.messages, conversation.messages[2:]))  # fmt: skip
    assert sum(whole.learn) == sum(last.learn) > 0 and whole.learn[-sum(last.learn):] == last.learn[-sum(last.learn):]
    turns[3].update(weight)
    with pytest.raises(BadRow, match="no answer has a weight"):
        one(folder, {"messages": turns})


@pytest.mark.parametrize("row", [
    llava("<audio>\nWhat?"), {"audio": "a.wav", **llava("What?")}, {"image": "a.png", **llava("<image 1> What?")},
    {"messages": talk([{"type": "audio", "audio": "a.wav"}], "Yes.", OPENAI)},
])  # fmt: skip
def test_a_sound_is_a_bad_row(folder, row):
    with pytest.raises(BadRow, match="not read|unknown content part"):
        one(folder, row)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stands_before_its_answer(folder, key):
    turns = talk("2 + 2?", "4", OPENAI)
    turns[1][key] = "Two and two."
    assert one(folder, {"messages": turns}).messages[1].text == "<think>Two and two.</think>4"


def test_pictures_of_a_turn_stand_in_it(folder):
    turns = [*talk("What?", "Red.", OPENAI), *talk("And this?", "Blue.", OPENAI)]
    turns[2]["images"] = ["b.png"]
    assert contents(one(folder, {"messages": turns}))[2] == ("user", ["BLUE", "And this?"])


@pytest.mark.parametrize("colour", ["black", "red"])
def test_the_black_picture_of_minimind_stands_for_none(folder, colour):
    for image in (png(colour), [png(colour)]):
        parquet.write_table(pa.table({"conversations": [json.dumps(talk("Hi", "Yes.", OPENAI))], "image_bytes": [image]}),
                            folder / "rows.parquet")  # fmt: skip
        assert len(load(folder / "rows.parquet")[0].pictures) == (colour == "red")


HALF = "A circle \ud83d."


@pytest.mark.parametrize("row", [
    {"question": "What?", "chosen": HALF, "rejected": "b"}, {"question": "What?", "chosen": "a", "rejected": HALF},
    {"question": HALF, "chosen": "a", "rejected": "b"}, {"system": HALF, "question": "What?", "chosen": "a", "rejected": "b"},
])  # fmt: skip
def test_half_a_character_in_a_preference_is_a_bad_row(folder, row):
    with pytest.raises(BadRow, match="text is not Unicode") as bad:
        load_preferences(lines(folder / "rows.jsonl", [row]))[0]
    assert bad.value.where.endswith("rows.jsonl:1")


@pytest.mark.parametrize("row", [{"question": HALF, "answer": "4"}, {"question": "2?", "answer": HALF}, {"text": HALF},
                                 {"system": HALF, **llava("Hi")}, {"image": "\ud83d.png", **QUESTION}])
def test_half_a_character_in_a_row_is_a_bad_row_that_can_be_printed(folder, row):
    with pytest.raises(BadRow) as bad:
        one(folder, row)
    bad.value.reason.encode()


def test_half_a_character_that_someone_types_is_a_bad_message():
    with pytest.raises(BadRow, match="text is not Unicode"):
        tiny.processor().prompt(Conversation("this message", (Message("user", (HALF,)),)))


@pytest.mark.parametrize(("row", "reason"), [
    ({"chosen": talk("Hi", "a", OPENAI), "rejected": talk("Ho", "b", OPENAI)}, "missing question"),
    ({"prompt": "Other", "chosen": talk("Hi", "a", OPENAI), "rejected": talk("Hi", "b", OPENAI)}, "not the beginning"),
    ({"chosen": [*talk("Hi", "a", OPENAI), *talk("Ho", "c", OPENAI)], "rejected": talk("Hi", "b", OPENAI)}, "not one message"),
    ({"messages": talk("Hi", "a", OPENAI), "rejected_response": "a"}, "the same answer"),
])  # fmt: skip
def test_a_preference_whose_prompt_is_not_clear_is_a_bad_row(folder, row, reason):
    with pytest.raises(BadRow, match=reason):
        load_preferences(lines(folder / "rows.jsonl", [row]))[0]


# ---------------------------------------------------------------- pictures: base64, wide values, zip files


@pytest.mark.parametrize("write", [
    lambda text: text, lambda text: "data:image/png;base64," + text,
    lambda text: "\n".join(text[i:i + 20] for i in range(0, 400, 20)),
    lambda text: "data:image/png;base64," + "\r\n".join(text[i:i + 76] for i in range(0, 400, 76)) + "\n",
])  # fmt: skip
def test_base64_is_read_everywhere_in_one_line_or_many(folder, write):
    image = write(base64.b64encode(png("blue")).decode())
    row = {"image": image, "question": "What?"}
    assert contents(one(folder, {**row, "answer": "An apple."})) == [("user", ["BLUE", "What?"]), ANSWERED]
    pair = load_preferences(lines(folder / "pairs.jsonl", [{**row, "chosen": "a", "rejected": "b"}]))[0]
    assert contents(pair.prompt) == [("user", ["BLUE", "What?"])]


@pytest.mark.parametrize(("values", "kind", "expected"), [
    ([0, 4095], np.uint16, [0, 255]), ([0, 2048, 4000], np.uint16, [0, 128, 249]), ([0, 1023], np.uint16, [0, 255]),
    ([0, 32768, 65535], np.uint16, [0, 128, 255]), ([0, 100, 255], np.uint16, [0, 100, 255]), ([0, 2**20], np.int32, [0, 16]),
    ([0, 0.5, 1], np.float32, [0, 128, 255]), ([0, 77, 200], np.float32, [0, 77, 200]), ([0, 4095], np.float32, [0, 255]),
])  # fmt: skip
def test_grey_values_of_many_bits_are_scaled_by_the_range_of_their_bits(folder, values, kind, expected):
    file = io.BytesIO()
    Image.fromarray(np.array([values], kind)).save(file, "TIFF")
    (folder / "wide.tif").write_bytes(file.getvalue())
    image = one(folder, {"image": "wide.tif", **QUESTION}).pictures[0].load()
    assert [image.getpixel((x, 0))[0] for x in range(len(values))] == expected


@pytest.mark.parametrize(("archive", "member", "name"), [
    ("images.zip", "a/1.png", "a/1.png"), ("images.zip", "images/1.png", "images/1.png"), ("images.zip", "images/1.png", "1.png"),
    ("images.zip", "1.png", "images/1.png"), ("coco/train2017.zip", "train2017/1.png", "coco/train2017/1.png"),
])  # fmt: skip
def test_pictures_in_zip_files_need_no_unpacking(tmp_path, archive, member, name):
    (tmp_path / archive).parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(tmp_path / archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, png("blue"))
    row = {"image": name, **QUESTION}
    picture = one(tmp_path, row).pictures[0]
    assert (picture.load().getpixel((0, 0)), picture.size, picture.address) == ((0, 0, 255), (8, 8), name)
    if "coco" not in name:
        assert load(tmp_path / "rows.jsonl", image_folder=tmp_path / archive)[0].pictures == (picture,)
    with pytest.raises(BadRow, match="image file missing"):
        one(tmp_path, {"image": "2.png", **QUESTION})


def test_a_damaged_zip_file_is_named(folder):
    (folder / "images.zip").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(UserError, match=r"images\.zip is not a whole zip file"):
        one(folder, {"image": "1.png", **QUESTION})


# ---------------------------------------------------------------- files and folders

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12242\n"


@pytest.mark.parametrize(("name", "text", "reason"), [
    *((f"rows.{suffix}", POINTER, "is a Git LFS pointer") for suffix in ("parquet", "jsonl", "json", "csv")),
    ("rows.parquet", "PAR1 cut off", "is not a whole parquet file"), ("rows.json", "<!DOCTYPE html><html>", "is a web page"),
    ("rows.json", '[{"text": "one"}, {"te', "is damaged or incomplete"), ("rows.json", "", "is empty"),
    ("rows.json", '{"a": [{}], "b": [{}]}', "without a list of rows"),
    ("rows.csv", "1,2\n3,4\n", "names no column that is known"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}.*{reason}"):
        load(tmp_path / name)


def test_a_parquet_file_that_breaks_off_inside_is_named(folder):
    table = pa.table({"text": ["one " * 500, "two"]})
    parquet.write_table(table, folder / "rows.parquet", compression="none", use_dictionary=False)
    whole = bytearray((folder / "rows.parquet").read_bytes())
    whole[4:60] = b"\xff" * 56
    (folder / "rows.parquet").write_bytes(whole)
    with pytest.raises(UserError, match=r"rows\.parquet is not a whole parquet file"):
        load(folder / "rows.parquet")


def test_a_broken_line_of_a_table_is_a_bad_row_and_its_neighbours_are_well(folder):
    lines = (b"image,question,answer", b'a.png,"What, or', b'who?",Red', b"a.png,What", b",2 + 2?,4", b"a.png,\xff,Red", b"")
    (folder / "rows.csv").write_bytes(b"\n".join(lines))
    source = load(folder / "rows.csv")
    assert contents(source[0]) == [("user", ["RED", "What, or\nwho?"]), ("assistant", ["Red"])]
    assert contents(source[2]) == [("user", ["2 + 2?"]), ("assistant", ["4"])]
    for i, reason in ((1, "2 cells under 3 columns"), (3, "not UTF-8")):
        with pytest.raises(BadRow, match=reason):
            source[i]


def snapshot(folder: Path) -> Path:
    """A data set as the hub's cache holds it: links to blobs, train and test files, and a file about them."""
    blobs, files = folder / "blobs", folder / "snapshots" / "1"
    (files / "data").mkdir(parents=True)
    blobs.mkdir()
    contents = {"dataset_infos.json": b'{"default": {"features": {}}}', "picture.png": png("red"), "README.md": b"#",
                "data/train-00000.jsonl": json.dumps({"text": "Once."}).encode(),
                "data/test-00000.jsonl": json.dumps(llava("Test")).encode(),
                "train.jsonl": json.dumps({"image": "picture.png", **QUESTION}).encode(), "val.json": b'[{"text": "Val"}]'}
    for i, (name, data) in enumerate(contents.items()):
        (blobs / str(i)).write_bytes(data)
        (files / name).symlink_to(blobs / str(i))
    return files


def test_of_a_folder_what_holds_rows_to_train_on_is_read_and_the_rest_is_told(tmp_path, capsys):
    files = snapshot(tmp_path)
    source = load(files, image_folder=files)
    out = capsys.readouterr().out
    assert len(source) == 2 and f"{files / 'train.jsonl'}: 1 rows, 1 with pictures, 1 with answers\n" in out
    for name, word in (("dataset_infos.json", "holds no rows"), ("val.json", "not for training"),
                       ("data/test-00000.jsonl", "not for training")):  # fmt: skip
        assert [word in line for line in out.splitlines() if line.startswith(f"{files / name}: not read")] == [True]
    assert contents(load(files / "train.jsonl")[0])[0] == ("user", ["RED", "What?"])
    assert load(files / "val.json")[0].messages[0].text == "Val"  # named, it is read
    (files / "train.jsonl").unlink()
    (files / "data" / "train-00000.jsonl").unlink()
    with pytest.raises(UserError, match="holds no file to train on"):
        load(files)


@pytest.mark.parametrize(("spec", "rows", "patterns"), [
    ("hf:owner/name", 2, None), ("hf:owner/name/train.jsonl", 1, "train.jsonl"), ("hf:owner/name/val.json", 1, "val.json")])
def test_a_data_set_of_the_hub_is_one_flag(tmp_path, monkeypatch, spec, rows, patterns):
    asked = []

    def download(name, **options):
        asked.append((name, options["repo_type"], options["allow_patterns"]))
        return str(snapshot(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(load(spec)) == rows
    ((name, kind, allowed),) = asked
    assert (name, kind) == ("owner/name", "dataset") and (allowed and allowed[0]) == patterns


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="hub gave no data set owner/name.*The error was: no network$"):
        load("hf:owner/name")


def test_pictures_without_texts_and_texts_without_pictures_are_told(folder, capsys):
    (folder / "a.txt").write_text("A red square.\n")
    (folder / "c.txt").write_text("Nothing.")
    assert [contents(row) for row in load(folder)] == [[("assistant", ["RED", "A red square."])]]
    out = capsys.readouterr().out
    assert "1 pictures without a .txt" in out and "1 .txt files without a picture" in out


# ---------------------------------------------------------------- how many bad rows are too many


@pytest.mark.parametrize(("rows", "max_bad", "allowed"), [
    (30, 0.01, 1), (30, 0.0, 0), (30, 0.1, 3), (200, 0.01, 2), (5000, 0.01, 10),
])  # fmt: skip
def test_one_bad_row_of_a_small_file_does_not_stop_a_run(rows, max_bad, allowed):
    bad_rows = BadRows(None, rows, max_bad)
    for row in range(allowed):
        bad_rows.add(BadRow("why", "cure", f"f:{row}"))
    with pytest.raises(TooManyBadRows, match=f"{allowed + 1} bad rows"):
        bad_rows.add(BadRow("why", "cure", "f:last"))
