"""Rollouts: which problems are sampled, what is kept, and that exactly what was sampled is learned, whoever sampled it."""

import dataclasses
import json
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset.bad_rows import BadRows
from dataset.chat import Conversation, Message
from dataset.collate import IGNORE
from dataset.early_stop import early_stop_reason
from dataset.feedback.pair_streams import SampledPairs
from dataset.mixture import load
from dataset.problems import Problem, of_rows, of_task, problems
from dataset.processor import Processor
from dataset.rewards import Reward, answer_reward
from dataset.rollouts import Group, RolloutBatch, add_to_tokens, as_rollout, share_out, stats
from dataset.sampler import Sampler
from dataset.tasks import Example, Task, Truncated, dialogue, exact
from model.generate import Answer, generate
from model.losses import score
from model.registry import TASKS, UserError
from model.runtime import Run
from tests import tiny
from tests.miniatures import lines

PROCESSOR = tiny.processor(image_tokens=9)
TOKENIZER = PROCESSOR.tokenizer
RIGHT, WRONG = "<think>so</think><answer>8</answer>", "<think>so</think><answer>9</answer>"


def answers(*texts: str) -> list[Answer]:
    """Sampled answers that ended by themselves."""
    return [Answer(tokens, [-0.5] * (len(tokens) + 1), stopped=True) for tokens in map(TOKENIZER.encode, texts)]


def problem(k: int) -> Problem:
    example = Example(dialogue(f"p{k}", [], [(f"{k} = ?", "")]), "8", "text")
    return Problem(example, answer_reward(lambda example, answer: float(">8<" in answer)))


def sampler(generate, count: int = 10, ranks: tiny.Ranks | None = None, **changes) -> Sampler:
    options = {"prompts": 4, "group_size": 2, "seed": 0, "resample_rounds": 3, **changes}
    return Sampler([problem(k) for k in range(count)], generate, PROCESSOR, ranks or tiny.Ranks(), **options)


def flags(*data: str, problems: int, pass_rates: tuple[float, float] = (0.0, 1.0)) -> SimpleNamespace:
    return SimpleNamespace(data=data, problems=problems, pass_rates=pass_rates, reward="rule")


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.inference(tmp_path / "out", "cpu", "fp32", 0)


def by_number(right: dict[int, tuple[bool, ...]]):
    """A policy that answers problem k right or wrong as the table says; both kinds where it says nothing."""

    def generate(batch: dict, generator: torch.Generator) -> list[Answer]:
        texts = []
        for row in batch["input_ids"]:
            k = int(TOKENIZER.decode_all(row.tolist()).partition("<|user|>")[2].partition(" =")[0])
            texts += [RIGHT if good else WRONG for good in right.get(k, (True, False))]
        return answers(*texts)

    return generate


def at(made: Sampler, position: int, count: int) -> list[Group]:
    """The groups of `count` problems from a position of the stream on."""
    made.position = position
    return made.sample(count)


# ---------------------------------------------------------------- problems


def test_problems_of_a_task_are_those_of_the_train_split_that_stage_two_did_not_learn():
    found = of_task(TASKS.make("arithmetic:rows=5"), 6, None)
    assert [item.prompt.id for item in found] == [f"arithmetic/train/{i}" for i in range(5, 11)]
    assert all(item.prompt.messages[-1].role == "user" for item in found)


def test_a_text_twin_is_a_spec_of_the_same_task(run):
    found, own = problems(flags("arithmetic:text=true", problems=8), run)
    assert own is None, "no file, and no reward of one's own"
    assert len(found) == 8 and not any(item.prompt.pictures for item in found)


@pytest.mark.parametrize("name", ["eureka.jsonl", "lmm_r1.jsonl"])
def test_official_files_are_problems_with_their_gold_answer(name, samples, tmp_path):
    found = of_rows(load(samples / name, need_answer=False), 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.0))
    assert len(found) == 4
    for item in found:
        assert item.prompt.answer is None and item.prompt.messages[-1].role == "user"
        assert item.reward(item.example, "<think>2+2</think><answer>4</answer>").total == 1.1
        assert item.reward(item.example, "<think>2+2</think><answer>5</answer>").total == 0.1
    assert [bool(item.prompt.pictures) for item in found] == ([False, True] * 2 if name == "eureka.jsonl" else [True] * 4)


