"""Rewards: the form as a whole, the final answer in full, and nothing that a model can say crashes or pays but a right answer."""

import dataclasses
import importlib.util
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import rewards
from dataset.rewards import Reward, by_gold, gold, judge_from, normal, parts, rule
from dataset.tasks import Cut, Example, dialogue
from model.registry import TASKS

math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is optional")


def example(answer: str) -> Example:
    return Example(dialogue("row", [], [("What is it?", "")]), answer, "file")


def formed(body: str, thoughts: str = "I think.") -> str:
    return f"<think>{thoughts}</think><answer>{body}</answer>"


JUDGE = rule(by_gold)

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
    assert JUDGE(example("8"), answer) == Reward(0.0, 0.0, 0.0)


def test_an_answer_that_did_not_end_by_itself_has_no_form():
    assert JUDGE(example("8"), formed("8")) == Reward(1.0, 1.0, 1.1)
    assert JUDGE(example("8"), Cut(formed("8"))) == Reward(0.0, 0.0, 0.0)


def test_a_wrong_answer_in_the_form_is_paid_for_the_form_alone():
    assert JUDGE(example("8"), formed("9")) == Reward(0.0, 1.0, 0.1)


def test_a_task_scores_its_own_answers_and_only_those_in_the_form():
    task = TASKS.make("arithmetic")
    question = task.examples("train", 1)[0]
    judge = rule(task.score)
    assert judge(question, formed(question.answer)).total == 1.1
    assert judge(question, f"<answer>{question.answer}</answer>").total == 0.0  # the task alone would take it
    row = task.row(3)
    assert parts(row.messages[-1].text), "what stage 2 learned from has the form"


# ---------------------------------------------------------------- the final answer

RIGHT = [
    ("42", ["42", " 42 ", "42.", "+42", "42.0", "$42$", "\\boxed{42}", "$\\boxed{42}$", "\\(42\\)", "84/2", "４２", "42 cm",
            "42°", "42^\\circ", "42 \\text{ cm}", "\\text{42}", "42 cm^2", "42 平方厘米", "42 degrees", "42%"]),
    ("-7", ["-7", "−7", "- 7", "-7.00"]), ("1,234", ["1234", "1,234", "1234.0"]), ("0", ["0", "-0", "0.0", "0/5"]),
    ("1/2", ["1/2", "0.5", "\\frac{1}{2}", "\\dfrac{1}{2}", "2/4", ".5"]), ("100/3", ["100/3", "\\frac{100}{3}"]),
    ("3.14", ["3.14", "3.141", "3.135", "\\pi", "157/50"]), ("78.54", ["78.54", "78.5398", "25\\pi", "25π"]),
    ("25\\pi", ["25π", "25 \\pi", "25pi", "25*π", "50π/2", "\\frac{50\\pi}{2}", "$25\\pi$", "25π cm^2"]),
    ("\\frac{\\pi}{4}", ["π/4", "pi/4", "\\frac{\\pi}{4}", "1/4 π"]), ("-π", ["-π", "-1π"]),
    ("B", ["B", "b", "(B)", "B.", "(b)", "B)", "Ｂ"]),
    ("up, left, left", ["up, left, left", "U L L", "ULL", "上左左", "Up Left Left", "up→left→left", "up,left,left."]),
    ("left", ["left", "Left", "左"]), ("red circle", ["red circle", "Red  Circle", "red circle."]),
    ("三角形", ["三角形", "三角形。"]),
]  # fmt: skip
WRONG = [
    ("42", ["41", "42.001", "", "x", "6*7", "6\\cdot 7", "6+36", "42 or 43", "41, 42", "41 42", "about 42", "42 43", "4 2",
            "42!", "forty two", "42/0", "4²", "42^1", "42e0", "0x2a", "inf", "nan"]),
    ("12", ["3*4", "3 × 4", "13, 12", "1,2", "12 12"]), ("144", ["12^2", "12²", "12**2"]),
    ("100/3", ["33.33", "33.3333333333", "33"]), ("1/2", ["1/3", "1/2/1", "2", "1 2"]), ("0.5", ["0.54", "0.6", "0"]),
    ("25\\pi", ["78.54", "25", "π25", "2π5", "25ππ", "24π", "25 pie"]), ("25", ["25π"]),
    ("B", ["A", "AB", "A or B", "B, C", "the answer is B", "B. C", "K"]),
    ("up, left, left", ["up, left", "left, left, up", "up, left, left, left", "up left or left", "up, jump, left"]),
    ("red circle", ["circle", "a red circle or a blue one", "red circle, blue circle"]),
]  # fmt: skip


