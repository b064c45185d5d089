"""LoRA: nothing changes at the start, only adapters move, merged equals unmerged, and a checkpoint is an ordinary one."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dataset.tokenizer import MODEL_FILE
from model import checkpoint, lora
from model.checkpoint import load, save
from model.optimizer import make_optimizer
from model.recipe import Mode, count_trainable, set_trainable
from model.registry import UserError
from model.resume import load_resume, save_resume
from tests import tiny


def batch() -> dict:
    return {**tiny.flat([tiny.document(9, [1], 0), tiny.document(12, [2], 1)]), "pixels": tiny.pictures(2, 2)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(), tiny.everywhere(batch()))


def adapted(mode: str = "lora:3", moved: bool = True, others: str = "freeze"):
    """A tiny model with adapters on the language model, after some imagined training."""
    model = tiny.vlm(attention_bias=True)
    for name, part in model.parts.items():
        set_trainable(part, Mode.parse(mode if name == "llm" else others))
    if moved:
        torch.manual_seed(5)
        for part in lora.adapters(model):
            nn.init.normal_(part.lora_b, std=0.3)
    return model


def test_at_the_start_an_adapted_model_is_the_model():
    assert torch.equal(logits(adapted(moved=False)), logits(tiny.vlm(attention_bias=True)))


def test_every_linear_map_of_the_blocks_is_adapted_the_rectangular_ones_too():
    model = adapted()
    inside = [part for block in model.llm.blocks for part in block.modules() if isinstance(part, nn.Linear)]
    assert len(inside) == 7 * 3 and all(isinstance(part, lora.LoRALinear) for part in inside)
    shapes = {tuple(part.weight.shape) for part in inside}
    assert {(32, 24), (16, 24), (24, 32), (40, 24), (24, 40)} == shapes  # q, k and v, o, gate and up, down: none is square
    assert not lora.adapters(model.connector) and not lora.adapters(model.encoder)


def test_the_encoder_can_be_adapted():
    model = tiny.vlm()
    set_trainable(model.encoder, Mode("lora", 2))
    assert count_trainable(model.encoder) == sum(
        part.lora_a.numel() + part.lora_b.numel() for part in lora.adapters(model.encoder)) > 0


def test_only_adapters_move_and_all_of_them_do():
    model = adapted(moved=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    optimizer = make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0)
    for _ in range(2):  # the first step moves B alone: while B is zero, A has no gradient
        model(batch(), tiny.everywhere(batch())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved == {name for name in before if "lora_" in name}


def test_the_number_of_trained_parameters_is_that_of_the_formula():
    model = tiny.vlm()
    maps = [part for block in model.llm.blocks for part in block.modules() if isinstance(part, nn.Linear)]
    expected = sum(4 * (part.in_features + part.out_features) for part in maps)
    set_trainable(model.llm, Mode("lora", 4))
    assert count_trainable(model.llm) == expected


def test_an_adapted_map_adds_alpha_over_rank_times_b_a():
    torch.manual_seed(0)
    base = nn.Linear(5, 7)
    part = lora.LoRALinear(base, rank=2, alpha=6)
    nn.init.normal_(part.lora_b)
    x = torch.randn(3, 5)
    change = (6 / 2) * part.lora_b.double() @ part.lora_a.double()
    expected = x.double() @ (base.weight.double() + change).T + base.bias.double()
    torch.testing.assert_close(part(x).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("others", ["freeze", "lora:2"])
def test_merged_equals_unmerged(others):
    model = adapted(others=others)
    unmerged, plain = logits(model), tiny.vlm(attention_bias=True)
    assert (unmerged - logits(plain)).abs().max() > 0.1  # the adapters change something
    merged = lora.merged(model)
    assert torch.equal(logits(model), unmerged) and lora.adapters(model)  # the model itself stays as it is
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert (logits(plain) - unmerged).abs().max() < 1e-5


def test_switched_off_is_the_model_before_and_only_inside_the_block():
    model = adapted()
    on = logits(model)
    with pytest.raises(KeyError):
        with lora.switched_off(model):
            assert torch.equal(logits(model), logits(tiny.vlm(attention_bias=True)))
            raise KeyError
    assert torch.equal(logits(model), on)


def test_without_adapters_there_is_nothing_to_switch_off_and_merged_is_the_model():
    model = tiny.vlm()
    with pytest.raises(UserError, match="no LoRA adapters to switch off: the model would be its own reference"):
        with lora.switched_off(model):
            pass
    merged, before = lora.merged(model), model.state_dict()
    assert merged.keys() == before.keys() and all(torch.equal(merged[name], before[name]) for name in before)


@pytest.mark.parametrize(("part", "mode", "message"), [
    ("connector", "lora:17", "the rank is 1 to 16"), ("llm", "lora:0", "the rank is 1 to 16"),
    ("llm", "lora:17", "the rank is 1 to 16"), ("llm", "lora:", "or lora:R, .*not 'lora:'"), ("llm", "lora:x", "or lora:R, "),
])  # fmt: skip
def test_adapters_that_make_no_sense_are_refused(part, mode, message):
    with pytest.raises(UserError, match=message):
        set_trainable(tiny.vlm().parts[part], Mode.parse(mode))


def test_adapters_on_adapters_are_refused():
    with pytest.raises(UserError, match="adapters already"):
        lora.apply(adapted().llm, rank=2, alpha=2)


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_saved_after_lora_is_an_ordinary_one(tmp_path):
    model = adapted()
    save(tmp_path, model, MODEL_FILE)
    back = load(tmp_path)
    assert not lora.adapters(back) and back.state_dict().keys() == tiny.vlm(attention_bias=True).state_dict().keys()
    assert (logits(back) - logits(model)).abs().max() < 1e-5
    assert lora.adapters(model)  # saving changes nothing


def test_resuming_brings_back_the_adapters_and_not_their_sum(tmp_path):
    model = adapted()
    optimizer = make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0)
    model(batch(), tiny.everywhere(batch())).square().mean().backward()
    optimizer.step()
    save_resume(tmp_path, model, optimizer, {"step": 1}, rank=0, world_size=1)
    (file,) = tmp_path.rglob("model.safetensors")
    stored = load_file(file)
    base = tiny.vlm(attention_bias=True).state_dict()
    assert any(name.endswith("lora_b") for name in stored)
    assert all(torch.equal(stored[name], base[name]) for name in base)  # the frozen matrices, unmerged
    other = adapted(moved=False)
    fresh = make_optimizer(other, "adamw", lr=1.0, weight_decay=0.0)
    load_resume(tmp_path, other, fresh, rank=0, world_size=1)
    assert torch.equal(logits(other), logits(model))


def test_resuming_with_another_rank_or_without_adapters_is_refused(tmp_path):
    model = adapted()
    optimizer = make_optimizer(model, "adamw", lr=1e-2, weight_decay=0.0)
    save_resume(tmp_path, model, optimizer, {"step": 1}, rank=0, world_size=1)
    with pytest.raises(ValueError, match="of another shape"):
        load_resume(tmp_path, adapted("lora:2"), optimizer, rank=0, world_size=1)
    with pytest.raises(ValueError, match="unexpected.*lora_a"):
        load_resume(tmp_path, tiny.vlm(attention_bias=True), optimizer, rank=0, world_size=1)


def test_an_adapted_encoder_is_stored_merged(tmp_path):
    model = tiny.vlm()
    set_trainable(model.encoder, Mode("lora", 2))
    for part in lora.adapters(model.encoder):
        nn.init.normal_(part.lora_b, std=0.3)
    save(tmp_path, model, MODEL_FILE)
    assert checkpoint.holds_encoder(tmp_path / "model.safetensors", model)
    assert (logits(load(tmp_path)) - logits(model)).abs().max() < 1e-5


# ---------------------------------------------------------------- adapters alone


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        model(batch(), tiny.everywhere(batch())).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("connector", ["freeze", "full", "lora:2"])
@pytest.mark.parametrize("encoder", ["freeze", "lora:2"])
def test_adapters_put_on_the_base_and_trained_further_are_the_uninterrupted_run(tmp_path, connector, encoder):
    modes = {"encoder": encoder, "connector": connector, "llm": "lora:3"}

    def begun():
        model = tiny.vlm(attention_bias=True)
        for name, part in model.parts.items():
            set_trainable(part, Mode.parse(modes[name]))
        return model, make_optimizer(model, "muon", lr=1e-2, weight_decay=0.1)

    model, optimizer = begun()
    train(model, optimizer, 2)
    lora.save(model, tmp_path / "adapter.safetensors")
    memory = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2)
    other, again = begun()
    lora.load(other, tmp_path / "adapter.safetensors")
    again.load_state_dict(memory)
    train(other, again, 2)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_bare_base_gets_the_adapters_of_the_file(tmp_path):
    model = adapted(others="lora:2")
    lora.save(model, tmp_path / "adapter.safetensors")
    with safe_open(tmp_path / "adapter.safetensors", "pt") as opened:
        assert json.loads(opened.metadata()["adapters"]) == {
            "encoder": {"rank": 2, "alpha": 4}, "connector": {"rank": 2, "alpha": 4}, "llm": {"rank": 3, "alpha": 6}}
        assert all("lora_" in name for name in opened.keys())
    base = tiny.vlm(attention_bias=True)
    lora.load(base, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(base), logits(model))
    plain, merged = tiny.vlm(attention_bias=True), lora.merged(base)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    assert (logits(plain) - logits(model)).abs().max() < 1e-5


def test_a_checkpoint_of_a_lora_run_has_its_adapters_beside_it_until_one_without_takes_its_place(tmp_path):
    save(tmp_path, adapted(), MODEL_FILE)
    base = tiny.vlm(attention_bias=True)
    lora.load(base, tmp_path / "adapter.safetensors")
    assert (logits(base) - logits(load(tmp_path))).abs().max() < 1e-5
    save(tmp_path, tiny.vlm(), MODEL_FILE)
    assert not (tmp_path / "adapter.safetensors").exists()


def test_adapters_on_another_base_or_of_another_shape_are_refused(tmp_path):
    file = tmp_path / "adapter.safetensors"
    lora.save(adapted(), file)
    other = tiny.vlm(attention_bias=True)
    with torch.no_grad():
        other.llm.model.norm.weight[0] += 1e-3
    with pytest.raises(UserError, match="another base.*--init the checkpoint"):
        lora.load(other, file)
    with pytest.raises(UserError, match="saved with .*'rank': 3.*give the same --train flags"):
        lora.load(adapted("lora:2"), file)
    with pytest.raises(UserError, match="does not fit the model.*up_proj"):
        lora.load(tiny.vlm(attention_bias=True, intermediate_size=56), file)
    save(tmp_path / "plain", tiny.vlm(), MODEL_FILE)
    with pytest.raises(UserError, match="holds no adapters"):
        lora.load(tiny.vlm(), tmp_path / "plain" / "model.safetensors")