def test_a_row_without_a_gold_answer_that_can_be_checked_is_named_when_the_data_are_loaded(tmp_path):
    rows = [{"conversations": [{"role": "user", "content": "1 + 1?"}], "answer": answer} for answer in ("2", None, "$$", "3")]
    source = load(lines(tmp_path / "rows.jsonl", rows), need_answer=False)
    with pytest.raises(RuntimeError, match="2 bad rows.*rows.jsonl:3"):
        of_rows(source, 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.01))
    kept = of_rows(source, 10, None, BadRows(tmp_path / "bad.jsonl", 4, 0.5))
    assert [item.example.answer for item in kept] == ["2", "3"]
    assert "nothing can match it" in (tmp_path / "bad.jsonl").read_text()


def test_a_problem_that_cannot_be_answered_is_named_with_its_row_when_the_data_are_loaded(tmp_path, capsys):
    Path(tmp_path / "bad.png").write_text("no picture")
    rows = [{"conversations": [{"role": "user", "content": "1?"}], "answer": "1"},
            {"conversations": [{"role": "user", "content": "<image>?"}], "answer": "1", "image_urls": [f"file://{tmp_path}/bad.png"]},
            {"conversations": [{"role": "user", "content": "long " * 500}], "answer": "1"}]
    source = load(lines(tmp_path / "r.jsonl", rows), need_answer=False)
    check = partial(PROCESSOR.require_answerable, max_prompt_tokens=64)
    assert len(of_rows(source, 3, None, BadRows(tmp_path / "bad", 3, 1.0), check=check)) == 1
    listed = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert [item["row"].rpartition("/")[2] for item in listed] == ["r.jsonl:2", "r.jsonl:3"]
    assert "lower --max_new_tokens" in listed[1]["remedy"]
    capsys.readouterr()
    with pytest.raises(RuntimeError, match="r.jsonl:2"):
        of_rows(source, 3, None, BadRows(tmp_path / "other", 3, 0.0, report=False), check=check)
    assert not (tmp_path / "other").exists() and not capsys.readouterr().err, "another process names it"


def test_rows_of_a_file_that_are_too_easy_or_too_hard_are_left_out_and_those_of_tasks_are_not(tmp_path, run):
    rows = [{"conversations": [{"role": "user", "content": f"{k} + 1?"}], "answer": "2", "pass_rate": k / 4} for k in range(5)]
    rows.append({"conversations": [{"role": "user", "content": "unknown"}], "answer": "2"})
    lines(tmp_path / "rows.jsonl", rows)
    run.config.val_share = 0.0
    found, own = problems(flags(str(tmp_path / "rows.jsonl"), "arithmetic", problems=6, pass_rates=(0.1, 0.9)), run)
    assert own is None
    assert [item.prompt.messages[-1].text for item in found[:4]] == ["1 + 1?", "2 + 1?", "3 + 1?", "unknown"]
    assert len(found) == 4 + 6


def test_without_any_problem_there_is_an_error(run):
    with pytest.raises(ValueError, match="no problem in arithmetic"):
        problems(flags("arithmetic", problems=0), run)


@pytest.mark.parametrize("name", ["arithmetic", "geometry", "perception", "sokoban"])
def test_a_right_answer_in_the_right_form_is_paid_by_every_task_with_a_rule(name):
    for item in of_task(TASKS.make(f"{name}:rows=0"), 20, None):
        assert item.reward(item.example, f"<think>.</think><answer>{item.example.answer}</answer>").accuracy == 1


def test_a_task_whose_score_does_not_read_the_final_answer_is_not_a_task_to_reward():
    class Bare(Task):
        def examples(self, split, n):
            return [Example(dialogue(f"{split}/{k}", [], [("1?", "")]), "1", "kind") for k in range(n)]

    class Deaf(Bare):
        def score(self, example, answer):
            return exact(example, answer)

    with pytest.raises(ValueError, match="the score of Deaf does not look for the final answer"):
        of_task(Deaf(), 2, None)
    assert len(of_task(Deaf(), 2, reward=lambda example, answer: Reward(0.0, 0.0, 0.5))) == 2
    (item, _) = of_task(Bare(), 2, None)  # exact match, the score of a task without one, looks there
    assert [item.reward(item.example, f"<think>.</think><answer>{body}</answer>").total for body in ("1", "2")] == [1.1, 0.1]
    assert [Bare().score(item.example, text) for text in ("1", "1.", "2", "<answer>1")] == [1, 1, 0, 0]


