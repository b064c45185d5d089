"""Reflection on one's own problems: what is put into the model's mouth, which picture is shown, and what is counted."""

import json
import random
import re

import pytest

from dataset.tasks import Truncated
from dataset.tasks.reflection_rows import changed, states, steps_of, wrong_answer
from model.registry import TASKS, UserError
from tests.miniatures import picture

SOLVED = "<think>3 cubes left, 2 right. 3+2=5. So 5.</think><answer>5</answer>"


def asked(folder, *rows):
    """The task of these rows, whose pictures are red and blue."""
    for name in ("red", "blue"):
        picture(folder / f"{name}.png", name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TASKS.make(f"reflection:path={folder / 'rows.jsonl'}")


def row(name, answer, question="How many?", **more):
    return {"image": f"{name}.png", "question": question, "answer": answer, **more}


def of(task, kind):
    return [example for example in task.examples("test", task.size) if example.kind == kind]


def begun(example):
    return example.prompt.messages[-1].text


def test_a_wrong_step_is_the_first_half_of_the_solution_with_its_last_number_changed(tmp_path):
    llava = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": SOLVED}]
    task = asked(tmp_path, {"image": "red.png", "conversations": llava}, row("blue", "7"))
    recovery, swap = of(task, "recovery")[0], of(task, "swap")[0]
    wrong = re.fullmatch(r"<think>3 cubes left, 2 right\. 3\+2=(\d+)\.", begun(recovery))
    assert wrong and wrong[1] != "5" and recovery.answer == "5" and recovery.tags == ("own", "")
    assert begun(swap) == "<think>3 cubes left, 2 right. 3+2=5." and recovery.prompt.messages[0].text == "How many?"


def test_without_a_solution_the_start_states_a_wrong_answer_of_the_same_form(tmp_path):
    task = asked(tmp_path, row("red", "B"), row("blue", "C"), row("red", "a cat", "What?"), row("red", "4", "几个？"))
    starts = {example.answer: (begun(example), example.tags[1]) for example in of(task, "recovery")}
    assert starts["B"] == ("<think>At first sight the answer is C.", "C") and starts["C"][1] == "B"
    assert starts["4"][0].startswith("<think>乍看答案是") and starts["4"][1] in "1234567" and starts["4"][1] != "4"
    assert starts["a cat"][1] in ("B", "C", "4")


def test_a_swapped_picture_is_of_a_row_with_the_same_question_and_its_answer_is_the_right_one(tmp_path):
    task = asked(tmp_path, row("red", "5"), row("blue", "a tree", "What?"), row("blue", "7"), row("red", "a bus", "Which?"))
    swaps = {example.prompt.id.rpartition(":")[2]: example for example in of(task, "swap")}
    shown = {id: example.prompt.pictures[0].key.rpartition("/")[2].partition(":")[0] for id, example in swaps.items()}
    assert shown == {"1/swap": "blue.png", "2/swap": "red.png", "3/swap": "red.png", "4/swap": "blue.png"}
    assert (swaps["1/swap"].answer, swaps["1/swap"].tags) == ("7", ("own", "5"))
    assert begun(swaps["1/swap"]) == "<think>At first sight the answer is 5."
    assert swaps["2/swap"].answer == "" and swaps["2/swap"].tags[1] == "a tree"  # nobody knows the right one


def test_rows_without_pictures_or_with_one_answer_alone_have_no_swap(tmp_path):
    task = asked(tmp_path, {"question": "1+1?", "answer": "2"}, row("red", "5"), row("blue", "5"))
    assert not of(task, "swap") and len(of(task, "markers")) == len(of(task, "recovery")) == 3


def test_metrics_written_out(tmp_path):
    task = asked(tmp_path, row("red", "5"), row("blue", "7"), row("red", "a bus", "What?"))
    examples = task.examples("test", 9)
    said = {("markers", "5"): "5", ("markers", "7"): "Wait, look again: <answer>7</answer>", ("markers", "a bus"): "a car",
            ("recovery", "5"): "5", ("recovery", "7"): examples[4].tags[1], ("recovery", "a bus"): "a bus",
            ("swap", "7"): "7", ("swap", "5"): "7", ("swap", ""): "a tram"}  # fmt: skip
    scores, metrics = task.measure(examples, [said[example.kind, example.answer] for example in examples])
    assert scores == [1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert metrics == {"markers": 2 / 3, "recovery": 2 / 3, "swap": 0.5, "markers_marked": 1 / 3, "recovery_marked": 0,
                       "swap_marked": 0, "recovered": 0.5, "recovery_misled": 1 / 3, "swap_old": 1 / 3}  # fmt: skip


def test_an_answer_that_was_cut_off_is_wrong(tmp_path):
    task = asked(tmp_path, row("red", "5"))
    assert [task.score(task.examples("test", 1)[0], answer) for answer in ("5", Truncated("5"))] == [1, 0]


def test_a_row_without_an_answer_is_named_and_a_file_of_them_is_refused(tmp_path, capsys):
    task = asked(tmp_path, row("red", "5"), {"image": "red.png", "question": "Who?"}, row("green", "6"))
    assert task.size == 1
    printed = capsys.readouterr().out
    assert "rows.jsonl:2: " in printed and "rows.jsonl:3: image file missing" in printed
    with pytest.raises(UserError, match=r"rows.jsonl holds no question with an answer"):
        asked(tmp_path, {"image": "red.png", "question": "Who?"})
    with pytest.raises(FileNotFoundError, match="reflection:path=.*gone.jsonl does not exist"):
        TASKS.make(f"reflection:path={tmp_path / 'gone.jsonl'}")


def test_a_number_is_changed_and_nothing_else_is():
    for text, before, after in (("2 of 3 left.", "2 of ", " left."), ("角是30度。", "角是", "度。"), ("1.25", "1.", "")):
        for seed in range(20):
            found = changed(text, random.Random(seed))
            assert found != text and found.startswith(before) and found.endswith(after)
    assert changed("no number", random.Random(0)) == "no number"
    assert {wrong_answer("5", [], random.Random(seed)) for seed in range(50)} == {"2", "3", "4", "6", "7", "8"}
    assert states("3", "How many?") == "<think>At first sight the answer is 3."


@pytest.mark.parametrize(("said", "steps"), [
    (SOLVED, ("3 cubes left, 2 right.", "3+2=5.", "So 5.")), ("左边3个。右边2个。所以5个。", ("左边3个。", "右边2个。")),
    ("There are 5.", ()), ("5", ()),
])  # fmt: skip
def test_steps_are_the_sentences_before_the_final_answer(said, steps, tmp_path):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": said}]
    task = asked(tmp_path, {"messages": turns})
    assert task.own.problems[0].steps == steps and steps_of(task.examples("test", 1)[0].prompt) == ()
