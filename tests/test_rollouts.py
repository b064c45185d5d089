"""Rollouts: what is asked, what is kept, and that what is learned is exactly what was sampled, whoever sampled it."""

import dataclasses
import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from dataset import rollouts
from dataset.chat import Conversation, Message, render, render_prompt
from dataset.collate import IGNORE
from dataset.evaluation import Ask
from dataset.formats.conversations import BadRows, load
from dataset.rewards import Reward, rule
from dataset.rollouts import (
    Group,
    Problem,
    Rollouts,
    advice,
    as_rollout,
    best_and_worst,
    micro_batches,
    of_rows,
    of_task,
    problems,
    shares,
    told,
)
from dataset.tasks import Cut, Example, dialogue, exact
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import Eyes
from model.generate import Answer, generate
from model.losses import next_token_targets
from model.registry import TASKS, TEMPLATES
from model.rl.policy import scored
from tests.miniatures import lines
from tests.test_dpo import tiny_model

TOKENIZER, TEMPLATE = Tokenizer(), TEMPLATES.make("pupil")
BANNED = (TOKENIZER.image, TOKENIZER.pad, TOKENIZER.bos)
RIGHT, WRONG = "<think>so</think><answer>8</answer>", "<think>so</think><answer>9</answer>"


def say(*texts: str, stopped: bool = True) -> list[Answer]:
    answers = [Answer(TOKENIZER.encode(text), [], stopped) for text in texts]
    for answer in answers:
        answer.logps = [-0.5] * (len(answer.tokens) + stopped)
    return answers


def problem(k: int) -> Problem:
    example = Example(dialogue(f"p{k}", [], [(f"{k} = ?", "")]), "8", "text")
    return Problem(example, rule(lambda example, answer: float(">8<" in answer)))


def stream(sample, count: int = 10, **changes) -> Rollouts:
    options = {"prompts": 4, "answers": 2, "chunk": 4, "seed": 0, **changes}
    return Rollouts([problem(k) for k in range(count)], sample, TEMPLATE, TOKENIZER, 9,
                    Eyes(tiny_model().encoder, "square", 0, torch.device("cpu"), None), torch.device("cpu"),
                    **options)  # fmt: skip


def by_number(right: dict[int, tuple[bool, ...]]):
    """A sampler that answers problem k right or wrong as the table says; both kinds where it says nothing."""

    def sample(batch: dict, generator: torch.Generator) -> list[Answer]:
        found = []
        for row in batch["input_ids"]:
            k = int(TOKENIZER.decode_all(row.tolist()).partition("<|user|>")[2].partition(" =")[0])
            found += say(*(RIGHT if good else WRONG for good in right.get(k, (True, False))))
        return found

    return sample


# ---------------------------------------------------------------- what is asked


def test_problems_of_a_task_are_those_of_the_train_split_that_stage_two_did_not_learn():
    task = TASKS.make("arithmetic:rows=5")
    found = rollouts.of_task(task, 6, None)
    assert [item.prompt.id for item in found] == [f"arithmetic/train/{i}" for i in range(5, 11)]
    assert all(item.prompt.messages[-1].role == "user" for item in found)


def test_a_text_twin_is_a_spec_of_the_same_task(tmp_path):
    found = problems(("arithmetic:text=true",), 8, None, image_folder=None, allow_urls=False, bad_rows=tmp_path, max_bad=0)
    assert len(found) == 8 and not any(item.prompt.pictures for item in found)


@pytest.mark.parametrize("name", ["eureka.jsonl", "lmm_r1.jsonl"])
def test_official_files_are_problems_with_their_gold_answer(name, samples, tmp_path):
    found = of_rows(load(samples / name, need_answer=False), 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.0))
    assert len(found) == 4
    for item in found:
        assert item.prompt.answer is None and item.prompt.messages[-1].role == "user"
        assert item.judge(item.example, "<think>2+2</think><answer>4</answer>").total == 1.1
        assert item.judge(item.example, "<think>2+2</think><answer>5</answer>").total == 0.1
    assert [bool(item.prompt.pictures) for item in found] == ([False, True] * 2 if name == "eureka.jsonl" else [True] * 4)


