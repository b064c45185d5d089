"""The benchmarks of parts compute what they say; a training step calls no more operators than it did: a GPU waits for each."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.collate import collate
from dataset.images import from_file, pixels
from dataset.mixture import mixture
from model.config import PRESETS, VLMConfig
from model.losses import IGNORE, next_token_targets
from model.vlm import VLM
from tests import tiny
from tests.speed import growth, loading, rollouts, startup
from tests.speed.rows import IMAGE, STAGES, make_documents


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks choose their own number of threads."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


# ---------------------------------------------------------------- rollouts

ROLLOUTS = rollouts.Config(threads=1, rounds=1, prompts=3, answers=2, prompt_tokens=10, answer_tokens=4, max_new_tokens=8,
                           results=None)
LLM = tiny.llm_config(vocab_size=60)


@pytest.mark.parametrize("qk_norm", [False, True])  # a Llama, a Qwen3
def test_greedy_answers_are_those_of_transformers_and_differ_in_length(qk_norm):
    model = rollouts.make_model(replace(LLM, qk_norm=qk_norm), seed=0)
    jobs = rollouts.make_jobs(ROLLOUTS, LLM.vocab_size)
    systems = [kind(model, torch.device("cpu"), torch.float32, 8) for kind in (rollouts.Ours, rollouts.Theirs)]
    for name, count in (("equal", 6), ("one", 1)):
        ours, theirs = (system(jobs[name]) for system in systems)
        assert ours == theirs and len(ours) == count
    assert all(len(answer) == 8 for answer in ours)  # nothing ends the answer of `one`
    sampled = [answer for _ in range(4) for system in systems for answer in system(jobs["group"])]
    assert len({len(answer) for answer in sampled}) > 1
    assert not {token for answer in sampled for token in answer} & set(jobs["group"].stop_ids)


def test_both_are_timed_in_every_job_and_round():
    found = rollouts.measure(replace(ROLLOUTS, rounds=2), LLM)
    for job in ("group", "one"):
        assert len(found[job]["ours"]) == len(found[job]["theirs"]) == len(found["gemm"]) == 2
        assert min(*found[job]["ours"], *found[job]["theirs"], found[job]["ratio"]) > 0


def test_a_model_of_other_weights_is_no_match(monkeypatch):
    other = rollouts.equal_model(rollouts.make_model(LLM, seed=1))
    monkeypatch.setattr(rollouts, "equal_model", lambda model: other)
    with pytest.raises(AssertionError, match="greedy answers differ"):
        rollouts.measure(ROLLOUTS, LLM)


# ---------------------------------------------------------------- reading pictures

LOADING = loading.Config(width=64, height=48, size=16, pictures=5, reads=8, batch_size=2, workers=(0, 1), rounds=1, results=None)


def test_pictures_are_read_from_their_files_as_an_encoder_takes_them(tmp_path):
    batches = loading.make_batches(loading.write_rows(tmp_path, LOADING), LOADING)
    expected = {pixels(from_file(file), 16, *loading.CLIP.values()).numpy().tobytes() for file in tmp_path.glob("*.jpg")}
    found = {picture.numpy().tobytes() for number in range(len(batches)) for picture in batches.batch(number)["pixels"]}
    assert found == expected and len(expected) == 5


def test_pictures_are_counted_for_a_thread_and_for_processes():
    found = loading.measure(LOADING)
    assert set(found["pictures_per_second"]) == {0, 1}
    assert all(len(rates) == 1 and rates[0] > 0 for rates in found["pictures_per_second"].values())


def test_a_file_is_as_large_as_that_of_a_photo(tmp_path):
    loading.photo(640, 480, np.random.default_rng(0)).save(tmp_path / "a.jpg", quality=90)
    assert 0.15 < (tmp_path / "a.jpg").stat().st_size / (640 * 480) < 0.4
    assert np.asarray(Image.open(tmp_path / "a.jpg")).std() > 20


# ---------------------------------------------------------------- what a run costs before it learns


def test_the_cost_of_a_command_is_that_of_its_own_process():
    busy = startup.cost(["-c", "import time\nwhile time.process_time() < 0.5: pass\nprint('done')"], 1, "done")
    assert 0.5 < busy.processor < 5
    assert busy.wall > 0.5
    with pytest.raises(RuntimeError, match="ended with 3"):
        startup.cost(["-c", "print('done'); raise SystemExit(3)"], 1, "done")
    with pytest.raises(RuntimeError, match="ended with 0"):
        startup.cost(["-c", ""], 1, "done")


def test_the_large_file_has_the_form_of_llava_and_rows_share_pictures(tmp_path):
    file = startup.write_llava(tmp_path, rows=7, pictures=3)
    raw, rows = json.loads(file.read_text()), mixture([str(file)], "pretrain", None, allow_urls=False)
    assert set(raw[0]) == {"id", "image", "conversations"} and len(raw) == len(rows) == 7
    keys = [rows[i].pictures[0].key for i in range(7)]
    assert len(set(keys)) == 3
    assert rows[0].pictures[0].size == (64, 48)


def test_a_run_is_measured_up_to_its_first_step():
    found = startup.measure(startup.Config(rows=40, pictures=4, rounds=1, cases=("help", "large"), threads=1))
    assert set(found) == {"help", "large"}
    assert found["large"]["processor"][0] > found["help"]["processor"][0] > 0


# ---------------------------------------------------------------- growth


def test_growth_is_drawn_with_a_point_for_every_value_of_every_axis(tmp_path, capsys):
    config = growth.Config(tmp_path, rows_in_file=(10, 20), patches=(1,), length=(64,), rows=(1,), size=("nano",),
                           preset="nano", threads=1, results=tmp_path / "results.jsonl")
    growth.main(config)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    found = [(point["axis"], point["value"]) for point in json.loads(line)["results"]["points"]]
    assert found[:5] == [("rows in the file", 10), ("rows in the file", 20), ("tokens a picture", 2), ("tokens a row", 64),
                         ("rows a micro-batch", 1)]
    assert [axis for axis, _ in found[5:]] == ["weights"]
    assert Image.open(tmp_path / "growth.png").size[0] > 1000
    printed = capsys.readouterr().out
    assert all(axis in printed for axis, _ in found)


def test_a_row_of_a_length_has_that_many_tokens_and_learns_the_last_ones():
    row = growth.one_row(50, 300)
    assert len(row.input_ids) == len(row.learn) == 300
    assert row.learn == [False] * 250 + [True] * 50
    assert row.input_ids.count(IMAGE) == 50


# ---------------------------------------------------------------- what a step asks of a GPU

WAITS = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "repeat_interleave", "_unique2")


class Calls(TorchDispatchMode):
    """Counts operator calls, and those after which a program waits for its GPU. Views are left out: they compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.waits = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        view = any(value.alias_info and not value.alias_info.is_write for value in func._schema.returns)
        if not view and name != "_unsafe_view":
            self.calls[name] += 1
        chosen = name in ("index", "index_put_", "index_put") and any(
            value is not None and value.dtype == torch.bool for value in args[1])
        if name in WAITS or chosen:  # a mask as an index is searched for its true places first
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def small_in_miniature() -> tuple[VLM, dict]:
    """The layers and heads of `small` with few channels, and a micro-batch of 40 rows with stored features."""
    torch.manual_seed(0)
    llm = replace(PRESETS["small"].llm, hidden_size=32, intermediate_size=48, vocab_size=100)
    model = VLM(VLMConfig(llm, "clip_random:size=28,patch=4,width=16,layers=1,heads=2", "linear", IMAGE))
    model.encoder.requires_grad_(False)
    documents = make_documents(STAGES["pretrain"], 40, model.image_tokens, 100, seed=0)
    return model, collate(documents, lambda pictures: torch.randn(len(pictures), 50, 16))


