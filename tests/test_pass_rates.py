"""The filter by pass rate, on miniatures of the official MM-EUREKA and LMM-R1 files."""

import json

import pytest
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.formats import pass_rates
from dataset.formats.pass_rates import by_pass_rate, pass_rate
from dataset.mixture import load
from model.registry import UserError


def eureka(folder, i: int, **more) -> dict:
    """A row as MM-EUREKA publishes it; every second without a picture."""
    images = [f"file://{folder}/a.png"] if i % 2 else []
    question = ("<image>\n" if images else "") + f"Question {i}?"
    turns = [{"role": "user", "content": question}]
    return {"id": str(i), "conversations": turns, "answer": f"${i}$", "image_urls": images, **more}


def lmm_r1(folder, i: int, **more) -> dict:
    """A row as LMM-R1 publishes it: the messages are a string."""
    images = [{"type": "image", "image": f"file://{folder}/a.png"}] if i % 2 else []
    content = [*images, {"type": "text", "text": f"Question {i}?"}]
    return {"id": str(i), "message": json.dumps([{"role": "user", "content": content}]), "answer": str(i), **more}


@pytest.fixture(params=[eureka, lmm_r1])
def source(request, tmp_path):
    """Nine rows solved in 0/8 to 8/8 of the answers, and one that does not say."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    rows = [request.param(tmp_path, i, pass_rate=i / 8) for i in range(9)] + [request.param(tmp_path, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load(tmp_path / "rows.jsonl", need_answer=False)


def questions(source) -> list[str]:
    return [one.messages[-1].text.split()[1] for one in source]


def test_rows_too_easy_or_too_hard_are_left_out(source):
    selected = by_pass_rate(source, 0.25, 0.75)
    assert questions(selected) == ["2?", "3?", "4?", "5?", "6?", "9?"] and len(selected) == 6
    assert questions(by_pass_rate(source, 0, 1)) == questions(source)
    assert [one.answer.strip("$") for one in selected] == ["2", "3", "4", "5", "6", "9"]
    with pytest.raises(IndexError):
        selected[6]


def test_a_row_of_words_alone_has_no_picture(source):
    assert [len(one.pictures) for one in source] == [i % 2 for i in range(10)]


def test_a_folder_is_filtered_file_by_file(source):
    folder = source.path.parent
    (folder / "more.jsonl").write_text(json.dumps(eureka(folder, 20, pass_rate=0.0)) + "\n")
    assert sorted(questions(by_pass_rate(load(folder, need_answer=False), 0.25, 0.75))) == ["2?", "3?", "4?", "5?", "6?", "9?"]


def test_a_pass_rate_that_is_not_a_share_of_1_makes_a_bad_row():
    for value in ("0.5", 1.5, -1, True, [0.5]):
        with pytest.raises(BadRow, match="is not a share of 1"):
            pass_rate({"pass_rate": value})
    assert pass_rate({"pass_rate": None}) is None and pass_rate([]) is None and pass_rate({"solve_rate": 0}) == 0


def test_a_broken_row_stays_in_and_is_named_when_it_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(eureka(tmp_path, 0, pass_rate=0.5)) + "\n{broken\n")
    selected = by_pass_rate(load(tmp_path / "rows.jsonl"), 0.25, 0.75)
    assert len(selected) == 2
    with pytest.raises(BadRow, match="not JSON"):
        selected[1]


def test_bounds_must_be_shares(source):
    for low, high in ((0.5, 0.4), (-0.1, 1), (0, 1.1)):
        with pytest.raises(UserError, match="pass rates"):
            by_pass_rate(source, low, high)


def test_the_command_counts_pass_rates(source, capsys):
    pass_rates.main(pass_rates.Config(source.path, low=0.2, high=0.8))
    assert "6 of 10 rows from 0.2 to 0.8" in capsys.readouterr().out
