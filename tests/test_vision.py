"""From the name of a picture to its features: it is found, goes through the encoder once, and nothing wrong is read back."""

import base64
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.bad_rows import BadRow
from dataset.images import Picture, from_bytes, from_image
from dataset.vision import feature_cache, image_processor
from dataset.vision.feature_cache import FeatureCache
from dataset.vision.image_processor import ImageProcessor, OneRank
from dataset.vision.loading import from_base64, from_name
from model.registry import UserError
from tests.test_images import gradient, saved

TOKENS, DIM = 3, 4

# ---------------------------------------------------------------- a name -> a picture


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "file:///etc/hostname", "a/../../secret.png", "link.png"])
def test_a_path_never_leaves_the_image_folder(tmp_path, name):
    folder = tmp_path / "images"
    folder.mkdir()
    gradient(8, 8).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRow, match="leaves the image folder"):
        from_name(name, folder, allow_urls=True)


def test_names_inside_the_folder_are_found_in_every_spelling(tmp_path):
    gradient(8, 8).save(tmp_path / "a b.png")
    for name in ("a b.png", "./a b.png", str(tmp_path / "a b.png"), f"file://{tmp_path}/a%20b.png"):
        assert from_name(name, tmp_path, allow_urls=False).load().size == (8, 8)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.png", "missing.png", "", "https://a.org/a.png", "data:image/png;base64,!!"])
def test_a_name_without_an_image_is_a_bad_row(tmp_path, name):
    with pytest.raises(BadRow):
        from_name(name, tmp_path, allow_urls=False)


def test_base64_is_read_with_and_without_its_prefix():
    text = base64.b64encode(saved(gradient(8, 8), "PNG")).decode()
    assert from_base64(text) == from_base64("data:image/png;base64," + text)


# ---------------------------------------------------------------- pictures -> features


def picture(shade: int) -> Picture:
    return from_image(Image.new("RGB", (4, 4), (shade, 0, 0)))


def opened(pictures):
    [picture.load() for picture in pictures]
    return pictures