def test_a_micro_step_of_small_calls_no_more_operators_and_waits_no_more_often_than_it_did(monkeypatch):
    """A change that raises a number costs every step of a small model on a GPU; lower the bound where a change lowers one."""
    monkeypatch.setattr("model.attention.MOST_SCORES", 0)  # the fused kernel, as on a GPU
    model, batch = small_in_miniature()
    lists: list[torch.Size] = []  # tensors that are read into Python's lists, which no operator shows
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    with Calls() as forward:
        targets = next_token_targets(batch["labels"], batch["document_ids"])  # as in 1-pretrain_vlm.py
        learned = targets != IGNORE
        loss = F.cross_entropy(model(batch, learned).float(), targets[learned], reduction="sum")
    with Calls() as backward:
        loss.backward()
        loss.item()
    layers = len(model.llm.blocks)
    assert forward.calls["mm"] + forward.calls["addmm"] == 7 * layers + 2  # the matrices of its layers, the connector, the head
    assert sum(count for name, count in forward.calls.items() if "scaled_dot" in name) == 5 * layers  # 40 rows, 8 a call
    assert 0 < forward.calls.total() <= 730, forward.calls  # 720 in torch 2.14
    assert 0 < backward.calls.total() <= 800, backward.calls  # 787
    assert 2 <= forward.waits.total() + backward.waits.total() + len(lists) <= 9, (forward.waits, backward.waits, lists)
