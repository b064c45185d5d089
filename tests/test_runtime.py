"""The mechanics of a run: the learning rate, what decays, and that processes and micro-steps change nothing."""

import json
import math
import re
import sys
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from dataset.chat import render
from dataset.collate import Batches
from dataset.formats.conversations import BadRows
from dataset.mixture import mixture
from dataset.tokenizer import MODEL_FILE, Tokenizer
from model.config import preset
from model.losses import IGNORE, next_token_targets
from model.optimizer import make_optimizer
from model.registry import TEMPLATES
from model.runtime import Run, clip_gradients, draw_curves, learning_rate
from model.vlm import VLM
from tests import tiny
from tests.conftest import ENCODER, MIXED_SEED, mixed_arguments

# ---------------------------------------------------------------- learning rate


def test_the_learning_rate_rises_in_a_line_to_its_peak():
    rates = [learning_rate(step, peak=1.0, warmup=4, total=20) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_last_learning_rate_that_is_no_share_of_the_peak_is_refused(floor):
    with pytest.raises(ValueError, match="--lr_end"):
        learning_rate(0, peak=1.0, warmup=4, total=20, floor=floor)


def test_the_learning_rate_falls_as_a_cosine_to_its_floor_and_stays_there():
    rate = partial(learning_rate, peak=2.0, warmup=10, total=110, floor=0.1)
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way down the cosine
    assert rate(35) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert rate(110) == rate(5000) == pytest.approx(0.2)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_a_run_without_warm_up_or_shorter_than_it_has_a_learning_rate():
    assert learning_rate(0, peak=1.0, warmup=0, total=3) == 1.0
    assert 0 < learning_rate(2, peak=1.0, warmup=20, total=3) < 1.0


# ---------------------------------------------------------------- optimizer and gradients


def test_matrices_decay_and_norms_do_not():
    model = tiny.vlm(attention_bias=True)
    decay, keep = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    assert (decay["weight_decay"], keep["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in keep["params"]} == {1}
    assert all(p.ndim >= 2 for p in decay["params"])
    assert len(decay["params"]) + len(keep["params"]) == len(list(model.parameters()))


def test_frozen_parts_are_no_business_of_the_optimizer():
    model = tiny.vlm()
    model.llm.requires_grad_(False)
    model.encoder.requires_grad_(False)
    (group,) = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    assert group["params"] == list(model.connector.parameters())
    model.connector.requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1)


def with_gradient(*values: float) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False)
    layer.weight.grad = torch.tensor([values])
    return layer


def test_long_gradients_are_scaled_down_and_short_ones_left_alone():
    long, short = with_gradient(30.0, 40.0), with_gradient(0.3, 0.4)
    assert (clip_gradients(long, 1.0), clip_gradients(short, 1.0)) == (pytest.approx(50.0), pytest.approx(0.5))
    assert torch.allclose(long.weight.grad, torch.tensor([[0.6, 0.8]]))
    assert torch.equal(short.weight.grad, torch.tensor([[0.3, 0.4]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_stops_the_run(value):
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf).*lower --lr"):
        clip_gradients(with_gradient(1.0, value), 1.0)


# ---------------------------------------------------------------- a run of one process


def settings(out, **changes) -> SimpleNamespace:
    return SimpleNamespace(**(dict(out=out, device="cpu", dtype="auto", seed=7, wandb=False, resume=False) | changes))


def test_a_cpu_computes_in_fp32(tmp_path):
    run = Run(settings(tmp_path), "test")
    assert (run.device, run.dtype) == (torch.device("cpu"), torch.float32)
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bf16_is_used_where_it_is_asked_for(tmp_path):
    with Run(settings(tmp_path, dtype="bf16"), "test").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("change", [{"dtype": "fp16"}, {"dtype": "fp31"}, {"device": "gpu"}])
def test_a_device_or_precision_that_does_not_exist_is_refused(tmp_path, change):
    with pytest.raises((ValueError, RuntimeError), match="fp32|cpu"):
        Run(settings(tmp_path, **change), "test")


def test_a_missing_gpu_is_said_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda, but torch sees no GPU"):
        Run(settings(tmp_path, device="cuda"), "test")


def test_weights_begin_alike_on_every_rank_and_random_numbers_do_not(tmp_path, monkeypatch):
    weights, noise = [], []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        run = Run(settings(tmp_path), "test")
        model = nn.Linear(3, 3)
        run.resume(model, torch.optim.SGD(model.parameters()))
        run.wrap(model, compile=False)
        weights.append(model.weight)
        noise.append(torch.rand(5))
    assert torch.equal(*weights)
    assert not torch.equal(*noise)


def test_a_resumed_run_goes_on_in_the_random_numbers_where_it_stopped(tmp_path):
    model = tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    run = Run(settings(tmp_path), "test")
    run.wrap(model, compile=False)
    assert run.resume(model, optimizer) == (0, 0)
    torch.rand(3)
    run.save(model, optimizer, MODEL_FILE, step=4, position=8)
    expected = torch.rand(3)
    again = Run(settings(tmp_path, resume=True), "test")
    again.wrap(model, compile=False)
    assert again.resume(model, optimizer) == (4, 8)
    assert torch.equal(torch.rand(3), expected)


def test_the_log_is_one_line_a_step_and_a_picture_of_curves(tmp_path, capsys):
    run = Run(settings(tmp_path), "test")
    run.resume(nn.Linear(1, 1), None)
    run.progress(0, 3)
    for step in range(3):
        run.count(50)
        run.log(step, loss=3.0 - step, lr=1e-3, tokens_per_second=run.tokens_per_second())
    run.log(3, exact=0.5)
    run.finish("wrote it", "the next script")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows[:3]] == [3.0, 2.0, 1.0]
    assert all(row["tokens_per_second"] > 0 for row in rows[:3])
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.format == "PNG" and min(curves.size) > 100
    assert re.search(r"wrote it in \d+ s\. Next: the next script\n$", capsys.readouterr().out)


def test_a_second_run_does_not_write_behind_the_log_of_the_first(tmp_path):
    for _ in range(2):
        run = Run(settings(tmp_path), "test")
        run.resume(nn.Linear(1, 1), None)
        run.log(0, loss=1.0)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_an_empty_history_draws_nothing(tmp_path):
    draw_curves([{"step": 0, "seconds": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    run = Run(settings(tmp_path / "out"), "test")
    run.resume(nn.Linear(1, 1), None)
    run.progress(0, 1)
    run.log(0, loss=1.0)
    run.finish("wrote it", "nothing")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_run_that_is_only_made_writes_nothing(tmp_path):
    Run(settings(tmp_path / "out"), "test")
    assert not (tmp_path / "out").exists()


def test_wandb_starts_only_when_asked_and_under_no_name_but_the_users(tmp_path, monkeypatch):
    asked = []
    library = SimpleNamespace(init=lambda **options: asked.append(options) or SimpleNamespace(log=None))
    monkeypatch.setitem(sys.modules, "wandb", library)
    Run(settings(tmp_path), "test").progress(0, 1)
    assert not asked
    Run(settings(tmp_path, wandb=True), "test").progress(0, 1)
    (options,) = asked
    assert "entity" not in options  # nobody's account but that of who is logged in


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_keeps_the_run_in_its_folder(run_script, mixed, tmp_path):
    run_script("1-pretrain_vlm.py", *mixed_arguments(mixed)[:-8], "--max_steps", 1, "--wandb", cwd=tmp_path,
               env={"WANDB_MODE": "offline"})  # fmt: skip
    (kept,) = (tmp_path / "out" / "pretrain" / "wandb").glob("offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


# ---------------------------------------------------------------- two processes are one


def micro_batches(mixed, number: int) -> list[dict]:
    """The first micro-batches that the scripts read of this data, without its pictures."""
    tokenizer = Tokenizer()
    batches = Batches(
        mixture([str(mixed)], "pretrain", None, False),
        partial(render, template=TEMPLATES.make("pupil"), tokenizer=tokenizer, image_tokens=37, max_length=1024),
        lambda pictures: torch.zeros(len(pictures), 37, 32), batch_size=2, window=1, seed=MIXED_SEED,
        bad_rows=BadRows(mixed.parent / "bad_rows.jsonl", 64, 0.0), rank=0, world=1)  # fmt: skip
    return [batches.batch(i) for i in range(number)]


def test_the_data_of_the_comparison_is_uneven(mixed):
    batches = micro_batches(mixed, 10)
    seen = [("features" in a, "features" in b) for a, b in zip(batches[::2], batches[1::2])]
    assert (True, False) in seen or (False, True) in seen
    learned = [int((next_token_targets(b["labels"], b["document_ids"]) != IGNORE).sum()) for b in batches]
    assert any(abs(a - b) > 10 for a, b in zip(learned[::2], learned[1::2]))


def first_weights() -> dict[str, torch.Tensor]:
    """The weights that script 1 begins with."""
    torch.manual_seed(MIXED_SEED)
    tokenizer = Tokenizer()
    return VLM(preset("nano", encoder=ENCODER, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image)).state_dict()


def test_two_processes_equal_one_that_accumulates(one_process, two_processes):
    start, one, two = (first_weights(), *(load_file(folder / "model.safetensors") for folder in (one_process, two_processes)))
    assert start.keys() == one.keys() == two.keys()
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert (one[name] - two[name]).norm() <= 1e-4 * moved, name
        assert moved > 0 or name.startswith("encoder."), name  # frozen


def test_two_processes_log_what_one_logs(one_process, two_processes):
    rows = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (one_process, two_processes)]  # fmt: skip
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [0, 1, 2, 3, 4, 5]
    for a, b in zip(*(found[:5] for found in rows)):
        assert (a["loss"], a["gradient_norm"], a["lr"]) == (
            pytest.approx(b["loss"], rel=1e-4), pytest.approx(b["gradient_norm"], rel=1e-3), b["lr"])  # fmt: skip


def test_two_processes_divide_the_features_between_them(one_process, two_processes):
    one, two = ([json.loads(file.read_text()) for file in (folder.parent / "features").rglob("*.json")]
                for folder in (one_process, two_processes))  # fmt: skip
    assert (len(one), len(two)) == (1, 2)  # a shard from each process
    assert sorted(one[0]) == sorted(two[0] + two[1])
