"""Rewards: the form as a whole, and nothing that a model can say crashes or pays but a right answer."""

import dataclasses

import pytest
from hypothesis import given, settings

from dataset.rewards import Reward, answer_reward, matches_gold, parts, reward_function
from dataset.tasks import Example, Truncated, dialogue
from model.registry import TASKS
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
