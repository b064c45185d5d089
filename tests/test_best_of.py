"""Best of N: the reward by hand, the choice, each model's log-probabilities the plainest way, and the script that chooses."""

import itertools
import json
import re
import runpy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset.chat import Conversation, Message
from dataset.evaluation import Answerer
from dataset.feedback.best_of import AnswerScorer, BestOf, best_of, implied_reward
from dataset.processor import Processor
from dataset.tasks import Truncated, dialogue
from dataset.tokenizer import MODEL_FILE
from model import checkpoint
from model.generate import Answer
from model.losses import score
from tests import tiny
from tests.conftest import ROOT
from tests.miniatures import lines
from tests.test_dpo import TOKENIZER, about_colours, batch_of

SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "4-eval_chat.py")))


# ---------------------------------------------------------------- rewards and the choice


def test_the_reward_is_beta_times_the_mean_difference_of_the_log_probabilities():
    assert implied_reward([-1.0, -2.0], [-2.0, -4.0], beta=0.1) == pytest.approx(0.1 / 2 * (-3 + 6))
    assert implied_reward([-1.0], [-1.0], beta=0.1) == 0
    one, ten = (implied_reward([-1.0] * n, [-2.0] * n, beta=0.1) for n in (1, 10))
    assert ten == pytest.approx(one)  # length is not a merit
    for aligned, reference in (([-1.0], [-1.0, -2.0]), ([], [])):
        with pytest.raises(ValueError, match="same tokenizer and template"):
            implied_reward(aligned, reference, beta=0.1)


PROMPTS = [dialogue(str(k), [], [("What is it?", "")]) for k in range(2)]
ANSWERS = [["a b", "d", "d", "c", "e"], ["d", "a b", "a b", "a b", "a b"]]
TABLE = {"a b": ([-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]), "c": ([-1.0, -1.0], [-2.0, -2.0]),
         "d": ([-3.0, -1.0], [-1.0, -1.0]), "e": ([-1.0, -1.0], [-2.0, -2.0])}  # fmt: skip


def answerer(samples: list[list[str]]):
    """In the place of an `Answerer`: the answers of PROMPTS."""
    def sampled(prompts, group_size):
        assert prompts == PROMPTS[:len(samples)] and group_size == len(samples[0])
        return samples

    return SimpleNamespace(sampled=sampled)


def model(side: int, calls: list):
    return lambda pairs: calls.append(pairs) or [TABLE[text][side] for _, text in pairs]


def test_of_several_answers_the_one_that_alignment_raised_most_comes_first():
    calls = []
    first, second = best_of(PROMPTS, ANSWERS, model(0, calls), model(1, calls), beta=0.2)
    assert [one.answer for one in first] == ["c", "e", "a b", "d"]
    assert [one.reward for one in first] == pytest.approx([0.2, 0.2, 0.0, -0.2])
    assert [one.answer for one in second] == ["a b", "d"]
    different = [(0, "a b"), (0, "d"), (0, "c"), (0, "e"), (1, "d"), (1, "a b")]
    assert calls[0] == calls[1] == [(PROMPTS[k], text) for k, text in different]  # each different answer is scored once
    assert BestOf(answerer(ANSWERS), model(0, calls), model(1, calls), 5)(PROMPTS) == ["c", "a b"]


def test_a_best_answer_that_was_truncated_is_still_known_to_be_one():
    found = BestOf(answerer([[Truncated("long"), "short"]]), lambda pairs: [[0.0], [0.0]], lambda pairs: [[-1.0], [-0.5]],
                   2)(PROMPTS[:1])  # fmt: skip
    assert found == ["long"] and isinstance(found[0], Truncated)


def test_several_answers_to_each_prompt_are_sampled_alike_and_come_in_its_order():
    numbers = itertools.count()

    def generate(batch):
        return [Answer(TOKENIZER.encode(str(next(numbers))), [], stopped=True) for _ in batch["input_ids"]]

    found = Answerer(tiny.processor(), generate).sampled(PROMPTS, 3)
    assert [sorted(texts, key=int) for texts in found] == [["0", "1", "2"], ["3", "4", "5"]]


# ---------------------------------------------------------------- what a model thinks of an answer


