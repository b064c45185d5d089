"""Rewards: the form as a whole, and nothing that a model can say crashes or pays but a right answer."""

import dataclasses
import json
import time

import pytest
from hypothesis import given, settings

from dataset.bad_rows import BadRow, BadRows
from dataset.formats.gold_answers import gold, gold_text
from dataset.mixture import load
from dataset.problems import of_rows
from dataset.rewards import Reward, answer_reward, matches_gold, parts, reward_function
from dataset.tasks import Example, Truncated, dialogue
from model.registry import TASKS
from tests.answer_pairs import CASES
from tests.test_gold_answers import NOISE, RIGHT, cases


def example(answer: str) -> Example:
    return Example(dialogue("row", [], [("What is it?", "")]), answer, "file")


def formed(body: str, thoughts: str = "I think.") -> str:
    return f"<think>{thoughts}</think><answer>{body}</answer>"


REWARD = answer_reward(matches_gold)

# ---------------------------------------------------------------- the form


@pytest.mark.parametrize("answer", [
    "<think>3+5=8</think><answer>8</answer>", " <think>3+5=8\nso</think>\n<answer>8</answer>\n",
    "<think><b></think><answer>8</answer>",
])  # fmt: skip
def test_the_form_is_reasoning_and_then_an_answer(answer):
    assert parts(answer)[1] == "8"


@pytest.mark.parametrize("answer", [
    "", "8", "<answer>8</answer>", "<think>x</think>8", "<think>x</think><answer>8", "x<think>x</think><answer>8</answer>",
    "<think>x</think><answer>8</answer>.", "<think>x</think> so <answer>8</answer>", "<think></think><answer>8</answer>",
    "<think>x</think><answer> </answer>", "<answer>8</answer><think>x</think>", "<think>x<think>x</think><answer>8</answer>",
    "<think>x</think><answer>7</answer><answer>8</answer>", "<think>x</think><answer>7</answer></answer>",
    "<think>x</think><think>y</think><answer>8</answer>", "<THINK>x</THINK><ANSWER>8</ANSWER>",
])  # fmt: skip
def test_anything_else_is_not_the_form(answer):
    assert parts(answer) is None
    assert REWARD(example("8"), answer) == Reward(0.0, 0.0, 0.0)


def test_an_answer_that_did_not_end_by_itself_has_no_form():
    assert REWARD(example("8"), formed("8")) == Reward(1.0, 1.0, 1.1)
    assert REWARD(example("8"), Truncated(formed("8"))) == Reward(0.0, 0.0, 0.0)


def test_a_wrong_answer_in_the_form_is_paid_for_the_form_alone():
    assert REWARD(example("8"), formed("9")) == Reward(0.0, 1.0, 0.1)


def test_the_final_answer_alone_is_compared_with_the_gold_answer_in_whatever_form():
    for right, answer in cases(RIGHT):
        assert REWARD(example(right), formed(answer)) == Reward(1.0, 1.0, 1.1), answer
    assert REWARD(example("8"), formed("9", thoughts="8")).accuracy == 0.0


def test_a_task_scores_its_own_answers_and_only_those_in_the_form():
    task = TASKS.make("arithmetic")
    question = task.examples("train", 1)[0]
    reward = answer_reward(task.score)
    assert reward(question, formed(question.answer)).total == 1.1
    assert reward(question, f"<answer>{question.answer}</answer>").total == 0.0  # the task alone would take it
    row = task.row(3)
    assert parts(row.messages[-1].text), "what stage 2 learned from has the form"


@settings(max_examples=300, deadline=None)
@given(NOISE)
def test_random_bytes_never_crash_a_reward(text):
    assert 0 <= REWARD(example("42"), formed(text)).total <= 1.1
    assert REWARD(example("42"), text).total in (0.0, 0.1, 1.1)


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize("right", sorted({right for right, _, _ in CASES}))
def test_a_right_answer_is_paid_in_any_form_and_a_near_miss_is_not(right):
    verdicts = {answer: paid for gold, answer, paid in CASES if gold == right}
    assert {answer: REWARD(example(right), formed(answer)).accuracy == 1.0 for answer in verdicts} == verdicts


def test_there_are_many_pairs_of_both_verdicts_and_languages():
    assert len(CASES) == len(set(CASES)) and sum(paid for *_, paid in CASES) > 500 and sum(not paid for *_, paid in CASES) > 500
    assert sum(any("\u4e00" <= char <= "\u9fff" for char in right + answer) for right, answer, _ in CASES) > 200


@pytest.mark.parametrize("right", ["x^2+2x+1", "2\\sqrt{3}", "e^{x^2}+x^2", "9^9", "(x+1)^2", "\\binom{5}{2}", "42", "(3, 4)"])
@pytest.mark.parametrize("answer", [
    "9^{9^9}", "9^9^9", "x^{9^9}", "(((9^99)^99)^99)^99", "99!!!", "(x+9)^{99}", "(x+y)^{99}",
    "\\binom{99999999}{9999999}", "1e9999999", "9" * 200, "(" * 200, "(" * 100 + ")" * 100, "|" * 60,
    "\\sqrt{" * 28 + "2" + "}" * 28, "\\sqrt{" + "9" * 60 + "}",
    "1+" * 90 + "1", "亿" * 150, "1 h " * 50, "x=1 or " * 25 + "x=2",
])  # fmt: skip
def test_no_answer_takes_long_to_be_refused(right, answer):
    comparison = gold(right)
    comparison.matches("x^2+2x")  # math-verify is loaded
    started = time.process_time()
    assert not comparison.matches(answer)
    assert time.process_time() - started < 2


