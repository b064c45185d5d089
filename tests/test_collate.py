"""Batches: nothing lost, nothing mixed up, and an order that one number brings back exactly."""

import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.bad_rows import BadRow, BadRows
from dataset.batches import Batches, epoch_order
from dataset.chat import Conversation, Document, Message
from dataset.collate import IGNORE, collate, pad
from dataset.images import Picture
from model.registry import UserError

IMAGE = 3


def opened(name: str) -> Image.Image:
    if name.startswith("broken"):
        raise BadRow("broken", "mend it")
    return Image.new("RGB", (2, 2))


def picture(name: str) -> Picture:
    return Picture(name, lambda: opened(name))


def features(pictures) -> torch.Tensor:
    """(N, 2, 4) features that say whose they are: the number in the picture's name."""
    return torch.stack([torch.full((2, 4), float(p.load() is not None and p.key.split("-")[1])) for p in pictures])


def document(name: str, length: int, *pictures: str) -> Document:
    ids = [1] + [IMAGE, IMAGE] * len(pictures) + list(range(10, 10 + length))
    return Document(name, ids, [number > 10 for number in ids], tuple(map(picture, pictures)))


DOCUMENTS = [document("a", 3, "p-1", "p-2"), document("b", 2), document("c", 4, "p-3")]


# ---------------------------------------------------------------- one batch


def test_a_flat_batch_written_out():
    batch = collate([document("a", 2, "p-7"), document("b", 3)], features)
    assert batch["input_ids"].tolist() == [[1, 3, 3, 10, 11, 1, 10, 11, 12]]
    assert batch["labels"].tolist() == [[IGNORE] * 4 + [11] + [IGNORE] * 2 + [11, 12]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, 1]]
    assert batch["features"].tolist() == [[[7.0] * 4] * 2]
    assert batch["ids"] == ["a", "b"]


def test_pictures_come_in_reading_order():
    assert collate(DOCUMENTS, features)["features"][:, 0, 0].tolist() == [1, 2, 3]


def test_pixels_and_features_go_by_their_own_names():
    batch = collate(DOCUMENTS, lambda pictures: torch.zeros(len(pictures), 3, 8, 8))
    assert batch["pixels"].shape == (3, 3, 8, 8)
    assert "features" not in batch


def test_a_batch_without_pictures_has_no_tensor_of_them():
    batch = collate([DOCUMENTS[1]], lambda _: pytest.fail("called"))
    assert not {"pixels", "features"} & set(batch)


def test_padded_holds_what_flat_holds():
    flat, padded = collate(DOCUMENTS, features), pad(DOCUMENTS, features, pad_id=2)
    real = padded["document_ids"] >= 0
    for name in ("input_ids", "labels", "position_ids", "document_ids"):
        assert torch.equal(padded[name][real], flat[name][0])
    assert torch.equal(padded["features"], flat["features"])
    assert set(padded["input_ids"][~real].tolist()) == {2}
    assert set(padded["labels"][~real].tolist()) == {IGNORE}


def test_a_broken_picture_names_its_document():
    with pytest.raises(BadRow) as caught:
        collate([DOCUMENTS[0], document("x", 2, "broken-1")], features)
    assert caught.value.where == "x"


# ---------------------------------------------------------------- the stream


def source(n: int) -> list[Conversation]:
    """Every third row has a picture."""
    return [Conversation(f"row:{i}", (Message("assistant", (*[picture(f"p-{i}")] * (i % 3 == 0), "x")),)) for i in range(n)]


def rendered(conversation: Conversation) -> Document:
    """Lengths between 2 and 13, the same for the same row."""
    number = int(conversation.id.split(":")[1])
    return document(conversation.id, 2 + number * 7 % 12, *(one.key for one in conversation.pictures))


def join(documents: list[Document]) -> dict:
    return collate(documents, features)


def bad(*ids: str):
    """`rendered`, but these rows are bad; without ids all are."""
    def render(conversation: Conversation) -> Document:
        if conversation.id in ids or not ids:
            raise BadRow("bad", "mend it", conversation.id)
        return rendered(conversation)

    return render


@pytest.fixture
def make(tmp_path):
    def batches(n=50, render=rendered, *, seed=0, max_bad=1.0, rows=None, batch_size=4):
        rows = source(n) if rows is None else rows
        bad_rows = BadRows(tmp_path / "bad_rows.jsonl", total=len(rows), max_bad=max_bad)
        return Batches(rows, render, join, batch_size=batch_size, seed=seed, bad_rows=bad_rows)

    return batches


