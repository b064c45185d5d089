"""Recipes: which tensors are trained, in every combination, at which learning rate, and what is stored of the activations."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model import lora, recipe
from model.optimizer import make_optimizer
from model.recipe import Mode, Train, count_trainable, set_trainable
from model.registry import CONNECTORS, UserError
from tests import tiny

FULL = Train("full", "full", "full")
MODES = ("freeze", "full", "partial:1", "lora:2")


def batch() -> dict:
    return {**tiny.flat([tiny.document(9, [1], 0), tiny.document(12, [2], 1)]), "pixels": tiny.pictures(2, 2)}


def steps(model, optimizer, count: int) -> None:
    for _ in range(count):
        model(batch(), tiny.everywhere(batch())).square().mean().backward()
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
        with pytest.raises(UserError, match="every part is frozen.*--train.llm full"):
            recipe.apply(model, Train(**modes))
        return
    recipe.apply(model, Train(**modes))
    before = state(model)
    steps(model, make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0), 2)  # the first step moves B of LoRA alone
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == set().union(*(expected(part, mode, list(before)) for part, mode in modes.items()))
    trained = {name for name, part in model.parts.items() if count_trainable(part)}
    assert trained == {part for part, mode in modes.items() if mode != "freeze"}


def test_lora_reaches_every_linear_map_of_every_part():
    model = tiny.vlm()
    recipe.apply(model, Train("lora:2", "lora:2", "lora:2"))
    assert len(lora.adapters(model.encoder)) == 2 * 4  # q, k and v in one bare matrix; out; two of the MLP
    assert sum(isinstance(part, lora.LoRAMatrix) for part in lora.adapters(model.encoder)) == 2
    assert (len(lora.adapters(model.connector)), len(lora.adapters(model.llm))) == (1, 3 * 7)


@pytest.mark.parametrize("name", CONNECTORS.names())
def test_every_connector_can_be_trained_in_every_mode_or_says_why_not(name):
    encoder = SimpleNamespace(dim=16, tokens=17, has_cls=True, size=8, blocks=[])
    features, index = torch.randn(2, 17, 16), torch.tensor([0, 1])
    for mode in MODES:
        connector = CONNECTORS.make(name, encoder=encoder, channels=16)
        if mode in ("partial:1", "lora:2") and not list(connector.parameters()):
            with pytest.raises(UserError, match="neither blocks nor linear maps.*freeze or full"):
                set_trainable(connector, Mode.parse(mode))
            continue
        set_trainable(connector, Mode.parse(mode))
        count = count_trainable(connector)
        whole = sum(p.numel() for p in connector.parameters())
        assert (count == 0) == (mode == "freeze" or whole == 0) and (count == whole or mode != "full")
        if count:
            connector(features, index).square().mean().backward()
            assert all(p.grad is not None for p in connector.parameters() if p.requires_grad)


def trained_names(part: torch.nn.Module) -> set[str]:
    return {name for name, p in part.named_parameters() if p.requires_grad}


def test_partial_sets_exactly_the_last_layers():
    model = tiny.vlm()
    set_trainable(model.llm, Mode("partial", 2))
    assert trained_names(model.llm) == {
        name for name, _ in model.llm.named_parameters() if name.startswith(("model.layers.1.", "model.layers.2."))
    }
    set_trainable(model.encoder, Mode("partial", 1))
    assert count_trainable(model.encoder) == sum(p.numel() for p in model.encoder.blocks[1].parameters())


def test_of_a_connector_without_blocks_the_last_linear_maps_are_meant():
    connector = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 8), nn.LayerNorm(8))
    set_trainable(connector, Mode("partial", 1))
    assert trained_names(connector) == {"2.weight", "2.bias"}
    connector.blocks = [connector[0]]
    set_trainable(connector, Mode("partial", 1))
    assert trained_names(connector) == {"0.weight", "0.bias"}


@pytest.mark.parametrize(("text", "mode"), [
    ("freeze", Mode("freeze")), ("full", Mode("full")), ("partial:2", Mode("partial", 2)), ("lora:16", Mode("lora", 16)),
    ("full:lr=1e-4", Mode("full", lr=1e-4)), ("lora:8,lr=1e-3", Mode("lora", 8, 1e-3)),
    ("partial:1,lr=0.5", Mode("partial", 1, 0.5)), ("full:lr=5E-05", Mode("full", lr=5e-5)),
    ("full:lr=.1", Mode("full", lr=0.1)), ("full:lr=2e+0", Mode("full", lr=2.0)),
])  # fmt: skip
def test_a_mode_is_read_from_its_text(text, mode):
    assert Mode.parse(text) == mode


@pytest.mark.parametrize("text", [
    "", "none", "Full", "full:2", "full:x", "freeze:", "freeze:lr=1e-3", "partial", "partial:", "partial:-1", "full:lr=",
    "full:lr=fast", "full:lr=-1", "full:lr=1.2.3", "full:lr=1e", "lora:8,rate=1", "lora:lr=1e-3",
    "lora:8,lr=1e-3,lr=1e-3", "lora:8 lr=1e-3",
])  # fmt: skip
def test_another_way_to_train_is_refused(text):
    with pytest.raises(UserError, match=f"freeze, full, partial:K or lora:R, .*full:lr=1e-4 or lora:8,lr=1e-3, not {text!r}"):
        Mode.parse(text)


def test_more_layers_than_there_are_are_refused():
    model = tiny.vlm()
    for part, count in ((model.llm, 4), (model.llm, 0), (model.connector, 2)):
        with pytest.raises(UserError, match=f"partial:{count}: the part has"):
            set_trainable(part, Mode("partial", count))


def test_the_summary_counts_the_parameters_of_each_part_and_those_that_are_trained():
    model = tiny.vlm()
    recipe.apply(model, Train("full", "partial:1", "freeze"))
    own = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts.items()}
    last = sum(p.numel() for p in model.llm.blocks[-1].parameters())
    assert recipe.summary(model) == (f"encoder {own['encoder']:,} (0 trained), connector {own['connector']:,} "
                                     f"({own['connector']:,} trained), llm {own['llm']:,} ({last:,} trained)")


# ---------------------------------------------------------------- a learning rate for each part


def test_a_recipe_says_which_parts_have_a_rate_of_their_own():
    assert Train().learning_rates() == {}
    assert Train("full:lr=1e-4", "lora:8,lr=1e-3", "partial:1").learning_rates() == {"connector": 1e-4, "llm": 1e-3}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("train", "rates"), [
    (Train("full:lr=1e-4", "full", "freeze"), {"connector": 1e-4, "llm": 5e-3}),
    (Train("full", "lora:8,lr=1e-3", "partial:1,lr=2e-3"), {"connector": 5e-3, "llm": 1e-3, "encoder": 2e-3}),
    (Train("freeze", "freeze", "lora:2,lr=1e-3"), {"encoder": 1e-3}),
    (Train("full:lr=5e-3", "full", "freeze"), {"connector": 5e-3, "llm": 5e-3}),
], ids=lambda value: "" if isinstance(value, dict) else f"{value.connector}-{value.llm}-{value.encoder}")  # fmt: skip
def test_every_trained_tensor_is_in_one_group_of_the_optimizer_and_at_the_rate_of_its_part(name, train, rates):
    model = tiny.vlm()
    recipe.apply(model, train)
    optimizer = make_optimizer(model, name, lr=5e-3, weight_decay=0.1, train=train)
    part_of = {id(p): full.partition(".")[0] for full, p in model.named_parameters()}
    groups = [(group["lr"], [part_of[id(p)] for p in group["params"]]) for group in optimizer.param_groups]
    assert {(lr, part) for lr, parts in groups for part in parts} == {(lr, part) for part, lr in rates.items()}
    assert sum(len(parts) for _, parts in groups) == sum(p.requires_grad for p in model.parameters())
    assert optimizer.base_lrs == [lr for lr, _ in groups]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_part_moves_at_its_own_rate(name):
    """A part at a rate of nearly nothing stays; the others go exactly where they go without it."""
    ends = []
    for train in (FULL, Train("full:lr=1e-12", "full", "full")):
        model = tiny.vlm()
        recipe.apply(model, train)
        before = state(model)
        steps(model, make_optimizer(model, name, lr=1e-2, weight_decay=0.0, train=train), 1)
        ends.append({key: (tensor - before[key]).abs().max().item() for key, tensor in model.state_dict().items()})
    assert ends[0]["connector.proj.weight"] > 1e-4 > 1e-9 > ends[1]["connector.proj.weight"]
    others = [key for key in ends[0] if not key.startswith("connector.")]
    assert [ends[0][key] for key in others] == pytest.approx([ends[1][key] for key in others], rel=1e-4)


def test_the_schedule_scales_the_peak_of_each_part():
    model = tiny.vlm()
    optimizer = make_optimizer(model, "muon", lr=1.0, weight_decay=0.1, train=Train(llm="full:lr=4.0", encoder="full"))
    assert optimizer.scale_lr(0.5) == {"lr_encoder": 0.5, "lr_connector": 0.5, "lr_llm": 2.0}
    names = {p: name.partition(".")[0] for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert {group["lr"]} == {2.0 if names[p] == "llm" else 0.5 for p in group["params"]}
    assert make_optimizer(model, "muon", lr=1.0, weight_decay=0.1).scale_lr(0.25) == {"lr": 0.25}


def test_resuming_with_other_groups_is_refused():
    model = tiny.vlm()
    states = make_optimizer(model, "adamw", lr=1.0, weight_decay=0.0, train=Train(llm="full:lr=2.0")).state_dict()
    for other in (None, Train(encoder="full:lr=2.0")):
        with pytest.raises(UserError, match="resume with the same --optimizer, --shard and --train flags"):
            make_optimizer(model, "adamw", lr=1.0, weight_decay=0.0, train=other).load_state_dict(states)


# ---------------------------------------------------------------- activations that are computed again


def gradients_and_stored_bytes(checkpointing: bool) -> tuple[dict, int]:
    model, stored = tiny.vlm(num_hidden_layers=3), {}
    recipe.apply(model, FULL, checkpointing)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    documents = [tiny.document(100, [1], seed) for seed in range(4)]
    rows = {**tiny.flat(documents), "pixels": tiny.pictures(4, 2)}

    def store(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        loss = model(rows, tiny.everywhere(rows)).square().mean()
        held = sum(stored.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


def test_checkpointing_changes_no_gradient_and_stores_much_less():
    (plain, most), (again, least) = gradients_and_stored_bytes(False), gradients_and_stored_bytes(True)
    assert plain.keys() == again.keys() and len(plain) > 40
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert least < 0.35 * most


def test_checkpointing_leaves_names_and_answers_alone():
    model, before = tiny.vlm(), tiny.vlm().state_dict().keys()
    recipe.apply(model, FULL, checkpointing=True)
    assert model.state_dict().keys() == before
    with torch.no_grad():
        assert torch.equal(model(batch(), tiny.everywhere(batch())), tiny.vlm()(batch(), tiny.everywhere(batch())))


# ---------------------------------------------------------------- an adapter to go on from


def test_an_adapter_of_another_recipe_is_refused_and_of_the_same_is_loaded(tmp_path):
    model, train, file = tiny.vlm(), Train("partial:1", "lora:2", "freeze"), tmp_path / "adapter.safetensors"
    recipe.apply(model, train)
    steps(model, make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0, train=train), 2)
    lora.save(model, file)
    same = tiny.vlm()
    recipe.apply(same, train, adapter=file)
    assert all(torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="saved with .*'rank': 2.*give the same --train flags"):
        recipe.apply(tiny.vlm(), Train("partial:1", "lora:3", "freeze"), adapter=file)
    for llm in ("full", "freeze"):
        with pytest.raises(UserError, match="has adapters of llm, --train of nothing: give the same --train flags"):
            recipe.apply(tiny.vlm(), Train("partial:1", llm, "freeze"), adapter=file)


# ---------------------------------------------------------------- the scripts


def test_a_script_reads_rates_of_parts_from_a_file_and_from_flags(samples, run_script, tmp_path):
    from tests.conftest import TINY
    from tests.test_scripts import log_of

    (tmp_path / "run.yaml").write_text("lr: 1e-3\ntrain:\n  connector: full:lr=4e-3\nwarmup: 0\n")
    run_script("1-pretrain_vlm.py", *TINY, "--data", samples / "llava.json", "--max_steps", 2, "--config", "run.yaml",
               "--train.llm", "full:lr=2e-3", cwd=tmp_path)  # fmt: skip
    first, *_ = log_of(tmp_path / "out" / "pretrain")
    assert (first["lr_connector"], first["lr_llm"], "lr" in first) == (4e-3, 2e-3, False)


def test_an_adapter_is_saved_and_gone_on_from_by_a_flag(stage_one, samples, run_script, tmp_path):
    """All modes in one run: adapters of encoder and language model, the connector's last map, activations computed again."""
    from tests.test_scripts import log_of

    arguments = ("2-sft_vlm.py", "--init", stage_one[0] / "out" / "pretrain", "--data", samples / "llava.json", "--max_steps", 2,
                 "--batch_size", 4, "--log_every", 1, "--device", "cpu", "--bench", "", "--warmup", 0, "--lr", 1e-3,
                 "--train.encoder", "lora:2,lr=5e-4", "--train.connector", "partial:1", "--train.llm", "lora:2",
                 "--checkpointing", "--val_share", 0)  # fmt: skip
    run_script(*arguments, cwd=tmp_path)
    folder = tmp_path / "out" / "sft"
    first, *_ = log_of(folder)
    assert (first["lr_encoder"], first["lr_connector"], first["lr_llm"]) == (5e-4, 1e-3, 1e-3)
    file = folder / "adapter.safetensors"
    assert file.stat().st_size < 0.3 * (folder / "model.safetensors").stat().st_size
    run_script(*arguments, "--adapter", file, "--out", "out/more", cwd=tmp_path)
    assert (tmp_path / "out" / "more" / "adapter.safetensors").is_file()
    for flags, message in ((("--adapter", "nowhere"), "no adapters at nowhere"),
                           (("--adapter", file, "--train.llm", "lora:3"), "give the same --train flags")):
        done = run_script(*arguments, *flags, "--out", "out/other", cwd=tmp_path, expect=1)
        assert message in done.err and "Traceback" not in done.err
