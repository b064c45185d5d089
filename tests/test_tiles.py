"""Tiles: a large picture is seen whole and then part by part, in every script alike, and nothing of it is lost or seen twice."""

import ast
import dataclasses
import json
import math
import random
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import web_demo
from dataset.chat import Conversation, Message, render, render_prompt
from dataset.collate import Batches, collate
from dataset.formats.conversations import BadRows
from dataset.images import BadRow, Picture, from_bytes, from_file, from_image, padded
from dataset.preferences import Preference
from dataset.preferences import render as render_pair
from dataset.studies.probe import by_cell, cell_features, ridge
from dataset.tokenizer import Tokenizer
from dataset.vision.image_processor import Eyes
from dataset.vision.tiles import Tiles, cut, grid
from dataset.world import drawings
from model import checkpoint
from model.config import VLMConfig, preset
from model.losses import IGNORE
from model.registry import ENCODERS, TEMPLATES
from model.vlm import VLM
from tests.conftest import ROOT
from tests.miniatures import lines
from tests.test_images import MEAN, gradient, saved
from tests.test_structure import PRODUCT, TREES, call_name
from tests.tiny import llm_config

TOKENIZER, TEMPLATE, CPU = Tokenizer(), TEMPLATES.make("pupil"), torch.device("cpu")
S = 32  # the square of the encoder below
ENCODER = f"clip_random:size={S},patch=16,width=32,layers=1,heads=2"


def views(most: int, fit: str = "square", size: int = S) -> Tiles:
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


# ---------------------------------------------------------------- what is seen


def put_together(tiles: list[Image.Image], columns: int) -> np.ndarray:
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[k:k + columns]], axis=1) for k in range(0, len(tiles), columns)]
    return np.concatenate(rows)


@pytest.mark.parametrize("fit", ["square", "naive", "pad"])
def test_the_tiles_put_together_are_the_picture_no_pixel_lost_or_seen_twice(fit):
    painted = np.zeros((64, 96, 3), np.uint8)  # every pixel has a colour of its own: its coordinates
    painted[..., 0], painted[..., 1] = np.arange(96), np.arange(64)[:, None]
    _, *tiles = cut(Image.fromarray(painted), 3, 2, S, MEAN, fit)
    assert [tile.size for tile in tiles] == [(S, S)] * 6
    assert [tuple(np.asarray(tile)[0, 0, :2]) for tile in tiles] == [(0, 0), (32, 0), (64, 0), (0, 32), (32, 32), (64, 32)]
    assert np.array_equal(put_together(tiles, 3), painted)


def test_a_picture_between_two_grids_is_squeezed_or_padded_as_one():
    image = gradient(100, 50)
    _, *squeezed = cut(image, 3, 1, S, MEAN, "square")
    assert np.array_equal(put_together(squeezed, 3), np.asarray(image.resize((96, 32), Image.Resampling.BICUBIC)))
    _, *banded = cut(image, 3, 1, S, MEAN, "pad")
    whole = put_together(banded, 3)
    bands = np.all(whole == [round(255 * channel) for channel in MEAN], axis=(0, 2))
    assert np.flatnonzero(~bands).tolist() == list(range(16, 80))  # 64 x 32 in the middle of 96 x 32
    assert np.array_equal(whole[:, 16:80], np.asarray(image.resize((64, 32), Image.Resampling.BICUBIC)))


