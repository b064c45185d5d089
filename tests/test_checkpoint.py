"""Checkpoints: what is saved comes back, what does not fit is refused by name, and a crash costs nothing."""

import dataclasses
import json
import shutil
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dataset.tokenizer import MODEL_FILE
from model import checkpoint
from model.checkpoint import load, save
from model.encoder.clip import clip_random
from model.optimizer import make_optimizer
from model.recipe import Mode, set_trainable
from model.registry import ENCODERS
from model.resume import load_resume, save_resume
from tests import tiny
from tests.conftest import mixed_arguments

# ---------------------------------------------------------------- saving and loading


def same_weights(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def named(monkeypatch):
    """A model whose encoder has a name that brings it back, as a pretrained one has, and does not learn."""
    monkeypatch.setitem(ENCODERS.factories, "pretrained", pretrained)
    model = tiny.vlm()
    model.config = dataclasses.replace(model.config, encoder="pretrained")
    model.encoder = pretrained()
    model.encoder.requires_grad_(False)
    return model


def pretrained(seed: int = 1):
    torch.manual_seed(seed)
    return clip_random(size=8, patch=4, width=16, layers=2, heads=2)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_saved_comes_back_exactly(tmp_path, tied):
    model = tiny.vlm(tie_word_embeddings=tied)
    save(tmp_path, model, MODEL_FILE)
    back = load(tmp_path)
    assert back.config == model.config
    assert same_weights(back, model)
    assert not back.training
    assert (tmp_path / "tokenizer.model").read_bytes() == MODEL_FILE.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_a_frozen_pretrained_encoder_is_named_and_not_stored(tmp_path, named):
    save(tmp_path, named, MODEL_FILE)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if name.startswith("encoder.")]
    assert same_weights(load(tmp_path), named)


def test_a_trained_encoder_is_stored_and_stays_so_when_a_later_stage_freezes_it(tmp_path, named):
    set_trainable(named.encoder, Mode("partial", 1))
    with torch.no_grad():
        named.encoder.blocks[-1].ln_1.weight.add_(1)
    for _ in range(2):
        save(tmp_path, named, MODEL_FILE)
        assert "encoder.conv1.weight" in load_file(tmp_path / "model.safetensors")
        back = load(tmp_path)
        assert same_weights(back, named)
        set_trainable(back.encoder, Mode("freeze"))
        named = back


def test_another_encoder_of_the_same_name_is_refused(tmp_path, named, monkeypatch):
    save(tmp_path, named, MODEL_FILE)
    monkeypatch.setitem(ENCODERS.factories, "pretrained", lambda: pretrained(seed=2))
    prints = named.encoder.fingerprint(), pretrained(2).fingerprint()
    with pytest.raises(ValueError, match="another pretrained than the one installed here.*{} != {}".format(*prints)):
        load(tmp_path)


