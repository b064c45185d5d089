"""The mechanics of a run: the learning rate, what decays, and that processes and micro-steps change nothing."""

import dataclasses
import json
import math
import re
import runpy
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dataset.bad_rows import BadRows
from dataset.batches import Batches
from dataset.mixture import mixture
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from model import devices, wandb_log
from model.cli import RunFlags
from model.config import preset
from model.losses import IGNORE, next_token_targets
from model.optimizer import OptimizerGroup, clip_gradients, lr_multiplier, make_optimizer
from model.registry import UserError
from model.runtime import Run, data_settings, draw_curves
from model.vlm import VLM
from tests import tiny
from tests.conftest import ENCODER, MIXED_SEED, ROOT, mixed_arguments

# ---------------------------------------------------------------- learning rate


def test_the_learning_rate_rises_in_a_line_to_its_peak():
    rates = [lr_multiplier(step, warmup=4, total=20) for step in range(5)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_last_learning_rate_that_is_no_share_of_the_peak_is_refused(floor):
    with pytest.raises(UserError, match="--lr_end"):
        lr_multiplier(0, warmup=4, total=20, floor=floor)


def test_the_learning_rate_falls_as_a_cosine_to_its_floor_and_stays_there():
    share = partial(lr_multiplier, warmup=10, total=110, floor=0.1)
    assert share(60) == pytest.approx(0.1 + 0.9 * 0.5)  # half way down the cosine
    assert share(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert share(110) == share(5000) == pytest.approx(0.1)
    falling = [share(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_a_run_without_warm_up_or_shorter_than_it_has_a_learning_rate():
    assert lr_multiplier(0, warmup=0, total=3) == 1.0
    assert 0 < lr_multiplier(2, warmup=20, total=3) < 1.0


def test_every_group_gets_its_share_of_its_own_peak():
    optimizer = OptimizerGroup(torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0, "parts": ["llm"]},
                                                {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5, "parts": ["connector"]}]))
    for share in (0.25, 0.5):
        assert optimizer.scale_lr(share) == {"lr_llm": 2.0 * share, "lr_connector": 0.5 * share}
        assert [group["lr"] for group in optimizer.param_groups] == [2.0 * share, 0.5 * share]


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
def test_the_norm_of_a_gradient_that_is_no_number_says_so(value):
    assert not math.isfinite(clip_gradients(with_gradient(1.0, value), 1.0))


# ---------------------------------------------------------------- a run of one process


def flags(out, **changes) -> RunFlags:
    return RunFlags(out, "", 0, 0, save_every=1, log_every=1, **(dict(device="cpu", seed=7) | changes))


def test_a_cpu_computes_in_fp32(tmp_path):
    run = Run(flags(tmp_path), "test")
    assert (run.device, run.dtype) == (torch.device("cpu"), torch.float32)
    with run.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_bf16_is_used_where_it_is_asked_for(tmp_path):
    with Run(flags(tmp_path, dtype="bf16"), "test").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


BF16, WITHOUT = {"avx512_bf16": True}, {"avx512_f": True}


@pytest.mark.parametrize(("can", "channels", "expected"), [
    (BF16, 512, torch.bfloat16), ({"amx_bf16": True}, 128, torch.bfloat16), (BF16, 64, torch.float32),
    (WITHOUT, 512, torch.float32), ({}, 512, torch.float32)])
def test_auto_is_bf16_for_wide_models_on_processors_that_multiply_in_it(tmp_path, monkeypatch, can, channels, expected):
    monkeypatch.setattr(devices, "processor", lambda: can)
    run, model = Run(flags(tmp_path), "test"), SimpleNamespace(llm=SimpleNamespace(dim=channels))
    assert run.dtype == torch.float32  # inference, whatever the processor
    assert run.fit_dtype(model) == run.dtype == expected
    asked = Run(flags(tmp_path, dtype="fp32"), "test")
    assert asked.fit_dtype(model) == torch.float32


def test_products_stay_exact_to_fp32_with_the_processor_s_widest_vectors(tmp_path):
    Run(flags(tmp_path), "test")  # sets what oneDNN may do
    a, b = torch.randn(300, 200), torch.randn(200, 100)
    exact = a.double() @ b.double()
    assert (a @ b - exact).norm() < 1e-6 * exact.norm()  # bf16: 3e-3


def test_a_run_goes_on_in_the_precision_it_was_started_in(tmp_path):
    model = tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    run = Run(flags(tmp_path, dtype="bf16"), "test")
    run.resume(model, optimizer)
    run.save(model, optimizer, MODEL_FILE, step=4, position=8)
    with pytest.raises(UserError, match="was trained in bf16 so far.*: add --dtype bf16"):
        Run(flags(tmp_path, resume=True), "test").resume(model, optimizer)  # as on a processor without bf16
    assert Run(flags(tmp_path, resume=True, dtype="bf16"), "test").resume(model, optimizer) == (4, 8)


@pytest.mark.parametrize("change", [{"dtype": "fp16"}, {"dtype": "fp31"}, {"device": "gpu"}])
def test_a_device_or_precision_that_does_not_exist_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="--dtype is auto, fp32 or bf16, not 'fp|--device is auto, cpu, cuda or mps, not 'gpu'"):
        Run(flags(tmp_path, **change), "test")


