"""Data files row by row, never all of a large one in memory; and the rows that are skipped, which are counted and named."""

import errno
import gc
import json
import os
import runpy

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from dataset.bad_rows import BadRow, BadRows
from dataset.batches import blocks
from dataset.formats import files, tables
from dataset.formats.files import complete_lines, rewrite
from dataset.formats.json_rows import NoRows, json_rows
from dataset.mixture import load
from dataset.uncollected import uncollected
from dataset.writing import naming, replacing, write_text
from model.registry import UserError
from tests.miniatures import llava, minimind_tables, png
from tests.test_conversations import ANSWERED, contents, written


def test_every_source_is_indexed_at_random_and_iterated(tmp_path):
    rows = [llava(f"Question {i}") for i in range(20)]
    table = pa.table({"conversations": [json.dumps(row["conversations"]) for row in rows]})
    parquet.write_table(table, tmp_path / "data.parquet", row_group_size=3)
    texts = [f"Question {i}" for i in range(20)]
    for source in (written(tmp_path, *rows), written(tmp_path, *rows, name="data.json"), load(tmp_path / "data.parquet")):
        assert len(source) == 20
        assert [one.messages[0].text for one in source] == texts
        assert [source[i].messages[0].text for i in (19, 0, 7)] == [texts[i] for i in (19, 0, 7)]
        with pytest.raises(IndexError):
            source[20]


def test_blank_lines_and_a_missing_last_line_end_are_not_rows(tmp_path):
    (tmp_path / "data.jsonl").write_text('\n{"text": "héllo 你好"}\r\n\n{"text": "two"}')
    assert [one.messages[0].text for one in load(tmp_path / "data.jsonl")] == ["héllo 你好", "two"]


@pytest.mark.parametrize("text", [
    '[{"a": "]"}, {"b": [1, {}]}]', ' [ {"a": "\\u2028,é"} ,\n\t{"a": "😀"}, 3, [], "x,]" ] \n', "[]", "[\n]", '[{"a": 1}]',
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_rows_of_an_array_are_those_of_the_whole_file_parsed_one_by_one(text, encoding, tmp_path):
    file = tmp_path / "rows.json"
    file.write_bytes(text.encode(encoding))
    rows = json_rows(file)
    assert [rows[i] for i in range(len(rows))] == json.loads(text)
    if len(rows):
        assert rows[0] is not rows[0]  # a row is parsed when it is asked for


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},', '[{"a": 1},]', '[{"a": 1} {"a": 2}]', '[{"a": 1}] x', '[,{"a": 1}]',
                                  '[{"a": 1}[{"a": 2}]', '[{"a": 1}]]', '[{"a": 1}, {"a": }]', '[{"a": 1},,{"a": 2}]'])
def test_an_array_that_is_damaged_anywhere_is_refused(text, tmp_path):
    with pytest.raises(ValueError):
        json.loads(text)
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match="is not JSON.*download it again"):
        json_rows(file)


def test_an_array_without_any_row_is_told(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text("[1, 2]")
    with pytest.raises(NoRows, match="holds one list without a list of rows"):
        json_rows(file)


def test_parquet_keeps_few_row_groups_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 1000)
    parquet.write_table(minimind_tables(20)[0], tmp_path / "data.parquet", row_group_size=2)
    source, most = load(tmp_path / "data.parquet"), 0
    for i in np.random.default_rng(0).permutation(20):
        assert source[int(i)].pictures
        most = max(most, len(source.rows.tables))
        assert sum(table.nbytes for table in source.rows.tables.values()) <= 1000
    assert 1 < most < 10


