"""What makes a step fast, counted: positions, logit rows, encoder calls. All forms compute one loss and one gradient."""

import json
import math
from dataclasses import replace

import pytest
import torch

from model.config import VLMConfig
from model.losses import IGNORE, score
from model.registry import UserError
from tests import tiny
from tests.speed import __main__ as speed
from tests.speed import measuring, table
from tests.speed.legs import EVERY_STEP, LADDER, LONGEST, MAXIMUM, OURS, Form, Leg, Times
from tests.speed.rows import IMAGE, STAGES, make_documents

ENCODER = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"
SHAPE = VLMConfig(tiny.llm_config(vocab_size=50), encoder=ENCODER, connector="linear", image_token_id=IMAGE)
CONFIG = speed.Config(steps=1, rows=4, dtype="fp32", threads=torch.get_num_threads(), results=None)
ALL = (*LADDER, EVERY_STEP)


@pytest.fixture(scope="module", params=STAGES)
def legs(request) -> dict[Form, Leg]:
    return {leg.form: leg for leg in speed.make_legs(CONFIG, request.param, SHAPE, ALL)}


def counted(leg: Leg) -> dict[str, int]:
    """What one forward pass computes: positions of the first and the last block, logit rows, encoder calls."""
    counts = {"encoder": 0}
    model, blocks = leg.model, leg.model.llm.blocks
    hooks = [
        model.encoder.register_forward_hook(lambda *_: counts.update(encoder=counts["encoder"] + 1)),
        blocks[0].mlp.register_forward_hook(lambda module, args, out: counts.update(first=len(out))),
        blocks[-1].mlp.register_forward_hook(lambda module, args, out: counts.update(last=len(out))),
        model.llm.register_forward_hook(lambda module, args, out: counts.update(logits=len(out))),
    ]
    with torch.no_grad():
        leg.loss(leg.batches[0])
    for hook in hooks:
        hook.remove()
    return counts


def test_our_step_computes_real_tokens_learned_logits_and_no_encoder(legs):
    (batch,) = legs[OURS].batches
    tokens, learned = batch["input_ids"].numel(), int((batch["labels"] != IGNORE).sum())
    assert 0 < learned < tokens < CONFIG.rows * legs[OURS].stage.maximum
    ours = {"first": tokens, "last": learned, "logits": learned, "encoder": 0}
    assert counted(legs[OURS]) == ours and counted(legs[EVERY_STEP]) == {**ours, "encoder": 1}


def test_the_padded_step_really_computes_its_padding(legs):
    for form in (MAXIMUM, LONGEST):
        everything = legs[form].batches[0]["input_ids"].numel()
        assert counted(legs[form]) == {"first": everything, "last": everything, "logits": everything, "encoder": 1}
    assert legs[MAXIMUM].batches[0]["input_ids"].shape == (CONFIG.rows, legs[MAXIMUM].stage.maximum)


def test_every_rung_of_the_ladder_computes_no_more_than_the_one_before(legs):
    rungs = [counted(legs[form]) for form in LADDER]
    for before, after in zip(rungs, rungs[1:]):
        assert all(after[name] <= before[name] for name in before) and after != before


def test_every_form_has_the_loss_and_the_gradients_of_the_padded_one(legs):
    losses, gradients = {}, {}
    for form, leg in legs.items():
        leg.model.zero_grad()
        losses[form] = leg.loss(leg.batches[0])
        losses[form].backward()
        gradients[form] = {name: weight.grad for name, weight in leg.model.named_parameters() if weight.requires_grad}
    for form in ALL[1:]:
        # Stored features are fp16, and nothing else differs but the order of sums.
        limit = 2e-3 if form.stored else 1e-5
        assert abs(losses[form] - losses[MAXIMUM]) < 1e-4 * losses[MAXIMUM]
        for name, expected in gradients[MAXIMUM].items():
            assert expected.norm() > 0, name
            assert (gradients[form][name] - expected).norm() < limit * expected.norm(), (form.name, name)


def test_the_loss_is_that_of_the_scripts(legs):
    (batch,) = legs[OURS].batches
    scores = score(legs[OURS].model, batch)
    expected = -scores.logps.mean()
    if legs[OURS].stage.pairs:  # before training the implied rewards are equal: -log sigmoid(0), and the SFT term
        chosen = [scores.logps[scores.owner == k].mean() for k in range(0, CONFIG.rows, 2)]
        expected = math.log(2) - 1.5 * torch.stack(chosen).mean()
    torch.testing.assert_close(legs[OURS].loss(batch), expected)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stage", STAGES)
def test_padded_and_packed_training_have_the_same_losses_step_by_step(stage, optimizer, capsys):
    assert speed.compare_losses(replace(CONFIG, rows=2, steps_compared=6, optimizer=optimizer), stage, SHAPE) < 2e-6
    assert capsys.readouterr().out.count("padded") == 6


