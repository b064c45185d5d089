"""Towers of other libraries give their own features; a layer is selected, two are fused, and mistakes say what to do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from model.encoder import clip
from model.encoder.fused import Fused, resized
from model.encoder.open_clip import Transformer, tower
from model.encoder.select import Selected
from model.encoder.timm import Tower
from model.registry import ENCODERS, UserError
from tests import tiny

RANDOM = "clip_random:size=16,patch=4,width=16,layers=3,heads=2"
KINDS = {  # tokens and channels of each: SigLIP has no class token, DINOv2 a class token and here two registers
    "siglip": (16, 24), "dinov2": (17, 24), "eva": (17, 24), "convnext": (4, 24), "fastvit": (4, 24),
}  # fmt: skip


def trunk(kind: str) -> torch.nn.Module:
    """A small model of timm with random weights, none of them at a value that hides a mistake."""
    from timm.models.convnext import ConvNeXt
    from timm.models.eva import Eva
    from timm.models.fastvit import FastVit
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    vit = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    stages = {"num_classes": 0, "drop_path_rate": 0.0}
    made = {
        "siglip": lambda: VisionTransformer(**vit, class_token=False, global_pool="map"),
        "dinov2": lambda: VisionTransformer(**vit, reg_tokens=2, init_values=0.1),
        "eva": lambda: Eva(**vit, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True),
        "convnext": lambda: ConvNeXt(**stages, depths=(1, 1, 1, 1), dims=(8, 8, 16, 24)),
        "fastvit": lambda: FastVit(**stages, layers=(1, 1, 1, 1), embed_dims=(6, 12, 24, 24), token_mixers=("repmixer",) * 4),
    }[kind]().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return made


def edge(kind: str) -> int:
    return 64 if kind in ("convnext", "fastvit") else 16


def library_tower(kind: str) -> Tower:
    return Tower(trunk(kind), kind, edge(kind), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def random_pixels(count: int, size: int) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_the_librarys_own_before_its_last_norm(kind):
    pixels, whole = random_pixels(2, edge(kind)), trunk(kind)
    expected = whole.forward_features(pixels)
    after = {"convnext": whole.norm_pre if kind == "convnext" else None, "fastvit": getattr(whole, "final_conv", None)}
    last = after.get(kind) or whole.norm
    ours = library_tower(kind)
    features = ours(pixels)
    assert features.shape == (2, ours.tokens, ours.dim) == (2, *KINDS[kind])
    assert ours.has_cls == (kind in ("dinov2", "eva"))
    if expected.ndim == 4:  # a grid (N, D, edge, edge)
        torch.testing.assert_close(last(features.mT.unflatten(2, (2, 2))), expected, atol=1e-5, rtol=1e-5)
    else:
        kept = [0, *range(3, 19)] if kind == "dinov2" else slice(None)  # the registers are left out
        torch.testing.assert_close(last(features), expected[:, kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_a_library_tower_serves_its_features(kind):
    ours = library_tower(kind)
    ours(random_pixels(2, edge(kind))).square().sum().backward()
    assert not [name for name, weight in ours.named_parameters() if weight.grad is None]


@torch.no_grad()
def test_a_picture_looks_the_same_in_any_batch_even_in_training():
    ours = library_tower("fastvit").train()
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.modules())
    pixels, before = random_pixels(3, 64), ours.fingerprint()
    torch.testing.assert_close(ours(pixels)[:1], ours(pixels[:1]))
    assert ours.fingerprint() == before  # no batch norm has moved


def test_a_model_without_patches_is_refused():
    with pytest.raises(ValueError, match="gives no patch tokens: choose a ViT"):
        Tower(torch.nn.Flatten(), "flat", 8, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def test_vit(tmp_path_factory):
    """A local weights file of timm's smallest ViT (64 channels, 160 pixels)."""
    import timm

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False).state_dict(), file)
    return file