def test_a_huge_row_group_is_refused_with_the_command_that_splits_it(tmp_path, monkeypatch):
    parquet.write_table(minimind_tables(20)[1], tmp_path / "data.parquet", use_dictionary=False)
    rewrite(tmp_path / "data.parquet", tmp_path / "small.parquet", rows=2)
    monkeypatch.setattr(tables, "MAX_GROUP_BYTES", 3000)
    with pytest.raises(UserError, match=r"python -m dataset.formats.files .*data.parquet"):
        load(tmp_path / "data.parquet")
    source = load(tmp_path / "small.parquet")
    assert blocks(source).tolist() == [i // 2 for i in range(20)]
    assert [contents(one) for one in source] == [[("user", ["RED", "BLUE", "What?"]), ANSWERED]] * 20


@pytest.mark.parametrize(("name", "text"), [("none.jsonl", None), ("a.csv", "x"), ("a.json", "{"), ("a.json", "{}")])
def test_a_file_that_cannot_be_read_at_all_is_named(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((FileNotFoundError, UserError), match=name):
        load(tmp_path / name)


def test_pictures_are_looked_for_in_the_folder_that_is_given(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png("red"))
    source = written(tmp_path, llava("<image>", image="a.png"))
    with pytest.raises(BadRow, match="image file missing"):
        source[0]
    assert contents(load(source.path, image_folder=tmp_path / "pictures")[0])[0] == ("user", ["RED"])


def test_the_command_tells_what_a_file_holds_and_rewrites_it(tmp_path, capsys, monkeypatch):
    file, small = tmp_path / "data.parquet", tmp_path / "small.parquet"
    parquet.write_table(minimind_tables(600)[0], file)
    for arguments in ([file], [file, small]):
        monkeypatch.setattr("sys.argv", ["files", *map(str, arguments)])
        runpy.run_path(files.__file__, run_name="__main__")
    assert f"600 rows; the first: Conversation(id='{file}:1'" in capsys.readouterr().out
    assert np.bincount(load(small).blocks()).tolist() == [256, 256, 88]


# ---------------------------------------------------------------- bad rows


def test_bad_rows_are_listed_once_and_too_many_stop_the_run(tmp_path, capsys):
    bad_rows = BadRows(tmp_path / "out" / "bad_rows.jsonl", total=200, max_bad=0.01)
    bad_rows.seen = 10
    for row in (1, 1, 2):
        bad_rows.add(BadRow("why", "cure", f"f:{row}"))
    with pytest.raises(UserError, match="3 bad rows .* --max_bad 0.01 .* f:3: why; cure"):
        bad_rows.add(BadRow("why", "cure", "f:3"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert lines == [{"row": f"f:{row}", "reason": "why", "remedy": "cure"} for row in (1, 2, 3)]
    assert "skipped f:2: why; cure" in capsys.readouterr().err


def test_a_rank_that_does_not_report_still_counts(tmp_path):
    bad_rows = BadRows(tmp_path / "bad_rows.jsonl", total=1, max_bad=1, report=False)
    bad_rows.add(BadRow("why", "cure", "f:1"))
    assert bad_rows.names == {"f:1"}
    assert not bad_rows.path.exists()


def test_a_large_table_is_read_without_collections_and_they_go_on_after_it():
    with pytest.raises(UserError), uncollected():
        inside = gc.isenabled()
        raise UserError("a damaged file")
    assert (inside, gc.isenabled()) == (False, True)


def test_half_a_character_that_a_crash_left_is_cut_off(tmp_path):
    file = tmp_path / "answers.partial"
    file.write_bytes("[0, \"狐狸\u2028\"]\n[1, \"狐".encode()[:-1])
    assert complete_lines(file) == ["[0, \"狐狸\u2028\"]"] and file.read_bytes() == "[0, \"狐狸\u2028\"]\n".encode()


def test_an_error_of_the_system_names_the_file_and_leaves_what_was_there(tmp_path):
    file = tmp_path / "scores.json"
    write_text(file, "{}")
    for code in (errno.ENOSPC, errno.EIO):
        with pytest.raises(OSError, match=f"{os.strerror(code)}: '.*scores.json'"), replacing(file) as out:
            out.write(b"half")
            raise OSError(code, "said by the system")
    with pytest.raises(OSError, match="No space left on device: '.*scores.json'"), naming(file):
        raise OSError("16576 requested and 1984 written")  # as numpy says it
    with pytest.raises(FileNotFoundError, match="another"), naming(file):
        (tmp_path / "another").read_bytes()
    assert file.read_text() == "{}" and list(tmp_path.iterdir()) == [file]