def test_pairs_share_question_and_picture_and_differ_in_their_answers():
    documents = make_documents(STAGES["dpo"], 6, image_tokens=5, vocabulary=50, seed=1)
    for chosen, rejected in zip(documents[::2], documents[1::2]):
        prompts = [one.input_ids[: one.learn.index(True)] for one in (chosen, rejected)]
        assert prompts[0] == prompts[1] and chosen.pictures == rejected.pictures and chosen.input_ids != rejected.input_ids
    assert documents[0].pictures != documents[2].pictures


@pytest.mark.parametrize("stage, tokens, learned", [("pretrain", 93, 18), ("sft", 185, 101)])
def test_rows_are_as_long_as_those_of_their_stage(stage, tokens, learned):
    documents = make_documents(STAGES[stage], 2000, image_tokens=50, vocabulary=6400, seed=1)
    assert abs(sum(map(len, documents)) / 2000 - tokens) < 1.5
    assert abs(sum(sum(document.learn) for document in documents) / 2000 - learned) < 1.5
    assert documents[7].input_ids == make_documents(STAGES[stage], 8, 50, 6400, seed=1)[7].input_ids
    default = make_documents(STAGES[stage], 16, 50, 6400, speed.Config().seed)
    assert abs(sum(map(len, default)) / 16 - tokens) < 1.5


def test_speed_is_that_of_whole_updates():
    assert Times(rows=8, passes=2.0, update=1.0).samples_per_second(8) == pytest.approx(8 / 3)
    assert Times(rows=8, passes=2.0, update=1.0).samples_per_second(40) == pytest.approx(40 / 11)


def test_ratios_say_how_many_times_as_fast_ours_is():
    padded = table.Measured(MAXIMUM.name, 1e9, times=[Times(8, 4.0, 0.0), Times(8, 8.0, 0.0)])
    ours = table.Measured(OURS.name, math.nan, times=[Times(8, 1.0, 0.0), Times(8, 1.0, 0.0)])
    assert table.ratios([padded, ours], 8) == {MAXIMUM.name: {OURS.name: [4.0, 8.0]}, OURS.name: {OURS.name: [1.0, 1.0]}}
    numbers = table.numbers([padded, ours], 8)
    assert numbers[MAXIMUM.name]["ratios"] == {OURS.name: 6.0} and numbers[MAXIMUM.name]["rows_per_second"] == 1.5
    assert numbers[OURS.name]["step_gb"] is None


def test_the_operations_of_a_row_are_those_of_its_products(legs):
    leg = legs[OURS]
    forward, update = leg.operations(batch_size=1), leg.operations(batch_size=10**9)
    assert forward >= update > 0
    weights = sum(weight.numel() for block in leg.model.llm.blocks for weight in block.parameters() if weight.ndim == 2)
    tokens = leg.batches[0]["input_ids"].numel() / CONFIG.rows
    assert 3 < update / (tokens * weights) < 12  # 6 a weight and token, less in the last block; then attention and logits


def test_the_command_prints_both_speeds_and_their_ratio(capsys, tmp_path):
    results = tmp_path / "results.jsonl"
    config = replace(CONFIG, preset="nano", encoder=ENCODER, rounds=1, rows=2, maximum=350, results=results)
    speed.main(config)
    printed = capsys.readouterr().out
    for expected in ("matrix products", "padded to the maximum", "packed, features stored", "x 1.00 [1.00-1.00]"):
        assert expected in printed
    speed.main(replace(config, stage=("pretrain",), steps_compared=1))
    training, losses = map(json.loads, results.read_text().splitlines())
    assert training["settings"]["preset"] == "nano" and {"date", "processor", "commit", "torch"} < set(training)
    assert list(training["results"]) == list(STAGES) and losses["results"]["pretrain"] < 1e-6
    for stage, found in training["results"].items():
        assert list(found["legs"]) == [form.name for form in speed.forms_of(config, stage)] and found["share_of_gemm"] > 0


def test_a_row_longer_than_the_maximum_is_refused():
    with pytest.raises(UserError, match="does not fit into the 20 that"):
        speed.make_legs(replace(CONFIG, maximum=20), "pretrain", SHAPE, (MAXIMUM,))


@pytest.mark.parametrize("flags, message", [({"stage": ("rl",)}, "--stage is pretrain"), ({"rows": 3}, "its rows are even"),
                                            ({"peer": ("trl:.",)}, "--peer is minimind-v:PATH or nanovlm:PATH"),
                                            ({"peer": ("nanovlm:nowhere",)}, "with the folder of its code")])  # fmt: skip
def test_a_wrong_flag_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        speed.main(replace(CONFIG, preset="small:hidden_size=32,num_hidden_layers=2", encoder=ENCODER, **flags))


def test_the_memory_of_an_action_is_what_it_adds():
    held = measuring.added_memory(lambda: torch.ones(32, 2**20))
    assert math.isnan(held) or 0.9 * 2**27 < held < 1.3 * 2**27
