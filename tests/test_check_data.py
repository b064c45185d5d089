"""--check_data reads everything: counts, bad rows by reason, and rows as they are learned."""

import json
from functools import partial
from types import SimpleNamespace

import pytest

from dataset.bad_rows import TooManyBadRows
from dataset.chat import Conversation, Message
from dataset.check_data import check_data
from dataset.mixture import Mixture, load
from dataset.preferences import load_preferences
from tests import tiny
from tests.conftest import TINY
from tests.miniatures import lines, llava, png

PROCESSOR = tiny.processor()


def run(printed: list[str], max_bad: float = 0.01, check_rows: int = 0) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(max_bad=max_bad, check_rows=check_rows), print0=printed.append)


def checked(source, max_length: int = 1000, **more) -> str:
    """What is printed about a source."""
    printed: list[str] = []
    held_out = more.pop("held_out", None)
    check_data(source, PROCESSOR, partial(PROCESSOR.document, max_length=max_length), run(printed, **more), held_out)
    return "\n".join(printed)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "cut.png").write_bytes(png("red")[:50])
    good = [llava(f"<image>\nWhat is {i}?", image="a.png") for i in range(4)]
    return [*good, llava("Hi <b>", "Type <image> there."), llava("<image>", image="cut.png"), llava("<image>", image="gone.png"),
            llava("<image>", image="none.png")]  # fmt: skip


def test_every_row_and_picture_is_read_and_what_is_bad_is_counted_by_reason(tmp_path, rows, capsys):
    source = load(lines(tmp_path / "rows.jsonl", rows))
    capsys.readouterr()
    text = checked(source, max_bad=0.5)
    documents = [PROCESSOR.document(source[i], 1000) for i in range(5)]
    tokens, learned = sum(map(len, documents)), sum(sum(document.learn) for document in documents)
    assert (f"checked {source.path}: 5 good rows, 4 with pictures (4 pictures), 10 turns, {tokens} tokens, {learned} of them "
            f"learned\n  2 bad: image file missing\n  1 bad: image cannot be opened") in text  # fmt: skip
    assert text.count("【") == 3 and text.count("[image]") == 3  # three rows
    out = capsys.readouterr().out
    assert [f"bad row: {source.path}:{row}: " in out for row in range(1, 9)] == [False] * 5 + [True] * 3


def test_a_typed_placeholder_is_shown_as_it_is_typed(tmp_path, rows):
    source = load(lines(tmp_path / "rows.jsonl", rows[4:5]))
    shown = checked(source)
    assert "Type <image> there." in shown and "[image]" not in shown


def test_more_bad_rows_than_are_allowed_end_the_check_when_all_is_told(tmp_path, rows):
    source = load(lines(tmp_path / "rows.jsonl", rows))
    printed: list[str] = []
    with pytest.raises(TooManyBadRows, match="3 bad rows among 8 seen, more than --max_bad 0.01 allows"):
        check_data(source, PROCESSOR, partial(PROCESSOR.document, max_length=1000), run(printed))
    assert any("2 bad: image file missing" in text for text in printed)
    checked(load(lines(tmp_path / "one.jsonl", [*rows[:5], rows[6]])))  # a single one is never too many


def test_rows_that_are_cut_are_counted(tmp_path, rows):
    source = load(lines(tmp_path / "rows.jsonl", [*rows[:4], llava("Hi", "word " * 100)]))
    assert "  1 rows lose learned tokens to --max_length" in checked(source, max_length=60)
    assert "--max_length" not in checked(source)


def test_check_rows_reads_less_of_each_part(tmp_path, rows):
    parts = [load(lines(tmp_path / f"{name}.jsonl", rows[:4])) for name in "ab"]
    text = checked(Mixture([(parts[0], 2), (Mixture([(parts[1], 1)]), 0.5)]), check_rows=3)
    assert [f"checked {part.path}: 3 good rows" in text for part in parts] == [True, True]


def test_rows_that_are_held_out_as_well_are_counted(tmp_path, rows):
    source = load(lines(tmp_path / "rows.jsonl", rows[:4]))
    other = llava("<image>\nWhat is 2?", "Another answer.", image="a.png")
    held_out = load(lines(tmp_path / "val.jsonl", [rows[1], other, llava("What is 3?")]))
    assert "  2 rows ask what a held-out row asks" in checked(source, held_out=held_out)


def test_preferences_are_checked_as_well(tmp_path):
    pairs = [{"question": f"{i}?", "chosen": "Yes. " * (1 + 50 * (i == 0)), "rejected": "No."} for i in range(3)]
    source = load_preferences(lines(tmp_path / "pairs.jsonl", [*pairs, {"question": "?", "chosen": "a", "rejected": "a"}]))
    printed: list[str] = []
    check_data(source, PROCESSOR, partial(PROCESSOR.pair, max_length=40), run(printed))
    text = "\n".join(printed)
    assert "3 good rows, 0 with pictures (0 pictures), 6 turns" in text and "1 rows lose learned tokens" in text
    assert "1 bad: chosen and rejected are the same answer" in text and "rejected: <s>" in text


def test_drawings_are_not_opened(tmp_path):
    row = Conversation("world:1", (Message("user", (tiny_picture(), "What?")), Message("assistant", ("Red.",))))
    assert "checked a task: 1 good rows, 1 with pictures" in checked([row])


def tiny_picture():
    from dataset.images import Picture

    return Picture("drawn", lambda: 1 / 0)


def test_predictions_can_be_read_again(tmp_path):
    """The lines that 4-eval_chat.py writes hold the pictures of their rows, whatever the form of the row was."""
    (tmp_path / "a.png").write_bytes(png("red"))
    source = load(lines(tmp_path / "rows.jsonl", [llava("<img>a.png</img>What?")]), need_answer=False)
    row = {"conversations": [{"role": "user", "content": "<image>What?"}], "answer": "", "prediction": "Red.",
           "image_urls": [picture.address for picture in source[0].pictures]}  # fmt: skip
    again = load(lines(tmp_path / "predictions.jsonl", [json.loads(json.dumps(row))]), need_answer=False)
    assert again[0].pictures == source[0].pictures


def test_a_check_of_the_data_gives_no_advice_about_steps(run_script, tmp_path):
    lines(tmp_path / "rows.jsonl", [{"text": "alone"}] * 3)
    for more, advised in (("--check_data", False), ("--dry_run", True)):
        done = run_script("1-pretrain_vlm.py", *TINY, "--data", "rows.jsonl", more, cwd=tmp_path)
        assert ("are few to learn from" in done.out) == advised
