"""What --data means: each source as often as its weight says, and each row a function of its number and the seed."""

import numpy as np
import pytest

from dataset.batches import blocks
from dataset.chat import Conversation, Message
from dataset.mixture import Mixture, load, mixture, name_and_weight
from model.registry import UserError
from tests.miniatures import llava
from tests.test_conversations import written


def test_a_folder_is_all_its_files(tmp_path):
    written(tmp_path, llava("One"), name="a.json")
    written(tmp_path, llava("Two"), llava("Three"), name="b.jsonl")
    assert sorted(one.messages[0].text for one in load(tmp_path)) == ["One", "Three", "Two"]


def named(name: str, n: int) -> list[Conversation]:
    return [Conversation(f"{name}:{i}", (Message("assistant", (name,)),)) for i in range(n)]


def test_a_mixture_shows_each_source_as_often_as_its_weight_says():
    mixed = Mixture([(named("a", 10), 1), (named("b", 10), 2), (named("c", 10), 0.5)])
    ids = [one.id for one in mixed]
    assert len(ids) == len(mixed) == 35
    assert sorted(i for i in ids if i[0] == "a") == [f"a:{i}" for i in range(10)]
    assert sorted(i for i in ids if i[0] == "b") == sorted([f"b:{i}" for i in range(10)] * 2)
    assert len({i for i in ids if i[0] == "c"}) == 5


def test_a_mixture_is_a_function_of_its_seed():
    ids = [[one.id for one in Mixture([(named("a", 50), 0.5)], seed)] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_a_mixture_keeps_blocks_apart():
    class Grouped(list):
        def blocks(self):
            return np.arange(len(self)) // 2

    mixed = Mixture([(Grouped(named("a", 6)), 1), (named("b", 3), 1), (Grouped(named("c", 4)), 2)])
    block = blocks(mixed)
    members = [{one.id for one, own in zip(mixed, block) if own == b} for b in range(5)]
    assert members == [{"a:0", "a:1"}, {"a:2", "a:3"}, {"a:4", "a:5"}, {"c:0", "c:1"}, {"c:2", "c:3"}]
    assert (block == -1).sum() == 3


@pytest.mark.parametrize(("spec", "expected"), [
    ("data.jsonl", ("data.jsonl", 1.0)), ("data.jsonl:0.5", ("data.jsonl", 0.5)), ("world:3", ("world", 3.0)),
    ("a:b.jsonl", ("a:b.jsonl", 1.0)),
])  # fmt: skip
def test_a_weight_may_follow_the_name(spec, expected):
    assert name_and_weight(spec) == expected


def test_tasks_and_files_are_mixed_by_weight_and_a_task_without_data_for_a_stage_is_refused(tmp_path):
    file = written(tmp_path, llava("One"), llava("Two")).path
    mixed = mixture(["text:rows=5", f"{file}:2"], "sft", None, allow_urls=False)
    assert len(mixed) == 5 + 4
    assert sorted(mixed[k].messages[0].text for k in range(5, 9)) == ["One", "One", "Two", "Two"]
    with pytest.raises(UserError, match="the task 'reflection' has no data for pretrain: leave it out of --data"):
        mixture(["world:rows=2", "reflection"], "pretrain", None, allow_urls=False)