@pytest.mark.parametrize("fit", ["square", "naive", "pad"])
def test_the_first_view_is_the_whole_picture_small(fit):
    image = Image.new("RGB", (192, 128), "black")
    image.paste("red", (0, 0, 20, 128))
    image.paste("blue", (172, 0, 192, 128))  # the middle square shows neither
    thumbnail, *tiles = views(6, fit)(from_image(image))
    assert len(tiles) == 6
    shown = thumbnail.load()
    assert shown.size == thumbnail.size == (S, S)
    assert shown.getpixel((0, S // 2))[0] > 200 and shown.getpixel((S - 1, S // 2))[2] > 200
    expected = padded(image, (S, S), MEAN) if fit == "pad" else image.resize((S, S), Image.Resampling.BICUBIC)
    assert shown.tobytes() == expected.tobytes()


def test_a_small_picture_is_itself_and_without_tiles_nothing_is_opened():
    def never():
        raise AssertionError("opened")

    small, unopened = from_image(gradient(40, 30)), Picture("unopened", never)
    assert views(6)(small) == (small,)
    assert views(0)(unopened) == (unopened,)


def test_a_picture_is_opened_once_for_all_its_views_and_measured_by_its_header(tmp_path):
    gradient(192, 128).save(tmp_path / "wide.jpg")
    picture, opened = from_file(tmp_path / "wide.jpg"), []
    counted = dataclasses.replace(picture, load=lambda: opened.append(1) or picture.load())
    look = views(6)
    seen = look(counted)
    assert not opened and len(seen) == 7 == len({view.key for view in seen})
    assert [view.load().size for view in seen] == [(S, S)] * 7
    assert len(opened) == 1
    assert seen == look(counted)
    assert not {view.key for view in views(2)(counted)} & {view.key for view in seen}  # another grid, other tiles


# ---------------------------------------------------------------- in the text


def model_of(connector: str = "pixel_shuffle", tiles: int = 6, encoder: str = ENCODER) -> VLM:
    torch.manual_seed(0)
    config = VLMConfig(llm_config(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=512), encoder, connector,
                       TOKENIZER.image, tiles=tiles)  # fmt: skip
    return VLM(config).eval()


def eyes_of(model: VLM, cache=None) -> Eyes:
    return Eyes(model.encoder, model.config.fit, model.config.tiles, CPU, cache)


WIDE, SMALL, TALL = from_image(gradient(96, 64)), from_image(gradient(30, 30)), from_image(gradient(32, 64))
VIEWS = {WIDE: 7, SMALL: 1, TALL: 3}
FRAMES = [from_image(Image.new("RGB", (64, 32), (10 * k, 0, 0))) for k in range(8)]  # of a video


def about(*pictures: Picture, name: str = "row") -> Conversation:
    return Conversation(name, (Message("user", (*pictures, "What?")), Message("assistant", ("A bus.",))))


MIXED = [about(WIDE, SMALL, name="a"), about(name="b"), about(SMALL, name="c"), about(TALL, WIDE, SMALL, TALL, name="d"),
         about(*FRAMES, name="e")]  # fmt: skip


@pytest.mark.parametrize("connector", ["pixel_shuffle", "linear", "resampler:queries=3"])
@pytest.mark.parametrize("picture", ["{n}", ""])  # without numbers the placeholders of pictures side by side are one run
def test_every_view_has_its_placeholders_in_conversations_of_every_mixture(connector, picture):
    model = model_of(connector)
    eyes = eyes_of(model)
    form = dataclasses.replace(TEMPLATE, picture=picture)
    documents = [render(row, form, TOKENIZER, model.image_tokens, 2000, eyes.views) for row in MIXED]
    assert [len(document.pictures) for document in documents] == [8, 0, 1, 3 + 7 + 1 + 3, 8 * 3]
    batch = collate(documents, eyes)
    assert batch["pixels"].shape == (8 + 1 + 14 + 24, 3, S, S)
    learned = batch["labels"] != IGNORE
    together = model(batch, learned)
    apart = [collate([document], eyes) for document in documents]
    alone = torch.cat([model(one, one["labels"] != IGNORE) for one in apart])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_picture_in_tiles_is_one_numbered_picture_to_the_text():
    tokens = 2
    document = render(about(WIDE, SMALL), TEMPLATE, TOKENIZER, tokens, 1000, views(6))
    one, two, question = (TOKENIZER.encode(text) for text in ("1", "2", "What?"))
    begin = [TOKENIZER.id("<s>"), TOKENIZER.id("<|user|>")]
    expected = [*begin, *one, *[TOKENIZER.image] * 7 * tokens, *two, *[TOKENIZER.image] * tokens, *question]
    assert document.input_ids[:len(expected)] == expected
    asked = render_prompt(about(WIDE, SMALL), TEMPLATE, TOKENIZER, tokens, views=views(6))
    assert asked.input_ids == document.input_ids[:len(asked)] and asked.pictures == document.pictures


def test_each_view_reaches_the_model_where_its_placeholders_stand():
    """Another tile changes the tokens of that tile and no other."""
    model = model_of("linear")
    image = gradient(96, 64)
    changed = image.copy()
    changed.paste("white", (32, 32, 64, 64))  # the fifth of six tiles, the sixth view
    rows = [about(from_image(one)) for one in (image, changed)]
    batches = [collate([render(row, TEMPLATE, TOKENIZER, model.image_tokens, 1000, views(6))], eyes_of(model)) for row in rows]
    same = [torch.equal(a, b) for a, b in zip(batches[0]["pixels"], batches[1]["pixels"], strict=True)]
    assert [k for k, equal in enumerate(same) if not equal] == [0, 5]  # and the thumbnail
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])