def test_a_missing_gpu_is_said_and_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda, but torch sees no GPU"):
        Run(flags(tmp_path, device="cuda"), "test")


def test_weights_begin_alike_on_every_rank_and_random_numbers_do_not(tmp_path, monkeypatch):
    weights, noise = [], []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        run = Run(flags(tmp_path), "test")
        model = nn.Linear(3, 3)
        run.resume(model, torch.optim.SGD(model.parameters()))
        run.wrap(model)
        weights.append(model.weight)
        noise.append(torch.rand(5))
    assert torch.equal(*weights)
    assert not torch.equal(*noise)


def test_a_resumed_run_goes_on_in_the_random_numbers_where_it_stopped(tmp_path):
    model = tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    run = Run(flags(tmp_path), "test")
    run.wrap(model)
    assert run.resume(model, optimizer) == (0, 0)
    torch.rand(3)
    run.save(model, optimizer, MODEL_FILE, step=4, position=8)
    expected = torch.rand(3)
    again = Run(flags(tmp_path, resume=True), "test")
    again.wrap(model)
    assert again.resume(model, optimizer) == (4, 8)
    assert torch.equal(torch.rand(3), expected)


STAGES = [runpy.run_path(str(ROOT / script)) for script in ("1-pretrain_vlm.py", "2-sft_vlm.py", "3-rl_vlm.py")]
TRAINING = {"data", "batch_size", "accumulate", "max_length", "seed", "image_folder", "val_share", "val_data", "context_parallel"}
ROLLOUTS = {"data", "problems", "pass_rates", "prompts", "group_size", "resample_rounds", "reward", "max_new_tokens",
            "temperature", "seed", "image_folder", "val_share", "val_data", "context_parallel"}  # fmt: skip
OWN_PAIRS = {"pairs", "scenes", "questions", "group_size", "max_new_tokens", "temperature", "divider", "labeler", "judge"}