def test_a_row_without_a_gold_answer_that_can_be_checked_is_named_when_the_data_are_loaded(tmp_path):
    rows = [{"conversations": [{"role": "user", "content": "1 + 1?"}], "answer": answer} for answer in ("2", None, "$$", "3")]
    source = load(lines(tmp_path / "rows.jsonl", rows), need_answer=False)
    with pytest.raises(RuntimeError, match="rows.jsonl:2"):
        of_rows(source, 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.01))
    kept = of_rows(source, 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.5))
    assert [item.example.answer for item in kept] == ["2", "3"]
    assert "nothing can match it" in (tmp_path / "bad.jsonl").read_text()


def test_rows_of_a_file_that_are_too_easy_or_too_hard_are_no_problems_and_tasks_are_not_asked(tmp_path):
    rows = [{"conversations": [{"role": "user", "content": f"{k} + 1?"}], "answer": "2", "pass_rate": k / 4} for k in range(5)]
    rows.append({"conversations": [{"role": "user", "content": "untold"}], "answer": "2"})
    lines(tmp_path / "rows.jsonl", rows)
    found = problems((str(tmp_path / "rows.jsonl"), "arithmetic"), 6, None, image_folder=None, allow_urls=False,
                     bad_rows=tmp_path / "bad", max_bad=0, pass_rates=(0.1, 0.9))
    assert [item.prompt.messages[-1].text for item in found[:4]] == ["1 + 1?", "2 + 1?", "3 + 1?", "untold"]
    assert len(found) == 4 + 6


def test_without_any_problem_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no problem in arithmetic"):
        problems(("arithmetic",), 0, None, image_folder=None, allow_urls=False, bad_rows=tmp_path / "bad", max_bad=0)


# ---------------------------------------------------------------- the stream


def test_the_stream_shows_every_problem_once_a_turn_in_an_order_of_the_seed():
    made = stream(by_number({}))
    turns = [[made.problem(10 * turn + k).prompt.id for k in range(10)] for turn in range(2)]
    assert sorted(turns[0]) == sorted(turns[1]) == sorted(f"p{k}" for k in range(10)) and turns[0] != turns[1]
    again = stream(by_number({}))
    assert [again.problem(k).prompt.id for k in range(10)] == turns[0]
    assert [stream(by_number({}), seed=1).problem(k).prompt.id for k in range(10)] != turns[0]


def test_groups_without_any_difference_are_replaced_and_counted():
    made = stream(by_number({}))
    first = [int(made.problem(k).prompt.id[1:]) for k in range(4)]
    made.sample = by_number({first[0]: (True, True), first[1]: (False, False)})
    update = made.update(0)
    assert update.position == 6 and len(update.groups) == 4 and all(group.differs for group in update.groups)
    facts = update.facts
    assert facts["asked"] == 6 and facts["groups"] == 4
    assert facts["all_right"] == facts["all_wrong"] == pytest.approx(1 / 6)
    assert facts["accuracy"] == pytest.approx(0.5) and facts["format"] == 1 and facts["reward"] == pytest.approx(0.6)


def test_replacing_ends_after_three_rounds_and_then_there_is_nothing_to_learn_but_nothing_breaks():
    made = stream(by_number(dict.fromkeys(range(10), (False, False))))
    update = made.update(0)
    assert update.position == 16 and update.facts["groups"] == 0 and len(update.groups) == 4
    assert torch.equal(update.rewards(), torch.full((4, 2), 0.1))
    assert update.facts["all_wrong"] == 1 and "length_right" not in update.facts


def test_where_every_group_counts_none_is_replaced():
    update = stream(by_number(dict.fromkeys(range(10), (True, True))), keep_all=True).update(0)
    assert update.position == 4 and len(update.groups) == update.facts["groups"] == 4


