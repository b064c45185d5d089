"""Recipes: which tensors move, in every combination, at which rate, with what kept in memory."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model import lora, recipe
from model.optimizer import make_optimizer
from model.recipe import trainable
from model.registry import CONNECTORS
from tests import tiny

MODES = ("freeze", "full", "partial:1", "lora:2")


def batch() -> dict:
    return {**tiny.flat([tiny.document(9, [1], 0), tiny.document(12, [2], 1)]), "pixels": tiny.pictures(2, 2)}


def steps(model, optimizer, count: int, seen: dict | None = None) -> None:
    for _ in range(count):
        model(seen or batch(), tiny.everywhere(seen or batch())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


UNUSED = ("encoder.ln_post.weight", "encoder.ln_post.bias", "encoder.proj")  # of a whole CLIP tower; features do not pass them


def expected(part: str, mode: str, names: list[str]) -> set[str]:
    """What must move of a tiny model with the linear connector, after `mode` was set."""
    own = {name for name in names if name.startswith(f"{part}.")}
    last = {"encoder": "encoder.transformer.resblocks.1.", "connector": "connector.proj.", "llm": "llm.model.layers.2."}[part]
    return {
        "freeze": set(), "full": own - set(UNUSED), "partial:1": {name for name in own if name.startswith(last)},
        "lora:2": {name for name in own if name.endswith(("lora_a", "lora_b"))},
    }[mode]  # fmt: skip


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids="-".join)
def test_exactly_what_the_recipe_names_moves(modes):
    modes, model = dict(zip(("encoder", "connector", "llm"), modes)), tiny.vlm(num_hidden_layers=3)
    if set(modes.values()) == {"freeze"}:
        with pytest.raises(ValueError, match="every part is frozen.*--train.llm full"):
            recipe.apply(model, modes, checkpointing=False)
        return
    moving = recipe.apply(model, modes, checkpointing=False)
    before = state(model)
    steps(model, make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0), 2)  # the first step moves B of LoRA alone
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == set().union(*(expected(part, mode, list(before)) for part, mode in modes.items()))
    assert {part for part, count in moving.items() if count} == {part for part, mode in modes.items() if mode != "freeze"}


def test_lora_reaches_every_linear_map_of_every_part():
    model = tiny.vlm()
    recipe.apply(model, {"encoder": "lora:2", "connector": "lora:2", "llm": "lora:2"}, checkpointing=False)
    assert len(lora.adapters(model.encoder)) == 2 * 4  # q, k and v in one bare matrix; out; two of the MLP
    assert sum(isinstance(part, lora.LoRAMatrix) for part in lora.adapters(model.encoder)) == 2
    assert (len(lora.adapters(model.connector)), len(lora.adapters(model.llm))) == (1, 3 * 7)


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_every_connector_can_be_trained_in_every_mode_or_says_why_not(name):
    encoder = SimpleNamespace(dim=16, tokens=17, has_cls=True, size=8, blocks=[])
    features, numbers = torch.randn(2, 17, 16), torch.tensor([0, 1])
    for mode in MODES:
        connector = CONNECTORS.make(name, encoder=encoder, channels=16)
        if mode in ("partial:1", "lora:2") and not list(connector.parameters()):
            with pytest.raises(ValueError, match="neither blocks nor linear maps.*freeze or full"):
                trainable(connector, mode)
            continue
        count = trainable(connector, mode)
        whole = sum(p.numel() for p in connector.parameters())
        assert (count == 0) == (mode == "freeze" or whole == 0) and (count == whole or mode != "full")
        if count:
            connector(features, numbers).square().mean().backward()
            assert all(p.grad is not None for p in connector.parameters() if p.requires_grad)


def moving(part: torch.nn.Module) -> set[str]:
    return {name for name, p in part.named_parameters() if p.requires_grad}


def test_partial_sets_exactly_the_last_layers():
    model = tiny.vlm()
    trainable(model.llm, "partial:2")
    assert moving(model.llm) == {
        name for name, _ in model.llm.named_parameters() if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    assert trainable(model.encoder, "partial:1") == sum(p.numel() for p in model.encoder.blocks[1].parameters())


def test_of_a_connector_without_blocks_the_last_linear_maps_are_meant():
    connector = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 8), nn.LayerNorm(8))
    trainable(connector, "partial:1")
    assert moving(connector) == {"2.weight", "2.bias"}
    connector.blocks = [connector[0]]
    trainable(connector, "partial:1")
    assert moving(connector) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("mode", ["", "none", "Full", "full:2", "full:x", "freeze:", "partial", "partial:", "partial:-1"])
def test_another_way_to_train_is_refused(mode):
    with pytest.raises(ValueError, match="freeze, full, partial:K or lora:R"):
        trainable(tiny.vlm().llm, mode)


def test_more_layers_than_there_are_are_refused():
    model = tiny.vlm()
    for part, count in ((model.llm, 4), (model.llm, 0), (model.connector, 2)):
        with pytest.raises(ValueError, match=f"partial:{count}: the part has"):
            trainable(part, f"partial:{count}")


# ---------------------------------------------------------------- a learning rate for each part


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_part_moves_at_its_own_rate(name):
    """A part at a rate of nearly nothing stays; the others go exactly where they go without it."""
    ends = []
    for own in ({}, {"connector": 1e-12, "encoder": 0.0}):
        model = tiny.vlm()
        recipe.apply(model, dict.fromkeys(model.parts, "full"), checkpointing=False)
        before = state(model)
        optimizer = make_optimizer(model, name, lr=1e-2, weight_decay=0.0, own_lr=own)
        steps(model, optimizer, 1)
        ends.append({key: (tensor - before[key]).abs().max().item() for key, tensor in model.state_dict().items()})
    assert ends[0]["connector.proj.weight"] > 1e-4 > 1e-9 > ends[1]["connector.proj.weight"]
    others = [key for key in ends[0] if not key.startswith("connector.")]
    assert [ends[0][key] for key in others] == pytest.approx([ends[1][key] for key in others], rel=1e-4)


def test_the_schedule_scales_the_peak_of_each_part():
    model = tiny.vlm()
    optimizer = make_optimizer(model, "muon", lr=1.0, weight_decay=0.1, own_lr={"llm": 4.0, "encoder": 0.0})
    assert optimizer.set_lr(lambda peak: peak / 2) == {"lr_encoder": 0.5, "lr_connector": 0.5, "lr_llm": 2.0}
    names = {p: name.partition(".")[0] for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert {group["lr"]} == {2.0 if names[p] == "llm" else 0.5 for p in group["params"]}
    assert make_optimizer(model, "muon", lr=1.0, weight_decay=0.1).set_lr(lambda peak: peak / 4) == {"lr": 0.25}


def test_resuming_with_other_groups_is_refused():
    model = tiny.vlm()
    states = make_optimizer(model, "adamw", lr=1.0, weight_decay=0.0, own_lr={"llm": 2.0}).state_dict()
    for own in ({}, {"encoder": 2.0}):
        with pytest.raises(ValueError, match="resume with the same --optimizer, --shard, --train and --lr_"):
            make_optimizer(model, "adamw", lr=1.0, weight_decay=0.0, own_lr=own).load_state_dict(states)


# ---------------------------------------------------------------- activations that are computed again


def gradients_and_kept_bytes(checkpointing: bool) -> tuple[dict, int]:
    model, kept = tiny.vlm(num_hidden_layers=3), {}
    recipe.apply(model, dict.fromkeys(model.parts, "full"), checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    documents = [tiny.document(100, [1], seed) for seed in range(4)]
    seen = {**tiny.flat(documents), "pixels": tiny.pictures(4, 2)}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(seen, tiny.everywhere(seen)).square().mean()
        held = sum(kept.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


def test_checkpointing_changes_no_gradient_and_keeps_much_less():
    (plain, most), (again, least) = gradients_and_kept_bytes(False), gradients_and_kept_bytes(True)
    assert plain.keys() == again.keys() and len(plain) > 40
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert least < 0.35 * most


def test_checkpointing_leaves_names_and_answers_alone():
    model, before = tiny.vlm(), tiny.vlm().state_dict().keys()
    recipe.apply(model, dict.fromkeys(model.parts, "full"), checkpointing=True)
    assert model.state_dict().keys() == before
    with torch.no_grad():
        assert torch.equal(model(batch(), tiny.everywhere(batch())), tiny.vlm()(batch(), tiny.everywhere(batch())))


# ---------------------------------------------------------------- the scripts


def test_a_script_reads_rates_of_parts_from_flags_and_from_a_file(stage_one, samples, run_script, tmp_path):
    """1- from a file, 2- from flags: what the log says of the rates, and what has moved."""
    from tests.conftest import TINY
    from tests.test_scripts import log_of

    (tmp_path / "run.yaml").write_text("lr: 1e-3\nlr_connector: 4e-3\nwarmup: 0\n")
    data = ("--data", samples / "llava.json", "--max_steps", 2)
    run_script("1-pretrain_vlm.py", *TINY, *data, "--config", "run.yaml", "--lr_llm", 2e-3, cwd=tmp_path)
    first, *_ = log_of(tmp_path / "out" / "pretrain")
    assert (first["lr_connector"], first["lr_llm"], "lr" in first) == (4e-3, 2e-3, False)
    run_script("2-sft_vlm.py", *data, "--batch_size", 4, "--log_every", 1, "--device", "cpu", "--bench", "", "--warmup", 0,
               "--lr", 1e-3, "--lr_encoder", 5e-4, "--train.encoder", "lora:2", "--train.connector", "partial:1",
               "--train.llm", "partial:1", "--checkpointing", cwd=tmp_path)  # fmt: skip
    first, *_ = log_of(tmp_path / "out" / "sft")
    assert (first["lr_encoder"], first["lr_connector"], first["lr_llm"]) == (5e-4, 1e-3, 1e-3)


def test_an_adapter_is_gone_on_from_by_a_flag(stage_one, samples, run_script, tmp_path):
    base = stage_one[0] / "out" / "pretrain"
    arguments = ("2-sft_vlm.py", "--init", base, "--data", samples / "llava.json", "--max_steps", 2, "--batch_size", 4,
                 "--device", "cpu", "--bench", "", "--train.llm", "lora:2")  # fmt: skip
    run_script(*arguments, cwd=tmp_path)
    file = tmp_path / "out" / "sft" / "adapter.safetensors"
    assert file.stat().st_size < 0.3 * (tmp_path / "out" / "sft" / "model.safetensors").stat().st_size
    run_script(*arguments, "--adapter", file, "--out", "out/more", cwd=tmp_path)
    assert (tmp_path / "out" / "more" / "adapter.safetensors").is_file()
    done = run_script(*arguments[:-1], "lora:3", "--adapter", file, "--out", "out/other", cwd=tmp_path, expect=1)
    assert re.search(r"saved with .*'rank': 2.*give the same --train flags", done.err)
    for flags in ((), ("--train.llm", "freeze")):
        done = run_script(*arguments[:-2], *flags, "--adapter", file, "--out", "out/other", cwd=tmp_path, expect=1)
        assert "has adapters of llm, --train of nothing: give the same --train flags" in done.err
    done = run_script(*arguments, "--adapter", "nowhere", "--out", "out/other", cwd=tmp_path, expect=1)
    assert "no adapters at nowhere" in done.err and "Traceback" not in done.err
