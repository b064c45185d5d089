"""Every connector with every family of encoders and every form of the language model learns and speaks."""

import itertools
import subprocess
import sys

import pytest
import torch

from model.config import VLMConfig
from model.encoder.fused import Fused
from model.encoder.select import Selected
from model.generate import generate
from model.losses import score
from model.optimizer import make_optimizer
from model.registry import CONNECTORS, ENCODERS
from model.vlm import VLM
from tests import tiny
from tests.conftest import ROOT
from tests.test_encoders import library_tower

C = 24  # channels of the encoders and of the language model, as `identity` needs it


def vit(width: int = C) -> torch.nn.Module:
    return ENCODERS.make(f"clip_random:size=16,patch=4,width={width},layers=2,heads=2")


FAMILIES = {
    "clip": vit,
    "llava": lambda: Selected(vit(), layer=-2, cls=False),
    "siglip": lambda: library_tower("siglip"),
    "fused": lambda: Fused(vit(16), vit(8)),
}
SPECS = ("identity", "linear", "mlp:depth=2", "pixel_shuffle:side=2", "pixel_shuffle_compare", "resampler:queries=3,heads=2",
         "qformer:queries=3,heads=2")
FORMS = {
    "own": {"qk_norm": True},
    "llama": {"tie_word_embeddings": False, "head_dim": None},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 10},
}


def batch(model: VLM) -> dict:
    """Two documents: two adjacent pictures, and text alone."""
    span = [tiny.IMAGE] * model.image_tokens
    documents = [[5, *span, *span, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    return {**tiny.flat(documents), "pixels": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(("spec", "family", "form"), list(itertools.product(SPECS, FAMILIES, FORMS)))
def test_every_combination_learns_and_generates(spec, family, form):
    torch.manual_seed(0)
    config = VLMConfig(tiny.llm_config(**{"num_hidden_layers": 2, **FORMS[form]}), family, spec, image_token_id=tiny.IMAGE)
    model = VLM(config, FAMILIES[family]())
    assert model.connector.tokens == (3 if "queries" in spec else 4 if "shuffle" in spec else model.encoder.tokens)
    optimizer = make_optimizer(model, "muon", lr=5e-3, weight_decay=0.0)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    rows, losses = batch(model), []
    for _ in range(3):
        loss = -score(model, rows).logps.sum()
        loss.backward()
        optimizer.step()
        used = {name for name, weight in model.named_parameters() if weight.grad is not None}
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 1e3  # nan is neither
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    embedding = {name for name in before if "ln_post" in name or name.endswith(".proj")}  # serves CLIP's embedding alone
    assert set(before) - embedding <= used
    assert {name for name in before if name.startswith("connector.")} <= moved
    prompt = {name: value[:, :-4] if name != "pixels" else value for name, value in rows.items()}
    (answer,) = generate(model, prompt, max_new_tokens=2, stop_ids=set(), temperature=0.0, banned=(tiny.IMAGE,))
    assert len(answer.tokens) == 2


def test_a_query_reads_the_picture_and_differs_from_its_neighbour():
    for spec in ("resampler:queries=3,heads=2", "qformer:queries=3,heads=2"):
        torch.manual_seed(0)
        connector = CONNECTORS.make(spec, encoder=vit(), channels=C)
        features, index = torch.randn(2, 17, C), torch.zeros(2, dtype=torch.long)
        tokens = connector(features, index)
        assert tokens.shape == (2, 3, C)
        assert (tokens[0] - tokens[1]).abs().mean() > 0.1 and (tokens[:, 0] - tokens[:, 1]).abs().mean() > 0.1
        alone = connector(features[:1], index[:1])
        torch.testing.assert_close(alone[0], tokens[0], atol=1e-5, rtol=1e-5)
        shuffled = connector(features[:, torch.randperm(17)], index)  # places stand in the features, not in their order
        torch.testing.assert_close(shuffled, tokens, atol=1e-5, rtol=1e-5)


def test_muon_gets_the_matrices_of_a_connector_and_not_its_tables():
    for spec in ("mlp", "pixel_shuffle", "pixel_shuffle_compare", "resampler:heads=2", "qformer:heads=2"):
        model = tiny.vlm()
        model.connector = CONNECTORS.make(spec, encoder=model.encoder, channels=C)
        muon, adamw = make_optimizer(model, "muon", lr=1e-3, weight_decay=0.1).optimizers
        of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
        tables = {id(part.weight) for part in model.connector.modules() if isinstance(part, torch.nn.Embedding)}
        assert bool(tables) == ("queries" in dict(model.connector.named_children()) or spec == "pixel_shuffle_compare")
        for name, weight in model.connector.named_parameters():
            assert (id(weight) in of_muon) == (weight.ndim == 2 and id(weight) not in tables), name


def test_an_mlp_of_depth_one_is_one_map_and_each_more_adds_another():
    maps = [sum(weight.ndim == 2 for weight in CONNECTORS.make(f"mlp:depth={depth}", encoder=vit(), channels=8).parameters())
            for depth in (1, 2, 4)]  # fmt: skip
    assert maps == [1, 2, 4]


def test_the_qformer_looks_at_the_picture_in_every_other_block():
    def cross_attends(spec):
        return [block.cross_attention is not None for block in CONNECTORS.make(spec, encoder=vit(), channels=C).blocks]

    assert cross_attends("qformer:heads=2") == [True, False] * 2
    assert cross_attends("qformer:heads=2,depth=3,every=1") == [True] * 3


@pytest.mark.parametrize(("spec", "message"), [
    ("identity", "needs an encoder of the language model's 20 channels, this one has 24: use --connector linear"),
    ("mlp:depth=0", "at least one linear map"),
    ("mlp:depth=two", "'depth=two' is not of type int"),
    ("mlp:layers=2", "has no option 'layers=2'. Options: depth"),
    ("resampler:queries=0", "at least one query"),
    ("resampler:heads=3", "heads=3 does not divide the 20 channels"),
    ("resampler:heads=0", "heads=0 does not divide"),
    ("resampler:depth=0,heads=2", "without a block nothing reads the image"),
    ("qformer:heads=2,every=0", "both must be at least 1"),
    ("qfromer", "Did you mean 'qformer'"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(spec, message):
    with pytest.raises(ValueError, match=message):
        CONNECTORS.make(spec, encoder=vit(), channels=20)


def test_the_list_of_parts_gives_sizes_and_imports_no_library_that_it_does_not_need():
    code = ("import runpy, sys; runpy.run_module('model.registry', run_name='__main__'); "
            "print({name for name in ('open_clip', 'timm', 'transformers', 'torchvision') if name in sys.modules})")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "set()"
    size = {tuple(line.split()[:2]): line.split()[2] for line in lines}
    assert size["connector", "linear"] == f"{192 * 128:,}" and size["connector", "identity"] == "-"
    assert size["encoder", "open_clip"] == size["encoder", "timm"] == size["encoder", "fused"] == "-"
    assert size["encoder", "tiny_clip"].startswith("2,4") and size["llm", "gpt"].startswith("1,")