def first(batches: Batches, n: int, position: int = 0, rank: int = 0, world_size: int = 1) -> list[tuple[int, dict]]:
    """[(position to store, batch)]: what a rank sees first."""
    stream = batches.stream(position, SimpleNamespace(rank=rank, world_size=world_size))
    assert stream.position == position
    return [(stream.position, batch) for batch in itertools.islice(stream, n)]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if k != "ids" else a[k] == b[k] for k in a)


def test_an_epoch_shows_every_row_once_and_the_next_in_another_order(make):
    batches = make(50)
    assert len(batches) == 13
    epochs = [[name for number in range(e * 13, e * 13 + 13) for name in batches.batch(number)["ids"]] for e in (0, 1)]
    for names in epochs:
        assert sorted(names) == sorted(row.id for row in source(50))
    assert epochs[0] != epochs[1]


def test_batch_number_m_depends_on_the_seed_and_m_alone(make):
    numbers = np.random.default_rng(0).permutation(30)
    called_in_order, called_at_random = make(), make()
    in_order = [called_in_order.batch(m) for m in range(30)]
    for m in numbers:
        assert same(called_at_random.batch(int(m)), in_order[m])
    assert not same(make(seed=1).batch(0), in_order[0])


def test_the_documents_of_a_batch_stand_from_short_to_long(make):
    batches = make()
    lengths = [batches.batch(m)["document_ids"].unique(return_counts=True)[1].tolist() for m in range(13)]
    assert lengths == [sorted(batch) for batch in lengths] and sum(map(len, lengths)) == 50


def test_a_run_that_stops_anywhere_goes_on_exactly(make):
    whole = first(make(), 30)
    for stop in (1, 7, 13, 20):
        resumed = first(make(), 30 - stop, position=whole[stop - 1][0])
        assert all(p == q and same(a, b) for (p, a), (q, b) in zip(whole[stop:], resumed, strict=True))


