"""Connectors: which encoder tokens go into which token of the language model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model.connector.similarity_count import SimilarityCount, lerp
from model.registry import CONNECTORS


def encoder(edge: int, has_cls: bool, dim: int = 3) -> SimpleNamespace:
    return SimpleNamespace(tokens=edge**2 + has_cls, dim=dim, has_cls=has_cls)


def plain(connector: nn.Module) -> nn.Module:
    """pixel_shuffle_compare without what its tokens say of the image's index."""
    nn.init.zeros_(connector.index.weight)
    return connector


SHUFFLES = ("pixel_shuffle", "pixel_shuffle_compare")


# ---------------------------------------------------------------- pixel shuffle


@pytest.mark.parametrize("side", [1, 2, 3])
@torch.no_grad()
def test_pixel_shuffle_is_that_of_smolvlm_and_idefics3(side):
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

    vision, text = SimpleNamespace(hidden_size=5), SimpleNamespace(hidden_size=7)
    config = SimpleNamespace(scale_factor=side, vision_config=vision, text_config=text)
    features, index = torch.randn(3, 36, 5), torch.tensor([0, 1, 0])
    for theirs in (Idefics3Connector(config), SmolVLMConnector(config)):
        ours = CONNECTORS.make(f"pixel_shuffle:side={side}", encoder=encoder(6, False, dim=5), channels=7)
        ours.load_state_dict(theirs.modality_projection.state_dict())  # one matrix, called proj, and nothing else
        assert torch.equal(ours.squares(features), theirs.pixel_shuffle(features, side))
        assert torch.equal(ours(features, index), theirs(features))
        assert ours(features, index).shape == (3, ours.tokens, 7)
        with_cls = CONNECTORS.make(f"pixel_shuffle:side={side}", encoder=encoder(6, True, dim=5), channels=7)
        with_cls.load_state_dict(theirs.modality_projection.state_dict())
        tokens = torch.cat([torch.randn(3, 1, 5), features], dim=1)
        assert torch.equal(with_cls.squares(tokens), theirs.pixel_shuffle(features, side))
        torch.testing.assert_close(with_cls(tokens, index), theirs(features))


@pytest.mark.parametrize("has_cls", [False, True])
@pytest.mark.parametrize("name", SHUFFLES)
def test_pixel_shuffle_lays_the_patches_of_a_square_side_by_side(name, has_cls):
    connector = CONNECTORS.make(name, encoder=encoder(6, has_cls), channels=12)
    assert connector.tokens == 9 and connector.proj.weight.shape == (12, 4 * 3)
    if name == "pixel_shuffle_compare":
        plain(connector)
    nn.init.eye_(connector.proj.weight)  # what goes in comes out
    patches = torch.arange(36.0).view(1, 36, 1).expand(2, 36, 3)
    features = torch.cat([torch.full((2, int(has_cls), 3), -1.0), patches], dim=1)
    squares = connector(features, torch.tensor([0, 0])).detach().view(2, 9, 4, 3)[0, :, :, 0]  # (9 squares, 4 patches)
    assert squares[0].tolist() == [0, 1, 6, 7] and squares[1].tolist() == [2, 3, 8, 9] and squares[8].tolist() == [28, 29, 34, 35]
    assert sorted(squares.flatten().tolist()) == list(range(36))  # every patch once, the class token never


@pytest.mark.parametrize("name", SHUFFLES)
def test_pixel_shuffle_of_side_one_is_the_linear_connector_without_the_class_token(name):
    shuffle = CONNECTORS.make(f"{name}:side=1", encoder=encoder(4, True), channels=5)
    if name == "pixel_shuffle_compare":
        plain(shuffle)
    linear = CONNECTORS.make("linear", encoder=encoder(4, True), channels=5)
    linear.proj.load_state_dict(shuffle.proj.state_dict())
    features, index = torch.randn(2, 17, 3), torch.tensor([0, 1])
    torch.testing.assert_close(shuffle(features, index), linear(features, index)[:, 1:])