def test_log_probabilities_are_those_of_the_answer_and_its_end_one_token_at_a_time_in_batches_of_any_size():
    model = tiny.nano().eval()
    processor = Processor.of(model, TOKENIZER, tiny.Ranks())
    pictures = [row.pictures[0] for row in about_colours(6)]
    earlier = (Message("user", (pictures[0], "Hi!")), Message("assistant", ("Hello.",)))
    pairs = [(Conversation("a", (*earlier, Message("user", (pictures[2], "And?")))), "It is green, all of it."),
             (Conversation("b", (Message("user", ("What?",)), Message("assistant", ("Gold.",)))), "Red."),  # it has one
             (Conversation("c", (Message("user", (pictures[4], "What is it?")),)), "")]  # fmt: skip
    found = {}
    for size in (1, 2, 3):
        scorer = AnswerScorer(processor, partial(SCRIPT.answer_logps, model), size)
        found[size] = scorer(pairs)
    for k, (prompt, text) in enumerate(pairs):
        tokens = [*TOKENIZER.encode(text), *processor.stop_ids]
        document = scorer.document(prompt, text)
        assert document.input_ids[-len(tokens):] == tokens and sum(document.learn) == len(tokens)
        assert TOKENIZER.encode("Gold.")[0] not in document.input_ids
        batch = processor.padded([document])
        with torch.no_grad():
            logps = model(batch, batch["document_ids"] >= 0).double().log_softmax(-1)  # (T, V)
        begin = len(document) - len(tokens)
        expected = [logps[begin + i - 1, token].item() for i, token in enumerate(tokens)]
        for size in found:
            assert found[size][k] == pytest.approx(expected, abs=1e-3)


# ---------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with out/sft, and out/dpo that was moved from it towards calling everything red."""
    folder, model = tmp_path_factory.mktemp("models"), tiny.nano()
    checkpoint.save(folder / "out" / "sft", model, MODEL_FILE)
    batch = batch_of([row for row in about_colours(6) if row.chosen == "It is red."], model)
    optimizer = torch.optim.AdamW(model.llm.parameters(), lr=3e-3)
    for _ in range(5):
        scores = score(model, batch)
        (-scores.logps[scores.owner % 2 == 0].mean() + scores.logps[scores.owner % 2 == 1].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save(folder / "out" / "dpo", model, MODEL_FILE)
    return folder


@pytest.fixture
def main(models, monkeypatch):
    """`main(prompt=...)`: the script in that folder, its models sampling three colours in turn."""
    colours = itertools.cycle(("It is blue.", "It is red.", "It is green."))

    def sampled(model, batch, **options):
        return [Answer(TOKENIZER.encode(next(colours)), [], stopped=True) for _ in batch["input_ids"]]

    monkeypatch.chdir(models)
    monkeypatch.setitem(SCRIPT.main.__globals__, "generate", sampled)
    options = dict(best_of=3, reference=Path("out/sft"), temperature=0.7, device="cpu")
    return lambda **changes: SCRIPT.main(SCRIPT.Config(**{**options, **changes}))


def test_a_question_gets_the_answer_that_preference_learning_raised_most(main, models, samples, capsys):
    main(prompt="What colour is it?", image=(samples / "red.png",))
    assert capsys.readouterr().out == "It is red.\n"
    main(prompt="What colour is it?", image=(samples / "red.png",), model=(Path("out/sft"),), reference=Path("out/dpo"))
    assert capsys.readouterr().out != "It is red.\n"  # the other way round it is the one that was raised least
    with pytest.raises(ValueError, match="image file missing: nowhere.png"):
        main(prompt="What?", image=(Path("nowhere.png"),))


def test_every_row_of_a_file_gets_its_best_answer(main, models, tmp_path):
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Gold."}]} for text in ("A?", "B?")]
    main(data=lines(tmp_path / "rows.jsonl", rows), save=tmp_path / "found.jsonl")
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == ["It is red."] * 2


def test_the_scores_of_best_of_n_stand_beside_those_of_one_answer(main, models):
    main(bench="arithmetic", examples=2)
    chosen = models / "out" / "dpo-best_of_3"
    assert json.loads((chosen / "scores.json").read_text())["arithmetic/n"] == 2
    rows = [json.loads(line) for line in (chosen / "predictions-arithmetic.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in rows} == {"It is red."}
    assert not (models / "out" / "dpo" / "scores.json").exists()
    assert "## Test scores of dpo-best_of_3" in (models / "out" / "report.md").read_text()


@pytest.mark.parametrize(("changes", "message"), [
    ({"reference": None}, "add --reference out/sft"), ({"temperature": 0.0}, "add --temperature 0.7"),
    ({"best_of": 1}, "--reference is for --best_of N"), ({"prompt": ""}, "answers --prompt, --data or --bench"),
    ({"reference": Path("out/dpo")}, "is the model itself"),
    ({"reference": Path("out/other_words")}, "out/other_words has another tokenizer than out/dpo"),
    ({"reference": Path("out/other_turns")}, "out/other_turns has another template than out/dpo"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(changes, message, main, models):
    for name in ("other_words", "other_turns"):
        checkpoint.save(models / "out" / name, tiny.nano(), MODEL_FILE)
    (models / "out" / "other_words" / "tokenizer.model").write_bytes(b"another")
    config = models / "out" / "other_turns" / "config.json"
    config.write_text(config.read_text().replace('"pupil"', '"chatml"'))
    with pytest.raises(ValueError, match=re.escape(message)):
        main(**{"prompt": "What?", **changes})


def test_a_reference_that_is_not_there_is_told_with_the_command_that_makes_it(main):
    with pytest.raises(FileNotFoundError, match="no checkpoint in out/grpo: run"):
        main(prompt="What?", reference=Path("out/grpo"))