def test_two_ranks_sample_half_each_and_know_the_same_as_one():
    def sample(batch: dict, generator: torch.Generator) -> list[Answer]:
        draws = torch.rand(2 * len(batch["input_ids"]), generator=generator)
        return say(*(RIGHT if draw < 0.5 else WRONG for draw in draws.tolist()))

    def texts(update):
        return [(group.problem.prompt.id, rollout.text, rollout.reward) for group in update.groups for rollout in group.rollouts]

    alone, parts = stream(sample, chunk=2), {}
    expected = alone.update(3)
    ranks = [stream(sample, chunk=2, rank=rank, world=2) for rank in range(2)]
    asked = []
    for rank, made in enumerate(ranks):  # what each would send
        made.union = lambda found, rank=rank: parts.setdefault(rank, []).append(found) or found
        with pytest.raises(KeyError):  # the other half is missing
            made.ask(3, 4)
        asked.append(parts[rank][0])
    assert asked[0].keys() == {0, 1} and asked[1].keys() == {2, 3}
    both = {**asked[0], **asked[1]}
    for made in ranks:
        made.union = lambda found: both
        groups = made.ask(3, 4)
        assert texts(rollouts.Update(groups, 0, {})) == texts(rollouts.Update(alone.ask(3, 4), 0, {}))
    assert expected.position >= 7


def test_the_same_seed_samples_the_same_and_another_place_in_the_stream_something_else():
    model = tiny_model().eval()

    def sample(batch, generator):
        return generate(model, batch, max_new_tokens=5, stop_ids={TOKENIZER.end}, temperature=1.0, banned=BANNED,
                        generator=generator, answers=2)  # fmt: skip

    made = stream(sample)
    one, again, other = ([[r.document.input_ids for r in g.rollouts] for g in made.ask(position, 3)] for position in (0, 0, 3))
    assert one == again != other


# ---------------------------------------------------------------- what is learned


def test_a_rollout_is_the_rendered_conversation_with_one_beginning():
    prompt = Conversation("row", (Message("user", ("3 + 5 ?",)),))
    document = render_prompt(prompt, TEMPLATE, TOKENIZER, 9)
    tokens = TOKENIZER.encode(RIGHT)
    made = as_rollout(document, TOKENIZER.end, tokens, [-1.0] * (len(tokens) + 1), True, RIGHT, Reward(1, 1, 1.1))
    whole = render(Conversation("row", (*prompt.messages, Message("assistant", (RIGHT,)))), TEMPLATE, TOKENIZER, 9, 1000)
    assert made.document == whole and made.document.input_ids.count(TOKENIZER.bos) == 1 and made.stopped
    assert sum(whole.learn) == len(made) == len(tokens) + 1


def test_an_answer_that_was_cut_off_learns_no_end():
    document = render_prompt(Conversation("row", (Message("user", ("?",)),)), TEMPLATE, TOKENIZER, 9)
    made = as_rollout(document, TOKENIZER.end, [50, 60], [-1.0, -2.0], False, "so", Reward(0, 0, 0))
    assert made.document.input_ids[-2:] == [50, 60] and sum(made.document.learn) == 2
    assert isinstance(made.text, Cut) and not made.stopped
    with pytest.raises(ValueError, match="3 tokens have 2 log-probabilities"):
        as_rollout(document, TOKENIZER.end, [50, 60], [-1.0, -2.0], True, "so", Reward(0, 0, 0))


def test_rollout_and_training_agree_about_every_log_probability():
    """With the cache, finished rows leaving, pictures and texts of different lengths: 1e-4 in fp32 (here 2e-5)."""
    model = tiny_model().eval()
    task = TASKS.make("arithmetic:rows=0")
    asked = [Problem(example, rule(task.score)) for example in task.examples("train", 6)]
    assert {bool(item.prompt.pictures) for item in asked} == {True, False}
    stops = {TOKENIZER.end, *range(100, 2000)}  # so that answers of an untrained model end at different lengths

    def sample(batch, generator):
        found = generate(model, batch, max_new_tokens=12, stop_ids=stops, temperature=0.9, banned=BANNED, generator=generator,
                         answers=3)  # fmt: skip
        for answer in found:  # the stop token itself is not kept: end all as if it had been the one
            answer.logps, answer.stopped = answer.logps[:len(answer.tokens)], False
        return found

    made = dataclasses.replace(stream(sample), problems=asked, answers=3, image_tokens=model.image_tokens, keep_all=True,
                               prompts=6, eyes=Eyes(model.encoder, "square", 0, torch.device("cpu"), None))  # fmt: skip
    said = made.update(0).rollouts
    assert len({len(rollout) for rollout in said}) > 2
    said = [rollout for rollout in said if len(rollout)]
    for batch in micro_batches(said, made.eyes, 5, 0, 1):
        targets = next_token_targets(batch["labels"], batch["document_ids"])
        learned = targets != IGNORE
        with torch.no_grad():
            logps, _ = scored(model(batch, learned), targets[learned], BANNED, 0.9)
        torch.testing.assert_close(logps, batch["rollout_logps"], atol=1e-4, rtol=0)