@pytest.mark.parametrize(("config", "names"), [
    (STAGES[0]["Config"], TRAINING), (STAGES[1]["Config"], TRAINING), (STAGES[2]["DPO"], TRAINING | OWN_PAIRS),
    (STAGES[2]["GRPO"], ROLLOUTS | {"keep_zero_variance", "num_iterations"}),
    (STAGES[2]["OnlineDPO"], ROLLOUTS | {"pairs", "batch_size"}),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_these_flags_decide_which_row_comes_when(config, names):
    assert {name for name in data_settings(config()) if not name.endswith(" files")} == names


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a run of 3-rl_vlm.py on a file and with a reward of one's own, that was saved; the function that starts it again)."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "my.py").write_text("def one(): ...\ndef two(): ...\n")
    model = tiny.vlm()
    optimizer = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0)
    started = STAGES[2]["GRPO"](data=(f"{folder}/rows.jsonl:2",), reward=f"{folder}/my.py:one", run=flags(folder / "out"))

    def start(**changes) -> tuple[int, int]:
        of_run = {name: changes.pop(name) for name in list(changes) if hasattr(started.run, name)}
        config = dataclasses.replace(started, **changes, run=dataclasses.replace(started.run, **of_run))
        run = Run(config.run, "grpo", config)
        place = run.resume(model, optimizer)
        if not config.run.resume:
            run.save(model, optimizer, MODEL_FILE, step=4, position=8)
        return place

    assert start() == (0, 0)
    return folder, start


@pytest.mark.parametrize(("changes", "message"), [
    ({"resample_rounds": 1}, "--resample_rounds 3, now 1"),
    ({"group_size": 4, "temperature": 0.9}, "--group_size 8, now 4; --temperature 1.0, now 0.9"),
    ({"reward": "rule"}, "--reward 'FOLDER/my.py:one', now 'rule'"),
    ({"reward": "FOLDER/my.py:two"}, "--reward 'FOLDER/my.py:one', now 'FOLDER/my.py:two'"),
    ({"data": ("FOLDER/rows.jsonl",)}, "--data ['FOLDER/rows.jsonl:2'], now ['FOLDER/rows.jsonl']"),
    ({"seed": 8}, "--seed 7, now 8"),
    ({"image_folder": "FOLDER"}, "--image_folder None, now 'FOLDER'"),
])  # fmt: skip
def test_a_run_that_would_go_on_with_other_rows_is_refused_by_the_name_of_the_flag(saved, changes, message):
    folder, start = saved
    here = {name: tuple(text.replace("FOLDER", str(folder)) for text in value) if isinstance(value, tuple) else
            value.replace("FOLDER", str(folder)) if isinstance(value, str) else value for name, value in changes.items()}
    here = {name: Path(value) if name == "image_folder" else value for name, value in here.items()}
    with pytest.raises(UserError, match=rf"^\S+/out was started with .*{re.escape(message.replace('FOLDER', str(folder)))}"):
        start(resume=True, **here)


@pytest.mark.parametrize(("flag", "name", "more"), [("data", "rows.jsonl", '{"text": "b"}\n'), ("reward", "my.py", "# more\n")])
def test_a_run_whose_file_grew_since_is_refused_by_the_name_of_the_file(saved, flag, name, more):
    folder, start = saved
    before = (folder / name).read_text()
    (folder / name).write_text(before + more)
    files = rf"{{'\S+/{name}\S*': '\w+'}}"
    with pytest.raises(UserError, match=f"was started with --{flag} files {files}, now {files}: --resume would go on"):
        start(resume=True)
    (folder / name).write_text(before)
    assert start(resume=True) == (4, 8)


def test_what_does_not_change_the_rows_may_change(saved):
    assert saved[1](resume=True, batch_size=8, entropy_floor=0.1, log_every=3, save_every=7, max_bad=0.5) == (4, 8)


def test_the_log_is_one_line_a_step_and_a_picture_of_curves(tmp_path, capsys):
    run = Run(flags(tmp_path), "test")
    run.resume(nn.Linear(1, 1), None)
    for step in run.steps(0, 3):
        if step == 3:
            run.log(step, exact=0.5)
        else:
            run.log_step(step, [{"input_ids": torch.zeros(1, 50)}], loss=3.0 - step, lr=1e-3)
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
        run = Run(flags(tmp_path), "test")
        run.resume(nn.Linear(1, 1), None)
        run.log(0, loss=1.0)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_an_empty_history_draws_nothing(tmp_path):
    draw_curves([{"step": 0, "seconds": 1.0}], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_curves_show_what_changed_with_reward_accuracy_and_length_first(tmp_path, monkeypatch):
    history = [{"step": step, "loss": 3.0 - step, "format": 1.0, "ratio_max": 1 + 1e-5 * step, "length_wrong": 9 - step,
                "accuracy": step / 4, "clipped_low": 0.0, "reward": step / 3} for step in range(3)]  # fmt: skip
    shown = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda axis, title, **style: shown.append(title))
    draw_curves(history, tmp_path / "curves.png")
    assert shown == ["reward", "accuracy", "length_wrong", "loss"]
    shown.clear()
    draw_curves([{"step": step, "loss": 2.0} for step in range(3)], tmp_path / "curves.png")
    assert shown == ["loss"]  # where nothing changed, all of it


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    run = Run(flags(tmp_path / "out"), "test")
    run.resume(nn.Linear(1, 1), None)
    assert list(run.steps(0, 1)) == [0, 1]
    run.log(0, loss=1.0)
    run.finish("wrote it", "nothing")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_run_that_is_only_made_writes_nothing(tmp_path):
    Run(flags(tmp_path / "out"), "test")
    assert not (tmp_path / "out").exists()


def test_wandb_starts_only_when_asked_and_under_no_name_but_the_users(tmp_path, monkeypatch):
    asked = []
    library = SimpleNamespace(init=lambda **options: asked.append(options) or SimpleNamespace(log=None))
    monkeypatch.setitem(sys.modules, "wandb", library)
    assert list(Run(flags(tmp_path), "test").steps(0, 1)) == [0, 1]
    assert not asked
    monkeypatch.setenv("WANDB_NAME", "")
    assert list(Run(flags(tmp_path, wandb="eyes"), "test").steps(0, 1)) == [0, 1]
    assert list(Run(flags(tmp_path, wandb="eyes/first"), "test").steps(0, 1)) == [0, 1]
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert list(Run(flags(tmp_path, wandb="eyes"), "test").steps(0, 1)) == [0, 1]
    assert [(options["project"], options["name"]) for options in asked] == [("eyes", "test"), ("eyes", "first"), ("eyes", "mine")]
    assert all("entity" not in options for options in asked)  # nobody's account but that of who is logged in


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_keeps_the_run_in_its_folder(run_script, mixed, tmp_path):
    run_script("1-pretrain_vlm.py", *mixed_arguments(mixed)[:-8], "--max_steps", 1, "--wandb", "eyes", cwd=tmp_path,
               env={"WANDB_MODE": "offline"})  # fmt: skip
    (kept,) = (tmp_path / "out" / "pretrain" / "wandb").glob("offline-run-*/*.wandb")
    sent = kept.read_bytes()
    assert all(name in sent for name in (b"loss", b"curves", b"image-file"))
    assert list(kept.parent.rglob("media/images/curves*.png"))


def test_wandb_gets_the_pictures_and_the_scores_of_a_finished_run(tmp_path, monkeypatch):
    sent: dict = {}
    session = SimpleNamespace(log=sent.update, finish=lambda: sent.update(finished=True))
    library = SimpleNamespace(Image=lambda path: ("image", path), Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", library)
    (tmp_path / "figures").mkdir()
    for name in ("curves.png", "figures/pair.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "scores.json").write_text('{"world/exact": 0.9}')
    wandb_log.finish(session, tmp_path)
    pictures = {name: ("image", str(tmp_path / f"{name}.png")) for name in ("curves", "figures/pair")}
    assert sent == {**pictures, "scores": (["metric", "value"], [["world/exact", 0.9]]), "finished": True}


# ---------------------------------------------------------------- two processes are one


def micro_batches(mixed, number: int) -> list[dict]:
    """The first micro-batches that the scripts read of this data, without its pictures."""
    processor = tiny.processor(image_tokens=9)
    batches = Batches(
        mixture([str(mixed)], "pretrain", None, False), partial(processor.document, max_length=1024), processor.batch,
        batch_size=2, seed=MIXED_SEED, bad_rows=BadRows(mixed.parent / "bad_rows.jsonl", 64, 0.0))  # fmt: skip
    return [batches.batch(i) for i in range(number)]


def test_the_data_of_the_comparison_is_uneven(mixed):
    batches = micro_batches(mixed, 10)
    seen = [("pixels" in a, "pixels" in b) for a, b in zip(batches[::2], batches[1::2])]
    assert (True, False) in seen or (False, True) in seen
    learned = [int((next_token_targets(b["labels"], b["document_ids"]) != IGNORE).sum()) for b in batches]
    assert any(abs(a - b) > 10 for a, b in zip(learned[::2], learned[1::2]))


def first_weights() -> dict[str, torch.Tensor]:
    """The weights that script 1 begins with."""
    torch.manual_seed(MIXED_SEED)
    tokenizer = SentencePieceTokenizer()
    return VLM(preset("nano", encoder=ENCODER, vocab_size=tokenizer.vocab_size, image_token_id=tokenizer.image)).state_dict()


def test_two_processes_equal_one_that_accumulates(one_process, two_processes):
    start, one, two = (first_weights(), *(load_file(folder / "model.safetensors") for folder in (one_process, two_processes)))
    assert start.keys() == one.keys() == two.keys()
    for name in one:
        moved = (one[name] - start[name]).norm()
        assert (one[name] - two[name]).norm() <= 1e-4 * moved, name
        assert moved > 0 or name.startswith("encoder."), name  # frozen


def test_two_processes_that_accumulate_equal_one(mixed, run_script, run_ranks, tmp_path):
    """Four micro-batches a step. In one step no rank's last one holds a picture, but an earlier one does: its gradient counts."""
    pictures = ["pixels" in batch for batch in micro_batches(mixed, 20)]  # of a step: first of rank 0, of rank 1; then the last
    assert any(any(pictures[k:k + 2]) and not any(pictures[k + 2:k + 4]) for k in range(0, 20, 4))
    run_script("1-pretrain_vlm.py", *mixed_arguments(mixed), "--accumulate", 4, cwd=tmp_path)
    one = load_file(tmp_path / "out" / "pretrain" / "model.safetensors")
    (tmp_path / "two").mkdir()
    run_ranks("1-pretrain_vlm.py", *mixed_arguments(mixed), "--accumulate", 2, cwd=tmp_path / "two")
    two, start = load_file(tmp_path / "two" / "out" / "pretrain" / "model.safetensors"), first_weights()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * (one[name] - start[name]).norm(), name


def counted(calls: list[int], bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's sum over ranks, counted."""
    calls.append(bucket.index())
    return distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def test_ranks_add_up_their_gradients_once_a_step(tmp_path):
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model, calls = nn.Linear(3, 2), []
        policy = DistributedDataParallel(model, find_unused_parameters=True)
        policy.register_comm_hook(calls, counted)
        batches = [{"x": torch.randn(4, 3)} for _ in range(3)]
        for batch in Run(flags(tmp_path), "test").micro_steps(policy, batches):
            policy(batch["x"]).sum().backward()
        assert calls == [0]
        assert torch.allclose(model.weight.grad, sum(batch["x"].sum(0) for batch in batches).expand(2, 3))
    finally:
        distributed.destroy_process_group()


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
