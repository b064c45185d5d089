"""Reading data: every published format as it is, and every kind of broken row with its name and its cure."""

import base64
import io
import json
import os

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from dataset.chat import Conversation, Message, render
from dataset.formats import conversations
from dataset.formats.conversations import BadRows, Mixture, blocks, load, name_and_weight, rewrite
from dataset.images import BadRow, Picture
from dataset.tokenizer import Tokenizer
from model.registry import TEMPLATES


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder with two pictures, and beside it one that nobody may read."""
    made = tmp_path / "data"
    made.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("../secret.png", "black")):
        (made / name).write_bytes(png(colour))
    (made / "truncated.png").write_bytes(png()[:50])
    (made / "text.png").write_text("not an image")
    return made


def written(folder, *rows, name="data.jsonl"):
    """A source of these rows, each an object or a raw line."""
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load(path)


def shown(conversation: Conversation) -> list:
    """[(role, parts)] with each picture as the colour of its first pixel."""
    names = {(255, 0, 0): "RED", (0, 0, 255): "BLUE"}
    return [
        (m.role, [names[p.load().getpixel((0, 0))] if isinstance(p, Picture) else p for p in m.parts])
        for m in conversation.messages
    ]


def llava(question, answer="An apple.", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **more}


ANSWERED = ("assistant", ["An apple."])
URLS = {name: "data:image/png;base64," + base64.b64encode(png(name)).decode() for name in ("red", "blue")}


def openai(*content, **more):
    return {"messages": [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "An apple."}], **more}


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(("row", "user"), [
    (llava("<image>\nWhat?", image="a.png"), ["RED", "What?"]),
    (llava("What?\n<image>", image="a.png"), ["What?", "RED"]),
    (llava("What?", image="a.png"), ["RED", "What?"]),  # no placeholder: before the first question
    (llava("<image><image>", image="a.png, b.png"), ["RED", "BLUE"]),  # adjacent
    (llava("From <image> to <image>?", image=["b.png", "a.png"]), ["From ", "BLUE", " to ", "RED", "?"]),
    (llava("What?", images=["a.png", "b.png"]), ["RED", "BLUE", "What?"]),
    (llava("What is an <image> tag?\n"), ["What is an <image> tag?\n"]),  # no image: text stays text
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
    assert shown(source[0]) == [("user", user), ANSWERED]
    assert source[0].id == f"{folder / name}:1"


def test_minimind_roles_system_turns_and_several_rounds(folder):
    turns = [("system", "Be kind."), ("user", "<image>\nOne?"), ("assistant", "An <image>."), ("user", "<image>Two?"),
             ("assistant", "Yes.")]  # fmt: skip
    row = {"image": "a.png, b.png", "conversations": [{"role": role, "content": text} for role, text in turns]}
    assert shown(written(folder, row)[0]) == [
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
    assert [shown(one) for one in source] == [[("user", ["RED", "How many?"])], [("user", ["2 + 2?"])]]
    assert [one.answer for one in source] == ["4", "4"]


def test_lmm_r1_rows_hold_their_messages_as_a_string(folder):
    content = [{"type": "image", "image": f"file://{folder}/b.png"}, {"type": "text", "text": "How many?"}]
    row = {"id": "1", "message": json.dumps([{"role": "user", "content": content}]), "answer": "$4$"}
    made = written(folder, row)[0]
    assert (shown(made), made.answer) == ([("user", ["BLUE", "How many?"])], "$4$")


def test_text_and_captions_without_turns(folder):
    source = written(folder, {"text": "Once upon a time <image>."}, {"text": "A red square.", "image": "a.png"})
    assert shown(source[0]) == [("assistant", ["Once upon a time <image>."])]
    assert shown(source[1]) == [("assistant", ["RED", "A red square."])]


def minimind_tables(n: int) -> tuple[pa.Table, pa.Table]:
    """n rows with the bytes of one picture each, red and blue in turn; n rows with a list of both."""
    talk = json.dumps([{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "An apple."}])
    two = talk.replace("<image>", "<image><image>")
    one_each = pa.table({"conversations": [talk] * n, "image_bytes": [png("red"), png("blue")] * (n // 2)})
    lists = pa.table({"conversations": [two] * n, "image_bytes": [[png("red"), png("blue")]] * n})
    return one_each, lists


def test_minimind_parquet_with_bytes_and_with_lists_of_bytes(folder):
    for table, users in zip(minimind_tables(4), (["BLUE", "What?"], ["RED", "BLUE", "What?"])):
        parquet.write_table(table, folder / "data.parquet")
        assert shown(load(folder / "data.parquet")[3]) == [("user", users), ANSWERED]


def test_a_text_only_parquet_row_has_null_bytes_and_no_placeholder(folder):
    table = pa.table({"conversations": [json.dumps(llava("Hi")["conversations"])], "image_bytes": pa.array([None], pa.binary())})
    parquet.write_table(table, folder / "data.parquet")
    assert shown(load(folder / "data.parquet")[0]) == [("user", ["Hi"]), ANSWERED]


def test_a_row_that_ends_with_a_question_is_for_inference_only(folder):
    path = written(folder, {"messages": [{"role": "user", "content": "Why?"}]}).path
    assert shown(load(path, need_answer=False)[0]) == [("user", ["Why?"])]
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
    "placeholder, null image": (llava("<image>?", image=None), "1 <image> placeholders but 0 images"),
    "images inside and beside": (openai({"type": "image", "image": "a.png"}, images=["a.png"]), "0 <image> .* 1 images"),
    "unknown content part": (openai({"type": "video"}), "unknown content part"),
    "content part of the wrong type": (openai("Hi"), "unknown content part"),
    "missing image": (llava("<image>", image="none.png"), "image file missing"),
    "a folder as image": (llava("<image>", image="."), "image file missing"),
    "image outside": (llava("<image>", image="../secret.png"), "leaves the image folder"),
    "file URL outside": (llava("<image>", image_urls=["file:///etc/hostname"]), "leaves the image folder"),
    "web address": (llava("<image>", image="https://example.com/a.png"), "is a URL"),
    "image of the wrong type": (llava("<image>", image=7), "an image is a int"),
    "null among images": (llava("<image>", image=[None]), "an image is a NoneType"),
    "bad JSON in a message": ({"message": "[{'role'", "answer": "1"}, "message is not JSON"),
    "half a character": (llava("Hi \ud83d"), "text is no Unicode"),
    "half a character in a list": (openai({"type": "text", "text": "\ud83d"}), "text is no Unicode"),
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
    assert shown(source[0]) == [("user", ["Hi"]), ANSWERED]  # its neighbour is well
    with pytest.raises(BadRow, match=reason) as caught:
        source[1]
    assert caught.value.where == f"{path}:2"
    assert str(caught.value) == f"{path}:2: {caught.value.reason}; {caught.value.remedy}"
    assert caught.value.remedy


@pytest.mark.parametrize(("name", "reason"), [("truncated", "(?i)truncated"), ("text", "identify"), ("bomb", "pixels")])
def test_a_broken_image_is_a_bad_row_once_it_is_opened(folder, name, reason):
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")  # 10 kB that unpack to 81 million pixels
    made = written(folder, llava("<image>", image=f"{name}.png"))[0]
    with pytest.raises(BadRow, match=reason):
        made.pictures[0].load()


@pytest.mark.parametrize("images", [[None], [[None]]])
def test_a_parquet_row_with_a_placeholder_and_null_bytes_is_bad(folder, images):
    kind = pa.binary() if images == [None] else pa.list_(pa.binary())
    table = {"conversations": [json.dumps(llava("<image>")["conversations"])], "image_bytes": pa.array(images, kind)}
    parquet.write_table(pa.table(table), folder / "data.parquet")
    with pytest.raises(BadRow, match="0 images|NoneType"):
        load(folder / "data.parquet")[0]


def test_a_row_cut_to_nothing_is_named_too(folder):
    made = written(folder, llava("<image>" + "long " * 50, image="a.png"))[0]
    with pytest.raises(BadRow, match="nothing left to learn") as caught:
        render(made, TEMPLATES.make("pupil"), Tokenizer(), image_tokens=5, max_length=20)
    assert caught.value.where == made.id


def test_a_bug_of_ours_is_not_a_bad_row(folder, monkeypatch):
    source = written(folder, llava("Hi"))
    monkeypatch.setattr(conversations, "check_order", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source[0]


# ---------------------------------------------------------------- sources


def test_every_source_is_indexed_at_random_and_iterated(folder):
    rows = [llava(f"Question {i}") for i in range(20)]
    table = pa.table({"conversations": [json.dumps(row["conversations"]) for row in rows]})
    parquet.write_table(table, folder / "data.parquet", row_group_size=3)
    texts = [f"Question {i}" for i in range(20)]
    for source in (written(folder, *rows), written(folder, *rows, name="data.json"), load(folder / "data.parquet")):
        assert len(source) == 20
        assert [one.messages[0].text for one in source] == texts
        assert [source[i].messages[0].text for i in (19, 0, 7)] == [texts[i] for i in (19, 0, 7)]
        with pytest.raises(IndexError):
            source[20]


def test_blank_lines_and_a_missing_last_line_end_are_no_rows(folder):
    (folder / "data.jsonl").write_text('\n{"text": "héllo 你好"}\r\n\n{"text": "two"}')
    assert [one.messages[0].text for one in load(folder / "data.jsonl")] == ["héllo 你好", "two"]


def test_parquet_keeps_few_row_groups_in_memory(folder, monkeypatch):
    monkeypatch.setattr(conversations, "KEPT_BYTES", 1000)
    parquet.write_table(minimind_tables(20)[0], folder / "data.parquet", row_group_size=2)
    source, most = load(folder / "data.parquet"), 0
    for i in np.random.default_rng(0).permutation(20):
        assert source[int(i)].pictures
        most = max(most, len(source.rows.kept))
        assert sum(table.nbytes for table in source.rows.kept.values()) <= 1000
    assert 1 < most < 10


def test_a_huge_row_group_is_refused_with_the_command_that_splits_it(folder, monkeypatch):
    parquet.write_table(minimind_tables(20)[1], folder / "data.parquet", use_dictionary=False)
    rewrite(folder / "data.parquet", folder / "small.parquet", rows=2)
    monkeypatch.setattr(conversations, "KEPT_BYTES", 3000)
    with pytest.raises(ValueError, match=r"python -m dataset.formats.conversations .*data.parquet"):
        load(folder / "data.parquet")
    source = load(folder / "small.parquet")
    assert blocks(source).tolist() == [i // 2 for i in range(20)]
    assert [shown(one) for one in source] == [[("user", ["RED", "BLUE", "What?"]), ANSWERED]] * 20


def test_a_folder_is_all_its_files(folder):
    written(folder, llava("One"), name="a.json")
    written(folder, llava("Two"), llava("Three"), name="b.jsonl")
    assert sorted(one.messages[0].text for one in load(folder)) == ["One", "Three", "Two"]


@pytest.mark.parametrize(("name", "text"), [("none.jsonl", None), ("a.csv", "x"), ("a.json", "{"), ("a.json", "{}")])
def test_a_file_that_cannot_be_read_at_all_is_named(folder, name, text):
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises((FileNotFoundError, ValueError, TypeError), match=name):
        load(folder / name)


def test_pictures_are_looked_for_in_the_folder_that_is_given(folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(llava("<image>", image="a.png")))
    assert shown(load(path, image_folder=folder)[0])[0] == ("user", ["RED"])


def named(name: str, n: int) -> list[Conversation]:
    return [Conversation(f"{name}:{i}", (Message("assistant", (name,)),)) for i in range(n)]


def test_a_mixture_shows_each_source_as_often_as_its_weight_says():
    mixture = Mixture([(named("a", 10), 1), (named("b", 10), 2), (named("c", 10), 0.5)])
    ids = [one.id for one in mixture]
    assert len(ids) == len(mixture) == 35
    assert sorted(i for i in ids if i[0] == "a") == [f"a:{i}" for i in range(10)]
    assert sorted(i for i in ids if i[0] == "b") == sorted([f"b:{i}" for i in range(10)] * 2)
    assert len({i for i in ids if i[0] == "c"}) == 5


def test_a_mixture_is_a_function_of_its_seed():
    made = [[one.id for one in Mixture([(named("a", 50), 0.5)], seed)] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_a_mixture_keeps_blocks_apart():
    class Grouped(list):
        def blocks(self):
            return np.arange(len(self)) // 2

    mixture = Mixture([(Grouped(named("a", 6)), 1), (named("b", 3), 1), (Grouped(named("c", 4)), 2)])
    block = blocks(mixture)
    members = [{one.id for one, own in zip(mixture, block) if own == b} for b in range(5)]
    assert members == [{"a:0", "a:1"}, {"a:2", "a:3"}, {"a:4", "a:5"}, {"c:0", "c:1"}, {"c:2", "c:3"}]
    assert (block == -1).sum() == 3


@pytest.mark.parametrize(("spec", "expected"), [
    ("data.jsonl", ("data.jsonl", 1.0)), ("data.jsonl:0.5", ("data.jsonl", 0.5)), ("world:3", ("world", 3.0)),
    ("a:b.jsonl", ("a:b.jsonl", 1.0)),
])  # fmt: skip
def test_a_weight_may_follow_the_name(spec, expected):
    assert name_and_weight(spec) == expected


# ---------------------------------------------------------------- counting


def test_bad_rows_are_listed_once_and_too_many_stop_the_run(tmp_path, capsys):
    bad_rows = BadRows(tmp_path / "out" / "bad_rows.jsonl", total=200, max_bad=0.01)
    bad_rows.seen = 10
    for row in (1, 1, 2):
        bad_rows.add(BadRow("why", "cure", f"f:{row}"))
    with pytest.raises(RuntimeError, match="3 bad rows .* --max_bad 0.01 .* f:3: why; cure"):
        bad_rows.add(BadRow("why", "cure", "f:3"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert lines == [{"row": f"f:{row}", "reason": "why", "remedy": "cure"} for row in (1, 2, 3)]
    assert "skipped f:2: why; cure" in capsys.readouterr().err


def test_a_rank_that_does_not_report_still_counts(tmp_path):
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl", total=1, max_bad=1)
    bad_rows.add(BadRow("why", "cure", "f:1"), report=False)
    assert bad_rows.names == {"f:1"}
    assert not os.path.exists(bad_rows.path)
