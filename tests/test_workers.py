"""Processes that make batches: the same batches, bad rows and errors as a thread's, and one zip file for all of them."""

import io
import itertools
import multiprocessing
import zipfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dataset import workers
from dataset.bad_rows import BadRows
from dataset.batches import Batches
from dataset.vision.zips import Zips
from model.registry import UserError
from tests.test_collate import bad, join, same, source

pytestmark = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
PICTURES: list = []  # what forked processes find
ALONE = SimpleNamespace(rank=0, world_size=1)


def batches(render, processes: int) -> Batches:
    return Batches(source(50), render, join, batch_size=4, seed=0, bad_rows=BadRows(None, 50, 1.0), workers=processes)


def test_processes_make_the_batches_that_a_thread_makes_and_name_the_same_bad_rows():
    by_thread, by_processes = (batches(bad("row:2", "row:11"), processes) for processes in (0, 2))
    expected = list(itertools.islice(by_thread.stream(3, ALONE), 23))  # to the end of the second epoch
    stream = by_processes.stream(3, ALONE)
    assert all(same(next(stream), batch) for batch in expected) and stream.position == 26
    assert by_processes.bad_rows.names == by_thread.bad_rows.names == {"row:2", "row:11"}
    assert by_processes.bad_rows.seen == 23 * 4 - 2 * 2  # the last micro-batch of an epoch has two rows


def test_an_error_in_a_process_is_raised_as_it_is():
    def render(conversation):
        raise UserError("no such flag")

    with pytest.raises(UserError, match="^no such flag$"):
        next(batches(render, 1).stream(0, ALONE))


def test_a_full_shared_memory_is_told_where_torch_would_wait_for_ever(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match="no shared memory is left for batches .*--workers 0 .*No space left on device"):
        next(batches(bad("row:2"), 1).stream(0, ALONE))


def red(k: int) -> int:
    return PICTURES[k].load().getpixel((0, 0))[0]


def test_processes_read_one_zip_file_without_moving_each_others_place(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for k in range(200):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (k, 0, 0)).save(file, "PNG")
            archive.writestr(f"{k}.png", file.getvalue())
    zips = Zips(tmp_path)
    PICTURES[:] = [zips.find(f"{k}.png") for k in range(200)]  # the archive is open before the fork
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(red, range(200), chunksize=1) == list(range(200))


@pytest.mark.parametrize("device, stored, local_ranks, expected", [
    ("cpu", False, 1, 0), ("cuda", True, 1, 0), ("cuda", False, 1, 6), ("cuda", False, 4, 3), ("cuda", False, 24, 0),
])  # fmt: skip
def test_processes_start_where_a_gpu_waits_for_pictures(device, stored, local_ranks, expected, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    assert workers.useful(6, torch.device(device), stored) == expected
