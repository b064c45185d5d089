"""A batch that several threads share gives the model's own logits and gradients."""

import threading

import pytest
import torch

from model import in_threads, recompute
from model.in_threads import MOST, InThreads, on_cores, split
from model.losses import count_learned, score
from model.rl.critic import ActorCritic
from model.vlm import VLM
from tests import tiny

DOCUMENTS = [tiny.document(9, [2], 1), tiny.document(4, [], 2), tiny.document(17, [1, 8], 3), tiny.document(12, [], 4)]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(in_threads, "LEAST", 4)


def batch_of(documents: list[list[int]], images: str = "pixels") -> dict:
    batch = {**tiny.flat(documents), "ids": [f"row {k}" for k in range(len(documents))], "advantages": torch.ones(3)}
    count = sum(document.count(tiny.IMAGE) for document in documents) // tiny.IMAGE_TOKENS
    if count:
        batch["pixels"] = tiny.pictures(count, 5)
        if images == "features":
            batch["features"] = tiny.vlm().encoder(batch.pop("pixels")).detach()
    return batch


def logps_and_gradients(called: torch.nn.Module, model: VLM, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = score(called, batch).logps
    (-logps.sum() / count_learned(batch)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logps.detach(), gradients


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
@pytest.mark.parametrize("images", ["pixels", "features"])
def test_logits_and_gradients_are_those_of_the_model(threads, images):
    model = tiny.vlm(qk_norm=True).double()
    if images == "features":
        model.encoder.requires_grad_(False)
    batch = {name: value.double() if name in ("pixels", "features") else value
             for name, value in batch_of(DOCUMENTS, images).items()}  # fmt: skip
    logps, gradients = logps_and_gradients(model, model, batch)
    found, of_threads = logps_and_gradients(InThreads(model, threads), model, batch)
    assert torch.allclose(found, logps, atol=1e-12, rtol=0) and of_threads.keys() == gradients.keys()
    assert any(name.startswith("encoder") for name in gradients) == (images == "pixels")
    for name, gradient in gradients.items():
        assert torch.allclose(of_threads[name], gradient, atol=1e-12, rtol=0), name


def test_threads_compute_parts_of_equal_size_in_the_precision_of_the_run(monkeypatch):
    model, seen = tiny.vlm(), []
    main = threading.get_ident()
    model.llm.model.norm.register_forward_hook(
        lambda module, inputs, output: seen.append((threading.get_ident() == main, torch.is_autocast_enabled("cpu"),
                                                    len(output))))  # fmt: skip
    batch = batch_of(DOCUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        InThreads(model, 2)(batch, torch.ones_like(batch["input_ids"], dtype=torch.bool))
    assert sorted(seen) == [(False, True, 13), (False, True, 29)]
    assert InThreads(model, 64).parts == MOST
    seen.clear()
    monkeypatch.setattr(in_threads, "LEAST", 22)  # tokens of a part at least: 42 are too few for two
    InThreads(model, 2)(batch, torch.ones_like(batch["input_ids"], dtype=torch.bool))
    assert seen == [(True, False, 42)]


def test_the_same_bytes_come_again():
    model, batch = tiny.vlm(), batch_of(8 * DOCUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        first = logps_and_gradients(InThreads(model, 3), model, batch)[1]
        again = logps_and_gradients(InThreads(model, 3), model, batch)[1]
    assert all(torch.equal(gradient, again[name]) for name, gradient in first.items())


def test_parts_without_pictures_and_a_frozen_language_model_are_computed_too():
    model = tiny.vlm()
    model.llm.requires_grad_(False)
    batch = batch_of([DOCUMENTS[1], DOCUMENTS[3], DOCUMENTS[0]])
    gradients = logps_and_gradients(model, model, batch)[1]
    found = logps_and_gradients(InThreads(model, 3), model, batch)[1]
    assert found.keys() == gradients.keys() and not any(name.startswith("llm") for name in found)
    assert all(torch.allclose(found[name], gradients[name], atol=1e-6) for name in gradients)
    text = batch_of([DOCUMENTS[1], DOCUMENTS[3]])
    assert logps_and_gradients(InThreads(model, 2), model, text)[1] == {}
    with torch.no_grad():
        assert not score(InThreads(model, 2), text).logits.requires_grad


def test_a_part_holds_what_belongs_to_its_documents():
    batch = batch_of(DOCUMENTS)
    (first, keep), (second, _), (third, _) = split(batch, batch["labels"] > 0, 3, tiny.IMAGE, tiny.IMAGE_TOKENS)
    assert [part["ids"] for part in (first, second, third)] == [["row 0", "row 1"], ["row 2"], ["row 3"]]
    assert torch.equal(torch.cat([part["input_ids"] for part in (first, second, third)], 1), batch["input_ids"])
    assert torch.equal(torch.cat([first["pixels"], second["pixels"]]), batch["pixels"]) and len(first["pixels"]) == 1
    assert "pixels" not in third and "advantages" not in first and torch.equal(keep, first["labels"] > 0)


@pytest.mark.parametrize("change", [lambda batch: batch.update(pixels=batch["pixels"][1:]), lambda batch: batch.pop("pixels")])
def test_missing_pictures_are_told_as_ever(change):
    model, batch = tiny.vlm(), batch_of(DOCUMENTS)
    change(batch)
    with pytest.raises(ValueError, match="image placeholders"):
        score(InThreads(model, 2), batch)


def test_only_what_is_known_to_keep_nothing_between_calls_is_shared_out(monkeypatch):
    model = tiny.vlm()
    critic = ActorCritic(model)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert on_cores(model) is model
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert isinstance(on_cores(model), InThreads) and on_cores(critic) is critic
    model.llm.extra = type("Foreign", (torch.nn.Module,), {"__module__": "transformers.models"})()
    assert on_cores(model) is model


def test_activations_are_recomputed_in_threads():
    model, batch = tiny.vlm(), batch_of(DOCUMENTS)
    gradients = logps_and_gradients(model, model, batch)[1]
    recompute.apply(model)
    found = logps_and_gradients(InThreads(model, 2), model, batch)[1]
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in gradients.items())
