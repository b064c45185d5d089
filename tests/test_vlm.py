"""Images land where their placeholders are, in packed and in padded batches, and mismatches are named."""

import pytest
import torch

from model.losses import score
from model.vlm import count_parameters
from tests import tiny

# Four documents: no image, one, two adjacent (no token between them), two apart with one of them at the very end.
DOCUMENTS = [
    tiny.document(9, [], seed=1),
    tiny.document(14, [2], seed=2),
    tiny.document(20, [1, 6], seed=3),
    tiny.document(17, [0, 12], seed=4),
]
IMAGES = [0, 1, 2, 2]  # per document
PIXELS = tiny.pictures(sum(IMAGES), seed=5)


def loss_of(model, batch):
    return -score(model, batch).logps.sum()


def test_where_only_the_connector_is_trained_a_text_has_a_backward_pass_and_gives_no_gradient():
    model = tiny.vlm()
    for part in (model.llm, model.encoder):
        part.requires_grad_(False)
    batch = tiny.flat(DOCUMENTS[:1])
    loss_of(model, batch).backward()
    assert all(weight.grad is None for weight in model.parameters())
    with torch.no_grad():
        assert not loss_of(model, batch).requires_grad


def test_packed_equals_padded_in_logits():
    model = tiny.vlm()
    padded, packed = ({**make(DOCUMENTS), "pixels": PIXELS} for make in (tiny.padded, tiny.flat))
    expected = model(padded, tiny.everywhere(padded))
    assert expected.std() > 0.1
    torch.testing.assert_close(model(packed, tiny.everywhere(packed)), expected, atol=1e-5, rtol=0)


def test_packed_equals_padded_in_every_gradient():
    model = tiny.vlm()
    gradients = []
    for make in (tiny.padded, tiny.flat):
        model.zero_grad()
        loss_of(model, {**make(DOCUMENTS), "pixels": PIXELS}).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    padded, packed = gradients
    # CLIP's final norm and projection serve embed() alone; everything else must have learned something.
    assert {name for name, grad in packed.items() if grad is None} == {
        "encoder.proj", "encoder.ln_post.weight", "encoder.ln_post.bias",
    }  # fmt: skip
    for name, gradient in packed.items():
        if gradient is not None:
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(gradient, padded[name], atol=1e-4, rtol=1e-4, msg=name)


def test_packed_documents_equal_each_document_alone():
    model = tiny.vlm()
    packed = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    together = model(packed, tiny.everywhere(packed)).split([len(ids) for ids in DOCUMENTS])
    for ids, pixels, logits in zip(DOCUMENTS, PIXELS.split(IMAGES), together, strict=True):
        alone = {**tiny.flat([ids])} | ({"pixels": pixels} if len(pixels) else {})
        torch.testing.assert_close(model(alone, tiny.everywhere(alone)), logits, atol=1e-5, rtol=0)


def test_another_picture_moves_its_own_document_alone_and_only_from_its_place_on():
    model = tiny.vlm()
    packed = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    changed = PIXELS.clone()
    changed[2] += 1.0  # the second of the two adjacent pictures of the third document, which begins at 9 + 14 + 6
    keep = tiny.everywhere(packed)
    moved = (model({**packed, "pixels": changed}, keep) - model(packed, keep)).abs().amax(-1)
    assert moved[:29].max() == 0 and moved[29:43].min() > 0 and moved[43:].max() == 0


def test_each_placeholder_is_replaced_by_its_own_image_token():
    model = tiny.vlm()
    seen = []
    model.llm.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    packed = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    model(packed, tiny.everywhere(packed))
    is_image = packed["input_ids"][0] == tiny.IMAGE
    tokens = model.connector(model.encoder(PIXELS), torch.zeros(len(PIXELS), dtype=torch.long)).flatten(0, 1)
    torch.testing.assert_close(seen[0][is_image], tokens)
    torch.testing.assert_close(seen[0][~is_image], model.llm.embed(packed["input_ids"][0][~is_image]))


def test_the_connector_gets_the_index_of_each_picture_in_its_conversation():
    model = tiny.vlm()
    seen = []
    model.connector.register_forward_pre_hook(lambda module, args: seen.append(args[1].tolist()))
    for rows in (tiny.flat(DOCUMENTS), tiny.padded(DOCUMENTS)):
        model({**rows, "pixels": PIXELS}, tiny.everywhere(rows))
    assert seen == [[0, 0, 1, 0, 1]] * 2


