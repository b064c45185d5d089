"""Gold answers: the same answer in another form is right, anything else is wrong, and text of a model is never evaluated."""

import importlib.util
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.formats.gold_answers import MAX_LETTERS, gold, normal

math_verify = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is optional")

RIGHT = [
    ("42", ["42", " 42 ", "42.", "+42", "42.0", "$42$", "\\boxed{42}", "$\\boxed{42}$", "\\(42\\)", "84/2", "４２", "42 cm",
            "42°", "42^\\circ", "42 \\text{ cm}", "\\text{42}", "42 cm^2", "42 平方厘米", "42 degrees", "42%"]),
    ("-7", ["-7", "−7", "- 7", "-7.00"]), ("1,234", ["1234", "1,234", "1234.0"]), ("0", ["0", "-0", "0.0", "0/5"]),
    ("1/2", ["1/2", "0.5", "\\frac{1}{2}", "\\dfrac{1}{2}", "2/4", ".5"]), ("100/3", ["100/3", "\\frac{100}{3}"]),
    ("3.14", ["3.14", "3.141", "3.135", "\\pi", "157/50"]), ("78.54", ["78.54", "78.5398", "25\\pi", "25π"]),
    ("25\\pi", ["25π", "25 \\pi", "25pi", "25*π", "50π/2", "\\frac{50\\pi}{2}", "$25\\pi$", "25π cm^2"]),
    ("\\frac{\\pi}{4}", ["π/4", "pi/4", "\\frac{\\pi}{4}", "1/4 π"]), ("-π", ["-π", "-1π"]),
    ("B", ["B", "b", "(B)", "B.", "(b)", "B)", "Ｂ", "the answer is B"]),
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
    ("B", ["A", "AB", "A or B", "B, C", "the answer is A", "B. C", "K"]),
    ("up, left, left", ["up, left", "left, left, up", "up, left, left, left", "up left or left", "up, jump, left"]),
    ("red circle", ["circle", "a red circle or a blue one", "red circle, blue circle"]),
]  # fmt: skip


def cases(table):
    return [(right, answer) for right, answers in table for answer in answers]


@pytest.mark.parametrize(("right", "answer"), cases(RIGHT))
def test_the_same_answer_in_another_form_is_right(right, answer):
    assert gold(right).matches(answer)


@pytest.mark.parametrize(("right", "answer"), cases(WRONG))
def test_what_is_not_the_answer_in_full_is_wrong(right, answer):
    assert not gold(right).matches(answer)


def test_a_gold_answer_matches_itself_in_every_kind():
    for right, _ in RIGHT:
        assert gold(right).matches(right), right
        tagged = f"<think>I think.</think><answer>{right}</answer>"
        assert gold(right).matches(tagged) is False, "tags are taken off before"


@pytest.mark.parametrize("nothing", [None, "", "   ", "$$", ".", "\\boxed{}", "?!"])
def test_a_gold_answer_that_nothing_can_match_is_an_error(nothing):
    with pytest.raises(ValueError, match="nothing can match it"):
        gold(nothing)


def test_a_long_final_answer_is_wrong_whatever_it_ends_with():
    assert not gold("42").matches("0" * 300 + "42")


# ---------------------------------------------------------------- LaTeX


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
@pytest.mark.parametrize(("right", "answer"), [
    ("x^2", "x^{2}"), ("e^{2x}+x^{100}", "x^{100}+e^{2x}"), ("(x+1)^2", "(1+x)^2"), ("x^{10}", "x^{10}"), ("\\frac{\\sqrt{3}}{3}",
    "\\frac{1}{\\sqrt{3}}"), ("e^{x^2}", "e^{x^2}"), ("2\\sqrt{3}", "\\left(2\\sqrt{3}\\right)"),
])  # fmt: skip
def test_latex_in_another_form_is_right_where_it_takes_no_more_than_the_gold_answer_does(right, answer):
    assert gold(right).matches(answer)


@math_verify
def test_math_verify_works_in_threads():
    results = []
    worker = threading.Thread(target=lambda: results.append(gold("\\sqrt{2}").matches("\\sqrt{2}")))
    worker.start()
    worker.join()
    assert results == [True]


@math_verify
def test_latex_that_means_nothing_is_an_error():
    with pytest.raises(ValueError, match="even math-verify cannot read"):
        gold("\\frac{}{")


# ---------------------------------------------------------------- whatever a model says

GOLDS = [gold(right) for right, _ in RIGHT]
PIECES = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "\\frac{", "}", "{", "\\boxed{", "$", "π", "\\pi", "1", "/0", "9" * 50, ",",
    ".", "-", "e", "^", "__import__('os')", "\x00", "\ud800", "上", "U", "²", "٣", " "])  # fmt: skip
NOISE = st.one_of(st.binary(max_size=80).map(lambda data: data.decode("utf-8", "replace")), st.text(max_size=80),
                  st.lists(PIECES, max_size=12).map("".join))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(NOISE)
def test_random_bytes_are_right_or_wrong_and_never_crash(text):
    for answer in GOLDS:
        assert answer.matches(text) in (True, False)
    assert isinstance(normal(text), str)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=8).map("".join)))
def test_a_gold_answer_is_understood_or_refused_and_then_matches_itself(text):
    try:
        answer = gold(text)
    except ValueError:
        return
    assert answer.matches(text) or len(text) > MAX_LETTERS


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
        for answer in golds:
            assert not answer.matches(text), text
    assert not file.exists()


def test_text_of_a_model_is_never_evaluated(tmp_path):
    file = tmp_path / "touched"
    for text in (f"open({str(file)!r}, 'w')", f"__import__('pathlib').Path({str(file)!r}).touch()", "9**9**9**9"):
        for answer in GOLDS:
            assert not answer.matches(text)
    assert not file.exists()