def test_a_task_that_pays_for_something_else_than_right_answers_still_counts_the_right_ones():
    """The published reward for Sokoban: twenty moves that touch no box are worth more than half of a solution."""
    wandering = f"<think>go</think><answer>{', '.join(['up', 'down'] * 10)}</answer>"
    for spec, paid in (("sokoban:rows=0", 0.0), ("sokoban:rows=0,reward=hackable", 1.0)):
        (item,) = of_task(TASKS.make(spec), 1, None)
        reward = item.reward(item.example, wandering)
        assert reward.accuracy == 0 and reward.format == 1
        assert paid <= reward.total - 0.1 < paid + 0.03  # and a thousandth for each word


# ---------------------------------------------------------------- the stream


def test_the_stream_shows_every_problem_once_a_turn_in_an_order_of_the_seed():
    made = sampler(by_number({}))
    turns = [[made.problem(10 * turn + k).prompt.id for k in range(10)] for turn in range(2)]
    assert sorted(turns[0]) == sorted(turns[1]) == sorted(f"p{k}" for k in range(10)) and turns[0] != turns[1]
    again = sampler(by_number({}))
    assert [again.problem(k).prompt.id for k in range(10)] == turns[0]
    assert [sampler(by_number({}), seed=1).problem(k).prompt.id for k in range(10)] != turns[0]


def test_groups_without_reward_variance_are_replaced_and_counted():
    made = sampler(by_number({}))
    first = [int(made.problem(k).prompt.id[1:]) for k in range(4)]
    made.generate = by_number({first[0]: (True, True), first[1]: (False, False)})
    rollout = made.next()
    assert made.position == 6 and len(rollout.groups) == 4 and not any(group.zero_variance for group in rollout.groups)
    assert rollout.stats["sampled"] == 6 and rollout.stats["groups"] == 4
    assert rollout.stats["all_right"] == rollout.stats["all_wrong"] == pytest.approx(1 / 6)
    assert rollout.stats["zero_variance"] == pytest.approx(1 / 3)
    assert rollout.stats["accuracy"] == pytest.approx(0.5) and rollout.stats["format"] == 1
    assert rollout.stats["reward"] == pytest.approx(0.6)


def test_resampling_ends_after_three_rounds_and_then_there_is_nothing_to_learn_but_nothing_breaks():
    made = sampler(by_number(dict.fromkeys(range(10), (False, False))))
    rollout = made.next()
    assert made.position == 16 and rollout.stats["groups"] == 0 and len(rollout.groups) == 4
    assert torch.equal(rollout.rewards, torch.full((4, 2), 0.1))
    assert rollout.stats["all_wrong"] == 1 and "length_right" not in rollout.stats


def test_where_every_group_counts_none_is_replaced():
    made = sampler(by_number(dict.fromkeys(range(10), (True, True))), resample_rounds=None)
    rollout = made.next()
    assert made.position == 4 and len(rollout.groups) == rollout.stats["groups"] == 4


def test_two_ranks_sample_half_each_and_know_the_same_as_one(monkeypatch):
    monkeypatch.setattr("dataset.sampler.CHUNK", 2)

    def generate(batch: dict, generator: torch.Generator) -> list[Answer]:
        draws = torch.rand(2 * len(batch["input_ids"]), generator=generator)
        return answers(*(RIGHT if draw < 0.5 else WRONG for draw in draws.tolist()))

    def texts(groups):
        return [(group.problem.prompt.id, rollout.text, rollout.reward) for group in groups for rollout in group.rollouts]

    alone = texts(at(sampler(generate), 3, 4))
    assert len({reward.total for _, _, reward in alone}) == 2
    both, samplers = {}, []
    for rank in range(2):
        ranks, sent = tiny.Ranks(rank, 2), []
        samplers.append(sampler(generate, ranks=ranks))
        ranks.all_gather = lambda found, sent=sent: sent.append(found) or found
        with pytest.raises(KeyError):  # the other half is missing
            at(samplers[rank], 3, 4)
        assert sent[0].keys() == ({0, 1}, {2, 3})[rank]
        both.update(sent[0])
    for made in samplers:
        made.ranks.all_gather = lambda found: both
        assert texts(at(made, 3, 4)) == alone


def test_the_same_seed_samples_the_same_and_another_place_in_the_stream_something_else():
    model = tiny.nano().eval()
    made = sampler(lambda batch, generator: generate(model, batch, max_new_tokens=5, temperature=1.0, generator=generator,
                                                     group_size=2, **PROCESSOR.sampling), count=1)  # fmt: skip
    one, again, other = ([r.document.input_ids for g in at(made, position, 1) for r in g.rollouts] for position in (0, 0, 1))
    assert one == again != other, "the one problem, twice from the first place of the stream and once from the second"


