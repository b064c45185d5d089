"""LLaVA folders of others, as transformers and LLaVA write them, become checkpoints with the same logits; the rest is named."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset.tokenizer import load_tokenizer
from model import checkpoint
from model.from_llava import imported
from model.registry import UserError
from tests import test_native

transformers = pytest.importorskip("transformers", reason="transformers is not installed, and computes what is compared")

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 1, "image_size": 28,
          "patch_size": 14, "hidden_act": "quick_gelu"}  # fmt: skip
TEXT = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5}  # fmt: skip


def llava(text: str = "Llama", **changes):
    """A LLaVA-1.5 of a few thousand random weights."""
    torch.manual_seed(0)
    vision, language = transformers.CLIPVisionConfig(**VISION), getattr(transformers, f"{text}Config")(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=language, **changes)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def saved(model, folder: Path) -> Path:
    """The folder, with a tokenizer whose <image> has the number that the config states."""
    tokenizer = load_tokenizer(test_native.save(folder) / "tokenizer.json")
    model.config.image_token_index = tokenizer.image
    model.save_pretrained(folder)
    return folder


def original(model, folder: Path, tower: bool = True, **changes) -> Path:
    """The same model under LLaVA's own names, as RLAIF-V-7B is published: with its tower, or with the tower's name alone."""
    saved(model, folder)
    names = ((r"^vision_tower\.", "model.vision_tower.vision_tower.vision_model."), (r"^language_model\.", ""),
             (r"^multi_modal_projector\.linear_1", "model.mm_projector.0"),
             (r"^multi_modal_projector\.linear_2", "model.mm_projector.2"))  # fmt: skip
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for theirs, its in names:
            name = re.sub(theirs, its, name)
        if tower or "vision_tower" not in name:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    text = model.config.text_config.to_dict()
    (folder / "config.json").write_text(json.dumps({
        **{key: text[key] for key in (*TEXT, "max_position_embeddings", "tie_word_embeddings")}, "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14-336", "rope_theta": 10000.0,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 64, "image_aspect_ratio": "pad", **changes}))  # fmt: skip
    return folder


def assert_same_logits(theirs, folder: Path) -> object:
    ours, _ = imported(str(folder), load_tokenizer)
    image = ours.config.image_token_id
    ids = [5, 6, *[image] * ours.image_tokens, 7, *[image] * ours.image_tokens, 8, 9]
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": torch.tensor([ids]), "position_ids": torch.arange(len(ids))[None], "pixels": pixels,
             "document_ids": torch.zeros(1, len(ids), dtype=torch.long)}  # fmt: skip
    theirs.config.image_token_index = image
    with torch.inference_mode():
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        found = ours(batch, torch.ones(1, len(ids), dtype=torch.bool))
    torch.testing.assert_close(found[:, :expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
    return ours


@pytest.mark.parametrize(("text", "changes"), [
    ("Llama", {}), ("Qwen2", {"vision_feature_layer": -1}), ("Qwen3", {"vision_feature_select_strategy": "full"}),
    ("Llama", {"vision_feature_layer": 1, "tie_word_embeddings": True}),
])  # fmt: skip
def test_a_folder_of_transformers_becomes_the_same_model(text, changes, tmp_path):
    model = llava(text, **changes)
    ours = assert_same_logits(model, saved(model, tmp_path / "hf"))
    assert ours.config.connector == "mlp:depth=2" and ours.encoder.has_cls == ("vision_feature_select_strategy" in changes)


def test_the_original_names_become_the_same_model_and_a_checkpoint_of_it(tmp_path):
    model = llava()
    ours = assert_same_logits(model, original(model, tmp_path / "original"))
    assert (ours.config.fit, ours.config.template) == ("pad", "vicuna")
    checkpoint.save(tmp_path / "ours", ours, tmp_path / "original" / "tokenizer.json")
    again = checkpoint.load(tmp_path / "ours")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_a_tower_that_is_not_in_the_folder_comes_by_its_name(tmp_path):
    model = llava()
    model.model.vision_tower.save_pretrained(tmp_path / "clip")
    assert_same_logits(model, original(model, tmp_path / "original", tower=False, mm_vision_tower=str(tmp_path / "clip")))


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "qwen2_5_vl"}, "Qwen2.5-VL's tower has windows"), ({"model_type": "internvl_chat"}, "InternViT"),
    ({"model_type": "omnilmm"}, "OmniLMM's tower is EVA-02"), ({"mm_vision_tower": "siglip"}, "its tower is siglip"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio = 'anyres'"),
    ({"model_type": "llava_mpt"}, "is a mpt"),
    ({"mm_projector_type": "resampler"}, "projector is of the kind 'resampler'"),
    ({"mm_vision_select_layer": [-2, -5]}, r"layer \[-2, -5\]"),
])  # fmt: skip
def test_what_our_parts_cannot_hold_is_said_by_name(changes, message, tmp_path):
    folder = original(llava(), tmp_path / "other", **changes)
    with pytest.raises(UserError, match=message):
        imported(str(folder), load_tokenizer)


def test_tensors_of_another_part_are_named(tmp_path):
    folder = original(llava(), tmp_path / "next")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.image_newline": torch.zeros(4)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="model.image_newline"):
        imported(str(folder), load_tokenizer)