def cases(table):
    return [(right, said) for right, answers in table for said in answers]


@pytest.mark.parametrize(("right", "said"), cases(RIGHT))
def test_the_same_answer_in_another_form_is_right(right, said):
    assert JUDGE(example(right), formed(said)).accuracy == 1.0


@pytest.mark.parametrize(("right", "said"), cases(WRONG))
def test_what_is_not_the_answer_in_full_is_wrong(right, said):
    assert not gold(right).matches(said)


def test_a_gold_answer_matches_itself_in_every_kind():
    for right, _ in RIGHT:
        assert gold(right).matches(right), right
        assert gold(right).matches(formed(right)) is False, "tags are taken off before"


@pytest.mark.parametrize("nothing", [None, "", "   ", "$$", ".", "\\boxed{}", "?!"])
def test_a_gold_answer_that_nothing_can_match_is_an_error(nothing):
    with pytest.raises(ValueError, match="nothing can match it"):
        gold(nothing)


def test_latex_without_math_verify_is_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        gold("\\sqrt{2}")


@math_verify
def test_latex_is_compared_by_meaning_behind_the_check_of_operators():
    root = gold("2\\sqrt{3}")
    assert root.kind == "latex" and root.matches("2\\sqrt{3}") and root.matches("$2\\sqrt{3}$") and root.matches("\\sqrt{3} 2")
    assert not root.matches("3\\sqrt{2}") and not root.matches("2*\\sqrt{3}") and not root.matches("\\sqrt{12}, 2\\sqrt{3}")
    assert not gold("x^2").matches("x^3")
    assert gold("25\\pi").kind == "number", "what the rules read never goes to math-verify, which wants $25\\pi$"


@math_verify
def test_math_verify_works_in_threads():
    found = []
    worker = threading.Thread(target=lambda: found.append(gold("\\sqrt{2}").matches("\\sqrt{2}")))
    worker.start()
    worker.join()
    assert found == [True]


@math_verify
def test_latex_that_means_nothing_is_an_error():
    with pytest.raises(ValueError, match="even math-verify cannot read"):
        gold("\\frac{}{")


# ---------------------------------------------------------------- whatever a model says

GOLDS = [gold(right) for right, _ in RIGHT]
PIECES = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "\\frac{", "}", "{", "\\boxed{", "$", "π", "\\pi", "1", "/0", "9" * 50, ",",
    ".", "-", "e", "^", "__import__('os')", "\x00", "\ud800", "上", "U", "²", "٣", " "])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=80).map(lambda data: data.decode("utf-8", "replace")), st.text(max_size=80),
                 st.lists(PIECES, max_size=12).map("".join)))  # fmt: skip
def test_random_bytes_never_crash_a_reward(text):
    for found in GOLDS:
        assert found.matches(text) in (True, False)
        reward = JUDGE(example("42"), formed(text))
        assert 0 <= reward.total <= 1.1
    assert JUDGE(example("42"), text).total in (0.0, 0.1, 1.1)
    assert isinstance(normal(text), str)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join)))
def test_a_gold_answer_is_understood_or_refused_and_then_matches_itself(text):
    try:
        found = gold(text)
    except ValueError:
        return
    assert found.matches(text) or len(text) > rewards.LONGEST


@math_verify
@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12).map("".join))
def test_random_pieces_never_crash_math_verify(text):
    assert gold("2\\sqrt{3}").matches(text) in (True, False)