@pytest.mark.parametrize("name", ["linear", "pixel_shuffle"])
def test_a_plain_connector_says_the_same_of_a_picture_wherever_it_stands(name):
    connector = CONNECTORS.make(name, encoder=encoder(4, False), channels=5)
    assert [name for name, _ in connector.named_parameters()] == ["proj.weight"] and connector.proj.bias is None
    features = torch.randn(3, 16, 3)
    together = connector(features, torch.tensor([0, 1, 2]))
    for number, picture in enumerate(features):
        torch.testing.assert_close(connector(picture[None], torch.tensor([0]))[0], together[number])


@pytest.mark.parametrize(("name", "patches"), [("linear", 1), *((name, 4) for name in SHUFFLES)])
def test_a_projection_begins_in_the_space_that_its_encoder_shares_with_text(name, patches):
    clip = encoder(4, True, dim=12)
    clip.shared_space = torch.randn(12, 3)
    connector = CONNECTORS.make(name, encoder=clip, channels=7)
    random = CONNECTORS.make(name, encoder=encoder(4, True, dim=12), channels=7).proj.weight.detach()
    compared = [connector.similarity_count.proj] if name == "pixel_shuffle_compare" else []
    for proj in (connector.proj, *compared):
        weight = proj.weight.detach()  # (7, patches * 12)
        first, *others = weight.view(7, patches, 12).unbind(1)
        assert torch.linalg.matrix_rank(torch.cat([first, clip.shared_space.T])) == 3  # nothing outside of it is read
        assert all(torch.equal(first, other) for other in others)  # neighbours count alike
        assert weight.norm() == pytest.approx(random.norm().item(), rel=0.3)


@pytest.mark.parametrize("name", SHUFFLES)
@pytest.mark.parametrize(("edge", "side"), [(7, 2), (6, 4), (6, 0)])
def test_a_side_that_does_not_divide_the_picture_is_refused(name, edge, side):
    with pytest.raises(ValueError, match=f"side={side} needs"):
        CONNECTORS.make(f"{name}:side={side}", encoder=encoder(edge, True), channels=5)


# ---------------------------------------------------------------- pixel shuffle that compares


def test_it_begins_as_pixel_shuffle_with_the_index_of_the_image_added():
    ours = CONNECTORS.make("pixel_shuffle_compare", encoder=encoder(4, True), channels=5)
    shuffle = CONNECTORS.make("pixel_shuffle", encoder=encoder(4, True), channels=5)
    shuffle.proj.load_state_dict(ours.proj.state_dict())
    features, index = torch.randn(3, 17, 3), torch.tensor([0, 1, 2])
    torch.testing.assert_close(ours(features, index), shuffle(features, index) + ours.index.weight[:3, None])


def test_it_marks_each_image_with_its_index_and_those_past_the_last_alike():
    connector = CONNECTORS.make("pixel_shuffle_compare:images=3", encoder=encoder(4, True), channels=5)
    features = torch.randn(1, 17, 3).expand(4, 17, 3)
    tokens = connector(features, torch.tensor([0, 1, 2, 7]))
    marks = tokens - tokens[:1]  # what the index alone changes
    torch.testing.assert_close(marks[:, 0], connector.index.weight[[0, 1, 2, 2]] - connector.index.weight[0])
    torch.testing.assert_close(marks, marks[:, :1].expand_as(marks))


def test_it_sees_the_image_before_in_the_same_conversation_alone():
    connector = CONNECTORS.make("pixel_shuffle_compare", encoder=encoder(4, True), channels=5)
    features, index = torch.randn(5, 17, 3), torch.tensor([0, 1, 2, 0, 1])  # a conversation of three pictures, one of two
    without = connector(features, index)  # as it begins
    nn.init.normal_(connector.difference.weight)
    seen = connector(features, index) - without
    assert seen[0].abs().max() == 0 and seen[3].abs().max() == 0
    changed = features.clone()
    changed[1] += 1  # the middle one of the first conversation
    moved = (connector(changed, index) - connector(features, index)).abs().amax((1, 2))
    assert (moved > 0).tolist() == [False, True, True, False, False]