def rewritten(folder, change) -> None:
    """The saved weights after a change to the dict of tensors; what is said about the encoder stays."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        facts = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, facts)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop("connector.proj.weight"), r"1 missing \['connector.proj.weight'\], 0 unexpected"),
    (lambda tensors: tensors.update(extra=torch.zeros(1)), r"0 missing \[\], 1 unexpected \['extra'\]"),
    (lambda tensors: tensors.update({"llm.model.norm.weight": torch.zeros(7)}),
     r"1 of another shape \['llm.model.norm.weight: \(7,\) in the file, \(24,\) in the model'\]"),
    (lambda tensors: [tensors.update({"module." + name: tensors.pop(name)}) for name in list(tensors)],
     r" 0 tensors match, \d\d missing \['connector.proj.weight', .*unexpected \['module.connector.proj.weight'"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, change, message):
    save(tmp_path, tiny.vlm(), MODEL_FILE)
    rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_config_with_an_unknown_key_is_refused_by_name(tmp_path):
    save(tmp_path, tiny.vlm(), MODEL_FILE)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "conector": "mlp"}))
    with pytest.raises(ValueError, match="unknown key.*conector"):
        load(tmp_path)


@pytest.mark.parametrize(("name", "command"), [
    ("pretrain", "python 1-pretrain_vlm.py"), ("sft", "python 2-sft_vlm.py"), ("elsewhere", "python 1-pretrain_vlm.py"),
])  # fmt: skip
def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, name, command):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in .*{name}: run `{command}`"):
        load(tmp_path / name)


def test_the_newest_stage_is_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="run `python 1-pretrain_vlm.py`, then `python 2-sft_vlm.py`"):
        checkpoint.latest(tmp_path)
    for stage in ("pretrain", "sft", "dpo", "grpo"):
        save(tmp_path / stage, tiny.vlm(), MODEL_FILE)
        assert checkpoint.latest(tmp_path) == tmp_path / stage


def test_names_of_folders_mean_nothing(tmp_path):
    save(tmp_path / "finetune_lora_frozen", tiny.vlm(), MODEL_FILE)
    assert same_weights(load(tmp_path / "finetune_lora_frozen"), tiny.vlm())


# ---------------------------------------------------------------- a crash while writing


class Crash(Exception):
    pass


@pytest.mark.parametrize("writer", ["model.tensor_file.save_file", "os.replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, writer):
    model = tiny.vlm()
    save(tmp_path, model, MODEL_FILE)

    def crash(*arguments, **options):
        if writer.endswith("save_file"):
            arguments[1].write_bytes(b"half of it")
        raise Crash

    monkeypatch.setattr(writer, crash)
    with torch.no_grad():
        model.connector.proj.weight.add_(1)
    with pytest.raises(Crash):
        save(tmp_path, model, MODEL_FILE)
    assert same_weights(load(tmp_path), tiny.vlm())


def trained_a_little(model, steps: int = 2):
    """An optimizer with a memory."""
    optimizer = make_optimizer(model, "muon", lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("writer", ["model.tensor_file.save_file", "torch.save", "os.replace"])
def test_a_crash_while_saving_for_resume_leaves_the_step_before(tmp_path, monkeypatch, writer):
    model = tiny.vlm()
    optimizer = trained_a_little(model)
    save_resume(tmp_path, model, optimizer, {"step": 1}, rank=0, world_size=1)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def crash(*arguments, **options):
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(writer, crash)
        trained_a_little(model)
        with pytest.raises(Crash):
            save_resume(tmp_path, model, optimizer, {"step": 2}, rank=0, world_size=1)
    assert load_resume(tmp_path, model, optimizer, rank=0, world_size=1) == {"step": 1}
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    save_resume(tmp_path, model, optimizer, {"step": 2}, rank=0, world_size=1)  # what the crash left is in nobody's way
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["000002"]


# ---------------------------------------------------------------- resuming


def test_resuming_puts_everything_back(tmp_path):
    model = tiny.vlm()
    optimizer = trained_a_little(model)
    torch.manual_seed(3)
    torch.rand(10)
    save_resume(tmp_path, model, optimizer, {"step": 7, "position": 28, "seconds": 1.5}, rank=0, world_size=1)
    expected, noise = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.rand(4)
    memory = optimizer.state_dict()

    other = tiny.vlm()
    fresh = make_optimizer(other, "muon", lr=5.0, weight_decay=0.0)
    assert load_resume(tmp_path, other, fresh, rank=0, world_size=1) == {"step": 7, "position": 28, "seconds": 1.5}
    assert torch.equal(torch.rand(4), noise)
    assert all(torch.equal(expected[name], tensor) for name, tensor in other.state_dict().items())
    restored = fresh.state_dict()
    assert {group["lr"] for group in fresh.param_groups} == {1e-2}
    assert memory.keys() == restored.keys()
    for part, expected_part in memory.items():
        assert expected_part["state"]
        for index, state in expected_part["state"].items():
            assert all(torch.equal(state[name], restored[part]["state"][index][name]) for name in state)


@pytest.mark.parametrize(("keep", "left"), [(1, ["1000000"]), (2, ["000900", "1000000"])])
def test_only_the_newest_steps_are_kept(keep, left, tmp_path):
    model = tiny.vlm()
    optimizer = trained_a_little(model)
    for step in (5, 900, 1000000, 1000000):
        save_resume(tmp_path, model, optimizer, {"step": step}, rank=0, world_size=1, keep=keep)
    assert sorted(path.name for path in (tmp_path / "resume").iterdir()) == left


def test_a_frozen_pretrained_encoder_is_not_stored_for_resuming_either(tmp_path, named, monkeypatch):
    optimizer = trained_a_little(named)
    save_resume(tmp_path, named, optimizer, {"step": 1}, rank=0, world_size=1)
    (file,) = tmp_path.rglob("model.safetensors")
    assert not [name for name in load_file(file) if name.startswith("encoder.")]
    load_resume(tmp_path, named, optimizer, rank=0, world_size=1)
    named.encoder = pretrained(seed=2).requires_grad_(False)
    with pytest.raises(ValueError, match="another pretrained than the one installed here"):
        load_resume(tmp_path, named, optimizer, rank=0, world_size=1)


def test_resuming_with_another_number_of_processes_is_refused(tmp_path):
    model = tiny.vlm()
    optimizer = trained_a_little(model)
    save_resume(tmp_path, model, optimizer, {"step": 1}, rank=0, world_size=1)
    with pytest.raises(ValueError, match="another number of processes than 2"):
        load_resume(tmp_path, model, optimizer, rank=0, world_size=2)


def test_resuming_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume.*without --resume"):
        load_resume(tmp_path, tiny.vlm(), None, rank=0, world_size=1)


@pytest.fixture(scope="session")
def killed_and_resumed(run_script, mixed, tmp_path_factory):
    """(run that was killed after step 3 of 5, the same run resumed): folders of checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ("1-pretrain_vlm.py", *mixed_arguments(mixed), "--accumulate", 2)
    run_script(*arguments, cwd=folder, die_at_step=3, expect=-signal.SIGKILL)
    crashed = shutil.copytree(folder / "out" / "pretrain", folder / "crashed")
    run_script(*arguments, "--resume", cwd=folder)
    return crashed, folder / "out" / "pretrain"