@torch.no_grad()
def test_timm_with_a_local_file_gives_that_models_features_and_one_fingerprint(test_vit):
    import timm
    from safetensors.torch import load_file

    ours = ENCODERS.make(f"timm:test_vit/{test_vit}")
    whole = timm.create_model("test_vit", pretrained=False).eval()
    whole.load_state_dict(load_file(test_vit))
    pixels = random_pixels(1, 160)
    assert (ours.size, ours.tokens, ours.dim, ours.has_cls) == (160, 101, 64, True)
    assert ours.mean == tuple(whole.pretrained_cfg["mean"]) and ours.std == tuple(whole.pretrained_cfg["std"])
    torch.testing.assert_close(whole.norm(ours(pixels)), whole.forward_features(pixels), atol=1e-5, rtol=1e-5)
    assert ours.fingerprint() == ENCODERS.make(f"timm:test_vit/{test_vit}").fingerprint()
    smaller = ENCODERS.make(f"timm:test_vit/{test_vit},size=80")
    assert smaller(random_pixels(1, 80)).shape == (1, 26, 64) and smaller.fingerprint() != ours.fingerprint()


@torch.no_grad()
def test_timm_reads_a_folder_as_the_hub_gives_it(test_vit, tmp_path):
    import timm
    from safetensors.torch import load_file
    from timm.models import save_for_hf

    whole = timm.create_model("test_vit", pretrained=False)
    whole.load_state_dict(load_file(test_vit))
    save_for_hf(whole, tmp_path)
    ours, pixels = ENCODERS.make(f"timm:{tmp_path}"), random_pixels(1, 160)
    torch.testing.assert_close(ours(pixels), ENCODERS.make(f"timm:test_vit/{test_vit}")(pixels))
    assert ours.fingerprint() == ENCODERS.make(f"timm:test_vit/{test_vit}").fingerprint()


def test_timm_names_what_is_wrong(test_vit, monkeypatch):
    import timm

    with pytest.raises(ValueError, match="knows no model 'vit_smal_patch14_dinov2'. Near it: .*vit_small_patch14_dinov2"):
        ENCODERS.make("timm:vit_smal_patch14_dinov2")
    with pytest.raises(FileNotFoundError, match="no file .*other.safetensors; after the name comes the path"):
        ENCODERS.make(f"timm:test_vit/{test_vit.with_name('other.safetensors')}")
    with pytest.raises(UserError, match=r"could not get convnext_atto/.* from timm"):
        ENCODERS.make(f"timm:convnext_atto/{test_vit}")  # another model's weights

    def offline(name, **options):
        raise OSError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"Fetch it once.*local file: timm:vit_small_patch14_dinov2.*no connection"):
        ENCODERS.make("timm:vit_small_patch14_dinov2.lvd142m")


# ---------------------------------------------------------------- open_clip

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def fetched(folder, vision: dict, weights: bool = True):
    """A folder as the Hugging Face Hub gives it, and the open_clip model that is in it."""
    import open_clip

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    model = open_clip.CLIP(**config).eval()
    preprocess = {"mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    if weights:
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "open_clip_model.safetensors")
    return model


TIMM_VISION = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
               "image_size": 160}  # fmt: skip
PLAIN_VISION = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