def test_no_length_leaves_half_a_picture():
    tokens, look = 2, views(6)
    row = Conversation("row", (Message("user", (SMALL, "One?")), Message("assistant", ("A bus.",)),
                               Message("user", (WIDE, "And?", TALL)), Message("assistant", ("A fox.",))))  # fmt: skip
    whole, seen = render(row, TEMPLATE, TOKENIZER, tokens, 1000, look), set()
    for length in range(1, len(whole) + 1):
        try:
            document = render(row, TEMPLATE, TOKENIZER, tokens, length, look)
        except BadRow as bad:
            assert "11 images and tiles of 2" in str(bad) and "--tiles" in bad.remedy
            continue
        assert document.input_ids.count(TOKENIZER.image) == tokens * len(document.pictures)
        assert document.pictures == whole.pictures[:len(document.pictures)] and len(document) <= length
        seen.add(len(document.pictures))
    assert seen == {1, 1 + 7 + 3}  # nothing is learned between the second picture and the third


def test_a_preference_shows_both_answers_the_same_views():
    pair = render_pair(Preference("p", about(WIDE), "A bus.", "A fox."), TEMPLATE, TOKENIZER, 1, 100, views(6))
    assert pair.chosen.pictures == pair.rejected.pictures and len(pair.chosen.pictures) == 7


def test_a_broken_picture_is_a_bad_row_whether_its_header_is_broken_or_what_follows(tmp_path):
    data = saved(gradient(200, 64), "JPEG")
    broken = {"header": from_bytes(data[:20]), "body": from_bytes(data[:-200])}
    rows = [about(picture, name=name) for name, picture in broken.items()] + [about(WIDE, name="good")]
    model = model_of()
    for cache in (None, tmp_path / "features"):
        eyes, bad_rows = eyes_of(model, cache), BadRows(tmp_path / "bad.jsonl", len(rows), 1.0)
        batches = Batches(rows, lambda row, look=eyes.views: render(row, TEMPLATE, TOKENIZER, 1, 100, look), eyes, batch_size=3,
                          window=1, seed=0, bad_rows=bad_rows, rank=0, world=1)  # fmt: skip
        eyes.prepare(picture for row in rows for picture in row.pictures)
        assert batches.batch(0)["ids"] == ["good"]
        named = [json.loads(line) for line in bad_rows.path.read_text().splitlines()]
        assert {row["row"] for row in named} == set(broken) and all("cannot be opened" in row["reason"] for row in named)
        bad_rows.path.unlink()


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("fit", ["square", "naive", "pad"])
def test_cached_features_are_those_of_the_views_and_no_picture_finds_those_of_another(tmp_path, fit):
    model = model_of()
    model.config = dataclasses.replace(model.config, fit=fit)
    cached, now = eyes_of(model, tmp_path), eyes_of(model)
    cached.prepare([WIDE, SMALL, TALL])
    assert len(cached.features.place) == 7 + 1 + 3
    seen = [view for picture in (TALL, WIDE, SMALL) for view in now.views(picture)]
    assert torch.equal(cached(seen), now.encode(seen).half().float())
    plain = Eyes(model.encoder, fit, 0, CPU, tmp_path)
    plain.prepare([WIDE])  # the same folder, without tiles
    assert torch.equal(plain([WIDE]), plain.encode([WIDE]).half().float())
    assert torch.equal(cached(seen), now.encode(seen).half().float())


def test_a_view_goes_to_the_encoder_pixel_by_pixel_whatever_the_fit():
    model = model_of()
    for fit in ("square", "naive", "pad"):
        eyes = Eyes(model.encoder, fit, 6, CPU, None)
        pixels = eyes(eyes.views(WIDE))[1:]  # the tiles
        mean, std = (torch.tensor(value)[:, None, None] for value in (model.encoder.mean, model.encoder.std))
        shown = put_together([Image.fromarray(((one * std + mean) * 255).round().byte().permute(1, 2, 0).numpy())
                              for one in pixels], 3)  # fmt: skip
        assert np.array_equal(shown, np.asarray(WIDE.load()))