def test_a_killed_run_goes_on_to_exactly_the_same_weights(killed_and_resumed, one_process):
    crashed, resumed = killed_and_resumed
    assert [path.name for path in (crashed / "resume").iterdir()] == ["000002"]
    ends = [load_file(folder / "model.safetensors") for folder in (resumed, one_process)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    before = load_file(crashed / "model.safetensors")
    assert not torch.equal(before["connector.proj.weight"], ends[0]["connector.proj.weight"])


def test_a_resumed_run_ends_with_the_same_optimizer_and_random_numbers(killed_and_resumed, one_process):
    ends = [folder / "resume" / "000005" for folder in (killed_and_resumed[1], one_process)]
    one, two = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in ends)
    assert one.keys() == two.keys() == {"Muon", "AdamW"}
    for part in one:
        assert one[part]["param_groups"] == two[part]["param_groups"]
        states = one[part]["state"], two[part]["state"]
        assert states[0] and all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])
    one, two = (torch.load(folder / "random-0.pt", weights_only=True)["cpu"] for folder in ends)
    assert torch.equal(one, two)
    one, two = (json.loads((folder / "state.json").read_text())["position"] for folder in ends)
    assert one == two == 10


def test_the_log_of_a_resumed_run_has_each_step_once(killed_and_resumed, one_process):
    crashed, resumed = killed_and_resumed
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (crashed, resumed, one_process)]  # fmt: skip
    assert [row["step"] for row in logs[0]] == [0, 1, 2, 3]
    assert [row["step"] for row in logs[1]] == [0, 1, 2, 3, 4, 5]
    for field in ("loss", "lr", "gradient_norm"):
        assert [row.get(field) for row in logs[1]] == [row.get(field) for row in logs[2]]
    seconds = [row["seconds"] for row in logs[1]]
    assert seconds == sorted(seconds)  # the clock goes on
