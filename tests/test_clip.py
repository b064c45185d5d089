"""Our CLIP ViT is open_clip's, to the last feature, and a missing weights file says what to do."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.encoder import clip
from model.encoder.open_clip import copy_tower
from model.registry import ENCODERS, UserError


def small(activation: str = "gelu") -> clip.ViT:
    torch.manual_seed(0)
    return clip.ViT(
        size=24, patch=8, width=32, layers=3, heads=4, mlp=96, output=20,
        activation=activation, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4),
    )  # fmt: skip


@functools.cache
def tower(activation: str, **changes) -> torch.nn.Module:
    """open_clip's own visual tower with random weights, none of them at a value that hides a mistake."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=24, patch_size=8, width=32, layers=3, heads=4, mlp_ratio=3.0, output_dim=20,
        act_layer={"gelu": torch.nn.GELU, "quick_gelu": QuickGELU}[activation], **changes,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in visual.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return visual


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_features_and_embedding_equal_open_clips(activation):
    visual = tower(activation)
    ours = copy_tower(visual, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    pixels = torch.randn(2, 3, 24, 24)
    theirs = visual.forward_intermediates(
        pixels, indices=1, output_fmt="NLC", output_extra_tokens=True, intermediates_only=True
    )
    expected = torch.cat([theirs["image_intermediates_prefix"][-1], theirs["image_intermediates"][-1]], dim=1)
    assert expected.shape == (2, ours.tokens, ours.dim) == (2, 10, 32)
    torch.testing.assert_close(ours(pixels), expected, atol=2e-5, rtol=1e-5)
    unit = torch.nn.functional.normalize(visual(pixels), dim=-1)
    torch.testing.assert_close(ours.embed(pixels), unit, atol=1e-5, rtol=0)
    assert ours.facts["activation"] == activation and ours.facts["mlp"] == 96


@torch.no_grad()
def test_gelu_in_place_of_quick_gelu_moves_the_features():
    quick, exact = small("quick_gelu"), small("gelu")
    exact.load_state_dict(quick.state_dict())
    pixels = torch.randn(1, 3, 24, 24)
    assert (quick(pixels) - exact(pixels)).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"pool_type": "avg"}, {"ls_init_value": 0.5}, {"no_ln_pre": True}])
def test_a_tower_that_is_not_a_plain_clip_vit_is_refused(change):
    with pytest.raises(ValueError, match="not a plain CLIP ViT"):
        copy_tower(tower("gelu", **change), mean=(0, 0, 0), std=(1, 1, 1))


def test_a_convolutional_tower_is_refused():
    with pytest.raises(ValueError, match="Conv2d is not a plain CLIP ViT"):
        copy_tower(torch.nn.Conv2d(3, 3, 1), mean=(0, 0, 0), std=(1, 1, 1))


def test_open_clip_without_a_network_names_both_ways_out(monkeypatch):
    import open_clip

    def offline(name, **options):
        raise RuntimeError("Failed to download")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"Fetch it once.*local file: open_clip:ViT-B-32/.*Failed to download"):
        ENCODERS.make("open_clip:ViT-B-32/laion2b_s34b_b79k")


def test_open_clip_without_a_tag_lists_the_tags():
    with pytest.raises(ValueError, match="laion2b_s34b_b79k"):
        ENCODERS.make("open_clip:ViT-B-32")


def test_a_missing_encoder_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m dataset.studies.train_clip"):
        clip.load(tmp_path / "tiny_clip.safetensors")


def test_a_saved_encoder_comes_back_in_fp32_with_its_facts(tmp_path):
    encoder = small().half().float()  # what fp16 on disk can hold
    save_file({name: weight.half() for name, weight in encoder.state_dict().items()}, tmp_path / "small.safetensors")
    (tmp_path / "small.json").write_text(json.dumps(encoder.facts))
    loaded = clip.load(tmp_path / "small.safetensors")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.fingerprint() == encoder.fingerprint()
    assert (loaded.mean, loaded.std, loaded.size) == (encoder.mean, encoder.std, encoder.size)


def test_a_saved_encoder_with_a_foreign_weight_is_refused(tmp_path):
    encoder = small()
    save_file({**encoder.state_dict(), "other": torch.zeros(1)}, tmp_path / "small.safetensors")
    (tmp_path / "small.json").write_text(json.dumps(encoder.facts))
    with pytest.raises(RuntimeError, match="other"):
        clip.load(tmp_path / "small.safetensors")


@torch.no_grad()
def test_the_fingerprint_changes_with_a_weight_and_with_the_activation():
    encoder, same, quick = small(), small(), small("quick_gelu")
    assert encoder.fingerprint() == same.fingerprint() != quick.fingerprint()
    same.blocks[1].mlp.c_fc.bias[3] += 1e-6
    assert encoder.fingerprint() != same.fingerprint()


def test_encoder_facts_agree_with_what_it_computes():
    encoder = ENCODERS.make("clip_random:size=16,patch=4,width=16,layers=2,heads=2")
    assert encoder(torch.randn(1, 3, encoder.size, encoder.size)).shape == (1, encoder.tokens, encoder.dim)
    assert encoder.has_cls and len(encoder.blocks) == 2


@pytest.mark.parametrize("ship", [None, "encoder.safetensors"])
def test_a_few_steps_of_training_write_a_whole_clip_and_an_encoder_that_can_be_loaded(ship, tmp_path, monkeypatch):
    """And the shipped encoder, which checkpoints name, stays as it is."""
    from dataset.studies import train_clip

    shipped = Path(clip.__file__).with_name("tiny_clip.safetensors")
    before = shipped.read_bytes()
    monkeypatch.setattr(train_clip, "scores", lambda *model: {})  # of 1,100 scenes and 1,500 drawings
    config = train_clip.Config(minutes=1 / 60, batch_size=4, width=32, layers=1, device="cpu", out=tmp_path / "clip",
                               ship=ship and tmp_path / ship)
    train_clip.main(config)
    both = load_file(tmp_path / "clip" / "clip.safetensors")
    encoder = clip.load(tmp_path / (ship or "clip/tiny_clip.safetensors"))
    assert encoder(torch.zeros(1, 3, encoder.size, encoder.size)).shape == (1, encoder.tokens, 32)
    for name, weight in encoder.state_dict().items():
        torch.testing.assert_close(weight, both[f"visual.{name}"], atol=1e-3, rtol=1e-3)  # halves on the disk
    assert shipped.read_bytes() == before
