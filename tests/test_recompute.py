"""Gradient checkpointing: the same gradients, and copies that compute with their own weights."""

import copy

import torch

from model import recompute
from tests import tiny


def test_a_copy_of_a_model_that_recomputes_has_its_own_weights():
    """A reference is such a copy: it must not follow the policy."""
    model = tiny.vlm()
    recompute.apply(model)
    batch = tiny.flat([tiny.document(9, [], seed=0)])
    reference = copy.deepcopy(model)
    before = reference(batch, tiny.everywhere(batch))
    with torch.no_grad():
        model.llm.blocks[0].mlp.down_proj.weight.zero_()
    assert torch.equal(reference(batch, tiny.everywhere(batch)), before)
    assert not torch.allclose(model(batch, tiny.everywhere(batch)), before)


def test_recomputed_activations_have_the_gradients_of_stored_ones():
    stored, again = tiny.vlm(), tiny.vlm()
    recompute.apply(again)
    batch = tiny.flat([tiny.document(9, [2], seed=0)])
    batch["pixels"] = tiny.pictures(1, seed=0)
    for model in (stored, again):
        model.encoder.requires_grad_(False)
        model(batch, tiny.everywhere(batch)).square().sum().backward()
    trained = [(one, other) for one, other in zip(stored.parameters(), again.parameters()) if one.requires_grad]
    assert trained and all(torch.equal(one.grad, other.grad) for one, other in trained)