@torch.no_grad()
def test_a_folder_of_open_clip_with_a_tower_of_timm_runs_through_the_library(tmp_path):
    whole = fetched(tmp_path, TIMM_VISION)
    ours = ENCODERS.make(f"open_clip:{tmp_path}")
    assert isinstance(ours, Tower) and (ours.size, ours.tokens, ours.mean, ours.std) == (160, 101, tuple(MEAN), tuple(STD))
    pixels = random_pixels(1, 160)
    trunk = whole.visual.trunk
    torch.testing.assert_close(trunk.norm(ours(pixels)), trunk.forward_features(pixels), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_folder_of_open_clip_with_a_plain_vit_becomes_our_own(tmp_path):
    whole = fetched(tmp_path, PLAIN_VISION)
    ours = ENCODERS.make(f"open_clip:{tmp_path}")
    assert isinstance(ours, clip.ViT) and (ours.mean, ours.std) == (tuple(MEAN), tuple(STD))
    pixels = random_pixels(2, 24)
    torch.testing.assert_close(ours.embed(pixels), whole.encode_image(pixels, normalize=True), atol=1e-5, rtol=0)
    assert ENCODERS.make(f"open_clip:{tmp_path},size=40").tokens == 26


def test_a_folder_of_open_clip_without_weights_is_refused(tmp_path):
    fetched(tmp_path, PLAIN_VISION, weights=False)
    with pytest.raises(UserError, match="could not get .* from open_clip"):
        ENCODERS.make(f"open_clip:{tmp_path}")


@torch.no_grad()
def test_a_vit_of_open_clip_that_is_not_a_plain_clip_runs_through_the_library():
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    visual = VisionTransformer(image_size=24, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=32,
                               ls_init_value=0.5, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True).eval()  # fmt: skip
    visual.preprocess_cfg = {"mean": MEAN, "std": STD}
    pixels = random_pixels(2, 24)
    expected, norm, proj = visual(pixels), visual.ln_post, visual.proj
    ours = tower(visual, "odd")
    assert isinstance(ours, Transformer) and ours.has_cls and len(ours.blocks) == 2
    pooled = norm(ours(pixels)[:, 1:].mean(dim=1)) @ proj
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)