# ---------------------------------------------------------------- what is learned


def prompt(text: str = "?"):
    return PROCESSOR.prompt(Conversation("row", (Message("user", (text,)),)))


def test_a_rollout_is_the_rendered_conversation_with_one_beginning():
    (answer,) = answers(RIGHT)
    made = as_rollout(prompt("3 + 5 ?"), TOKENIZER.end, answer, RIGHT, Reward(1, 1, 1.1))
    whole = PROCESSOR.document(Conversation("row", (Message("user", ("3 + 5 ?",)), Message("assistant", (RIGHT,)))), 1000)
    assert made.document == whole and made.document.input_ids.count(TOKENIZER.bos) == 1 and made.stopped
    assert sum(whole.learn) == len(made) == len(answer.tokens) + 1


def test_a_truncated_answer_learns_no_end():
    made = as_rollout(prompt(), TOKENIZER.end, Answer([50, 60], [-1.0, -2.0], stopped=False), "so", Reward(0, 0, 0))
    assert made.document.input_ids[-2:] == [50, 60] and sum(made.document.learn) == 2
    assert isinstance(made.text, Truncated) and not made.stopped
    with pytest.raises(ValueError, match="3 tokens have 2 log-probabilities"):
        as_rollout(prompt(), TOKENIZER.end, Answer([50, 60], [-1.0, -2.0], stopped=True), "so", Reward(0, 0, 0))


def test_rollout_and_training_agree_about_every_log_probability():
    """With the cache, finished rows leaving, pictures and texts of different lengths: 1e-4 in fp32 (here 2e-5)."""
    model, ranks = tiny.nano().eval(), tiny.Ranks()
    processor, task = Processor.of(model, TOKENIZER, ranks), TASKS.make("arithmetic:rows=0")
    prompts = [Problem(example, answer_reward(task.score)) for example in task.examples("train", 6)]
    assert {bool(item.prompt.pictures) for item in prompts} == {True, False}
    stops = {TOKENIZER.end, *range(100, 2000)}  # so that answers of an untrained model end at different lengths

    def sample(batch, generator):
        found = generate(model, batch, max_new_tokens=12, stop_ids=stops, temperature=0.9, banned=processor.banned,
                         generator=generator, group_size=3)  # fmt: skip
        for answer in found:  # the stop token itself is not kept: end all as if it had been the one
            answer.logps, answer.stopped = answer.logps[:len(answer.tokens)], False
        return found

    made = Sampler(prompts, sample, processor, ranks, prompts=6, group_size=3, seed=0, resample_rounds=None)
    groups = made.next().groups
    assert len({len(rollout) for group in groups for rollout in group.rollouts}) > 2
    groups = [dataclasses.replace(group, rollouts=[rollout for rollout in group.rollouts if len(rollout)]) for group in groups]
    for batch in RolloutBatch(groups, {}).micro_batches(5, processor, ranks):
        with torch.no_grad():
            scores = score(model, batch, 0.9, processor.banned)
        torch.testing.assert_close(scores.logps, batch["rollout_logps"], atol=1e-4, rtol=0)


def some_rollouts(count: int):
    """Answer k is token 10 + k several times, then the end, and is paid k."""
    rng = random.Random(0)
    made = []
    for k in range(count):
        length = rng.randint(1, 6)
        answer = Answer([10 + k] * length, [-k - t / 100 for t in range(length + 1)], stopped=True)
        made.append(as_rollout(prompt(), TOKENIZER.end, answer, "", Reward(0, 0, k)))
    return made