def test_what_is_too_small_to_read_when_squeezed_can_be_read_in_tiles():
    """Three drawings of digits side by side, 288 x 96: a linear probe of the tiny CLIP, on what it sees squeezed and in tiles.

    Squeezed, a cell of 32 x 32 pixels holds three digits side by side, and a probe for each of them reads it.
    """
    encoder, rng = ENCODERS.make("tiny_clip").eval(), random.Random(0)
    rows = [[drawings.digits([rng.randint(0, 9) for _ in range(9)], rng) for _ in range(3)] for _ in range(120)]
    features, names, thirds = [], [], []
    for drawn in rows:
        strip = Image.fromarray(np.concatenate([np.asarray(one.image) for one in drawn], axis=1))
        thumbnail, *tiles = (SimpleNamespace(image=view.load()) for view in views(3, size=96)(from_image(strip)))
        assert all(tile.image.tobytes() == one.image.tobytes() for tile, one in zip(tiles, drawn, strict=True))
        seen = cell_features(encoder, [thumbnail, *tiles])  # (4, 9, 4 D)
        for k, one in enumerate(drawn):
            for cell, name in by_cell(one):
                features.append((seen[0, cell // 3 * 3 + k], seen[1 + k, cell]))
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


@pytest.mark.parametrize("tiles", [-1, 1])
def test_a_number_of_tiles_that_means_nothing_is_refused(tiles, run_script, tmp_path):
    done = run_script("1-pretrain_vlm.py", "--tiles", tiles, "--encoder", ENCODER, "--bench", "", "--dry_run",
                      cwd=tmp_path, expect=1)  # fmt: skip
    assert f"tiles {tiles}: the most tiles of a picture are 0 (none) or at least 2" in done.err


RENDERERS = {"render", "render_prompt", "rollouts.render_prompt", "preferences.render", "answered", "rendered", "Dialogue"}


def test_whoever_renders_a_picture_says_how_it_is_looked_at():
    """The default is for tests; a script that forgot `views` would silently show the model one view of a large picture."""
    found = {"views": [], "config.tiles": []}
    for call in (node for file in PRODUCT for node in ast.walk(TREES[file]) if isinstance(node, ast.Call)):
        name = ast.unparse(call.args[0]) if call_name(call) == "partial" else call_name(call)
        bound = len(call.args) + len(call.keywords) < 3  # `render(row)` of a partial that holds the rest
        if name == "Eyes" or name in RENDERERS and not bound:
            found["config.tiles" if name == "Eyes" else "views"].append(ast.unparse(call))
    for needed, calls in found.items():
        assert len(calls) > 5 and not [call for call in calls if needed not in call]


@pytest.fixture(scope="module")
def pupil(run_script, tmp_path_factory):
    """(folder, data): stages 1 and 2 on pictures larger than the encoder, with --tiles given to the first alone."""
    folder = tmp_path_factory.mktemp("tiled")
    for k in range(6):
        gradient(90 + 20 * k, 64).save(folder / f"{k}.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    lines(folder / "rows.jsonl", [{"image": f"{k}.png", "conversations": turns} for k in range(6)])
    common = ("--batch_size", 4, "--max_steps", 3, "--log_every", 1, "--device", "cpu", "--bench", "")
    data = ("--data", "world:rows=6", folder / "rows.jsonl")
    run_script("1-pretrain_vlm.py", "--encoder", ENCODER, "--tiles", 4, *data, *common, cwd=folder)
    run_script("2-sft_vlm.py", *data, *common[:-1], "world", "--eval_examples", 1, cwd=folder)
    return folder


def keys(folder) -> set[str]:
    """The keys of all pictures of which features were kept."""
    return {key for listing in folder.glob("out/features/*/*.json") for key in json.loads(listing.read_text())}


def test_training_sees_tiles_and_the_checkpoint_says_so(pupil):
    for stage in ("pretrain", "sft"):
        assert json.loads((pupil / "out" / stage / "config.json").read_text())["tiles"] == 4
        assert json.loads((pupil / "out" / stage / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    known = keys(pupil)
    wide = {key for key in known if ".png" in key}
    assert {key.rpartition("/")[0].rpartition("#")[2] for key in wide} == {"3x1", "4x1", "2x1", "2x2"} & {
        f"{c}x{r}" for c, r in (grid(90 + 20 * k, 64, S, 4) for k in range(6))}  # fmt: skip
    scenes = {key for key in known if key.startswith("world:")}
    assert scenes and {key.rpartition("#")[2] for key in scenes} == {f"2x2/{k}" for k in range(5)}


def test_preferences_and_rules_go_on_with_tiles(pupil, run_script, tmp_path):
    given = ("--init", pupil / "out" / "sft", "--feature_cache", tmp_path / "out" / "features", "--bench", "", "--device", "cpu",
             "--max_steps", 3, "--batch_size", 2)  # fmt: skip
    pairs = lines(tmp_path / "pairs.jsonl", [{"image": f"{k}.png", "question": "What?", "chosen": "A bus.", "rejected": "A fox."}
                                             for k in range(6)])  # fmt: skip
    run_script("3-rl_vlm.py", "--algo", "dpo", "--data", pairs, "--image_folder", pupil, *given, cwd=tmp_path)
    assert len(keys(tmp_path)) > 6 and all(".png:" in key and "#" in key for key in keys(tmp_path))
    run_script("3-rl_vlm.py", "--data", "arithmetic:rows=0", "--problems", 4, "--prompts", 2, "--answers", 2,
               "--max_new_tokens", 4, *given, cwd=tmp_path)  # fmt: skip
    problems = {key for key in keys(tmp_path) if key.startswith("arithmetic:")}
    assert problems and all("#2x2/" in key for key in problems)
    for stage in ("dpo", "grpo"):
        assert json.loads((tmp_path / "out" / stage / "config.json").read_text())["tiles"] == 4


def test_chat_files_and_benchmarks_need_no_flag(pupil, run_script, tmp_path):
    out = pupil / "out" / "sft"
    done = run_script("4-eval_chat.py", "--image", pupil / "5.png", "--prompt", "What?", "--max_new_tokens", 4, cwd=pupil)
    model = checkpoint.load(out)
    sampling = {"max_new_tokens": 4, "stop_ids": {TOKENIZER.end}, "temperature": 0.0,
                "banned": (TOKENIZER.image, TOKENIZER.pad, TOKENIZER.bos)}  # fmt: skip
    script = SimpleNamespace(**runpy.run_path(str(ROOT / "4-eval_chat.py")))
    run = SimpleNamespace(device=CPU, to_device=lambda batch: batch)
    talk = script.dialogue(run, model, TOKENIZER, sampling, room=1000)
    page = web_demo.dialogues(model, TOKENIZER, CPU, web_demo.Config(max_new_tokens=4, temperature=0.0))([])
    picture = from_file(pupil / "5.png")
    columns, rows = grid(190, 64, S, 4)
    for one in (talk, page):
        document, _ = one.prompt([Message("user", (picture, "What?"))])
        assert len(document.pictures) == 1 + columns * rows > 1
        assert document.input_ids.count(TOKENIZER.image) == model.image_tokens * len(document.pictures)
        said = list(one.say([picture, "What?"]))[-1]
        assert done.out.rstrip("\n") == said.rstrip("\n")
        assert list(one.say([from_file(pupil / "0.png"), "And now?"]))  # the second picture after the first

    data = ("--data", pupil / "rows.jsonl", "--save", tmp_path / "predictions.jsonl")
    run_script("4-eval_chat.py", *data, "--bench", "world", "--examples", 1, "--max_new_tokens", 4, cwd=pupil)
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6
    assert "world/exact" in json.loads((out / "scores.json").read_text())


def test_a_model_learns_to_see_tiles_from_a_checkpoint_without(pupil, run_script, tmp_path):
    common = ("--data", "world:rows=4", "--batch_size", 4, "--max_steps", 1, "--device", "cpu", "--bench", "")
    run_script("1-pretrain_vlm.py", "--encoder", ENCODER, *common, cwd=tmp_path)
    assert not [key for key in keys(tmp_path) if "#" in key]
    run_script("1-pretrain_vlm.py", "--init", "out/pretrain", "--out", "out/more", "--tiles", 9, *common, cwd=tmp_path)
    assert json.loads((tmp_path / "out" / "more" / "config.json").read_text())["tiles"] == 9
    assert any("#3x3/9" in key for key in keys(tmp_path))
    assert math.isfinite(json.loads((tmp_path / "out" / "more" / "log.jsonl").read_text().splitlines()[0])["loss"])
