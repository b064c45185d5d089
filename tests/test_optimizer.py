"""The optimizers: what Muon does to a matrix, and which tensors it gets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.muon import Muon, orthogonal
from model.optimizer import make_optimizer
from model.registry import UserError
from tests import tiny


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5)])
def test_an_orthogonal_update_keeps_the_directions_and_evens_out_their_sizes(shape):
    updates = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonal(updates)
    u, _, vh = torch.linalg.svd(updates, full_matrices=False)
    sizes = (u.mT @ result @ vh.mT).diagonal(dim1=1, dim2=2)  # of the result along the update's own directions
    assert result.shape == updates.shape
    assert (sizes > 0.5).all() and (sizes < 1.3).all()
    assert torch.allclose(u @ torch.diag_embed(sizes) @ vh, result, atol=1e-4)


def test_in_bf16_the_directions_of_an_update_turn_by_a_percent():
    updates = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    exact, rounded = orthogonal(updates), orthogonal(updates, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.05  # rounded indeed, and little


def test_matrices_treated_together_move_as_if_treated_alone():
    gradients = [torch.randn(4, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]

    def moved(groups):
        weights = [torch.nn.Parameter(torch.zeros(4, 6)) for _ in gradients]
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient.clone()
        for chosen in groups:
            Muon([weights[k] for k in chosen], lr=0.1, weight_decay=0.0).step()
        return torch.stack([weight.detach() for weight in weights])

    assert torch.allclose(moved([[0, 1, 2]]), moved([[0], [1], [2]]), atol=1e-6)


def test_an_update_of_muon_is_half_as_large_as_one_of_adamw():
    weight = torch.nn.Parameter(torch.zeros(64, 48))
    weight.grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    assert 0.07 < weight.detach().pow(2).mean().sqrt() < 0.13  # AdamW's is about 0.2


def test_muon_takes_the_matrices_of_blocks_and_connector_and_adamw_all_else_that_moves():
    model = tiny.vlm()
    model.encoder.requires_grad_(False)
    muon, adamw = make_optimizer(model, "muon", lr=1e-3, weight_decay=0.1).optimizers
    names = {p: name for name, p in model.named_parameters()}
    of_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    of_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert "connector.proj.weight" in of_muon and "llm.model.layers.0.mlp.up_proj.weight" in of_muon
    assert all(name.startswith("connector.") or ".layers." in name and "norm" not in name for name in of_muon)
    assert "llm.model.embed_tokens.weight" in of_adamw
    assert of_muon | of_adamw == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not of_muon & of_adamw


def test_a_table_of_vectors_is_not_a_matrix_for_muon():
    model = tiny.vlm()
    model.connector.index = torch.nn.Embedding(4, 24)
    muon, adamw = make_optimizer(model, "muon", lr=1e-3, weight_decay=0.1).optimizers
    of = {name: {id(p) for group in optimizer.param_groups for p in group["params"]}
          for name, optimizer in (("muon", muon), ("adamw", adamw))}
    assert id(model.connector.proj.weight) in of["muon"] and id(model.connector.index.weight) in of["adamw"]


def test_an_unknown_optimizer_and_a_resume_with_another_one_say_so():
    model = tiny.vlm()
    with pytest.raises(UserError, match="muon or adamw, not 'sgd'"):
        make_optimizer(model, "sgd", lr=1e-3, weight_decay=0.0)
    states = make_optimizer(model, "adamw", lr=1e-3, weight_decay=0.0).state_dict()
    with pytest.raises(UserError, match="resume with the same --optimizer"):
        make_optimizer(model, "muon", lr=1e-3, weight_decay=0.0).load_state_dict(states)


def test_a_step_of_training_loads_no_compiler_and_its_threads_spin_for_microseconds_alone():
    program = """
import os, sys
import model
assert "torch" not in sys.modules and (os.environ["OMP_WAIT_POLICY"], os.environ["GOMP_SPINCOUNT"]) == ("passive", "1000")
import torch
from model.optimizer import make_optimizer
from tests import tiny
net = tiny.vlm()
optimizer = make_optimizer(net, "muon", lr=1e-3, weight_decay=0.1)
before = [p.detach().clone() for p in net.parameters()]
for p in net.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
assert all((p != old).any() for p, old in zip(net.parameters(), before))
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], env=environment)
