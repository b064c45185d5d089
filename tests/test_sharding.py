"""A model divided among two processes: the same weights as with DDP, ordinary checkpoints, and resuming."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from model import checkpoint
from tests.conftest import free_port, mixed_arguments
from tests.test_runtime import first_weights


@pytest.fixture(scope="module")
def run_two(launcher):
    """`run_two(*arguments, cwd=folder)`: script 1 by two processes, as torchrun starts them."""

    def run_two(*arguments, cwd, expect: int = 0, **options):
        port = free_port()
        ranks = [launcher.start("1-pretrain_vlm.py", *arguments, cwd=cwd, env={
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }, **options) for rank in (0, 1)]  # fmt: skip
        done = [launcher.wait(rank) for rank in ranks]
        assert [end.status for end in done] == [expect, expect], "".join(end.err[-3000:] for end in done)
        return cwd / "out" / "pretrain"

    return run_two


def same_training(one, two) -> None:
    """Equal to rounding: the difference is tiny beside the way that each tensor went.

    The bias of the keys is left out: softmax does not see it, so its gradient is rounding alone, and AdamW makes steps of it.
    """
    start, one, two = first_weights(), load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for tensors in (start, one, two):
        for name in [name for name in tensors if name.endswith("in_proj_bias")]:
            of_queries, _, of_values = tensors[name].chunk(3)
            tensors[name] = torch.cat([of_queries, of_values])
    assert start.keys() == one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * (one[name] - start[name]).norm(), name


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_divided_weights_go_where_whole_ones_go(shard, run_two, two_processes, mixed, tmp_path):
    """Muon and AdamW, clipped; some micro-batches have no picture; the first process evaluates alone in between."""
    checks = ("--bench", "world", "--eval_every", 2, "--eval_examples", 1)
    folder = run_two(*mixed_arguments(mixed), "--shard", shard, *checks, cwd=tmp_path)
    same_training(two_processes, folder)
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (two_processes, folder)]
    losses = [[row["loss"] for row in log if "loss" in row] for log in logs]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    norms = [[row["gradient_norm"] for row in log if "loss" in row] for log in logs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert checkpoint.load(folder)


def test_a_divided_run_that_was_killed_goes_on_to_exactly_the_same_weights(run_two, mixed, tmp_path):
    """LoRA, an encoder that learns and recomputed activations with it, against the same run uninterrupted and against DDP."""
    arguments = (*mixed_arguments(mixed), "--train.llm", "lora:4", "--train.encoder", "partial:1", "--checkpointing")
    ends = []
    for name, shard in (("whole", "ddp"), ("divided", "zero3"), ("killed", "zero3")):
        (tmp_path / name).mkdir()
        run = (*arguments, "--shard", shard)
        if name == "killed":
            run_two(*run, cwd=tmp_path / name, die_at_step=3, expect=-signal.SIGKILL)
            assert [path.name for path in (tmp_path / name).glob("out/pretrain/resume/*")] == ["000002"]
            run = (*run, "--resume")
        ends.append(run_two(*run, cwd=tmp_path / name))
    same_training(*ends[:2])
    for file in ("model.safetensors", "adapter.safetensors"):
        one, two = (load_file(folder / file) for folder in ends[1:])
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def connector_arguments(mixed) -> tuple:
    """The connector alone, from one conversation a micro-batch: many hold no picture, and reach no weight that is trained."""
    return (*mixed_arguments(mixed), "--train.llm", "freeze", "--batch_size", 1, "--max_steps", 12)


@pytest.fixture(scope="module")
def connector_alone(run_script, mixed, tmp_path_factory):
    """The checkpoint of one process that trains the connector alone."""
    folder = tmp_path_factory.mktemp("connector")
    run_script("1-pretrain_vlm.py", *connector_arguments(mixed), "--accumulate", 2, cwd=folder)
    return folder / "out" / "pretrain"


def test_where_the_connector_alone_is_trained_nothing_else_moves(connector_alone):
    start, end = first_weights(), load_file(connector_alone / "model.safetensors")
    moved = {name for name in end if not torch.equal(end[name], start[name])}
    assert "connector.proj.weight" in moved and all(name.startswith("connector.") for name in moved)


@pytest.mark.parametrize("shard", ["ddp", "zero3"])
def test_a_connector_alone_learns_from_rows_of_which_some_hold_no_picture(shard, connector_alone, run_two, mixed, tmp_path):
    """Of two processes one often has no gradient, and both go on."""
    same_training(connector_alone, run_two(*connector_arguments(mixed), "--shard", shard, cwd=tmp_path))


@pytest.mark.parametrize(("arguments", "message"), [
    (("--shard", "zero3"), "--shard zero3 divides a model among processes, but there is only one: torchrun"),
    (("--shard", "zero1"), "--shard is ddp, zero2 or zero3, not 'zero1'"),
    (("--shard", "zero2", "--compile"), "--compile and --shard zero2 do not go together"),
])  # fmt: skip
def test_what_cannot_be_divided_is_refused(arguments, message, run_script, mixed, tmp_path):
    done = run_script("1-pretrain_vlm.py", *mixed_arguments(mixed), *arguments, cwd=tmp_path, expect=1)
    assert message in done.err and "Traceback" not in done.err
