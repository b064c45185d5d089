"""Tiles: a large picture is seen whole and then part by part, in every script alike, and nothing of it is lost or seen twice."""

import ast
import dataclasses
import json
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.bad_rows import BadRow, BadRows
from dataset.batches import Batches
from dataset.chat import Conversation, Message, Preference
from dataset.checkpoints import Checkpoints
from dataset.dialogue import Dialogue
from dataset.images import Picture, from_bytes, from_file, from_image, padded
from dataset.processor import Processor
from dataset.studies.probe import by_cell, cell_features, ridge
from dataset.tokenizer import MODEL_FILE, SentencePieceTokenizer
from dataset.vision.image_processor import ImageProcessor, OneRank
from dataset.vision.tiles import Tiles, cut, grid
from dataset.world import drawings
from model import checkpoint
from model.config import VLMConfig, preset
from model.generate import stream
from model.inspection import Inspector
from model.losses import IGNORE
from model.registry import ENCODERS, UserError
from model.vlm import VLM
from tests import tiny
from tests.conftest import ROOT
from tests.miniatures import lines, talk
from tests.test_images import MEAN, gradient, saved
from tests.test_structure import PRODUCT, TREES, call_name

TOKENIZER = SentencePieceTokenizer()
S = 32  # the square of the encoder below
ENCODER = f"clip_random:size={S},patch=16,width=32,layers=1,heads=2"


def tiles_of(most: int, fit: str = "square", size: int = S) -> Tiles:
    return Tiles(size, MEAN, fit, most)


# ---------------------------------------------------------------- which grid


@pytest.mark.parametrize(("width", "height", "most", "expected"), [
    (96, 96, 12, (1, 1)), (64, 48, 12, (1, 1)), (1, 1, 12, (1, 1)),  # no larger than the encoder's own square
    (143, 143, 12, (1, 1)), (144, 144, 12, (2, 2)),  # a second column where its own pixels fill at least half of it
    (192, 192, 4, (2, 2)), (192, 192, 3, (1, 1)),  # of three tiles none is a square, but one is
    (1000, 1000, 12, (3, 3)), (1000, 1000, 16, (4, 4)),
    (192, 96, 12, (2, 1)), (192, 96, 0, (1, 1)), (384, 192, 12, (4, 2)), (384, 192, 7, (2, 1)),
    (96, 288, 12, (1, 3)), (96, 288, 2, (1, 2)), (300, 200, 6, (3, 2)), (300, 200, 4, (2, 1)),
    (960, 96, 12, (10, 1)), (960, 96, 4, (4, 1)), (60_000, 1, 12, (12, 1)),  # panoramas
    (110, 40, 12, (1, 1)), (150, 60, 12, (2, 1)),  # 150 x 60 has the shape of 5 x 2, but not the pixels
    (1000, 700, 4, (2, 1)),  # 10 : 7 is nearer to 2 : 1 than to 1 : 1
])  # fmt: skip
def test_the_grid_is_the_one_of_the_nearest_shape_and_never_larger_than_the_picture_fills(width, height, most, expected):
    assert grid(width, height, 96, most) == expected
    assert grid(height, width, 96, most) == expected[::-1]


def test_no_grid_holds_more_tiles_than_allowed_or_enlarges_by_more_than_a_third():
    rng = random.Random(0)
    for _ in range(500):
        width, height, most = rng.randint(1, 2000), rng.randint(1, 2000), rng.randint(2, 12)
        columns, rows = grid(width, height, 96, most)
        assert columns * rows <= most
        assert columns == 1 or columns * 96 <= width * 4 / 3
        assert rows == 1 or rows * 96 <= height * 4 / 3


# ---------------------------------------------------------------- the tiles


def put_together(tiles: list[Image.Image], columns: int) -> np.ndarray:
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[k:k + columns]], axis=1) for k in range(0, len(tiles), columns)]
    return np.concatenate(rows)


