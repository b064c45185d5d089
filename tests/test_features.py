"""The feature cache: each picture goes through the encoder once, and nothing wrong is ever read back."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.images import BadRow, Picture, from_bytes, from_image
from dataset.vision import feature_cache, image_processor
from dataset.vision.feature_cache import FeatureCache

TOKENS, DIM = 3, 4


def picture(shade: int) -> Picture:
    return from_image(Image.new("RGB", (4, 4), (shade, 0, 0)))


class Encoder:
    """(n, P, D): the picture's shade everywhere; counts what it was asked."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pictures):
        shades = [picture.load().getpixel((0, 0))[0] for picture in pictures]
        self.seen += len(pictures)
        return torch.tensor(shades)[:, None, None].expand(-1, TOKENS, DIM).float() / 7


PICTURES = [picture(shade) for shade in range(10)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD", 4)
    monkeypatch.setattr(feature_cache, "BATCH", 3)


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, "print", TOKENS, DIM)


def again(cache: FeatureCache) -> FeatureCache:
    """The cache as another process finds it."""
    return FeatureCache(cache.folder.parent, cache.folder.name, TOKENS, DIM)


@pytest.mark.parametrize("most", [1, 200, 10**9])
def test_pictures_that_hold_their_bytes_are_walked_through_twice_where_they_are_too_many(most, tmp_path, monkeypatch):
    monkeypatch.setattr(image_processor, "MOST_HELD", most)
    encoder = SimpleNamespace(size=4, mean=(0.5,) * 3, std=(0.5,) * 3, tokens=TOKENS, dim=DIM, fingerprint=lambda: "print")
    walks = []

    def pictures():
        walks.append(1)
        yield from PICTURES[:7] + PICTURES[:3]

    looks = image_processor.Eyes(encoder, "square", 0, torch.device("cpu"), tmp_path)
    looks.encode = Encoder()
    looks.prepare(pictures)
    assert looks.encode.seen == len(looks.features.place) == 7 and len(walks) == (1 if most == 10**9 else 2)
    assert looks(PICTURES[:7]).shape == (7, TOKENS, DIM)
    looks.prepare(iter(PICTURES))  # what cannot be asked for again is held
    assert looks.encode.seen == 10


def test_above_the_bound_on_disk_no_picture_is_looked_at(tmp_path):
    encoder = SimpleNamespace(size=4, mean=(0.5,) * 3, std=(0.5,) * 3, tokens=TOKENS, dim=DIM, fingerprint=lambda: "print")
    looks, said, walked = image_processor.Eyes(encoder, "square", 0, torch.device("cpu"), tmp_path), [], []
    looks.prepare(lambda: (walked.append(picture) or picture for picture in PICTURES), gigabytes=4.5 * 2 * TOKENS * DIM / 1e9,
                  say=said.append)  # fmt: skip
    assert looks.features is None and len(walked) == 5 and "5 or more pictures" in said[0] and not list(tmp_path.iterdir())


def test_features_are_what_the_encoder_gives_to_half_precision(cache):
    encode = Encoder()
    cache.fill(PICTURES, encode, rank=0, world=1)
    made = again(cache).get((PICTURES[9], PICTURES[2], PICTURES[2]))
    assert made.dtype == torch.float32
    assert torch.equal(made, encode([PICTURES[9], PICTURES[2], PICTURES[2]]).half().float())


def test_each_picture_is_encoded_once_ever(cache):
    encode = Encoder()
    cache.fill(PICTURES[:6] + PICTURES[:6], encode, rank=0, world=1)
    cache.fill(PICTURES, encode, rank=0, world=1)
    again(cache).fill(PICTURES, encode, rank=0, world=1)
    assert encode.seen == 10


def test_ranks_share_the_work_and_see_each_others(cache):
    encoders = [Encoder(), Encoder()]
    ranks = [cache, again(cache)]
    for rank in (0, 1):  # as if at once: neither has seen the other's shards
        ranks[rank].fill(PICTURES, encoders[rank], rank, world=2)
    assert [encode.seen for encode in encoders] == [5, 5]
    cache.refresh()
    assert torch.equal(cache.get(tuple(PICTURES)), Encoder()(PICTURES).half().float())


def test_another_encoder_does_not_find_these(cache):
    cache.fill(PICTURES, Encoder(), rank=0, world=1)
    other = FeatureCache(cache.folder.parent, "another print", TOKENS, DIM)
    with pytest.raises(KeyError, match="call fill first"):
        other.get((PICTURES[0],))


@pytest.mark.parametrize("keep", [0, 60, 130])
def test_a_shard_that_was_cut_short_is_computed_again(cache, keep, capsys):
    cache.fill(PICTURES, Encoder(), rank=0, world=1)
    shard = max(cache.folder.glob("*.npy"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:keep])
    encode, found = Encoder(), again(cache)
    assert "to be computed again" in capsys.readouterr().out
    found.fill(PICTURES, encode, rank=0, world=1)
    assert encode.seen == 4
    assert torch.equal(found.get(tuple(PICTURES)), Encoder()(PICTURES).half().float())


def test_a_shard_without_its_list_was_never_finished(cache):
    cache.fill(PICTURES[:4], Encoder(), rank=0, world=1)
    next(cache.folder.glob("*.json")).unlink()
    assert not again(cache).place


def test_a_crash_leaves_what_was_finished_and_nothing_half_done(cache):
    def fails_late(pictures):
        if PICTURES[6] in pictures:
            raise RuntimeError("out of memory")
        return Encoder()(pictures)

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fill(PICTURES, fails_late, rank=0, world=1)
    assert set(again(cache).place) == {picture.key for picture in PICTURES[:4]}


def test_a_broken_picture_is_left_out_and_says_why_when_asked(cache):
    broken = from_bytes(b"no image")
    cache.fill([*PICTURES[:2], broken, *PICTURES[2:]], Encoder(), rank=0, world=1)
    assert len(cache.place) == 10
    with pytest.raises(BadRow, match="cannot be opened"):
        cache.get((PICTURES[0], broken))


@pytest.mark.parametrize("made", [torch.zeros(3, TOKENS, DIM + 1), torch.full((3, TOKENS, DIM), 1e6)])
def test_features_of_another_shape_or_too_large_for_fp16_are_refused(cache, made):
    with pytest.raises(ValueError, match="fp16"):
        cache.fill(PICTURES[:3], lambda pictures: made, rank=0, world=1)


def test_a_cache_of_another_shape_is_refused(cache):
    cache.fill(PICTURES, Encoder(), rank=0, world=1)
    with pytest.raises(ValueError, match="delete"):
        FeatureCache(cache.folder.parent, cache.folder.name, TOKENS, DIM + 1)


def test_features_are_read_through_a_memory_map(cache):
    cache.fill(PICTURES, Encoder(), rank=0, world=1)
    assert all(isinstance(shard, np.memmap) for shard, _ in cache.place.values())


def test_the_size_on_disk_is_known_before(cache):
    assert FeatureCache(cache.folder, "vit", 50, 768).bytes_for(595_000) == 45_696_000_000