class Encode:
    """Pictures, or their pixels -> (n, P, D): the picture's shade everywhere. It counts them."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pictures):
        if isinstance(pictures, torch.Tensor):  # normalised by a mean and a std of 0.5
            shades = ((pictures[:, 0, 0, 0] * 0.5 + 0.5) * 255).round().tolist()
        else:
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


def test_features_are_what_the_encoder_gives_to_half_precision(cache):
    encode = Encode()
    cache.fill(PICTURES, opened, encode, rank=0, world=1)
    features = again(cache).get((PICTURES[9], PICTURES[2], PICTURES[2]))
    assert features.dtype == torch.float32
    assert torch.equal(features, encode([PICTURES[9], PICTURES[2], PICTURES[2]]).half().float())


def test_each_picture_is_encoded_once_ever(cache):
    encode = Encode()
    cache.fill(PICTURES[:6] + PICTURES[:6], opened, encode, rank=0, world=1)
    cache.fill(PICTURES, opened, encode, rank=0, world=1)
    again(cache).fill(PICTURES, opened, encode, rank=0, world=1)
    assert encode.seen == 10


def test_ranks_share_the_work_and_see_each_others(cache):
    encoders = [Encode(), Encode()]
    ranks = [cache, again(cache)]
    for rank in (0, 1):  # as if at once: neither has seen the other's shards
        ranks[rank].fill(PICTURES, opened, encoders[rank], rank, world=2)
    assert [encode.seen for encode in encoders] == [5, 5]
    cache.refresh()
    assert torch.equal(cache.get(tuple(PICTURES)), Encode()(PICTURES).half().float())


def test_another_encoder_does_not_find_these(cache):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    other = FeatureCache(cache.folder.parent, "another print", TOKENS, DIM)
    with pytest.raises(KeyError, match="call fill first"):
        other.get((PICTURES[0],))


@pytest.mark.parametrize("size", [0, 60, 130])
def test_a_shard_that_was_cut_short_is_computed_again(cache, size, capsys):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    shard = max(cache.folder.glob("*.npy"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:size])
    encode, reread = Encode(), again(cache)
    assert "to be computed again" in capsys.readouterr().out
    reread.fill(PICTURES, opened, encode, rank=0, world=1)
    assert encode.seen == 4
    assert torch.equal(reread.get(tuple(PICTURES)), Encode()(PICTURES).half().float())


@pytest.mark.parametrize("kind", ["*.json", "*.npy"])
def test_a_shard_with_half_a_file_is_computed_again(kind, cache):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    file = next(cache.folder.glob(kind))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again(cache).fill(PICTURES, opened, Encode(), rank=0, world=1)
    assert set(again(cache).place) == {picture.key for picture in PICTURES}


def test_features_that_are_not_finite_are_refused(cache):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    for file in cache.folder.glob("*.npy"):
        shard = np.load(file)
        shard[:, 0, 0] = np.nan
        np.save(file, shard)
    with pytest.raises(UserError, match="the features of a picture .* are not finite. Delete the folder"):
        again(cache).get((PICTURES[1],))


def test_a_shard_without_its_list_was_never_finished(cache):
    cache.fill(PICTURES[:4], opened, Encode(), rank=0, world=1)
    next(cache.folder.glob("*.json")).unlink()
    assert not again(cache).place


def test_a_crash_leaves_what_was_finished_and_nothing_half_done(cache):
    def fails_late(pictures):
        if PICTURES[6] in pictures:
            raise RuntimeError("out of memory")
        return Encode()(pictures)

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.fill(PICTURES, opened, fails_late, rank=0, world=1)
    assert set(again(cache).place) == {picture.key for picture in PICTURES[:4]}


def test_a_broken_picture_is_left_out_and_says_why_when_asked(cache):
    broken = from_bytes(b"no image")
    cache.fill([*PICTURES[:2], broken, *PICTURES[2:]], opened, Encode(), rank=0, world=1)
    assert len(cache.place) == 10
    with pytest.raises(BadRow, match="cannot be opened"):
        cache.get((PICTURES[0], broken))


@pytest.mark.parametrize("features", [torch.zeros(3, TOKENS, DIM + 1), torch.full((3, TOKENS, DIM), 1e6)])
def test_features_of_another_shape_or_too_large_for_fp16_are_refused(cache, features):
    with pytest.raises(ValueError, match="fp16"):
        cache.fill(PICTURES[:3], opened, lambda pictures: features, rank=0, world=1)


def test_a_cache_of_another_shape_is_refused(cache):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    with pytest.raises(ValueError, match="delete"):
        FeatureCache(cache.folder.parent, cache.folder.name, TOKENS, DIM + 1)


def test_features_are_read_through_a_memory_map(cache):
    cache.fill(PICTURES, opened, Encode(), rank=0, world=1)
    assert all(isinstance(shard, np.memmap) for shard, _ in cache.place.values())


def test_the_size_on_disk_is_known_before(cache):
    assert FeatureCache(cache.folder, "vit", 50, 768).bytes_for(595_000) == 45_696_000_000


# ---------------------------------------------------------------- the image processor


def images(cache=None, *, max_tiles: int = 0, ranks=None) -> ImageProcessor:
    """An image processor whose encoder is `Encode`."""
    encoder = SimpleNamespace(size=4, mean=(0.5,) * 3, std=(0.5,) * 3, tokens=TOKENS, dim=DIM, fingerprint=lambda: "print")
    result = ImageProcessor(encoder, "square", max_tiles, cache, ranks or OneRank())
    result.encode = Encode()
    return result


@pytest.mark.parametrize("most", [1, 200, 10**9])
def test_pictures_that_hold_their_bytes_are_walked_through_twice_where_they_are_too_many(most, tmp_path, monkeypatch):
    monkeypatch.setattr(image_processor, "MAX_BYTES_IN_MEMORY", most)
    walks = []

    def pictures():
        walks.append(1)
        yield from PICTURES[:7] + PICTURES[:3]

    processor = images(tmp_path)
    processor.prepare(pictures)
    assert processor.encode.seen == len(processor.features.place) == 7 and len(walks) == (1 if most == 10**9 else 2)
    assert processor(PICTURES[:7]).shape == (7, TOKENS, DIM)
    processor.prepare(iter(PICTURES))  # what cannot be called for again is held
    assert processor.encode.seen == 10


def test_above_the_bound_on_disk_no_picture_is_encoded(tmp_path):
    processor, printed, walked = images(tmp_path), [], []
    processor.prepare(lambda: (walked.append(picture) or picture for picture in PICTURES), 4.5 * 2 * TOKENS * DIM / 1e9,
                      printed.append)
    assert processor.features is None and len(walked) == 5 and processor.encode.seen == 0 and not list(tmp_path.iterdir())
    (text,) = printed
    assert "5 or more pictures" in text and "--feature_cache_gb" in text
    assert processor(PICTURES[:2]).shape == (2, 3, 4, 4)  # pixels from now on


def test_without_a_cache_the_model_gets_pixels():
    assert torch.equal(images()(PICTURES[:3]), images().pixels(PICTURES[:3]))
    assert images()(PICTURES[:3]).shape == (3, 3, 4, 4)
    images().prepare(lambda: pytest.fail("walked"))


def test_all_ranks_know_what_is_missing_before_one_writes_and_wait_until_all_have_written(tmp_path):
    """Two threads as two ranks, the second late: it finds the folder empty, or they would divide the pictures differently."""
    meeting, first_waits, processors = threading.Barrier(2, timeout=10), threading.Event(), {}

    def rank(number: int) -> None:
        def barrier() -> None:
            first_waits.set()
            meeting.wait()

        if number == 1:
            first_waits.wait(10)
        ranks = SimpleNamespace(device=torch.device("cpu"), rank=number, world_size=2, barrier=barrier)
        processors[number] = images(tmp_path, ranks=ranks)
        processors[number].prepare(PICTURES)

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert {number: one.encode.seen for number, one in processors.items()} == {0: 5, 1: 5}
    for one in processors.values():
        assert torch.equal(one(PICTURES), Encode()(PICTURES).half().float())
    alone = processors[1].on_one_rank()  # waits for nobody
    alone.encode = Encode()
    alone.prepare([picture(77), *PICTURES])
    assert alone.encode.seen == 1 and (alone.ranks.rank, alone.ranks.world_size) == (0, 1)


def test_a_picture_that_does_not_open_is_left_for_whoever_renders_its_row(tmp_path):
    broken, wide = from_bytes(b"no image"), from_image(gradient(16, 8))
    processor = images(tmp_path, max_tiles=4)
    assert [tile.key for tile in processor.all_tiles([PICTURES[0], broken, wide])] == [
        PICTURES[0].key, *(tile.key for tile in processor.tiles(wide))]
    processor.prepare([PICTURES[0], broken])
    assert set(processor.features.place) == {PICTURES[0].key}
    with pytest.raises(BadRow, match="cannot be opened"):
        processor([broken])
