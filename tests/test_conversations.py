"""Rows to conversations: every published format as it is, and every kind of broken row with its name and its cure."""

import base64
import json

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dataset.bad_rows import BadRow
from dataset.chat import Conversation
from dataset.formats import conversations
from dataset.images import Picture
from dataset.mixture import load
from tests import tiny
from tests.miniatures import OPENAI, llava, minimind_tables, png, talk


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures, and beside it one that nobody may read."""
    data = tmp_path / "data"
    data.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("../secret.png", "black")):
        (data / name).write_bytes(png(colour))
    (data / "truncated.png").write_bytes(png("red")[:50])
    (data / "text.png").write_text("not an image")
    return data


def written(folder, *rows, name="data.jsonl"):
    """A source of these rows, each an object or a raw line."""
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load(path)


def contents(conversation: Conversation) -> list:
    """[(role, parts)] with each picture as the colour of its first pixel."""
    names = {(255, 0, 0): "RED", (0, 0, 255): "BLUE"}
    return [
        (m.role, [names[p.load().getpixel((0, 0))] if isinstance(p, Picture) else p for p in m.parts])
        for m in conversation.messages
    ]


ANSWERED = ("assistant", ["An apple."])
URLS = {name: "data:image/png;base64," + base64.b64encode(png(name)).decode() for name in ("red", "blue")}


def openai(*content, **more):
    return {"messages": talk(list(content), "An apple.", OPENAI), **more}


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(("row", "user"), [
    (llava("<image>\nWhat?", image="a.png"), ["RED", "What?"]),
    (llava("What?\n<image>", image="a.png"), ["What?", "RED"]),
    (llava("What?", image="a.png"), ["RED", "What?"]),  # no placeholder: before the first question
    (llava("<image><image>", image="a.png, b.png"), ["RED", "BLUE"]),  # adjacent
    (llava("From <image> to <image>?", image=["b.png", "a.png"]), ["From ", "BLUE", " to ", "RED", "?"]),
    (llava("What?", images=["a.png", "b.png"]), ["RED", "BLUE", "What?"]),
    (llava("What is a <video> tag?\n"), ["What is a <video> tag?\n"]),  # no placeholder: text stays text
    (llava("Hello", image=None), ["Hello"]),
    (llava("<image>What?", image={"bytes": None, "path": "a.png"}), ["RED", "What?"]),
    (llava("<image>What?", image=URLS["blue"]), ["BLUE", "What?"]),
    (openai({"type": "text", "text": "What?"}), ["What?"]),
    (openai({"type": "image_url", "image_url": {"url": URLS["red"]}}, {"type": "text", "text": "?"}), ["RED", "?"]),
    (openai({"type": "image", "image": "b.png"}, {"type": "image", "image": "a.png"}), ["BLUE", "RED"]),
    (openai({"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}, images=["a.png", "b.png"]),
     ["RED", "or", "BLUE"]),
    (openai({"type": "text", "text": "is <image> it"}, images=["a.png"]), ["is ", "RED", " it"]),
])  # fmt: skip
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_each_way_to_write_a_question_with_pictures(folder, row, user, name):
    source = written(folder, row, name=name)
    assert contents(source[0]) == [("user", user), ANSWERED]
    assert source[0].id == f"{folder / name}:1"


def test_minimind_roles_system_turns_and_several_rounds(folder):
    turns = [("system", "Be kind."), ("user", "<image>\nOne?"), ("assistant", "An <image>."), ("user", "<image>Two?"),
             ("assistant", "Yes.")]  # fmt: skip
    row = {"image": "a.png, b.png", "conversations": [{"role": role, "content": text} for role, text in turns]}
    assert contents(written(folder, row)[0]) == [
        ("system", ["Be kind."]), ("user", ["RED", "One?"]), ("assistant", ["An <image>."]), ("user", ["BLUE", "Two?"]),
        ("assistant", ["Yes."]),
    ]  # fmt: skip


def test_mm_eureka_rows_keep_their_gold_answer(folder):
    question = [{"role": "user", "content": "<image>How many?"}]
    source = written(
        folder,
        {"id": "1", "conversations": question, "answer": "4", "image_urls": [f"file://{folder}/a.png"]},
        {"id": "2", "conversations": [{"role": "user", "content": "2 + 2?"}], "answer": 4, "image_urls": []},
    )
    assert [contents(one)[1:] for one in source] == [[("assistant", ["4"])]] * 2  # to learn from; and to be asked:
    source = load(source.path, need_answer=False)
    assert [contents(one) for one in source] == [[("user", ["RED", "How many?"])], [("user", ["2 + 2?"])]]
    assert [one.answer for one in source] == ["4", "4"]


def test_lmm_r1_rows_hold_their_messages_as_a_string(folder):
    content = [{"type": "image", "image": f"file://{folder}/b.png"}, {"type": "text", "text": "How many?"}]
    row = {"id": "1", "message": json.dumps([{"role": "user", "content": content}]), "answer": "$4$"}
    result = load(written(folder, row).path, need_answer=False)[0]
    assert (contents(result), result.answer) == ([("user", ["BLUE", "How many?"])], "$4$")


def test_text_and_captions_without_turns(folder):
    source = written(folder, {"text": "Once upon a time <image>."}, {"text": "A red square.", "image": "a.png"})
    assert contents(source[0]) == [("assistant", ["Once upon a time <image>."])]
    assert contents(source[1]) == [("assistant", ["RED", "A red square."])]


def test_minimind_parquet_with_bytes_and_with_lists_of_bytes(folder):
    for table, users in zip(minimind_tables(4), (["BLUE", "What?"], ["RED", "BLUE", "What?"])):
        parquet.write_table(table, folder / "data.parquet")
        assert contents(load(folder / "data.parquet")[3]) == [("user", users), ANSWERED]


def test_a_text_only_parquet_row_has_null_bytes_and_no_placeholder(folder):
    table = pa.table({"conversations": [json.dumps(llava("Hi")["conversations"])], "image_bytes": pa.array([None], pa.binary())})
    parquet.write_table(table, folder / "data.parquet")
    assert contents(load(folder / "data.parquet")[0]) == [("user", ["Hi"]), ANSWERED]


def test_a_row_that_ends_with_a_question_is_for_inference_only(folder):
    path = written(folder, {"messages": [{"role": "user", "content": "Why?"}]}).path
    assert contents(load(path, need_answer=False)[0]) == [("user", ["Why?"])]
    with pytest.raises(BadRow, match="last turn"):
        load(path)[0]


# ---------------------------------------------------------------- broken rows

TURNS = llava("Hi")["conversations"]
BROKEN = {
    "not JSON": ('{"conversations": [', "not JSON"),
    "not UTF-8": ('"\udcff"', "not JSON"),
    "not an object": ("[1, 2]", "is a list, not an object"),
    "missing conversations": ({"image": "a.png"}, "missing conversations"),
    "conversations of the wrong type": ({"conversations": {"from": "human"}}, "is a dict, not a list"),
    "empty conversations": ({"conversations": []}, "empty conversations"),
    "turn of the wrong type": ({"conversations": ["Hi"]}, "a turn is a str"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "Hi"}]}, "unknown role 'bot'"),
    "role of the wrong type": ({"conversations": [{"from": ["human"], "value": "Hi"}]}, "unknown role"),
    "two questions in a row": ({"conversations": [TURNS[0], *TURNS]}, "out of order: turn 2"),
    "answer first": ({"conversations": [TURNS[1]]}, "out of order: turn 1"),
    "system in the middle": ({"conversations": [*TURNS, {"from": "system", "value": ""}]}, "out of order: turn 3"),
    "only a system turn": ({"conversations": [{"from": "system", "value": "Hi"}]}, "no turn but"),
    "no answer at the end": ({"conversations": TURNS[:1]}, "last turn is not the assistant's"),
    "empty answer": (llava("Hi", " \n"), "empty answer"),
    "empty text": ({"text": ""}, "empty answer"),
    "value not a string": (llava(7), "value is a int, not a string"),
    "null value": (llava("Hi", None), "value is a NoneType"),
    "more placeholders": (llava("<image><image>", image="a.png"), "2 <image> placeholders but 1 images"),
    "fewer placeholders": (llava("<image>?", image=["a.png", "b.png"]), "1 <image> placeholders but 2 images"),
    "placeholder, no image": (llava("An <image> tag?", pic_no="a.png"), "1 <image> .* 0 images .* `conversations`, `pic_no`"),
    "placeholder, null image": (llava("<image>?", image=None), "1 <image> placeholders but 0 images"),
    "images inside and beside": (openai({"type": "image", "image": "a.png"}, images=["a.png"]), "0 <image> .* 1 images"),
    "unknown content part": (openai({"type": "audio"}), "unknown content part"),
    "content part of the wrong type": (openai("Hi"), "unknown content part"),
    "missing image": (llava("<image>", image="none.png"), "image file missing"),
    "a folder as image": (llava("<image>", image="."), "image file missing"),
    "image outside": (llava("<image>", image="../secret.png"), "leaves the image folder"),
    "file URL outside": (llava("<image>", image_urls=["file:///etc/hostname"]), "leaves the image folder"),
    "web address": (llava("<image>", image="https://example.com/a.png"), "is a URL"),
    "image of the wrong type": (llava("<image>", image=7), "an image is a int"),
    "null among images": (llava("<image>", image=[None]), "an image is a NoneType"),
    "bad JSON in a message": ({"message": "[{'role'", "answer": "1"}, "message is not JSON"),
    "half a character": (llava("Hi \ud83d"), "text is not Unicode"),
    "half a character in a list": (openai({"type": "text", "text": "\ud83d"}), "text is not Unicode"),
    "base64 of other letters": (llava("<image>", image="data:image/png;base64,\u00e9"), "bad base64"),
    "bad base64": (llava("<image>", image="data:image/png;base64,@@@"), "bad base64"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_row_says_where_why_and_what_to_do(folder, kind):
    row, reason = BROKEN[kind]
    line = row if isinstance(row, str) else json.dumps(row)
    path = folder / "data.jsonl"
    path.write_bytes(f"{json.dumps(llava('Hi'))}\n{line}\n".encode(errors="surrogateescape"))
    source = load(path)
    assert contents(source[0]) == [("user", ["Hi"]), ANSWERED]  # its neighbour is well
    with pytest.raises(BadRow, match=reason) as caught:
        source[1]
    assert caught.value.where == f"{path}:2"
    assert str(caught.value) == f"{path}:2: {caught.value.reason}; {caught.value.remedy}"
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "reason"), [("truncated", "(?i)truncated"), ("text", "identify"), ("bomb", "pixels")])
def test_a_broken_image_is_a_bad_row_once_it_is_opened(folder, name, reason):
    if name == "bomb":
        Image.new("1", (9000, 9000)).save(folder / "bomb.png")  # 10 kB that unpack to 81 million pixels
    row = written(folder, llava("<image>", image=f"{name}.png"))[0]
    with pytest.raises(BadRow, match=reason):
        row.pictures[0].load()


@pytest.mark.parametrize("images", [[None], [[None]]])
def test_a_parquet_row_with_a_placeholder_and_null_bytes_is_bad(folder, images):
    kind = pa.binary() if images == [None] else pa.list_(pa.binary())
    table = {"conversations": [json.dumps(llava("<image>")["conversations"])], "image_bytes": pa.array(images, kind)}
    parquet.write_table(pa.table(table), folder / "data.parquet")
    with pytest.raises(BadRow, match="0 images|NoneType"):
        load(folder / "data.parquet")[0]


def test_a_row_truncated_to_nothing_is_named_too(folder):
    row = written(folder, llava("<image>" + "long " * 50, image="a.png"))[0]
    with pytest.raises(BadRow, match="nothing left to learn") as caught:
        tiny.processor().document(row, max_length=20)
    assert caught.value.where == row.id == f"{folder / 'data.jsonl'}:1"


def test_a_bug_of_ours_is_not_a_bad_row(folder, monkeypatch):
    source = written(folder, llava("Hi"))
    monkeypatch.setattr(conversations, "check_order", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source[0]
