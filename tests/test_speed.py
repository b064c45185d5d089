"""What makes a step fast, counted: positions, logit rows, encoder calls. All forms compute one loss and one gradient."""

import pytest
import torch

from model.config import VLMConfig
from model.losses import IGNORE
from tests import tiny
from tests.speed import __main__ as speed

CONFIG = speed.Config(steps=1, rows=3, maximum=128, ladder=True)
ENCODER = "clip_random:size=8,patch=4,width=16,layers=1,heads=2"


@pytest.fixture(scope="module")
def legs() -> dict[speed.Form, speed.Leg]:
    config = VLMConfig(tiny.llm_config(vocab_size=50), encoder=ENCODER, connector="linear", image_token_id=speed.IMAGE)
    return {leg.form: leg for leg in speed.make_legs(CONFIG, config)}


def counted(leg: speed.Leg) -> dict[str, int]:
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
    (batch,) = legs[speed.OURS].batches
    tokens, learned = batch["input_ids"].numel(), int((batch["labels"] != IGNORE).sum())
    assert 0 < learned < tokens < CONFIG.rows * CONFIG.maximum
    assert counted(legs[speed.OURS]) == {"first": tokens, "last": learned, "logits": learned, "encoder": 0}


def test_the_padded_step_really_computes_its_padding(legs):
    everything = CONFIG.rows * CONFIG.maximum
    assert counted(legs[speed.NAIVE]) == {"first": everything, "last": everything, "logits": everything, "encoder": 1}


def test_every_rung_of_the_ladder_computes_no_more_than_the_one_before(legs):
    rungs = [counted(legs[form]) for form in speed.LADDER]
    for before, after in zip(rungs, rungs[1:]):
        assert all(after[name] <= before[name] for name in before) and after != before


def test_every_form_has_the_loss_and_the_gradients_of_the_padded_one(legs):
    losses, gradients = {}, {}
    for form, leg in legs.items():
        leg.model.zero_grad()
        losses[form] = leg.loss(leg.batches[0])
        losses[form].backward()
        gradients[form] = {name: weight.grad for name, weight in leg.model.named_parameters() if weight.requires_grad}
    for form in speed.LADDER[1:]:
        # Features from a cache are fp16, and nothing else differs but the order of sums.
        limit = 2e-3 if form.cached else 1e-5
        assert abs(losses[form] - losses[speed.NAIVE]) < 1e-4 * losses[speed.NAIVE]
        for name, expected in gradients[speed.NAIVE].items():
            assert expected.norm() > 0, name
            assert (gradients[form][name] - expected).norm() < limit * expected.norm(), (form.name, name)


def test_rows_are_like_pretraining_rows():
    documents = speed.make_documents(1000, image_tokens=50, vocabulary=6400, seed=1)
    assert abs(sum(map(len, documents)) / 1000 - 93) < 1
    assert abs(sum(sum(document.learn) for document in documents) / 1000 - 18) < 0.5
    assert documents[7].input_ids == speed.make_documents(8, image_tokens=50, vocabulary=6400, seed=1)[7].input_ids


def test_the_command_prints_both_speeds_and_their_ratio(capsys):
    threads = torch.get_num_threads()
    speed.main(speed.Config(preset="nano", encoder=ENCODER, threads=threads, rounds=1, steps=1, rows=2, maximum=128))
    printed = capsys.readouterr().out
    for expected in ("GEMM rate", "padded to the maximum", "packed (ours)", "x1.00 [1.00-1.00]"):
        assert expected in printed


def test_a_row_longer_than_the_maximum_is_refused():
    config = VLMConfig(tiny.llm_config(), encoder=ENCODER, connector="linear", image_token_id=speed.IMAGE)
    with pytest.raises(ValueError, match="does not fit into --maximum 20"):
        speed.make_legs(speed.Config(steps=1, rows=2, maximum=20), config)
