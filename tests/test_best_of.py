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
from dataset.collate import pad
from dataset.feedback.best_of import BestOf, Scorer, best_of, reward
from dataset.tasks import Cut, dialogue
from dataset.tokenizer import MODEL_FILE
from model import checkpoint
from model.generate import Answer
from tests.conftest import ROOT
from tests.miniatures import lines
from tests.test_dpo import TEMPLATE, TOKENIZER, about_colours, eyes, rendered, tiny_model, trained

SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "4-eval_chat.py")))


# ---------------------------------------------------------------- rewards and the choice


def test_the_reward_is_beta_times_the_mean_difference_of_the_log_probabilities():
    assert reward([-1.0, -2.0], [-2.0, -4.0], beta=0.1) == pytest.approx(0.1 / 2 * (-3 + 6))
    assert reward([-1.0], [-1.0], beta=0.1) == 0
    assert reward([-1.0] * 10, [-2.0] * 10, beta=0.1) == pytest.approx(reward([-1.0], [-2.0], beta=0.1))  # length is no merit
    for aligned, reference in (([-1.0], [-1.0, -2.0]), ([], [])):
        with pytest.raises(ValueError, match="same tokenizer and template"):
            reward(aligned, reference, beta=0.1)


PROMPTS = [dialogue(str(k), [], [("What is it?", "")]) for k in range(2)]
SAID = [["a b", "d", "d", "c", "e"], ["d", "a b", "a b", "a b", "a b"]]
TABLE = {"a b": ([-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]), "c": ([-1.0, -1.0], [-2.0, -2.0]),
         "d": ([-3.0, -1.0], [-1.0, -1.0]), "e": ([-1.0, -1.0], [-2.0, -2.0])}  # fmt: skip


def ask(prompts):
    """Five answers to each of the two."""
    assert prompts == [prompt for prompt in PROMPTS for _ in range(5)]
    return [text for texts in SAID for text in texts]


def model(side: int, asked: list):
    return lambda pairs: asked.append(pairs) or [TABLE[text][side] for _, text in pairs]


def test_of_several_answers_the_one_that_alignment_raised_most_comes_first():
    asked = []
    first, second = best_of(PROMPTS, ask, model(0, asked), model(1, asked), answers=5, beta=0.2)
    assert [one.answer for one in first] == ["c", "e", "a b", "d"]
    assert [one.reward for one in first] == pytest.approx([0.2, 0.2, 0.0, -0.2])
    assert [one.answer for one in second] == ["a b", "d"]
    different = [(0, "a b"), (0, "d"), (0, "c"), (0, "e"), (1, "d"), (1, "a b")]
    assert asked[0] == asked[1] == [(PROMPTS[k], text) for k, text in different]  # each different answer is scored once
    assert BestOf(ask, model(0, asked), model(1, asked), 5)(PROMPTS) == ["c", "a b"]


def test_a_best_answer_that_was_cut_off_is_still_known_to_be_one():
    said = BestOf(lambda prompts: [Cut("long"), "short"], lambda pairs: [[0.0], [0.0]], lambda pairs: [[-1.0], [-0.5]],
                  2)(PROMPTS[:1])  # fmt: skip
    assert said == ["long"] and isinstance(said[0], Cut)


# ---------------------------------------------------------------- what a model thinks of an answer


def test_log_probabilities_are_those_of_the_answer_and_its_end_one_token_at_a_time_in_batches_of_any_size():
    model = tiny_model().eval()
    pictures = [row.pictures[0] for row in about_colours(6)]
    earlier = (Message("user", (pictures[0], "Hi!")), Message("assistant", ("Hello.",)))
    asked = [(Conversation("a", (*earlier, Message("user", (pictures[2], "And?")))), "It is green, all of it."),
             (Conversation("b", (Message("user", ("What?",)), Message("assistant", ("Gold.",)))), "Red."),  # it has one
             (Conversation("c", (Message("user", (pictures[4], "What is it?")),)), "")]  # fmt: skip
    found = {}
    for size in (1, 2, 3):
        scorer = Scorer(TEMPLATE, TOKENIZER, model.image_tokens, eyes(model), partial(SCRIPT.answer_logps, model), size)
        found[size] = scorer(asked)
    for k, (prompt, text) in enumerate(asked):
        tokens = [*TOKENIZER.encode(text), TOKENIZER.end]
        document = scorer.document(prompt, text)
        assert document.input_ids[-len(tokens):] == tokens and sum(document.learn) == len(tokens)
        assert TOKENIZER.encode("Gold.")[0] not in document.input_ids
        batch = pad([document], eyes(model), TOKENIZER.pad)
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
    folder, model = tmp_path_factory.mktemp("models"), tiny_model()
    checkpoint.save(folder / "out" / "sft", model, MODEL_FILE)
    rows = [row for row in about_colours(12) if row.chosen == "It is red."]
    trained(model, rendered(rows, model), steps=10, lr=3e-3)
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
    main(prompt="What colour is it?", image=(samples / "red.png",), model=Path("out/sft"), reference=Path("out/dpo"))
    assert capsys.readouterr().out != "It is red.\n"  # the other way round it is the one that was raised least
    with pytest.raises(SystemExit, match="image file missing: nowhere.png"):
        main(prompt="What?", image=(Path("nowhere.png"),))


def test_every_row_of_a_file_gets_its_best_answer(main, models, tmp_path):
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Gold."}]} for text in ("A?", "B?")]
    main(data=lines(tmp_path / "rows.jsonl", rows), save=tmp_path / "said.jsonl")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in said] == ["It is red."] * 2


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
        checkpoint.save(models / "out" / name, tiny_model(), MODEL_FILE)
    (models / "out" / "other_words" / "tokenizer.model").write_bytes(b"another")
    config = models / "out" / "other_turns" / "config.json"
    config.write_text(config.read_text().replace('"pupil"', '"chatml"'))
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(**{"prompt": "What?", **changes})


def test_a_reference_that_is_not_there_is_told_with_the_command_that_makes_it(main):
    with pytest.raises(FileNotFoundError, match="no checkpoint in out/grpo: run"):
        main(prompt="What?", reference=Path("out/grpo"))
