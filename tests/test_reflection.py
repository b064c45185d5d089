"""The reflection tests: the start of an answer that is given, what counts as looking again, and rows that teach to."""

import random
import re

from dataset.chat import Prefill
from dataset.tasks.arithmetic import Arithmetic, misread, running_sum
from dataset.tasks.reflection import Reflection, marked
from tests import tiny

TASK = Reflection()
EXAMPLES = TASK.examples("test", 40)
RECHECK = Arithmetic(rows=400, recheck=0.1)
PROCESSOR = tiny.processor(image_tokens=9)
TOKENIZER = PROCESSOR.tokenizer


def of(kind: str):
    return [example for example in EXAMPLES if example.kind == kind]


def begun(example) -> list[int]:
    return list(map(int, re.findall(r"\d+", example.prompt.messages[-1].text)))


def test_a_prefill_ends_the_prompt():
    example = of("recovery")[0]
    words = example.prompt.messages[-1].text
    ids = PROCESSOR.prompt(example.prompt).input_ids
    assert ids[-len(TOKENIZER.encode(words)) :] == TOKENIZER.encode(words)
    assert ids[-len(TOKENIZER.encode(words)) - 1] == TOKENIZER.id("<|assistant|>")


def test_an_answer_that_is_not_a_prefill_is_left_out_of_the_prompt():
    row = Arithmetic(rows=1).train("sft")[0]
    ids = PROCESSOR.prompt(row).input_ids
    assert ids[-1] == TOKENIZER.id("<|assistant|>")
    assert PROCESSOR.document(row, 500).input_ids[: len(ids)] == ids


def test_recovery_begins_with_exactly_one_number_misread():
    for example in of("recovery"):
        wrong = begun(example)
        assert sum(wrong) == int(example.tags[1]) != int(example.answer)
        dice = "dice" in example.prompt.messages[0].text or "骰子" in example.prompt.messages[0].text
        assert all(1 <= value <= 6 if dice else 0 <= value <= 9 for value in wrong)


def test_a_misread_number_differs_and_the_others_do_not():
    rng = random.Random(0)
    for dice in (True, False):
        for _ in range(100):
            values = [rng.randint(1, 6) for _ in range(3)]
            assert sum(a != b for a, b in zip(values, misread(values, rng, dice))) == 1


def test_a_swap_begins_with_half_of_another_picture():
    for example in of("swap"):
        assert not example.prompt.messages[-1].text.endswith(".")  # the other half is still to be read
        assert len(begun(example)) in (1, 2) and len(example.tags) == 3


def test_markers_are_words_of_looking_again():
    for words in ("Wait, look again: 3", "let me recheck", "double-check", "等等，再看：3", "重新看"):
        assert marked(words), words
    for words in ("<think>3, 5. 3+5=8.</think>", "waiter", "我看到两个圆形。"):
        assert not marked(words), words


def test_metrics_written_out():
    examples = [of("markers")[0], of("markers")[1], of("recovery")[0],
                next(e for e in of("swap") if len({e.answer, *e.tags[1:]}) == 3)]  # fmt: skip
    right = [f"3. 3+5=8.</think><answer>{example.answer}</answer>" for example in examples]
    again = f" Wait, look again: {right[0]}"
    scores, metrics = TASK.measure(examples, [again, right[1].replace("<answer>", "<answer>9"), again, right[3]])
    assert scores == [1, 0, TASK.score(examples[2], again), 1]
    assert (metrics["markers"], metrics["markers_marked"], metrics["right_marked"], metrics["right_unmarked"]) == (0.5, 0.5, 1, 0)
    assert (metrics["recovery_marked"], metrics["swap"], metrics["swap_old"], metrics["swap_mixed"]) == (1, 1, 0, 0)
    misled = [f"</think><answer>{examples[2].tags[1]}</answer>", f"</think><answer>{examples[3].tags[2]}</answer>"]
    metrics = TASK.measure(examples[2:], misled)[1]
    assert (metrics["recovery"], metrics["recovery_misled"], metrics["swap_mixed"]) == (0, 1, 1)


def test_nothing_is_trained():
    assert TASK.train("sft") is None and TASK.train("pretrain") is None


def test_without_the_option_arithmetic_is_what_it_was():
    for i in range(200):
        text = Arithmetic().train("sft")[i].messages[-1].text
        assert not marked(text)
        values = list(map(int, re.match(r"<think>([\d, ]+)\.", text)[1].split(", ")))
        assert text == f"<think>{running_sum(values)}</think><answer>{sum(values)}</answer>"


def test_a_tenth_of_the_rows_looks_again_and_half_of_those_corrects_an_error():
    rows = [RECHECK.train("sft")[i] for i in range(400)]
    again = [row for row in rows if marked(row.messages[-1].text)]
    pictures = sum(bool(row.pictures) for row in rows)
    assert 0.05 < len(again) / pictures < 0.16 and all(row.pictures for row in again)
    corrected = [row for row in again if isinstance(row.messages[-1].parts[0], Prefill)]
    assert 0.25 < len(corrected) / len(again) < 0.75
    for row in again:
        first, second = row.messages[-1].parts
        read = list(map(int, re.findall(r"\d+", first)))
        truth = list(map(int, re.search(r"[:：] ?([\d, ]+)\.", second)[1].split(", ")))
        assert second.endswith(f"<answer>{sum(truth)}</answer>") and (read != truth) == isinstance(first, Prefill)


def test_a_misreading_is_not_learned():
    row = next(row for row in map(RECHECK.train("sft").__getitem__, range(400))
               if isinstance(row.messages[-1].parts[0], Prefill))  # fmt: skip
    document = PROCESSOR.document(row, max_length=500)
    learned = TOKENIZER.decode([token for token, learn in zip(document.input_ids, document.learn) if learn])
    assert marked(learned) and "<think>" not in learned


def test_random_bytes_are_wrong_and_crash_nothing():
    rng = random.Random(0)
    answers = [rng.randbytes(50).decode("utf-8", errors="replace") for _ in EXAMPLES]
    scores, metrics = TASK.measure(EXAMPLES, answers)
    assert not any(scores) and all(0 <= value <= 1 for value in metrics.values())