def test_a_tower_of_open_clip_without_patches_is_refused():
    from open_clip.modified_resnet import ModifiedResNet

    visual = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=8, heads=2, image_size=32, width=8)
    visual.image_size, visual.preprocess_cfg = (32, 32), {"mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="ModifiedResNet.* gives no patch tokens"):
        tower(visual, "RN")


# ---------------------------------------------------------------- select


@pytest.mark.parametrize("kind", [None, *KINDS])
@torch.no_grad()
def test_layer_minus_two_is_what_goes_into_the_last_block_and_the_last_block_is_gone(kind):
    make = (lambda: library_tower(kind)) if kind else lambda: small_vit()
    whole, seen = make(), []
    whole.blocks[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = random_pixels(1, whole.size)
    whole(pixels)
    selected = Selected(make(), layer=-2, cls=True)
    expected = seen[0].flatten(2).mT if seen[0].ndim == 4 else seen[0]
    if kind == "dinov2":
        expected = expected[:, [0, *range(3, 19)]]
    torch.testing.assert_close(selected(pixels), expected)
    assert (selected.tokens, selected.dim) == expected.shape[1:]
    assert len(selected.blocks) == len(whole.blocks) - 1
    assert selected.fingerprint() != Selected(make(), layer=-1, cls=True).fingerprint()


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return ENCODERS.make(RANDOM)


@torch.no_grad()
def test_cls_false_leaves_the_class_token_out_where_there_is_one():
    torch.manual_seed(0)
    without = ENCODERS.make(f"select:({RANDOM}),cls=false")
    pixels = random_pixels(1, 16)
    torch.testing.assert_close(without(pixels), small_vit()(pixels)[:, 1:])
    assert (without.tokens, without.has_cls) == (16, False)
    patches = Selected(library_tower("siglip"), layer=-1, cls=False)
    assert patches.tokens == 16  # SigLIP has none, and loses no patch
    assert without.fingerprint() != ENCODERS.make(f"select:({RANDOM})").fingerprint()


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_a_layer_that_is_not_there_says_which_are(layer):
    with pytest.raises(ValueError, match=f"select:layer={layer}: this encoder has 3 blocks. -1 is after the last"):
        ENCODERS.make(f"select:({RANDOM}),layer={layer}")


def test_a_layer_of_two_towers_is_selected_inside_them():
    with pytest.raises(ValueError, match=r"select inside it, fused:first=\(select:NAME"):
        ENCODERS.make(f"select:(fused:first=({RANDOM}),second=({RANDOM})),layer=-2")
    inside = ENCODERS.make(f"fused:first=(select:({RANDOM}),layer=-2),second=({RANDOM})")
    assert [len(part.blocks) for part in inside.towers] == [2, 3]


# ---------------------------------------------------------------- fused


@torch.no_grad()
def test_fused_towers_see_what_each_sees_alone_though_normed_otherwise():
    first, second = small_vit(), library_tower("siglip")
    both = Fused(first, second)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def seen(one):
        return one((image - torch.tensor(one.mean)[:, None, None]) / torch.tensor(one.std)[:, None, None])

    pixels = (image - torch.tensor(both.mean)[:, None, None]) / torch.tensor(both.std)[:, None, None]
    expected = torch.cat([seen(first)[:, 1:], seen(second)], dim=2)
    torch.testing.assert_close(both(pixels), expected, atol=1e-4, rtol=1e-4)
    assert (both.tokens, both.dim, both.has_cls, both.size) == (16, 16 + 24, False, 16)


@torch.no_grad()
def test_a_tower_of_another_size_and_grid_is_brought_to_the_firsts():
    first, second = small_vit(), library_tower("convnext")  # 4 x 4 patches of 16 pixels, 2 x 2 of 64
    both = Fused(first, second)
    assert (both.size, both.tokens, both.dim) == (64, 16, 16 + 24)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    out = both((image - torch.tensor(both.mean)[:, None, None]) / torch.tensor(both.std)[:, None, None])
    theirs = second((image - torch.tensor(second.mean)[:, None, None]) / torch.tensor(second.std)[:, None, None])
    grid = out[0, :, 16:].mT.unflatten(1, (4, 4))  # (24, 4, 4): corners lie nearest to the patch of that corner
    corners, patches = grid[:, [0, 0, 3, 3], [0, 3, 0, 3]], theirs[0].mT  # (24, 4) in reading order
    torch.testing.assert_close(corners, patches, atol=1e-4, rtol=1e-4)
    assert out[0, :, :16].std() > 0


def test_a_picture_is_resized_as_pil_does_it():
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(values).resize((20, 20), Image.Resampling.BICUBIC), np.float32)
    ours = resized(torch.from_numpy(values).permute(2, 0, 1)[None].float(), 20, "bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    assert np.abs(ours.numpy() - expected).max() < 1.0  # PIL rounds to whole grey levels, twice


def test_fused_blocks_end_with_the_last_of_each_tower_and_the_fingerprint_is_of_both():
    first, second = small_vit(), library_tower("siglip")
    both = Fused(first, second)
    assert set(both.blocks[-2:]) == {first.blocks[-1], second.blocks[-1]}
    assert len(both.blocks) == 6
    before = both.fingerprint()
    with torch.no_grad():
        second.blocks[0].mlp.fc1.bias[0] += 1
    assert both.fingerprint() != before


def test_fused_needs_squares_of_patches():
    odd = library_tower("siglip")
    odd.tokens = 15
    with pytest.raises(ValueError, match="patches that form a square, not 15"):
        Fused(small_vit(), odd)


# ---------------------------------------------------------------- in a checkpoint


@pytest.mark.parametrize("wrapped", [f"select:({RANDOM}),layer=-2,cls=false", f"fused:first=({RANDOM}),second=({RANDOM})"])
@torch.no_grad()
def test_a_random_encoder_inside_another_is_stored_and_comes_back(tmp_path, wrapped):
    from dataset.tokenizer import MODEL_FILE
    from model import checkpoint
    from model.config import VLMConfig
    from model.vlm import VLM

    model = VLM(VLMConfig(tiny.llm_config(), wrapped, "linear", image_token_id=tiny.IMAGE)).eval()
    model.encoder.requires_grad_(False)
    checkpoint.save(tmp_path, model, MODEL_FILE)
    loaded = checkpoint.load(tmp_path)
    pixels = random_pixels(1, 16)
    torch.testing.assert_close(loaded.encoder(pixels), model.encoder(pixels), atol=0, rtol=0)
