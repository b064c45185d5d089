"""Parts are found by exact names; errors name what would be right. Presets have the sizes they state."""

import dataclasses
import json

import pytest
import torch

from model.config import PRESETS, LLMConfig, VLMConfig
from model.encoder.clip import ViT
from model.registry import (
    ALGORITHMS,
    CONNECTORS,
    DIVIDERS,
    ENCODERS,
    LLMS,
    PREFERENCE_LOSSES,
    TASKS,
    TEMPLATES,
    Registry,
    UserError,
    listing,
    parse_value,
)
from model.vlm import VLM, count_parameters


def shelf() -> Registry:
    """A registry of its own, over an empty package."""
    registry = Registry("fruit", "json")
    registry.searched = True

    @registry.register("apple")
    def apple(color: str, weight: float = 1.0, ripe: bool = False, basket=None):
        """A round one.

        More about it.
        """
        return color, weight, ripe, basket

    return registry


def test_registering_a_name_twice_raises():
    with pytest.raises(ValueError, match="'apple' is registered twice"):
        shelf().register("apple")(dict)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UserError, match=r"unknown connector 'liner'. Did you mean 'linear'\? Known: .*linear"):
        CONNECTORS.make("liner")


@pytest.mark.parametrize("name", ["Apple", "app", "apples", "", " apple"])
def test_names_are_exact(name):
    with pytest.raises(UserError, match="unknown fruit"):
        shelf().make(name)


def test_options_are_parsed_to_their_types():
    assert shelf().make("apple:color=red,weight=2,ripe=true") == ("red", 2, True, None)
    assert [parse_value(text) for text in ("3", "-1e-3", "false", "False", "a/b")] == [3, -1e-3, False, "False", "a/b"]


def test_the_first_option_may_drop_its_key_and_context_comes_from_the_caller():
    assert shelf().make("apple:dark/red_2,weight=0.5", basket="mine") == ("dark/red_2", 0.5, False, "mine")


@pytest.mark.parametrize("spec", ["apple:red,size=3", "apple:red,5", "apple:red,basket=yours"])
def test_an_unknown_option_lists_the_known_ones(spec):
    with pytest.raises(UserError, match="has no option .* Options: color, weight, ripe"):
        shelf().make(spec, basket="mine")


def test_a_spec_inside_a_spec_stands_in_parentheses():
    assert shelf().make("apple:color=(pear:a=1,b=(plum:c=2,d=3)),weight=2") == ("pear:a=1,b=(plum:c=2,d=3)", 2, False, None)
    assert shelf().make("apple:(pear:a=1,b=2),ripe=true") == ("pear:a=1,b=2", 1.0, True, None)
    assert shelf().make("apple:pear:a=1") == ("pear:a=1", 1.0, False, None)  # without a comma none are needed


@pytest.mark.parametrize("spec", ["apple:(pear:a=1,weight=2", "apple:pear),weight=2"])
def test_half_a_parenthesis_is_refused(spec):
    with pytest.raises(UserError, match="a parenthesis is missing"):
        shelf().make(spec)


@pytest.mark.parametrize(("option", "kind"), [("weight=heavy", "float"), ("weight=true", "float"), ("ripe=1", "bool")])
def test_an_option_of_another_type_is_refused(option, kind):
    with pytest.raises(UserError, match=f"{option}' is not of type {kind}"):
        shelf().make(f"apple:red,{option}")


def test_a_text_option_that_looks_like_a_number_stays_text():
    assert shelf().make("apple:2024") == ("2024", 1.0, False, None)


def test_an_option_given_twice_or_missing_is_named():
    with pytest.raises(UserError, match="'color' is given twice"):
        shelf().make("apple:red,color=green")
    with pytest.raises(UserError, match="also needs color"):
        shelf().make("apple")


def test_a_class_without_a_constructor_of_its_own_has_no_options():
    registry = shelf()

    @registry.register("seed")
    class Seed(torch.nn.Module):
        """A module without __init__."""

    assert isinstance(registry.make("seed"), Seed)
    with pytest.raises(UserError, match="has no option 'big'. Options: none"):
        registry.make("seed:big")


def test_every_part_of_a_folder_is_found_and_described_in_one_line():
    registries = [LLMS, ENCODERS, CONNECTORS, TEMPLATES, TASKS, ALGORITHMS, PREFERENCE_LOSSES, DIVIDERS, shelf()]
    lines = listing(registries).splitlines()
    parts = [(line[:15].strip(), line[16:37].strip()) for line in lines]
    assert {("llm", "gpt"), ("encoder", "tiny_clip"), ("encoder", "clip_random"), ("encoder", "open_clip"),
            ("connector", "linear"), ("template", "chatml"), ("task", "world"), ("RL algorithm", "grpo"),
            ("preference loss", "dpo"), ("divider", "claims"), ("fruit", "apple")} <= set(parts)  # fmt: skip
    assert parts == [(registry.kind, name) for registry in registries for name in registry.names()]
    assert all(len(line[49:].split()) > 1 for line in lines), "a part without a docstring"
    assert lines[-1].endswith("A round one.")


def test_a_config_survives_json():
    config = dataclasses.replace(PRESETS["small"], image_token_id=7)
    assert VLMConfig.from_json(config.to_json()) == config


def test_unknown_config_keys_are_refused_by_name():
    values = json.loads(PRESETS["nano"].to_json())
    with pytest.raises(ValueError, match="VLMConfig: encodr"):
        VLMConfig.from_dict({**values, "encodr": "x"})
    values["llm"]["rope_tetha"] = 1.0
    with pytest.raises(ValueError, match="LLMConfig: rope_tetha"):
        VLMConfig.from_dict(values)


@pytest.mark.parametrize("change", [{"num_key_value_heads": 3}, {"hidden_size": 126, "head_dim": None}, {"head_dim": 31}])
def test_head_counts_that_do_not_divide_are_refused(change):
    with pytest.raises(ValueError):
        dataclasses.replace(PRESETS["nano"].llm, **change)


def test_a_config_resized_keeps_no_stale_head_size():
    small = PRESETS["small"].llm
    assert small.head_channels == 64
    assert dataclasses.replace(small, hidden_size=768).head_channels == 96
    assert isinstance(small, LLMConfig)


@pytest.mark.parametrize(
    ("name", "least", "most", "tokens", "vit"),
    [("nano", 2.1e6, 2.3e6, 9, (96, 16, 192)), ("small", 26e6, 27e6, 50, (224, 32, 768)),
     ("base", 104e6, 109e6, 50, (224, 32, 768))],
)
def test_presets_have_the_sizes_they_state(name, least, most, tokens, vit):
    with torch.device("meta"):  # shapes without memory
        encoder = ViT(*vit, 1, 12, 3072, 512, "gelu", (0.5,) * 3, (0.5,) * 3)
        model = VLM(dataclasses.replace(PRESETS[name], image_token_id=3), encoder)
    assert least <= count_parameters(model.llm, model.connector) <= most
    assert model.image_tokens == tokens


def test_a_preset_without_its_placeholder_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="image_token_id=tokenizer.image"):
        VLM(PRESETS["nano"], encoder=torch.nn.Identity())