# ---------------------------------------------------------------- golds of rows


@pytest.mark.parametrize(("answer", "right", "wrong"), [
    ("<answer> 5 </answer>", "5", "6"), (["3", "three"], "three", "four"), (["3", "4"], "4", "3, 4"),
    ([3, "B. cat"], "cat", "dog"), ("<think>2+3</think><answer>5</answer>", "5", "2"), ("\u200b5", "5", "6"),
    ("#### 5", "5", "6"), ("The answer is 5", "5", "6"), ("B. 60°", "60", "70"), ("(3, 4)", "(3,4)", "(4,3)"), (5, "5", "6"),
    (0, "0", "1"), (2.5, "5/2", "2"), (5.0, "5", "5.04"), ('["3", "three"]', "3", "4"), ("[1, 2]", "[1,2]", "1"),
    ("First $2+3$, so $\\boxed{\\frac{1}{2}}$ it is.", "0.5", "2"),
])  # fmt: skip
def test_the_gold_answer_of_a_row_is_understood_whatever_is_around_it(answer, right, wrong, tmp_path):
    (item,) = problems_of([answer], tmp_path)
    assert item.reward(item.example, formed(right)).total == 1.1
    assert item.reward(item.example, formed(wrong)).total == 0.1


@pytest.mark.parametrize(("answer", "name"), [
    (float("nan"), "nan, not a finite number"), (float("inf"), "inf, not a finite number"),
    (True, "True, a bool"), (False, "False, a bool"), ({"value": 5}, "{'value': 5}, a dict"),
    ([], "[], a list"), ([["3"]], "[['3']], a list"), (["3", None], "None, a NoneType"), ("nan", "nothing can match it"),
    (["3", "$$"], "nothing can match it"), ("x " * 101, "characters"), ("\\frac{}{", "cannot read"),
])  # fmt: skip
def test_a_gold_answer_that_nothing_can_match_is_a_bad_row_that_names_it(answer, name, tmp_path):
    assert [item.example.answer for item in problems_of(["1", answer], tmp_path, max_bad=0.5)] == ["1"]
    (bad,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert bad["row"].endswith("rows.jsonl:2") and name in bad["reason"]
    with pytest.raises(ValueError):
        gold(answer)


def problems_of(answers: list, folder, max_bad: float = 0.0) -> list:
    """The problems of a file whose rows have these gold answers."""
    rows = [{"conversations": [{"role": "user", "content": "What is x?"}], "answer": answer} for answer in answers]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load(folder / "rows.jsonl", need_answer=False)
    return of_rows(source, len(rows), None, BadRows(folder / "bad.jsonl", len(rows), max_bad))


def test_the_remedy_for_a_bool_is_a_word():
    with pytest.raises(BadRow, match='write a text, "yes"'):
        gold_text(True)


# ---------------------------------------------------------------- one's own reward


def test_a_function_in_a_file_is_a_reward(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(example, answer):\n    return len(example.answer) / max(1, len(answer))\n")
    reward = reward_function(f"{file}:short")
    assert reward(example("8"), "8 8 8 8 ") == Reward(0.125, 0.0, 0.125)
    assert reward(example("8"), formed("8")).format == 1.0
    assert reward_function("rule") is None


@pytest.mark.parametrize(("name", "message"), [
    ("mine.py:long", "has no function 'long'; it has short"), ("mine.py", "my_file.py:function, not"),
    ("yours.py:short", "my_file.py:function, not"), ("nothing", "--reward is rule, or a function in a file"),
])  # fmt: skip
def test_a_reward_that_does_not_exist_is_refused(name, message, tmp_path):
    (tmp_path / "mine.py").write_text("def short(example, answer):\n    return 0\n")
    with pytest.raises(ValueError, match=message):
        reward_function(str(tmp_path / name))


def test_a_bug_in_a_reward_ends_the_run_and_is_not_a_zero(tmp_path):
    functions = ("def bad(example, answer):\n    return 1 / 0\n", "def nan(example, answer):\n    return float('nan')\n")
    (tmp_path / "mine.py").write_text("".join(functions))
    with pytest.raises(ZeroDivisionError):
        reward_function(f"{tmp_path / 'mine.py'}:bad")(example("8"), "8")
    with pytest.raises(ValueError, match="a reward is a finite number"):
        reward_function(f"{tmp_path / 'mine.py'}:nan")(example("8"), "8")


def test_a_reward_is_plain_data():
    assert dataclasses.asdict(Reward(1.0, 1.0, 1.1)) == {"accuracy": 1.0, "format": 1.0, "total": 1.1}