def test_it_knows_where_an_image_differs_from_the_one_before():
    connector = plain(CONNECTORS.make("pixel_shuffle_compare", encoder=encoder(4, False), channels=5))
    with torch.no_grad():
        connector.difference.weight[:, 5:] = torch.eye(5)  # the distance alone
    features = torch.randn(1, 16, 3).repeat(2, 1, 1)
    features[1, 15] += 1  # a patch of the last square becomes another one
    first, second = connector(features, torch.tensor([0, 1]))
    seen = connector.proj(features.view(2, 2, 2, 2, 2, 3).transpose(2, 3).reshape(2, 4, 12))
    torch.testing.assert_close(first, seen[0])
    torch.testing.assert_close(second, seen[1] + (seen[1] - seen[0]).abs())
    assert ((second - seen[1]).abs().sum(1) > 0).tolist() == [False, False, False, True]


def similarity_count(tokens: int, dim: int) -> SimilarityCount:
    """Compares its input as it is; the first channel is the count in the image, the second that with the image before."""
    counting = SimilarityCount(nn.Linear(dim, dim, bias=False), tokens, channels=2)
    with torch.no_grad():
        counting.proj.weight.copy_(torch.eye(dim))
        counting.one.weight[:, 0] = torch.arange(tokens + 1)
        counting.both.weight[:, 1] = torch.arange(2 * tokens + 1)
    return counting


def test_each_token_gets_the_number_of_similar_tokens_in_its_image():
    objects = torch.eye(3)  # three objects that have nothing in common
    picture = objects[[0, 1, 0, 2, 0, 1]][None] * torch.rand(1, 6, 1).add(0.5)  # brighter or darker, the same
    counts = similarity_count(6, 3)(picture, torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(counts[0, :, 0], torch.tensor([3.0, 2, 3, 1, 3, 2]), atol=1e-3, rtol=0)
    assert (counts[..., 1] == 0).all()  # there is no image before


def test_a_later_image_gets_the_number_together_with_the_image_before():
    objects = torch.eye(3)
    pictures = objects[torch.tensor([[0, 0, 1], [0, 1, 2], [0, 0, 0]])]
    counts = similarity_count(3, 3)(pictures, torch.tensor([1]))  # the third begins a conversation of its own
    torch.testing.assert_close(counts[..., 0], torch.tensor([[2.0, 2, 1], [1, 1, 1], [3, 3, 3]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(counts[..., 1], torch.tensor([[0.0, 0, 0], [3, 2, 1], [0, 0, 0]]), atol=1e-3, rtol=0)


def test_a_number_between_two_rows_has_a_part_of_both_and_a_gradient():
    table, number = torch.tensor([[0.0, 0], [1, 10], [4, 20]]), torch.tensor([[1.25]], requires_grad=True)
    between = lerp(number, table)
    torch.testing.assert_close(between, torch.tensor([[[1.75, 12.5]]]))
    between.sum().backward()
    assert number.grad.item() == pytest.approx(13)  # 4 + 20 - 1 - 10


def test_counting_begins_silent_and_is_learned():
    connector = CONNECTORS.make("pixel_shuffle_compare", encoder=encoder(4, False), channels=5)
    features, index = torch.randn(2, 16, 3), torch.tensor([0, 1])
    squares = features.view(2, 2, 2, 2, 2, 3).transpose(2, 3).reshape(2, 4, 12)
    assert not connector.similarity_count(squares, torch.tensor([1])).any()
    connector(features, index).square().sum().backward()
    assert connector.similarity_count.one.weight.grad.any() and connector.similarity_count.both.weight.grad.any()