@pytest.mark.parametrize(("size", "world_size"), [(64, 1), (4, 1), (3, 2), (1, 3)])
def test_micro_batches_hold_every_rollout_once_and_every_rank_has_as_many(size, world_size):
    made = some_rollouts(11)
    update = RolloutBatch([Group(problem(0), made)], {})
    ranks = [update.micro_batches(size, PROCESSOR, tiny.Ranks(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [answer for batches in ranks for batch in batches for answer in batch["answer_ids"].unique().tolist()]
    assert sorted(seen) == list(range(11))
    for batch in (batch for batches in ranks for batch in batches):
        assert batch["document_ids"].max() < size + (world_size == 3)  # 11 over 3 ranks: 4 each would leave one empty
        labels = batch["labels"][batch["labels"] != IGNORE]
        assert len(labels) == len(batch["rollout_logps"]) == len(batch["answer_ids"])
        for answer in batch["answer_ids"].unique().tolist():
            mine = batch["answer_ids"] == answer
            assert batch["rollout_logps"][mine].tolist() == pytest.approx(made[answer].logps)
            assert labels[mine].tolist() == [10 + answer] * (len(made[answer]) - 1) + [TOKENIZER.end]


def test_every_token_gets_the_value_of_its_answer():
    made = some_rollouts(4)
    update = RolloutBatch([Group(problem(0), made[:2]), Group(problem(1), made[2:])], {})
    assert update.rewards.tolist() == [[0, 1], [2, 3]] and update.lengths.flatten().tolist() == list(map(len, made))
    batches = update.micro_batches(3, PROCESSOR, tiny.Ranks())
    add_to_tokens(batches, advantages=update.rewards * 10, weights=update.lengths)
    assert len(batches) == 2
    for batch in batches:
        assert torch.equal(batch["advantages"], 10 * batch["answer_ids"].float())
        assert batch["weights"].tolist() == [len(made[answer]) for answer in batch["answer_ids"].tolist()]


def test_fewer_answers_than_processes_are_refused():
    with pytest.raises(ValueError, match="raise --prompts"):
        share_out(3, 8, tiny.Ranks(0, 4))


# ---------------------------------------------------------------- pairs of what was sampled


def test_the_pair_of_a_group_is_its_best_and_its_worst_answer():
    made = some_rollouts(4)
    pairs = RolloutBatch([Group(problem(0), made), Group(problem(1), [made[1], made[1]])], {}).pairs()
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [(made[3].document, made[0].document)]


def test_pairs_are_not_sampled_in_vain_for_ever():
    made = sampler(by_number(dict.fromkeys(range(8), (False, False))), count=8)
    with pytest.raises(UserError, match="20 times in a row .* of 16 problems .* no right answer.*2-sft_vlm.py"):
        SampledPairs(made, 3, PROCESSOR, tiny.Ranks()).next()


def test_pairs_come_from_groups_with_variance_and_an_update_without_any_is_passed_over():
    made = sampler(by_number({}), count=40)
    order = [made.problem(k).prompt.id for k in range(20)]
    made.generate = by_number({int(name[1:]): (False, False) for name in order[:16]})  # Q and three rounds of others
    pairs = SampledPairs(made, 3, PROCESSOR, tiny.Ranks())
    batches = pairs.next()
    assert pairs.position == 20 and sum(len(batch["keys"]) for batch in batches) == 4
    assert [name for batch in batches for name in batch["ids"][::2]] == order[16:]
    assert pairs.stats["groups"] == 4
    pairs.position = 16
    assert [batch["keys"] for batch in pairs.next()] == [batch["keys"] for batch in batches], "from a stored position on"


# ---------------------------------------------------------------- when to stop


@pytest.mark.parametrize(("changes", "message"), [
    ({"all_wrong": 0.9}, "2-sft_vlm.py"), ({"all_right": 0.9}, "Take harder problems"), ({"entropy": 0.001}, "Lower --lr"),
    ({}, None),
])  # fmt: skip
def test_there_is_a_reason_to_stop_where_there_is_no_point_in_going_on(changes, message):
    row = {"all_wrong": 0.3, "all_right": 0.3, "zero_variance": 0.9, "entropy": 0.1, **changes}
    found = early_stop_reason([{"arithmetic/accuracy": 0.5}, *[row] * 20], 0.005)
    assert found is None if message is None else message in found
    assert early_stop_reason([row] * 19, 0.005) is None, "for long, not for a moment"
    of_pairs = {name: value for name, value in row.items() if name != "entropy"}  # no entropy is known
    assert early_stop_reason([of_pairs] * 20, 0.005) == (found if "entropy" not in changes else None)


@pytest.mark.parametrize("paid", [(0.1, 0.6), (1.0, 3.0)])
def test_a_reward_of_ones_own_that_calls_nothing_right_or_everything_goes_on_as_long_as_rewards_differ(paid):
    (of_one,) = at(sampler(by_number({})), 0, 1)
    made = [dataclasses.replace(one, reward=Reward(min(1.0, value), 1.0, value)) for one, value in zip(of_one.rollouts, paid)]
    facts = stats([dataclasses.replace(of_one, rollouts=made)] * 4)
    assert 1.0 in (facts["all_right"], facts["all_wrong"]) and facts["zero_variance"] == 0
    assert early_stop_reason([{**facts, "entropy": 0.1}] * 20, 0.005) is None