@math_verify
def test_text_of_a_model_is_never_evaluated_where_math_verify_reads_it_either(tmp_path):
    golds = [gold(right) for right in ("2\\sqrt{3}", "x^2", "e^{2x}+x^{100}", "(x+1)^2", "e^{x^2}+x^2")]
    file = tmp_path / "touched"
    for text in (f"open({str(file)!r}, 'w')", f"__import__('pathlib').Path({str(file)!r}).touch()", "9**9**9**9", "9^{9^{9^{9}}}",
                 "9^{9^{9}}+x", "\\sqrt{9^{9^{9^9}}}", "9^9^9^9", "9^(9^(9^9))", "9^{999999999}", "((9^99)^99)^99", "99!!!!",
                 "{{{9}^{99}}^{99}}^{99}", "\\binom{999999999}{99999999}", "\\sum_{k=1}^{99}k"):  # fmt: skip
        for found in golds:
            assert not found.matches(text), text
    assert not file.exists()


@math_verify
@pytest.mark.parametrize(("right", "said"), [
    ("x^2", "x^{2}"), ("e^{2x}+x^{100}", "x^{100}+e^{2x}"), ("(x+1)^2", "(1+x)^2"), ("x^{10}", "x^{10}"), ("\\frac{\\sqrt{3}}{3}",
    "\\frac{1}{\\sqrt{3}}"), ("e^{x^2}", "e^{x^2}"), ("2\\sqrt{3}", "\\left(2\\sqrt{3}\\right)"),
])  # fmt: skip
def test_latex_in_another_form_is_right_where_it_takes_no_more_than_the_gold_answer_does(right, said):
    assert gold(right).matches(said)


def test_text_of_a_model_is_never_evaluated(tmp_path):
    file = tmp_path / "touched"
    for text in (f"open({str(file)!r}, 'w')", f"__import__('pathlib').Path({str(file)!r}).touch()", "9**9**9**9"):
        for found in GOLDS:
            assert not found.matches(text)
    assert not file.exists()


def test_a_long_final_answer_is_wrong_whatever_it_ends_with():
    assert not gold("42").matches("0" * 300 + "42")


# ---------------------------------------------------------------- one's own reward


def test_a_function_in_a_file_is_a_reward(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(example, answer):\n    return len(example.answer) / max(1, len(answer))\n")
    judge = judge_from(f"{file}:short")
    assert judge(example("8"), "8 8 8 8 ") == Reward(0.125, 0.0, 0.125)
    assert judge(example("8"), formed("8")).format == 1.0
    assert judge_from("rule") is None


@pytest.mark.parametrize(("name", "message"), [
    ("mine.py:long", "has no function 'long'; it has short"), ("mine.py", "my_file.py:function, not"),
    ("yours.py:short", "my_file.py:function, not"), ("nothing", "--reward is rule, or a function in a file"),
])  # fmt: skip
def test_a_reward_that_there_is_not_is_refused(name, message, tmp_path):
    (tmp_path / "mine.py").write_text("def short(example, answer):\n    return 0\n")
    with pytest.raises(ValueError, match=message):
        judge_from(str(tmp_path / name))


def test_a_bug_in_a_reward_ends_the_run_and_is_no_zero(tmp_path):
    functions = ("def bad(example, answer):\n    return 1 / 0\n", "def nan(example, answer):\n    return float('nan')\n")
    (tmp_path / "mine.py").write_text("".join(functions))
    with pytest.raises(ZeroDivisionError):
        judge_from(f"{tmp_path / 'mine.py'}:bad")(example("8"), "8")
    with pytest.raises(ValueError, match="a reward is a finite number"):
        judge_from(f"{tmp_path / 'mine.py'}:nan")(example("8"), "8")


def test_a_reward_is_plain_data():
    assert dataclasses.asdict(Reward(1.0, 1.0, 1.1)) == {"accuracy": 1.0, "format": 1.0, "total": 1.1}
