"""Ring attention on gloo: what several processes compute together is what one computes alone, to ten digits."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from model import context_parallel
from model.registry import UserError
from model.ring_attention import Ring, Schedule
from tests import ring_worker, tiny
from tests.conftest import free_port, mixed_arguments
from tests.test_sharding import same_training


@pytest.fixture(scope="module")
def ranks(launcher):
    """`ranks(4, script, *arguments, cwd=folder)`: what each of four processes of one run wrote, and that it ended well."""

    def ranks(count: int, script: str, *arguments, expect: int = 0, **options):
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = [launcher.start(script, *arguments, env={"RANK": str(k), "LOCAL_RANK": str(k), **common}, **options)
                   for k in range(count)]  # fmt: skip
        done = [launcher.wait(one) for one in started]
        assert [one.status for one in done] == [expect] * count, "".join(one.err[-3000:] for one in done)
        return done

    return ranks


# ---------------------------------------------------------------- who computes what


@pytest.mark.parametrize(("size", "chunk"), [(2, 3), (4, 5), (3, 1)])
def test_every_pair_of_tokens_is_computed_once_and_every_rank_has_as_many(size, chunk, monkeypatch):
    """Of one document: T (T + 1) / 2 pairs; in every round after the first, each rank meets 2 full pairs of chunks."""
    monkeypatch.setattr("model.ring_attention.TILE", 2)
    seen = torch.zeros(2 * size * chunk, 2 * size * chunk, dtype=torch.long)
    for index in range(size):
        schedule = Schedule(Ring(tuple(range(size)), index, None), chunk, torch.zeros(2 * chunk, dtype=torch.long))
        for hop, tiles in enumerate(schedule.tiles):
            before = seen.sum()
            for q, k in tiles:
                visible = schedule.visible(q, k, hop)
                assert visible.any()
                seen[schedule.queries[q][:, None], schedule.keys[hop][k]] += visible
            assert seen.sum() - before == (2 * chunk * chunk if hop else chunk * chunk + chunk * (chunk + 1))
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_tiles_of_other_documents_are_not_computed(monkeypatch):
    monkeypatch.setattr("model.ring_attention.TILE", 4)
    ring, chunk = Ring((0, 1), 0, None), 8
    starts = torch.arange(4 * chunk).div(4, rounding_mode="floor") * 4  # documents of 4 tokens
    schedule = Schedule(ring, chunk, starts[ring.positions(0, chunk)])
    assert [len(tiles) for tiles in schedule.tiles] == [4, 0]


def shard_of(index: int, batch: dict, size: int = 2) -> dict:
    return context_parallel.ContextParallel(tiny.vlm(), Ring(tuple(range(size)), index, None)).shard(batch)


def test_a_rank_gets_its_chunks_and_the_pictures_of_their_placeholders():
    """16 tokens in 4 chunks: the first picture lies in chunks 0 and 1, the second in chunks 2 and 3."""
    batch = tiny.flat([tiny.document(16, [2, 9], seed=0)])
    batch.update(pixels=tiny.pictures(2, seed=0), ids=["a"], keys=["k"])
    first, second = (shard_of(index, batch) for index in (0, 1))
    ids = batch["input_ids"][0]
    assert torch.equal(first["input_ids"], torch.stack([ids[:4], ids[12:]]))
    assert torch.equal(second["input_ids"], torch.stack([ids[4:8], ids[8:12]]))
    assert first["labels"][0].tolist() == batch["labels"][0, :5].tolist(), "and the label that its last token predicts"
    assert first["shard"].placeholders.tolist() == [0, 1, 8, 9] and second["shard"].placeholders.tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.equal(first["pixels"], batch["pixels"]) and first["keys"] == ["k"]
    late = tiny.flat([tiny.document(16, [], seed=1), tiny.document(16, [10], seed=2)])
    late.update(pixels=tiny.pictures(1, seed=0), ids=["a", "b"])
    assert "pixels" in shard_of(0, late) and "pixels" not in shard_of(1, late)


def test_a_picture_without_placeholders_is_named_as_without_a_ring():
    batch = tiny.flat([tiny.document(16, [2], seed=0)])
    batch.update(pixels=tiny.pictures(2, seed=0), ids=["row 7"])
    with pytest.raises(ValueError, match=r"5 image placeholders, but 2 image\(s\).*row 7: 5"):
        shard_of(0, batch)


# ---------------------------------------------------------------- equal to one process


@pytest.mark.parametrize(("processes", "size"), [(2, 2), (4, 4), (4, 2)])
def test_a_ring_computes_the_losses_and_gradients_of_one_process(processes, size, ranks, tmp_path):
    """Packed documents, pictures across a boundary and in a late shard, answers in parts: in fp64, by Run and DDP; 2 x 2 too."""
    for done in ranks(processes, "tests/ring_worker.py", size, cwd=tmp_path):
        errors = json.loads(done.out)
        assert errors.keys() == ring_worker.CASES.keys()
        assert max(errors.values()) < 1e-10, errors


def test_a_run_in_a_ring_goes_where_one_process_goes_and_is_resumed_exactly(ranks, one_process, mixed, tmp_path):
    """Muon and AdamW, clipped, two micro-batches a step, some of them without a picture."""
    arguments = (*mixed_arguments(mixed), "--accumulate", 2, "--context_parallel", 2)
    ends = []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        run = ("1-pretrain_vlm.py", *arguments)
        if name == "killed":
            ranks(2, *run, cwd=tmp_path / name, die_at_step=3, expect=-signal.SIGKILL)
            run = (*run, "--resume")
        ranks(2, *run, cwd=tmp_path / name)
        ends.append(tmp_path / name / "out" / "pretrain")
    same_training(one_process, ends[0])
    one, two = (load_file(folder / "model.safetensors") for folder in ends)
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [[json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()] for path in (one_process, *ends)]
    losses = [[(row["loss"], row["gradient_norm"]) for row in log if "loss" in row] for log in logs]
    assert losses[0] == [pytest.approx(pair, rel=1e-3) for pair in losses[1]] and losses[1] == losses[2]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("size", "world_size"), [(2, 1), (4, 6), (0, 1), (-1, 2)])
def test_processes_that_make_no_whole_rings_are_refused(size, world_size):
    with pytest.raises(UserError, match=f"--context_parallel {size}: {world_size} process.*torchrun --nproc_per_node"):
        context_parallel.make_ring(size, 0, world_size)


def test_a_language_model_of_another_library_is_refused():
    model = tiny.vlm()
    del model.llm.blocks[1].self_attn
    with pytest.raises(UserError, match="--context_parallel needs --llm gpt"):
        context_parallel.apply(model, Ring((0, 1), 0, None))