def test_logits_come_only_where_they_are_asked_for_in_row_order():
    model = tiny.vlm()
    rows = {**tiny.padded(DOCUMENTS), "pixels": PIXELS}
    real = tiny.everywhere(rows)
    keep = real & (torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    torch.testing.assert_close(model(rows, keep), model(rows, real)[keep[real]], atol=1e-5, rtol=0)


def test_cached_features_give_the_same_logits_without_the_encoder():
    model = tiny.vlm()
    packed = tiny.flat(DOCUMENTS)
    keep = tiny.everywhere(packed)
    expected = model({**packed, "pixels": PIXELS}, keep)
    features = model.encoder(PIXELS)
    model.encoder.forward = None  # calling it would raise
    torch.testing.assert_close(model({**packed, "features": features}, keep), expected)


def test_text_alone_touches_neither_encoder_nor_connector():
    model = tiny.vlm()
    packed = tiny.flat([DOCUMENTS[0], tiny.document(6, [], seed=9)])
    model.encoder.forward = model.connector.forward = None  # calling them would raise
    assert model(packed, tiny.everywhere(packed)).shape == (15, 50)


def test_a_frozen_encoder_gets_no_gradient_and_stores_no_activations():
    model = tiny.vlm()
    model.encoder.requires_grad_(False)
    assert not model.image_features({"pixels": PIXELS.requires_grad_()}).requires_grad
    loss_of(model, {**tiny.flat(DOCUMENTS), "pixels": PIXELS.detach()}).backward()
    assert all(weight.grad is None for weight in model.encoder.parameters())
    assert model.connector.proj.weight.grad.abs().max() > 0


def test_an_encoder_with_one_trained_block_still_learns():
    model = tiny.vlm()
    model.encoder.requires_grad_(False)
    model.encoder.blocks[-1].requires_grad_(True)
    loss_of(model, {**tiny.flat(DOCUMENTS), "pixels": PIXELS}).backward()
    assert model.encoder.blocks[-1].mlp.c_fc.weight.grad.abs().max() > 0
    assert model.encoder.blocks[0].mlp.c_fc.weight.grad is None


@pytest.mark.parametrize("images", [4, 6])
def test_a_missing_or_extra_image_is_an_error_that_counts_both_and_names_the_samples(images):
    model = tiny.vlm()
    batch = {**tiny.flat(DOCUMENTS), "pixels": tiny.pictures(images, seed=0), "ids": ["cat", "dog", "cow", "bee"]}
    with pytest.raises(ValueError, match=rf"25 image placeholders, but {images} image.*cow: 10, bee: 10"):
        model(batch, tiny.everywhere(batch))


def test_a_broken_image_span_names_its_sample_alone():
    model = tiny.vlm()
    documents = [DOCUMENTS[1], DOCUMENTS[2][:9], DOCUMENTS[0]]  # truncation cut the second picture: 5 + 3 placeholders
    batch = {**tiny.flat(documents), "pixels": PIXELS[:3], "ids": ["whole", "broken.jpg", "text"]}
    with pytest.raises(ValueError, match=r"Placeholders in broken.jpg: 8\."):
        model(batch, tiny.everywhere(batch))


def test_spans_that_are_broken_but_add_up_are_an_error_too():
    model = tiny.vlm()
    shifted = [[tiny.IMAGE] * 4 + [7], [8] + [tiny.IMAGE] * 6]  # 4 + 6 = two images, each partly in the wrong document
    batch = {**tiny.flat(shifted), "pixels": PIXELS[:2]}
    with pytest.raises(ValueError, match="document 0: 4, document 1: 6"):
        model(batch, tiny.everywhere(batch))


def test_placeholders_without_any_image_are_an_error():
    model = tiny.vlm()
    batch = tiny.flat(DOCUMENTS)
    with pytest.raises(ValueError, match="25 image placeholders, but 0 image"):
        model(batch, tiny.everywhere(batch))


def test_images_without_any_placeholder_are_an_error():
    model = tiny.vlm()
    batch = {**tiny.flat([DOCUMENTS[0]]), "pixels": PIXELS[:1]}
    with pytest.raises(ValueError, match="0 image placeholders, but 1 image"):
        model(batch, tiny.everywhere(batch))


def test_bf16_autocast_stays_near_fp32_in_loss_and_gradient():
    model = tiny.vlm(qk_norm=True)
    batch = {**tiny.flat(DOCUMENTS), "pixels": PIXELS}
    exact = loss_of(model, batch)
    (expected,) = torch.autograd.grad(exact, [model.connector.proj.weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
    (gradient,) = torch.autograd.grad(loss, [model.connector.proj.weight])
    assert abs(loss - exact) < 0.02 * exact
    assert (gradient - expected).norm() < 0.1 * expected.norm()


def test_parts_hold_every_parameter_once():
    model = tiny.vlm()
    assert set(model.parts) == {"encoder", "connector", "llm"}
    assert count_parameters(*model.parts.values()) == count_parameters(model) == count_parameters(model, model.llm)
    assert len(set(model.state_dict())) == len({value.data_ptr() for value in model.state_dict().values()})
