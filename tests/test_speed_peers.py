"""Peers of the benchmark: processes that train with another's code, here with stand-ins for it that have its names."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.registry import UserError
from tests.speed import __main__ as speed
from tests.speed.legs import OURS
from tests.speed.peers import Peer, name_and_commit, task
from tests.test_speed import CONFIG, ENCODER, SHAPE

# Losses tell how a peer was called: 1000 x positions of a row + placeholders of a row.
MINIMIND = {
    "model/__init__.py": "",
    "model/model_vlm.py": """
        from types import SimpleNamespace
        import torch
        VLMConfig = SimpleNamespace
        class MiniMindVLM(torch.nn.Module):
            def __init__(self, config, vision_model_path):
                super().__init__()
                print("a peer prints")
                self.image_ids, self.weight = config.image_ids, torch.nn.Parameter(torch.ones(config.hidden_size))
            def forward(self, input_ids, labels, pixel_values):
                assert self.vision_encoder(pixel_values["pixel_values"].flatten(0, 1)).last_hidden_state.shape[1] == 4
                assert ((labels == -100) | (labels == input_ids)).all()
                told = 1000 * input_ids.shape[1] + (input_ids == self.image_ids[0]).sum() / len(input_ids)
                return SimpleNamespace(loss=told * self.weight.mean(), aux_loss=0 * self.weight.sum())
        """,
    "trainer/trainer_utils.py": """
        import torch
        import model.model_vlm
        def vlm_collate_fn(rows):
            return (torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]),
                    {"pixel_values": torch.stack([row[2]["pixel_values"] for row in rows])})
        """,
}
NANOVLM = {
    "models/config.py": "from types import SimpleNamespace as VLMConfig",
    "models/vision_language_model.py": """
        import torch
        from data.processors import get_tokenizer
        class VisionLanguageModel(torch.nn.Module):
            def __init__(self, cfg, load_backbone):
                super().__init__()
                assert not load_backbone and cfg.mp_image_token_length == 4
                self.image = get_tokenizer("", None, None).image_token_id
                self.vision_encoder, self.weight = torch.nn.Linear(2, 2), torch.nn.Parameter(torch.ones(cfg.lm_hidden_dim))
            def forward(self, input_ids, images, targets):
                learned = targets[:, :-1] != -100
                assert (targets[:, :-1][learned] == input_ids[:, 1:][learned]).all() and learned.any()
                pictures = sum(map(len, images))
                return None, (1000 * input_ids.shape[1] + (input_ids == self.image).sum() / pictures) * self.weight.mean()
        """,
    "data/advanced_datasets.py": """
        class ConstantLengthDataset:
            def __init__(self, dataset, infinite, max_sample_length, seq_length, num_of_sequences):
                self.dataset = dataset
            def __iter__(self):
                while True:
                    yield from (self.dataset[k] for k in range(len(self.dataset)))
        """,
    "data/collators.py": """
        import torch
        class VQACollator:
            def __init__(self, tokenizer, length):
                self.length, self.pad = length, tokenizer.pad_token_id
            def __call__(self, rows):
                def padded(name, value):
                    return torch.stack([torch.nn.functional.pad(row[name], (self.length - len(row[name]), 0), value=value)
                                        for row in rows])
                return {"input_ids": padded("input_ids", self.pad), "labels": padded("labels", -100),
                        "images": [row["images"] for row in rows]}
        """,
}
TINY = "small:hidden_size=32,num_hidden_layers=2,intermediate_size=48"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, files in (("minimind-v", MINIMIND), ("nanovlm", NANOVLM)):
        made[name] = tmp_path_factory.mktemp(name)
        for file, text in files.items():
            (made[name] / file).parent.mkdir(exist_ok=True)
            lines = text.splitlines()
            indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
            (made[name] / file).write_text("\n".join(line[indent:] for line in lines))
    return made


@pytest.mark.parametrize("name, stage, positions", [("minimind-v", "pretrain", 450), ("nanovlm", "sft", 768)])
def test_a_peer_gets_the_same_rows_in_its_own_padding_and_trains_a_round_at_a_time(folders, name, stage, positions):
    (leg,) = speed.make_legs(CONFIG, stage, SHAPE, (OURS,))
    peer = Peer(f"{name}:{folders[name]}", task(CONFIG, stage, SHAPE, leg))
    loss, added, peak = peer.warm_up()
    assert loss == 1000 * positions + 4  # of the five placeholders of a picture here, the class token is none there
    assert added != added or 0 <= added < peak
    for _ in range(3):
        times = peer.round()
        assert times.rows == (CONFIG.rows if name == "minimind-v" else 2) and times.passes > 0 and times.update > 0
    peer.close()
    assert peer.process.returncode == 0


def test_peers_alternate_with_ours_and_stand_in_the_table_and_in_the_results(folders, tmp_path, capfd):
    config = replace(CONFIG, stage=("pretrain",), preset=TINY, encoder=ENCODER, rounds=2, rows=2, maximum=200,
                     peer=(f"nanovlm:{folders['nanovlm']}",), results=tmp_path / "results.jsonl")  # fmt: skip
    speed.main(config)
    printed = capfd.readouterr().out
    assert "| nanovlm | " in printed and "a peer prints" not in printed
    line = json.loads(config.results.read_text())
    legs = line["results"]["pretrain"]["legs"]
    assert list(legs)[-1] == "nanovlm" and line["settings"]["peer"] == ["nanovlm"]
    assert legs["nanovlm"]["ratios"][OURS.name] > 0
    assert legs["nanovlm"]["peak_gb"] > 0.1 and legs[OURS.name]["peak_gb"] > 0.1  # whole processes
    assert legs["padded to the longest"]["peak_gb"] is None


def test_a_peer_that_fails_says_so(tmp_path, capfd):
    (leg,) = speed.make_legs(CONFIG, "pretrain", SHAPE, (OURS,))
    peer = Peer(f"nanovlm:{tmp_path}", task(CONFIG, "pretrain", SHAPE, leg))
    with pytest.raises(UserError, match="the process of nanovlm ended with status 1"):
        peer.warm_up()
    assert "No module named 'data'" in capfd.readouterr().err


def test_a_clone_is_named_with_its_commit(tmp_path):
    assert name_and_commit(f"nanovlm:{tmp_path}") == "nanovlm"
    assert name_and_commit(f"nanovlm:{Path(__file__).parent}").startswith("nanovlm")


def test_a_connector_that_merges_patches_is_refused(folders):
    config = replace(CONFIG, stage=("pretrain",), preset="nano", encoder=ENCODER, peer=(f"nanovlm:{folders['nanovlm']}",))
    with pytest.raises(UserError, match="a connector that keeps all its tokens"):
        speed.main(config)


def test_the_task_says_what_a_peer_trains(folders):
    (leg,) = speed.make_legs(CONFIG, "sft", SHAPE, (OURS,))
    told = task(CONFIG, "sft", SHAPE, leg)
    ids = torch.tensor([token for ids, _ in told.documents for token in ids])
    assert torch.equal(ids, torch.cat([batch["input_ids"][0] for batch in leg.batches]))
    assert (told.encoder["patch"], told.llm["vocab_size"], told.dtype, told.maximum) == (4, 50, "fp32", 768)