def some_rollouts(count: int):
    rng = random.Random(0)
    document = render_prompt(Conversation("row", (Message("user", ("?",)),)), TEMPLATE, TOKENIZER, 9)
    return [as_rollout(document, TOKENIZER.end, [10 + k] * n, [-k - t / 100 for t in range(n + 1)], True, "", Reward(0, 0, k))
            for k in range(count) for n in (rng.randint(1, 6),)]  # fmt: skip


@pytest.mark.parametrize(("size", "world"), [(64, 1), (4, 1), (3, 2), (1, 3)])
def test_micro_batches_hold_every_rollout_once_and_every_rank_has_as_many(size, world):
    said = some_rollouts(11)
    ranks = [micro_batches(said, None, size, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [place for batches in ranks for batch in batches for place in batch["places"].unique().tolist()]
    assert sorted(seen) == list(range(11))
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["document_ids"].max() < size + (world == 3)  # 11 over 3 ranks: 4 each would leave one empty
        labels = batch["labels"][batch["labels"] != IGNORE]
        assert len(labels) == len(batch["rollout_logps"]) == len(batch["places"])
        for place in batch["places"].unique().tolist():
            mine = batch["places"] == place
            assert batch["rollout_logps"][mine].tolist() == pytest.approx(said[place].logps)
            assert labels[mine].tolist() == [10 + place] * (len(said[place]) - 1) + [TOKENIZER.end]


def test_fewer_answers_than_processes_are_refused():
    with pytest.raises(ValueError, match="raise --prompts"):
        shares(3, 8, 0, 4)


def test_the_pair_of_a_group_is_its_best_and_its_worst_answer():
    said = some_rollouts(4)
    pairs = best_and_worst([Group(problem(0), said), Group(problem(1), [said[1], said[1]])])
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(said[3].document, said[0].document)]


def test_an_update_is_weighed_once_and_given_out_as_often_as_there_are_passes():
    made, given = stream(by_number({})), []

    def weighed(batches, rewards, lengths):
        given.append((rewards, lengths))
        return batches

    steps = made.batches(0, 3, 2, weighed)
    (position, batches, count, facts), again, other = (next(steps) for _ in range(3))
    update = made.update(0)
    assert again[1] is batches and position == again[0] == update.position < other[0]
    assert len(given) == 2 and all(map(torch.equal, given[0], (update.rewards(), update.lengths())))
    assert count == update.lengths().sum() == sum(len(batch["rollout_logps"]) for batch in batches) and facts == update.facts


def test_pairs_are_not_asked_for_in_vain_for_ever():
    made = stream(by_number(dict.fromkeys(range(8), (False, False))), count=8)
    with pytest.raises(RuntimeError, match="20 times in a row .* of 16 problems .* no right answer.*2-sft_vlm.py"):
        next(made.pairs(0, 3, lambda batch: batch))


def test_pairs_come_from_groups_that_differ_and_an_update_without_any_is_passed_over():
    made = stream(by_number({}), count=40)
    asked = [made.problem(k).prompt.id for k in range(20)]
    made.sample = by_number({int(name[1:]): (False, False) for name in asked[:16]})  # P and three rounds of others
    position, batches, count, facts = next(made.pairs(0, 3, lambda batch: {**batch, "reference": len(batch["keys"])}))
    assert position == 20 and count == sum(batch["reference"] for batch in batches) == 4
    assert [name for batch in batches for name in batch["ids"][::2]] == asked[16:]
    assert facts["policy_groups"] == 4 and all(name.startswith("policy_") for name in facts)


def test_a_problem_that_cannot_be_asked_is_told_with_its_row_when_the_data_are_loaded(tmp_path, capsys):
    Path(tmp_path / "bad.png").write_text("no picture")
    rows = [{"conversations": [{"role": "user", "content": "1?"}], "answer": "1"},
            {"conversations": [{"role": "user", "content": "<image>?"}], "answer": "1", "image_urls": [f"file://{tmp_path}/bad.png"]},
            {"conversations": [{"role": "user", "content": "long " * 500}], "answer": "1"}]
    source, made = load(lines(tmp_path / "r.jsonl", rows), need_answer=False), stream(by_number({}))
    check = partial(Ask(TEMPLATE, TOKENIZER, 9, made.eyes, generate).require_room, room=64)
    assert len(of_rows(source, 3, None, BadRows(tmp_path / "bad", 3, 1.0), check=check)) == 1
    told = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert [item["row"].rpartition("/")[2] for item in told] == ["r.jsonl:2", "r.jsonl:3"]
    assert "lower --max_new_tokens" in told[1]["remedy"]
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="r.jsonl:2"):
        of_rows(source, 3, None, BadRows(tmp_path / "other", 3, 0.0), report=False, check=check)
    assert not (tmp_path / "other").exists() and not capsys.readouterr().err, "another process tells it"


