"""Damaged rows and pictures, some hundred of each: all are read, or refused with a reason. The long form: tests/fuzz.py."""

import zipfile

import pytest
from PIL import Image

from dataset.bad_rows import BadRow, BadRows
from dataset.images import from_bytes
from dataset.mixture import load
from dataset.vision import decoding
from model.registry import UserError
from tests.fuzz import Count, table
from tests.fuzz_pictures import BOMBS, flat, flat_png, fuzz_pictures, icon, use, zip_bomb
from tests.fuzz_rows import HALF, WRITERS, fuzz_rows


def test_every_damaged_row_is_read_or_refused_with_a_reason(tmp_path):
    counts = fuzz_rows(tmp_path, 480, seed=1)
    assert [one.uncaught for one in counts] == [[]] * 2 * len(WRITERS), table(counts)
    assert all(one.tried >= 20 and one.slowest < 5 for one in counts) and sum(one.refused for one in counts) > 100


def test_every_damaged_picture_is_opened_or_refused_with_a_reason():
    counts = fuzz_pictures(400, seed=1, bombs=False)
    assert not [one.uncaught for one in counts if one.uncaught] and len(counts) >= 15, table(counts)
    assert 100 < sum(one.refused for one in counts) < sum(one.tried for one in counts) and max(one.slowest for one in counts) < 5


def test_what_parquet_cannot_hold_is_written_as_json(tmp_path):
    WRITERS["parquet"](tmp_path / "rows.parquet", [{"answer": [{}], "question": "a"}, {"answer": "b\ud83d"}])
    source = load(tmp_path / "rows.parquet")
    assert len(source) == 2


def test_what_is_not_caught_is_counted_and_fails():
    def fail():
        raise KeyError("a bug")

    counted = Count("a kind")
    counted.add(fail)
    assert counted.failed and "a bug" in counted.uncaught[0] and "a kind" in table([counted])


@pytest.mark.parametrize(("make", "reason"), [
    (BOMBS["PPM with a comment of 50 MB"], "more than 200,000 parts"), (lambda: icon(flat_png(2000)), "an icon of 2000 x 2000"),
    (lambda: flat_png(7200), "7200 x 7200 pixels, at most 51,000,000"), (BOMBS["JPEG of 2,000 scans"], "pixels in 2009 scans"),
    (lambda: flat("JPEG2000", 2900), "at most 8,000,000"), (lambda: b"P3 3000 3000 255\n1 2 3 ", "at most 1,000,000"),
    (BOMBS["PNG with a million chunks"], "more than 200,000 parts"), (lambda: bytes(decoding.MAX_BYTES + 1), "bytes, at most"),
])  # fmt: skip
def test_a_picture_that_would_cost_memory_or_time_is_refused_before_it_is_unpacked(make, reason, monkeypatch):
    data = make()
    Image.init()
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("unpacked"))
    for look in (lambda: from_bytes(data).size, from_bytes(data).load):
        with pytest.raises(BadRow, match=f"image cannot be opened: .*{reason}"):
            look()


def test_a_zip_that_unpacks_without_a_bound_is_refused():
    for size, reason in ((1000, "compressed by method 14"), (decoding.MAX_BYTES + 1, "larger than 100000000 bytes")):
        with pytest.raises(BadRow, match=reason):
            use(zip_bomb(size, zipfile.ZIP_LZMA if size == 1000 else zipfile.ZIP_DEFLATED))


def test_a_large_jpeg_is_unpacked_small_for_a_small_model_and_whole_for_a_page():
    picture = from_bytes(flat("JPEG", 1600))
    assert (picture.size, picture.load().size) == ((1600, 1600), (1600, 1600))
    assert [picture.at_least(side).size[0] for side in (100, 200, 201, 400, 900, 5000)] == [200, 200, 400, 400, 1600, 1600]
    assert from_bytes(flat("PNG", 64)).at_least(8).size == (64, 64)


@pytest.mark.parametrize("line", [
    "[" * 100_000, '{"text": ' + "[" * 100_000, '{"text": "\\ud83d"}', '{"question": "a", "answer": 1e999}', "\0", "1" * 5000,
    '{"question": "a", "answer": "b", "\\ud83d": 1, "image": "\\ud83d.png"}', '{"texts": []}', '{"prompt": []}',
    '{"question": "a", "answer": "b", "history": 7}', '{"text": "a", "image": "' + "/u" * 3000 + '"}',
    '{"conversations": [{"from": "\\udcff", "value": "a"}]}',
])  # fmt: skip
def test_a_broken_line_is_a_bad_row_that_the_list_can_bear(line, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    source, listed = load(file), BadRows(tmp_path / "bad_rows.jsonl", 2, 1.0)
    with pytest.raises(BadRow) as bad:
        source[1]
    bad.value.where += HALF  # as of a file whose name is not UTF-8
    listed.add(bad.value)
    assert bad.value.reason and bad.value.remedy and "rows.jsonl:2" in listed.path.read_text(encoding="utf-8")
    assert len(str(bad.value)) < 3000 and source[0].messages[0].text == "good"


def test_an_array_of_deep_brackets_is_named_and_a_broken_record_of_a_table_costs_its_row_alone(tmp_path):
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="rows.json is not JSON"):
        load(tmp_path / "rows.json")
    (tmp_path / "rows.csv").write_bytes(b"question,answer\na,b\nbro\rken,b\nc,d\n")
    source = load(tmp_path / "rows.csv")
    assert [source[i].messages[0].text for i in (0, 2)] == ["a", "c"] and len(list(source.walk())) == 3
    with pytest.raises(BadRow, match="rows.csv:2: not csv: new-line character"):
        source[1]
