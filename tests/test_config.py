"""Presets with sizes of one's own: written into config.json, and refused where they mean nothing."""

import json

import pytest

from model.config import PRESETS, VLMConfig, preset
from model.llm import pretrained
from model.registry import LLMS, UserError
from tests import tiny


def made(spec: str) -> VLMConfig:
    return preset(spec, vocab_size=6400, image_token_id=5)


def test_options_take_the_place_of_a_presets_sizes_and_stand_in_config_json():
    config = made("small:hidden_size=640,num_hidden_layers=10,rope_theta=1e4,qk_norm=true,head_dim=64")
    stored = json.loads(config.to_json())["llm"]
    assert (stored["hidden_size"], stored["num_hidden_layers"], stored["rope_theta"], stored["qk_norm"]) == (640, 10, 1e4, True)
    assert VLMConfig.from_json(config.to_json()) == config
    changed = {"hidden_size", "num_hidden_layers", "rope_theta", "qk_norm", "head_dim"}
    plain = json.loads(made("small").to_json())["llm"]
    assert {key for key in stored if stored[key] != plain[key]} == changed


def test_a_model_has_the_sizes_of_its_options():
    llm = LLMS.make("gpt", config=made("nano:hidden_size=64,num_hidden_layers=2,num_attention_heads=4,num_key_value_heads=2").llm)
    assert len(llm.blocks) == 2 and llm.dim == 64 and llm.blocks[0].self_attn.k_proj.out_features == 2 * 32


@pytest.mark.parametrize(("spec", "message"), [
    ("tiny", "unknown preset 'tiny'; known: nano, small, base"),
    ("small:hidden=640", "--preset small:hidden=640: 'hidden=640' is no option. Options of a preset: hidden_size, "),
    ("small:640", "'640' is no option"),
    ("small:vocab_size=100", "'vocab_size=100' is no option"),
    ("small:hidden_size=640,hidden_size=512", "'hidden_size=512' is given twice"),
    ("small:hidden_size=wide", "'hidden_size=wide' is not of type int"),
    ("small:hidden_size=0", "hidden_size must be above 0, not 0"),
    ("small:num_hidden_layers=-1", "num_hidden_layers must be above 0, not -1"),
    ("small:hidden_size=500", "hidden_size 500 is not a multiple of num_attention_heads 8: set head_dim"),
    ("small:num_key_value_heads=3", "must be a multiple of num_key_value_heads 3"),
    ("small:head_dim=7", "head_dim 7 must be even"),
])  # fmt: skip
def test_a_size_that_means_nothing_is_told(spec, message):
    with pytest.raises(UserError, match=message):
        made(spec)


def test_a_pretrained_language_model_has_its_own_sizes():
    start = pretrained.Pretrained("gpt", shape=tiny.llm_config(vocab_size=6400))
    assert all(start.config(made(name)).llm.hidden_size == 24 for name in PRESETS)
    with pytest.raises(UserError, match="has a shape of its own: leave out the options of --preset, or --llm"):
        start.config(made("small:hidden_size=640"))