# ---------------------------------------------------------------- when to stop


@pytest.mark.parametrize(("facts", "message"), [
    ({"all_wrong": 0.9}, "2-sft_vlm.py"), ({"all_right": 0.9}, "Take harder problems"), ({"entropy": 0.001}, "Lower --lr"),
    ({}, None),
])  # fmt: skip
def test_there_is_advice_where_there_is_no_point_in_going_on(facts, message):
    row = {"all_wrong": 0.3, "all_right": 0.3, "alike": 0.9, "entropy": 0.1, **facts}
    found = advice([{"arithmetic/accuracy": 0.5}, *[row] * 20], 0.005)
    assert found is None if message is None else message in found
    assert advice([row] * 19, 0.005) is None, "for long, not for a moment"
    of_pairs = {f"policy_{name}": value for name, value in row.items() if name != "entropy"}  # no entropy is known
    assert advice([of_pairs] * 20, 0.005) == (found if "entropy" not in facts else None)


@pytest.mark.parametrize("worth", [(0.1, 0.6), (1.0, 3.0)])
def test_a_reward_of_ones_own_that_calls_nothing_right_or_everything_goes_on_as_long_as_answers_differ(worth):
    made = stream(by_number({}))
    (of_one,) = made.ask(0, 1)
    paid = [dataclasses.replace(one, reward=Reward(min(1.0, value), 1.0, value)) for one, value in zip(of_one.rollouts, worth)]
    facts = told([dataclasses.replace(of_one, rollouts=paid)] * 4)
    assert 1.0 in (facts["all_right"], facts["all_wrong"]) and facts["alike"] == 0
    assert advice([{**facts, "entropy": 0.1}] * 20, 0.005) is None


@pytest.mark.parametrize("name", ["arithmetic", "geometry", "perception", "sokoban"])
def test_a_right_answer_in_the_right_form_is_paid_by_every_task_that_rules_ask(name):
    for item in of_task(TASKS.make(f"{name}:rows=0"), 20, None):
        assert item.judge(item.example, f"<think>.</think><answer>{item.example.answer}</answer>").accuracy == 1


def test_a_task_whose_score_does_not_read_the_final_answer_is_no_task_to_reward():
    class Bare:
        score = staticmethod(exact)

        def examples(self, split, n):
            return [Example(dialogue(f"{split}/{k}", [], [("1?", "")]), "1", "kind") for k in range(n)]

    with pytest.raises(ValueError, match="the score of Bare does not look for the final answer"):
        of_task(Bare(), 2, None)
    assert len(of_task(Bare(), 2, judge=lambda example, answer: Reward(0.0, 0.0, 0.5))) == 2


def test_a_task_that_pays_for_something_else_than_right_answers_is_paid_so_and_judged_right_all_the_same():
    """The published reward for Sokoban: twenty moves that touch no box are worth more than half of a solution."""
    wandering = f"<think>go</think><answer>{', '.join(['up', 'down'] * 10)}</answer>"
    for spec, worth in (("sokoban:rows=0", 0.0), ("sokoban:rows=0,reward=hackable", 1.0)):
        (problem,) = rollouts.of_task(TASKS.make(spec), 1, None)
        reward = problem.judge(problem.example, wandering)
        assert reward.accuracy == 0 and reward.format == 1
        assert worth <= reward.total - 0.1 < worth + 0.03  # and a thousandth for each word