@pytest.mark.parametrize("fit", ["square", "stretch", "pad"])
def test_the_tiles_put_together_are_the_picture_no_pixel_lost_or_seen_twice(fit):
    painted = np.zeros((64, 96, 3), np.uint8)  # every pixel has a colour of its own: its coordinates
    painted[..., 0], painted[..., 1] = np.arange(96), np.arange(64)[:, None]
    _, *tiles = cut(Image.fromarray(painted), (3, 2), S, MEAN, fit)
    assert [tile.size for tile in tiles] == [(S, S)] * 6
    assert [tuple(np.asarray(tile)[0, 0, :2]) for tile in tiles] == [(0, 0), (32, 0), (64, 0), (0, 32), (32, 32), (64, 32)]
    assert np.array_equal(put_together(tiles, 3), painted)


def test_a_picture_between_two_grids_is_squeezed_or_padded_as_one():
    image = gradient(100, 50)
    _, *squeezed = cut(image, (3, 1), S, MEAN, "square")
    assert np.array_equal(put_together(squeezed, 3), np.asarray(image.resize((96, 32), Image.Resampling.BICUBIC)))
    _, *banded = cut(image, (3, 1), S, MEAN, "pad")
    whole = put_together(banded, 3)
    bands = np.all(whole == [round(255 * channel) for channel in MEAN], axis=(0, 2))
    assert np.flatnonzero(~bands).tolist() == list(range(16, 80))  # 64 x 32 in the middle of 96 x 32
    assert np.array_equal(whole[:, 16:80], np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("fit", ["square", "stretch", "pad"])
def test_the_thumbnail_is_the_whole_picture_small(fit):
    image = Image.new("RGB", (192, 128), "black")
    image.paste("red", (0, 0, 20, 128))
    image.paste("blue", (172, 0, 192, 128))  # the middle square shows neither
    thumbnail, *tiles = tiles_of(6, fit)(from_image(image))
    assert len(tiles) == 6
    small = thumbnail.load()
    assert small.size == thumbnail.size == (S, S)
    assert small.getpixel((0, S // 2))[0] > 200 and small.getpixel((S - 1, S // 2))[2] > 200
    expected = padded(image, (S, S), MEAN) if fit == "pad" else image.resize((S, S), Image.Resampling.BICUBIC)
    assert small.tobytes() == expected.tobytes()


def test_a_small_picture_is_itself_and_without_tiles_nothing_is_opened():
    def never():
        raise AssertionError("opened")

    small, unopened = from_image(gradient(40, 30)), Picture("unopened", never)
    assert tiles_of(6)(small) == (small,)
    assert tiles_of(0)(unopened) == (unopened,)


def test_a_picture_is_opened_once_for_all_its_tiles_and_measured_by_its_header(tmp_path):
    gradient(192, 128).save(tmp_path / "wide.jpg")
    picture, opened = from_file(tmp_path / "wide.jpg"), []
    counted = dataclasses.replace(picture, load_small=lambda side: opened.append(1) or picture.load())
    cutter = tiles_of(6)
    tiles = cutter(counted)
    assert not opened and len(tiles) == 7 == len({tile.key for tile in tiles})
    assert [tile.load().size for tile in tiles] == [(S, S)] * 7
    assert len(opened) == 1
    assert tiles == cutter(counted)
    assert not {tile.key for tile in tiles_of(2)(counted)} & {tile.key for tile in tiles}  # another grid, other tiles


# ---------------------------------------------------------------- in the text


def model_of(connector: str = "pixel_shuffle", tiles: int = 6, encoder: str = ENCODER) -> VLM:
    torch.manual_seed(0)
    config = VLMConfig(tiny.llm_config(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=512), encoder, connector,
                       TOKENIZER.image, tiles=tiles)  # fmt: skip
    return VLM(config).eval()


def processor_of(model: VLM, cache=None) -> Processor:
    return Processor.of(model, TOKENIZER, OneRank(), cache)


def without_model(image_tokens: int) -> Processor:
    """A processor that cuts pictures into at most six tiles."""
    images = tiny.Images()
    images.tiles = tiles_of(6)
    return tiny.processor("pupil", image_tokens, tokenizer=TOKENIZER, images=images)


WIDE, SMALL, TALL = from_image(gradient(96, 64)), from_image(gradient(30, 30)), from_image(gradient(32, 64))
FRAMES = [from_image(Image.new("RGB", (64, 32), (10 * k, 0, 0))) for k in range(8)]  # of a video


def about(*pictures: Picture, name: str = "row") -> Conversation:
    return Conversation(name, (Message("user", (*pictures, "What?")), Message("assistant", ("A bus.",))))


MIXED = [about(WIDE, SMALL, name="a"), about(name="b"), about(SMALL, name="c"), about(TALL, WIDE, SMALL, TALL, name="d"),
         about(*FRAMES, name="e")]  # fmt: skip


@pytest.mark.parametrize("connector", ["pixel_shuffle", "pixel_shuffle_compare", "linear", "resampler:queries=3"])
@pytest.mark.parametrize("picture", ["{n}", ""])  # without numbers the placeholders of pictures side by side are one run
def test_every_tile_has_its_placeholders_in_conversations_of_every_mixture(connector, picture):
    model = model_of(connector)
    processor = processor_of(model)
    processor.template = dataclasses.replace(processor.template, picture=picture)
    documents = [processor.document(row, 2000) for row in MIXED]
    assert [len(document.pictures) for document in documents] == [8, 0, 1, 3 + 7 + 1 + 3, 8 * 3]
    batch = processor.batch(documents)
    assert batch["pixels"].shape == (8 + 1 + 14 + 24, 3, S, S)
    learned = batch["labels"] != IGNORE
    together = model(batch, learned)
    apart = [processor.batch([document]) for document in documents]
    alone = torch.cat([model(one, one["labels"] != IGNORE) for one in apart])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_picture_in_tiles_is_one_numbered_picture_to_the_text():
    processor = without_model(image_tokens=2)
    document = processor.document(about(WIDE, SMALL), 1000)
    one, two, question = (TOKENIZER.encode(text) for text in ("1", "2", "What?"))
    begin = [TOKENIZER.id("<s>"), TOKENIZER.id("<|user|>")]
    expected = [*begin, *one, *[TOKENIZER.image] * 7 * 2, *two, *[TOKENIZER.image] * 2, *question]
    assert document.input_ids[:len(expected)] == expected
    prompt = processor.prompt(about(WIDE, SMALL))
    assert prompt.input_ids == document.input_ids[:len(prompt)] and prompt.pictures == document.pictures


def test_each_tile_reaches_the_model_where_its_placeholders_stand():
    """Another tile changes the tokens of that tile and no other."""
    processor = processor_of(model_of("linear"))
    image = gradient(96, 64)
    changed = image.copy()
    changed.paste("white", (32, 32, 64, 64))  # the fifth of six tiles, behind the thumbnail
    batches = [processor.batch([processor.document(about(from_image(one)), 1000)]) for one in (image, changed)]
    same = [torch.equal(a, b) for a, b in zip(batches[0]["pixels"], batches[1]["pixels"], strict=True)]
    assert [k for k, equal in enumerate(same) if not equal] == [0, 5]  # and the thumbnail
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_no_length_leaves_half_a_picture():
    processor = without_model(image_tokens=2)
    row = Conversation("row", (Message("user", (SMALL, "One?")), Message("assistant", ("A bus.",)),
                               Message("user", (WIDE, "And?", TALL)), Message("assistant", ("A fox.",))))  # fmt: skip
    whole, numbers = processor.document(row, 1000), set()
    for length in range(1, len(whole) + 1):
        try:
            document = processor.document(row, length)
        except BadRow as bad:
            assert "11 images and tiles of 2" in str(bad) and "--tiles" in bad.remedy
            continue
        assert document.input_ids.count(TOKENIZER.image) == 2 * len(document.pictures)
        assert document.pictures == whole.pictures[:len(document.pictures)] and len(document) <= length
        numbers.add(len(document.pictures))
    assert numbers == {1, 1 + 7 + 3}  # nothing is learned between the second picture and the third


def test_a_preference_shows_both_answers_the_same_tiles():
    pair = without_model(image_tokens=1).pair(Preference("p", about(WIDE), "A bus.", "A fox."), 100)
    assert pair.chosen.pictures == pair.rejected.pictures and len(pair.chosen.pictures) == 7


def test_a_broken_picture_is_a_bad_row_whether_its_header_is_broken_or_what_follows(tmp_path):
    data = saved(gradient(200, 64), "JPEG")
    broken = {"header": from_bytes(data[:20]), "body": from_bytes(data[:-200])}
    rows = [about(picture, name=name) for name, picture in broken.items()] + [about(WIDE, name="good")]
    model = model_of()
    for cache in (None, tmp_path / "features"):
        processor, bad_rows = processor_of(model, cache), BadRows(tmp_path / "bad.jsonl", len(rows), 1.0)
        batches = Batches(rows, lambda row, processor=processor: processor.document(row, 100), processor.batch, batch_size=3,
                          seed=0, bad_rows=bad_rows)  # fmt: skip
        processor.images.prepare(batches.pictures(1))
        assert batches.batch(0)["ids"] == ["good"]
        named = [json.loads(line) for line in bad_rows.path.read_text().splitlines()]
        assert {row["row"] for row in named} == set(broken) and all("cannot be opened" in row["reason"] for row in named)
        bad_rows.path.unlink()


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("fit", ["square", "stretch", "pad"])
def test_cached_features_are_those_of_the_tiles_and_no_picture_finds_those_of_another(tmp_path, fit):
    model = model_of()
    model.config = dataclasses.replace(model.config, fit=fit)
    cached, now = processor_of(model, tmp_path).images, processor_of(model).images
    cached.prepare([WIDE, SMALL, TALL])
    assert len(cached.features.place) == 7 + 1 + 3
    tiles = [tile for picture in (TALL, WIDE, SMALL) for tile in now.tiles(picture)]
    assert torch.equal(cached(tiles), now.encode(now.pixels(tiles)).half().float())
    plain = ImageProcessor(model.encoder, fit, 0, tmp_path, OneRank())
    plain.prepare([WIDE])  # the same folder, without tiles
    assert torch.equal(plain([WIDE]), plain.encode(plain.pixels([WIDE])).half().float())
    assert torch.equal(cached(tiles), now.encode(now.pixels(tiles)).half().float())


def test_a_tile_goes_to_the_encoder_pixel_by_pixel_whatever_the_fit():
    model = model_of()
    for fit in ("square", "stretch", "pad"):
        images = ImageProcessor(model.encoder, fit, 6, None, OneRank())
        pixels = images(images.tiles(WIDE))[1:]  # without the thumbnail
        mean, std = (torch.tensor(value)[:, None, None] for value in (model.encoder.mean, model.encoder.std))
        restored = put_together([Image.fromarray(((one * std + mean) * 255).round().byte().permute(1, 2, 0).numpy())
                                 for one in pixels], 3)  # fmt: skip
        assert np.array_equal(restored, np.asarray(WIDE.load()))


def test_what_is_too_small_to_read_when_squeezed_can_be_read_in_tiles():
    """Three drawings of digits side by side, 288 x 96: a linear probe of the tiny CLIP, on what it sees squeezed and in tiles.

    Squeezed, a cell of 32 x 32 pixels holds three digits side by side, and a probe for each of them reads it.
    """
    encoder, rng = ENCODERS.make("tiny_clip").eval(), random.Random(0)
    rows = [[drawings.digits([rng.randint(0, 9) for _ in range(9)], rng) for _ in range(3)] for _ in range(80)]
    pictures = []  # of each row the thumbnail and three tiles
    for drawn in rows:
        strip = Image.fromarray(np.concatenate([np.asarray(one.image) for one in drawn], axis=1))
        seen = [SimpleNamespace(image=tile.load()) for tile in tiles_of(3, size=96)(from_image(strip))]
        assert all(tile.image.tobytes() == one.image.tobytes() for tile, one in zip(seen[1:], drawn, strict=True))
        pictures += seen
    features, names, thirds = [], [], []
    for drawn, cells in zip(rows, cell_features(encoder, pictures).unflatten(0, (-1, 4)), strict=True):  # (4, 9, 4 D)
        for k, one in enumerate(drawn):
            for cell, name in by_cell(one):
                features.append((cells[0, cell // 3 * 3 + k], cells[1 + k, cell]))
                names.append(int(name.split()[-1]))
                thirds.append(cell % 3)
    truth, thirds, split = torch.tensor(names), torch.tensor(thirds), len(names) * 3 // 4

    def read(inputs: torch.Tensor) -> float:
        """The share of the last quarter that is read right, fitted on the others, by a probe for each third."""
        right = 0.0
        for third in range(3):
            some = torch.nonzero(thirds == third).flatten()
            fitted, held_out = some[some < split], some[some >= split]
            weights = ridge(inputs[fitted], truth[fitted], 10)
            guess = (inputs[held_out] @ weights[:-1] + weights[-1]).argmax(-1)
            right += (guess == truth[held_out]).float().mean().item() / 3
        return right

    squeezed, tiled = (read(torch.stack(kind)) for kind in zip(*features, strict=True))
    print(f"read in tiles {tiled:.1%}, squeezed {squeezed:.1%}")
    assert tiled > 0.97 and squeezed < 0.75


# ---------------------------------------------------------------- stored, and honoured everywhere


def test_a_checkpoint_of_before_tiles_has_none():
    config = preset("nano", vocab_size=TOKENIZER.vocab_size, image_token_id=TOKENIZER.image, tiles=4)
    assert VLMConfig.from_json(config.to_json()) == config and config.tiles == 4
    old = config.to_dict()
    del old["tiles"]
    assert VLMConfig.from_dict(old).tiles == 0


def test_a_number_of_tiles_that_means_nothing_is_refused(run_script, tmp_path):
    reason = "tiles {}: the most tiles of a picture are 0 (none) or at least 2"
    for number in (-1, 1):
        with pytest.raises(UserError) as caught:
            model_of(tiles=number)
        assert str(caught.value) == reason.format(number)
    done = run_script("1-pretrain_vlm.py", "--tiles", 1, "--encoder", ENCODER, "--bench", "", "--dry_run", cwd=tmp_path,
                      expect=1)  # fmt: skip
    assert done.err == f"{reason.format(1)}\n"


def test_every_processor_is_made_of_its_model_and_so_cuts_pictures_as_the_checkpoint_says():
    """A script that made one by hand could silently show the model a large picture whole."""
    by_hand, of_a_model = [], []
    for file in PRODUCT:
        calls = [node for node in ast.walk(TREES[file]) if isinstance(node, ast.Call)]
        by_hand += [file.name for call in calls if call_name(call) in ("Processor", "ImageProcessor", "Tiles")]
        of_a_model += [file.name for call in calls if call_name(call) == "Processor.of"]
    assert sorted(by_hand) == sorted(["processor.py", "processor.py", "image_processor.py", "image_processor.py"])
    scripts = {path.name for path in PRODUCT if path.parent == ROOT}
    assert len(of_a_model) > 5 and scripts - {"web_demo.py"} | {"checkpoints.py"} <= set(of_a_model)  # the page opens several
    of = next(node for node in ast.walk(TREES[ROOT / "dataset" / "processor.py"]) if getattr(node, "name", "") == "of")
    assert "model.config.tiles" in ast.unparse(of)


@pytest.fixture(scope="module")
def pupil(run_script, tmp_path_factory):
    """The folder of stages 1 and 2 on pictures larger than the encoder, with --tiles given to the first alone."""
    folder = tmp_path_factory.mktemp("tiled")
    for k in range(6):
        gradient(90 + 20 * k, 64).save(folder / f"{k}.png")
    turns = talk("<image>\nWhat?", "A bus.")
    lines(folder / "rows.jsonl", [{"image": f"{k}.png", "conversations": turns} for k in range(6)])
    common = ("--batch_size", 4, "--max_steps", 3, "--log_every", 1, "--device", "cpu", "--bench", "")
    data = ("--data", "world:rows=6", folder / "rows.jsonl")
    run_script("1-pretrain_vlm.py", "--encoder", ENCODER, "--tiles", 4, *data, *common, cwd=folder)
    run_script("2-sft_vlm.py", *data, *common[:-1], "world", "--eval_examples", 1, cwd=folder)
    return folder


def keys(folder) -> set[str]:
    """The keys of all pictures of which features are cached."""
    return {key for listing in folder.glob("out/features/*/*.json") for key in json.loads(listing.read_text())}


def test_training_sees_tiles_and_the_checkpoint_says_so(pupil):
    for stage in ("pretrain", "sft"):
        assert json.loads((pupil / "out" / stage / "config.json").read_text())["tiles"] == 4
        assert json.loads((pupil / "out" / stage / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    cached = keys(pupil)
    wide = {key for key in cached if ".png" in key}
    assert {key.rpartition("/")[0].rpartition("#")[2] for key in wide} == {"3x1", "4x1", "2x1", "2x2"} & {
        f"{c}x{r}" for c, r in (grid(90 + 20 * k, 64, S, 4) for k in range(6))}  # fmt: skip
    scenes = {key for key in cached if key.startswith("world:")}
    assert scenes and {key.rpartition("#")[2] for key in scenes} == {f"2x2/{k}" for k in range(5)}


def test_preferences_and_rules_go_on_with_tiles(pupil, run_script, tmp_path):
    common = ("--init", pupil / "out" / "sft", "--feature_cache", tmp_path / "out" / "features", "--bench", "", "--device", "cpu",
              "--max_steps", 1, "--batch_size", 2)  # fmt: skip
    pairs = lines(tmp_path / "pairs.jsonl", [{"image": f"{k}.png", "question": "What?", "chosen": "A bus.", "rejected": "A fox."}
                                             for k in range(6)])  # fmt: skip
    run_script("3-rl_vlm.py", "--algo", "dpo", "--data", pairs, "--image_folder", pupil, "--val_share", 0, *common,
               cwd=tmp_path)
    assert len(keys(tmp_path)) > 6 and all(".png:" in key and "#" in key for key in keys(tmp_path))
    run_script("3-rl_vlm.py", "--data", "arithmetic:rows=0", "--problems", 4, "--prompts", 2, "--group_size", 2,
               "--max_new_tokens", 4, *common, cwd=tmp_path)  # fmt: skip
    problems = {key for key in keys(tmp_path) if key.startswith("arithmetic:")}
    assert problems and all("#2x2/" in key for key in problems)
    for stage in ("dpo", "grpo"):
        assert json.loads((tmp_path / "out" / stage / "config.json").read_text())["tiles"] == 4


def test_chat_files_and_benchmarks_need_no_flag(pupil, run_script, tmp_path):
    out = pupil / "out" / "sft"
    done = run_script("4-eval_chat.py", "--image", pupil / "5.png", "--prompt", "What?", "--max_new_tokens", 4, cwd=pupil)
    model = checkpoint.load(out)
    processor = processor_of(model)
    plain = Dialogue(lambda batch: stream(model, batch, max_new_tokens=4, temperature=0.0, **processor.sampling), processor, 1000)
    opened = Checkpoints({"sft": out}, partial(Inspector, device=torch.device("cpu")), stream)
    page = opened.dialogue("sft", max_new_tokens=4, temperature=0.0, top_p=1.0)
    picture = from_file(pupil / "5.png")
    columns, rows = grid(190, 64, S, 4)
    for one in (plain, page):
        document, _ = one.prompt([Message("user", (picture, "What?"))])
        assert len(document.pictures) == 1 + columns * rows > 1
        assert document.input_ids.count(TOKENIZER.image) == model.image_tokens * len(document.pictures)
        answer = list(one.say([picture, "What?"]))[-1]
        assert done.out.rstrip("\n") == answer.rstrip("\n")
        assert list(one.say([from_file(pupil / "0.png"), "And now?"]))  # the second picture after the first

    data = ("--data", pupil / "rows.jsonl", "--save", tmp_path / "predictions.jsonl")
    run_script("4-eval_chat.py", *data, "--bench", "world", "--examples", 1, "--max_new_tokens", 4, cwd=pupil)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6
    assert "world/exact" in json.loads((out / "scores.json").read_text())


def test_a_model_learns_to_see_tiles_from_a_checkpoint_without(run_script, tmp_path):
    checkpoint.save(tmp_path / "before", model_of(tiles=0), MODEL_FILE)
    assert processor_of(checkpoint.load(tmp_path / "before")).document(about(WIDE), 1000).pictures == (WIDE,)
    run_script("1-pretrain_vlm.py", "--init", "before", "--out", "out/more", "--tiles", 9, "--data", "world:rows=4",
               "--batch_size", 4, "--max_steps", 1, "--device", "cpu", "--bench", "", cwd=tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "out" / "more" / "config.json").read_text())["tiles"] == 9
    assert any("#3x3/9" in key for key in keys(tmp_path))
    assert math.isfinite(json.loads((tmp_path / "out" / "more" / "log.jsonl").read_text().splitlines()[0])["loss"])