def test_two_processes_see_what_one_with_two_accumulated_batches_sees(make):
    one = first(make(), 20)
    two = [first(make(), 10, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(10):
        for rank in (0, 1):
            assert same(two[rank][step][1], one[2 * step + rank][1])
            assert two[rank][step][0] == one[2 * step + 1][0] == 2 * step + 2  # the same position on every rank


def test_a_run_of_two_processes_resumes_on_one(make):
    position = first(make(), 3, rank=1, world_size=2)[-1][0]
    assert same(first(make(), 1, position)[0][1], make().batch(6))


def test_the_next_batch_is_made_meanwhile_and_is_not_counted(make):
    started, go_on = threading.Semaphore(0), threading.Event()

    def render(conversation):
        started.release()
        assert go_on.wait(10)
        return rendered(conversation)

    stream = make(render=render, batch_size=1).stream(3, SimpleNamespace(rank=0, world_size=1))
    assert started.acquire(timeout=10) and stream.position == 3  # the first one is being made before it is called for
    go_on.set()
    assert same(next(stream), make(batch_size=1).batch(3))
    assert started.acquire(timeout=10) and stream.position == 4  # so is the second
    assert same(next(iter(stream)), make(batch_size=1).batch(4))


def test_the_pictures_of_the_first_batches_are_those_that_they_will_show(make):
    for n in (1, 5, 13):
        batches = make()
        numbers = {int(value) for m in range(n) for value in batches.batch(m).get("features", torch.zeros(0, 2, 4))[:, 0, 0]}
        keys = [one.key for one in make().pictures(n)]
        assert sorted(keys) == sorted(f"p-{k}" for k in numbers)
    assert sorted(one.key for one in make().pictures(40)) == sorted(keys)  # a whole epoch shows every row: each comes once


def test_the_pictures_of_bad_rows_are_left_for_the_stream_to_name(make):
    class Rows(list):
        def __getitem__(self, i):
            if i % 2:
                raise BadRow("bad", "mend it", f"row:{i}")
            return super().__getitem__(i)

    batches = make(rows=Rows(source(50)))
    assert sorted(one.key for one in batches.pictures(13)) == sorted(f"p-{i}" for i in range(0, 50, 6))
    assert not batches.bad_rows.names and not batches.bad_rows.path.exists()


def test_bad_rows_leave_positions_and_all_other_rows_in_place(make):
    some_bad = bad("row:3", "row:17", "row:40")
    batches = make(render=some_bad)
    epoch = [batches.batch(m) for m in range(len(batches))]
    names = [name for batch in epoch for name in batch["ids"]]
    assert sorted(names) == sorted({row.id for row in source(50)} - {"row:3", "row:17", "row:40"})
    assert batches.bad_rows.names == {"row:3", "row:17", "row:40"}
    assert batches.bad_rows.seen == 50
    assert all(same(a, b) for a, b in zip([make(render=some_bad).batch(m) for m in range(13)], epoch, strict=True))


def test_a_broken_picture_costs_its_row_only(make):
    def one_broken(conversation):
        return document("row:8", 5, "broken-1") if conversation.id == "row:8" else rendered(conversation)

    batches, whole = make(render=one_broken), make()
    names = [{name for m in range(13) for name in made.batch(m)["ids"]} for made in (batches, whole)]
    assert names[1] - names[0] == {"row:8"}
    assert batches.bad_rows.names == {"row:8"}


def test_a_bad_row_alone_in_its_micro_batch_gives_way_to_a_neighbour_that_was_seen_before(make):
    batches = make(5, bad("row:0", "row:3"), batch_size=1)
    order = [f"row:{row}" for row in batches.order(0)]
    good = [name not in ("row:0", "row:3") for name in order]
    for m in range(5):
        before = [k for k in range(m + 1) if good[k]]
        expected = order[before[-1]] if before else next(name for name, fine in zip(order, good) if fine)
        assert batches.batch(m)["ids"] == [expected]
    assert not all(good[:3])  # of the first three one is bad


def test_every_process_names_the_bad_rows_that_it_reads(make):
    """Each renders other rows than the others: one that named nothing would lose half of them."""
    for rank in (0, 1):
        batches = make(4, bad(), batch_size=2)
        assert batches.items(0, rank) == []
    named = [json.loads(line)["row"] for line in batches.bad_rows.path.read_text().splitlines()]
    assert sorted(named) == [f"row:{k}" for k in range(4)]


def test_a_batch_of_broken_pictures_gives_way_to_the_next(make):
    rows = make(8).order(0)
    spoiled, others = ({f"row:{row}" for row in part} for part in (rows[:4], rows[4:]))
    batches = make(8, lambda c: document(c.id, 2, "broken-1" if c.id in spoiled else f"p-{c.id[4:]}"))
    assert [set(batches.batch(m)["ids"]) for m in (0, 1)] == [others, others]
    assert batches.bad_rows.names == spoiled


def test_too_many_bad_rows_stop_the_run(make):
    with pytest.raises(UserError, match="--max_bad"):
        make(render=bad(), max_bad=0.01).batch(0)
    with pytest.raises(UserError, match="no good row"):
        make(render=bad(), max_bad=1.0).batch(0)


def test_a_bug_of_ours_is_not_skipped(make):
    with pytest.raises(ZeroDivisionError):
        first(make(render=lambda conversation: 1 / 0), 1)


def test_a_source_without_rows_is_refused_at_once(make):
    with pytest.raises(ValueError, match="no row"):
        make(0)


def test_rows_of_a_block_stay_near_and_free_rows_spread():
    block = np.concatenate([np.repeat(np.arange(100), 10), np.full(1000, -1)])
    order = epoch_order(block, np.random.default_rng(0))
    assert sorted(order) == list(range(2000))
    place = np.empty(2000, int)
    place[order] = np.arange(2000)
    reach = [np.ptp(place[block == b]) for b in range(100)]
    assert max(reach) < 200  # of 2,000
    assert np.ptp(place[block == -1]) > 1900
    assert list(order[:50]) != sorted(order[:50])


def test_a_batch_reads_each_block_once(make):
    reads = []

    class Grouped(list):
        def blocks(self):
            return np.arange(len(self)) // 5

        def __getitem__(self, i):
            reads.append(i // 5)
            return super().__getitem__(i)

    make(rows=Grouped(source(60)), batch_size=12).batch(0)
    changes = [block for block, _ in itertools.groupby(reads)]
    assert len(reads) == 12 > len(changes) == len(set(changes)) > 1
