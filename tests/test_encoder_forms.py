"""Every form in which an encoder is published gives the features that its own library computes. Downloads are patched.

The largest differences: python -m pytest tests/test_encoder_forms.py -k own_features -rP
"""

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import hub
from model.encoder import clip
from model.encoder.open_clip import facts_of_weights
from model.encoder.timm import Tower
from model.registry import ENCODERS, UserError

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
PLAIN = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
SIGLIP = {"timm_model_name": "test_vit3", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none",
          "image_size": 160}  # fmt: skip


def noisy(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No weight stays at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return module.eval()


def random_pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same(ours: clip.ViT | Tower, expected: torch.Tensor, form: str) -> None:
    """Features (N, P, D), and their largest difference on the terminal."""
    with torch.no_grad():
        features = ours(random_pixels(ours.size))
    assert features.shape == expected.shape == (2, ours.tokens, ours.dim) and expected.std() > 0.1
    difference = (features - expected).abs().max().item()
    print(f"largest difference: {form:44} {difference:.1e} of {expected.abs().max().item():.1f}")
    assert difference <= 2e-5 * max(1.0, expected.abs().max().item())


# ---------------------------------------------------------------- open_clip


@pytest.fixture
def small_models(monkeypatch):
    """open_clip with its own names and tags, but small architectures, as a `download` that a test may set."""
    from open_clip import factory

    original, found = factory.get_model_config, {}

    def small_config(name: str) -> dict | None:
        config = original(name)
        if config is None:
            return None
        vision = SIGLIP if "timm_model_name" in config["vision_cfg"] else PLAIN
        rest = {key: value for key, value in config.items() if key in ("quick_gelu", "custom_text", "init_logit_bias")}
        return {**rest, "embed_dim": 96 if vision is SIGLIP else 16, "vision_cfg": dict(vision), "text_cfg": dict(TEXT)}

    monkeypatch.setattr(factory, "get_model_config", small_config)
    monkeypatch.setattr(factory, "download_pretrained", lambda cfg, **options: str(found["file"]))
    return found


@torch.no_grad()
def own_features(visual: torch.nn.Module, size: int) -> torch.Tensor:
    """What open_clip computes after the last block of a plain ViT, the CLS token first."""
    out = visual.forward_intermediates(random_pixels(size), indices=1, output_fmt="NLC", output_extra_tokens=True,
                                       intermediates_only=True)  # fmt: skip
    return torch.cat([out["image_intermediates_prefix"][-1], out["image_intermediates"][-1]], dim=1)


FORMS = [  # NAME/TAG, and the name under which open_clip itself computes with those weights as they were trained
    ("ViT-B-32/laion2b_s34b_b79k", "ViT-B-32"), ("ViT-B-32/openai", "ViT-B-32-quickgelu"),
    ("ViT-B-32-quickgelu/openai", "ViT-B-32-quickgelu"), ("ViT-B-32/metaclip_400m", "ViT-B-32-quickgelu"),
    ("ViT-B-16/openai", "ViT-B-16-quickgelu"), ("ViT-B-16/dfn2b", "ViT-B-16-quickgelu"),
    ("ViT-L-14/openai", "ViT-L-14-quickgelu"), ("ViT-L-14-336/openai", "ViT-L-14-336-quickgelu"),
    ("ViT-H-14-378/dfn5b", "ViT-H-14-378-quickgelu"), ("ViT-H-14/laion2b_s32b_b79k", "ViT-H-14"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_a_tag_of_open_clip_has_its_own_features_with_the_activation_of_its_training(form, name, small_models, tmp_path):
    import open_clip

    whole = noisy(open_clip.create_model(name, load_weights=False))
    small_models["file"] = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), small_models["file"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # open_clip warns where name and tag disagree about the activation
        ours = ENCODERS.make(f"open_clip:{form}")
    assert isinstance(ours, clip.ViT) and ours.facts["activation"] == ("quick_gelu" if "quickgelu" in name else "gelu")
    assert_same(ours, own_features(whole.visual, 24), f"open_clip:{form}")
    assert ours.mean == tuple(open_clip.get_pretrained_cfg(*form.split("/"))["mean"])


def test_every_tag_of_open_clip_says_its_activation():
    import open_clip

    every = open_clip.list_pretrained()
    quick = {(name, tag) for name, tag in every if facts_of_weights(open_clip, name, tag)["force_quick_gelu"]}
    assert quick == {(name, tag) for name, tag in every if open_clip.get_pretrained_cfg(name, tag).get("quick_gelu")}
    assert len(quick) > 40 and {(name, tag) for name, tag in every if name.endswith("-quickgelu") or tag == "openai"} <= quick


@pytest.mark.parametrize("source", ["ViT-B-16-SigLIP/webli", "ViT-B-16-SigLIP2/webli", "ViT-B-16-SigLIP/FILE"])
@torch.no_grad()
def test_siglip_through_open_clip_has_its_own_features_and_normalisation(source, small_models, tmp_path):
    import open_clip

    whole = noisy(open_clip.create_model(source.split("/")[0], load_weights=False))
    file = small_models["file"] = tmp_path / "weights.safetensors"
    save_file({name: weight.contiguous() for name, weight in whole.state_dict().items()}, file)
    ours = ENCODERS.make(f"open_clip:{source.replace('FILE', str(file))}")
    assert isinstance(ours, Tower) and not ours.has_cls and (ours.mean, ours.std) == ((0.5,) * 3, (0.5,) * 3)
    trunk = whole.visual.trunk
    registers = trunk.num_prefix_tokens
    expected = trunk.forward_features(random_pixels(160))[:, registers:]
    with torch.no_grad():
        torch.testing.assert_close(trunk.norm(ours(random_pixels(160))), expected, atol=1e-5, rtol=1e-5)
    blocks = trunk.forward_intermediates(random_pixels(160), indices=1, intermediates_only=True)[-1].flatten(2).mT
    assert_same(ours, blocks, f"open_clip:{source}")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_a_file_has_the_activation_of_the_name_before_it(name, small_models, tmp_path):
    import open_clip

    whole = noisy(open_clip.create_model(name, load_weights=False))
    file = tmp_path / "weights.safetensors"
    save_file(whole.state_dict(), file)
    assert_same(ENCODERS.make(f"open_clip:{name}/{file}"), own_features(whole.visual, 24), f"open_clip:{name}/FILE")


@pytest.mark.parametrize(("spec", "message"), [
    ("open_clip:ViT-B-33/openai", "knows no model 'ViT-B-33', and there is no folder ViT-B-33. Near it: ViT-B-32"),
    ("open_clip:ViT-B-32/open", r"ViT-B-32/open: neither a tag \(openai, .*\) nor a file"),
    ("open_clip:ViT-B-32", "does not say which weights"),
])  # fmt: skip
def test_a_name_or_tag_that_there_is_not_is_told(spec, message):
    with pytest.raises(UserError, match=message):
        ENCODERS.make(spec)


# ---------------------------------------------------------------- without a network


def test_without_a_network_one_line_at_once_says_how_to_get_the_weights(monkeypatch, caplog, tmp_path):
    from huggingface_hub import constants

    asked = []
    monkeypatch.setattr(hub, "reachable", lambda: asked.append(1) and True is False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = logging.root.manager.disable
    remedies = "`hf download timm/vit_base_patch32_clip_224.openai`.*open_clip:ViT-B-32-quickgelu/"
    with pytest.raises(UserError, match=remedies) as told:
        ENCODERS.make("open_clip:ViT-B-32/openai")
    assert "\n" not in str(told.value) and asked and not caplog.records
    assert constants.HF_HUB_OFFLINE is False and logging.root.manager.disable == before  # as they were


@pytest.mark.parametrize("spec", ["timm:vit_small_patch14_dinov2.lvd142m", "huggingface:openai/clip-vit-base-patch32"])
def test_every_download_says_in_one_line_that_there_is_no_network(spec, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises((UserError, FileNotFoundError), match="network") as told:
        ENCODERS.make(spec)
    assert "\n" not in str(told.value)


def test_the_hub_is_asked_once_for_its_host_and_a_proxy_is_believed(monkeypatch):
    def refused(address, timeout):
        raise OSError("no route")

    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", refused)
    assert not hub.reachable()
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy"})
    assert hub.reachable()


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion2b", False)])
@torch.no_grad()
def test_a_clip_of_timm_has_the_activation_of_its_training(tag, quick, monkeypatch, tmp_path):
    """timm's own way to OpenAI's features is another architecture, vit_base_patch32_clip_quickgelu_224."""
    import timm
    from timm.models import vision_transformer

    built = vision_transformer._create_vision_transformer
    monkeypatch.setattr(vision_transformer, "_create_vision_transformer", lambda name, pretrained=False, **options: built(
        name, pretrained, **{**options, "embed_dim": 32, "depth": 2, "num_heads": 2}))
    right = f"vit_base_patch32_clip_{'quickgelu_' if quick else ''}224"
    whole = noisy(timm.create_model(right, num_classes=0))
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    ours = ENCODERS.make(f"timm:vit_base_patch32_clip_224.{tag}/{tmp_path / 'model.safetensors'}")
    tokens = whole.forward_intermediates(random_pixels(224), indices=1, intermediates_only=True, return_prefix_tokens=True)[-1]
    expected = torch.cat([tokens[1][:, :1], tokens[0].flatten(2).mT], dim=1)
    assert_same(ours, expected, f"timm:vit_base_patch32_clip_224.{tag}")
    assert ours.name.endswith(", quick_gelu") == quick


# ---------------------------------------------------------------- Hugging Face's form

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8)


def published(folder: Path, kind: str, act: str = "quick_gelu", **options) -> torch.nn.Module:
    """A folder like clip-vit-base-patch32, and transformers' own model in it."""
    import transformers

    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**VISION, hidden_act=act, projection_dim=16)
    text = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2)
    both = dict(text_config=text, vision_config=vision.to_dict(), projection_dim=16)
    config = vision if "Vision" in kind else transformers.CLIPConfig(**both)
    whole = noisy(getattr(transformers, kind)(config))
    whole.save_pretrained(folder, **options)
    transformers.CLIPImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return whole


@pytest.mark.parametrize(("kind", "act"), [
    ("CLIPModel", "quick_gelu"), ("CLIPModel", "gelu"), ("CLIPVisionModelWithProjection", "quick_gelu"),
    ("CLIPVisionModel", "gelu"),
])  # fmt: skip
@torch.no_grad()
def test_hugging_faces_folder_of_a_clip_has_its_own_features(kind, act, tmp_path):
    whole = published(tmp_path, kind, act)
    ours = ENCODERS.make(f"huggingface:{tmp_path}")
    tower = getattr(whole, "vision_model", whole)
    assert_same(ours, tower(pixel_values=random_pixels(24)).last_hidden_state, f"huggingface:{kind}, {act}")
    assert isinstance(ours, clip.ViT) and (ours.mean, ours.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert (ours.shared_space is None) == (kind == "CLIPVisionModel")
    if kind == "CLIPModel":
        vectors = whole.get_image_features(pixel_values=random_pixels(24))
        vectors = getattr(vectors, "pooler_output", vectors)
        unit = torch.nn.functional.normalize(vectors, dim=-1)
        torch.testing.assert_close(ours.embed(random_pixels(24)), unit, atol=1e-5, rtol=0)
        torch.testing.assert_close(ENCODERS.make(f"open_clip:{tmp_path}")(random_pixels(24)), ours(random_pixels(24)))


@torch.no_grad()
def test_the_same_clip_as_bin_in_shards_and_with_old_buffers_is_read_alike(tmp_path):
    whole = published(tmp_path / "one", "CLIPModel")
    expected = ENCODERS.make(f"huggingface:{tmp_path / 'one'}")(random_pixels(24))
    published(tmp_path / "shards", "CLIPModel", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "bin" / name).write_text((tmp_path / "one" / name).read_text())
    buffers = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
    torch.save({**whole.state_dict(), **buffers}, tmp_path / "bin" / "pytorch_model.bin")
    for form in ("shards", "bin"):
        torch.testing.assert_close(ENCODERS.make(f"huggingface:{tmp_path / form}")(random_pixels(24)), expected, atol=0, rtol=0)


def test_a_vision_tower_alone_serves_a_connector(tmp_path):
    from model.registry import CONNECTORS

    published(tmp_path, "CLIPVisionModel")
    encoder = ENCODERS.make(f"huggingface:{tmp_path}")
    connector = CONNECTORS.make("linear", encoder=encoder, channels=24)
    assert connector.proj.weight.std() > 0 and encoder.fingerprint()


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "siglip"}, "holds a siglip, and of Hugging Face's form only CLIP .*: take open_clip:ViT-B-16-SigLIP/webli"),
    ({"model_type": "llava"}, "holds a llava, and of Hugging Face's form only CLIP is read as an encoder$"),
    ({"vision_config": {**VISION, "hidden_act": "silu"}}, "has hidden_act = 'silu', which .* does not compute"),
    ({"vision_config": {**VISION, "layer_norm_eps": 1e-6}}, "has layer_norm_eps = 1e-06"),
    ({"vision_config": {**VISION, "num_hidden_layers": 2}}, "are not those of its config.json: .*resblocks.2"),
    ({"vision_config": {**VISION, "hidden_size": 64}}, "are not those of its config.json: .*size mismatch"),
])  # fmt: skip
def test_another_model_in_the_folder_is_told_in_one_line(changes, message, tmp_path):
    published(tmp_path, "CLIPModel")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=message) as told:
        ENCODERS.make(f"huggingface:{tmp_path}")
    assert "\n" not in str(told.value)


def test_damaged_or_missing_files_of_a_folder_are_named(tmp_path):
    published(tmp_path, "CLIPModel")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="model.safetensors is damaged, or not a file of weights"):
        ENCODERS.make(f"huggingface:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        ENCODERS.make(f"huggingface:{tmp_path}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json in .*: fetch the whole folder"):
        ENCODERS.make(f"huggingface:{tmp_path}")
