"""Connectors: which encoder tokens go into which token of the language model."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from model.connector.alike import Alike, between
from model.registry import CONNECTORS


def encoder(edge: int, has_cls: bool, dim: int = 3) -> SimpleNamespace:
    return SimpleNamespace(tokens=edge**2 + has_cls, dim=dim, has_cls=has_cls)


@pytest.mark.parametrize("has_cls", [False, True])
def test_pixel_shuffle_lays_the_patches_of_a_square_side_by_side(has_cls):
    connector = CONNECTORS.make("pixel_shuffle", encoder=encoder(6, has_cls), channels=12)
    assert connector.tokens == 9 and connector.proj.weight.shape == (12, 4 * 3)
    torch.nn.init.eye_(connector.proj.weight)  # what goes in comes out
    patches = torch.arange(36.0).view(1, 36, 1).expand(2, 36, 3)
    features = torch.cat([torch.full((2, int(has_cls), 3), -1.0), patches], dim=1)
    torch.nn.init.zeros_(connector.number.weight)
    squares = connector(features, torch.tensor([0, 0])).detach().view(2, 9, 4, 3)[0, :, :, 0]  # (9 squares, 4 patches)
    assert squares[0].tolist() == [0, 1, 6, 7] and squares[1].tolist() == [2, 3, 8, 9] and squares[8].tolist() == [28, 29, 34, 35]
    assert sorted(squares.flatten().tolist()) == list(range(36))  # every patch once, the class token never


def test_pixel_shuffle_of_side_one_is_the_linear_connector_without_the_class_token():
    shuffle = CONNECTORS.make("pixel_shuffle:side=1", encoder=encoder(4, True), channels=5)
    linear = CONNECTORS.make("linear", encoder=encoder(4, True), channels=5)
    linear.proj.load_state_dict(shuffle.proj.state_dict())
    torch.nn.init.zeros_(shuffle.number.weight)
    features, numbers = torch.randn(2, 17, 3), torch.tensor([0, 1])
    torch.testing.assert_close(shuffle(features, numbers), linear(features, numbers)[:, 1:])


def test_pixel_shuffle_marks_each_picture_with_its_number_and_those_past_the_last_alike():
    connector = CONNECTORS.make("pixel_shuffle:pictures=3", encoder=encoder(4, True), channels=5)
    features = torch.randn(1, 17, 3).expand(4, 17, 3)
    tokens = connector(features, torch.tensor([0, 1, 2, 7]))
    marks = tokens - tokens[:1]  # what the number alone changes
    torch.testing.assert_close(marks[:, 0], connector.number.weight[[0, 1, 2, 2]] - connector.number.weight[0])
    torch.testing.assert_close(marks, marks[:, :1].expand_as(marks))


def test_pixel_shuffle_sees_the_picture_before_in_the_same_conversation_alone():
    connector = CONNECTORS.make("pixel_shuffle", encoder=encoder(4, True), channels=5)
    features, numbers = torch.randn(5, 17, 3), torch.tensor([0, 1, 2, 0, 1])  # a conversation of three pictures, one of two
    plain = connector(features, numbers)  # it begins without
    torch.nn.init.normal_(connector.before.weight)
    seen = connector(features, numbers) - plain
    assert seen[0].abs().max() == 0 and seen[3].abs().max() == 0
    changed = features.clone()
    changed[1] += 1  # the middle one of the first conversation
    moved = (connector(changed, numbers) - connector(features, numbers)).abs().amax((1, 2))
    assert (moved > 0).tolist() == [False, True, True, False, False]


def test_pixel_shuffle_knows_where_a_picture_differs_from_the_one_before():
    connector = CONNECTORS.make("pixel_shuffle", encoder=encoder(4, False), channels=5)
    with torch.no_grad():
        connector.before.weight[:, 5:] = torch.eye(5)  # the distance alone
        connector.number.weight.zero_()
    features = torch.randn(1, 16, 3).repeat(2, 1, 1)
    features[1, 15] += 1  # a patch of the last square becomes another one
    first, second = connector(features, torch.tensor([0, 1]))
    seen = connector.proj(features.view(2, 2, 2, 2, 2, 3).transpose(2, 3).reshape(2, 4, 12))
    torch.testing.assert_close(first, seen[0])
    torch.testing.assert_close(second, seen[1] + (seen[1] - seen[0]).abs())
    assert ((second - seen[1]).abs().sum(1) > 0).tolist() == [False, False, False, True]


def alike(tokens: int, dim: int) -> Alike:
    """Compares what it is given as it is; tells the number in the first channel, with the picture before in the second."""
    made = Alike(nn.Linear(dim, dim, bias=False), tokens, channels=2)
    with torch.no_grad():
        made.look.weight.copy_(torch.eye(dim))
        made.here.weight[:, 0] = torch.arange(tokens + 1)
        made.both.weight[:, 1] = torch.arange(2 * tokens + 1)
    return made


def test_each_token_is_told_how_many_of_its_picture_look_alike():
    objects = torch.eye(3)  # three things that have nothing in common
    picture = objects[[0, 1, 0, 2, 0, 1]][None] * torch.rand(1, 6, 1).add(0.5)  # brighter or darker, the same
    numbers = alike(6, 3)(picture, torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(numbers[0, :, 0], torch.tensor([3.0, 2, 3, 1, 3, 2]), atol=1e-3, rtol=0)
    assert (numbers[..., 1] == 0).all()  # there is no picture before


def test_a_later_picture_is_told_how_many_there_are_with_the_one_before():
    objects = torch.eye(3)
    pictures = objects[torch.tensor([[0, 0, 1], [0, 1, 2], [0, 0, 0]])]
    numbers = alike(3, 3)(pictures, torch.tensor([1]))  # the third begins a conversation of its own
    torch.testing.assert_close(numbers[..., 0], torch.tensor([[2.0, 2, 1], [1, 1, 1], [3, 3, 3]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(numbers[..., 1], torch.tensor([[0.0, 0, 0], [3, 2, 1], [0, 0, 0]]), atol=1e-3, rtol=0)


def test_a_number_between_two_has_a_part_of_both_and_a_gradient():
    table, number = torch.tensor([[0.0, 0], [1, 10], [4, 20]]), torch.tensor([[1.25]], requires_grad=True)
    found = between(number, table)
    torch.testing.assert_close(found, torch.tensor([[[1.75, 12.5]]]))
    found.sum().backward()
    assert number.grad.item() == pytest.approx(13)  # 4 + 20 - 1 - 10


def test_counting_begins_silent_and_is_learned():
    connector = CONNECTORS.make("pixel_shuffle", encoder=encoder(4, False), channels=5)
    features, numbers = torch.randn(2, 16, 3), torch.tensor([0, 1])
    squares = features.view(2, 2, 2, 2, 2, 3).transpose(2, 3).reshape(2, 4, 12)
    assert not connector.alike(squares, torch.tensor([1])).any()
    connector(features, numbers).square().sum().backward()
    assert connector.alike.here.weight.grad.any() and connector.alike.both.weight.grad.any()


@pytest.mark.parametrize(("name", "patches"), [("linear", 1), ("pixel_shuffle", 4)])
def test_a_projection_begins_in_the_space_that_its_encoder_shares_with_text(name, patches):
    clip = encoder(4, True, dim=12)
    clip.shared_space = torch.randn(12, 3)
    weight = CONNECTORS.make(name, encoder=clip, channels=7).proj.weight.detach()  # (7, patches * 12)
    first, *others = weight.view(7, patches, 12).unbind(1)
    assert torch.linalg.matrix_rank(torch.cat([first, clip.shared_space.T])) == 3  # nothing outside of it is read
    assert all(torch.equal(first, other) for other in others)  # neighbours count alike
    plain = CONNECTORS.make(name, encoder=encoder(4, True, dim=12), channels=7).proj.weight.detach()
    assert weight.norm() == pytest.approx(plain.norm().item(), rel=0.3)


@pytest.mark.parametrize(("edge", "side"), [(7, 2), (6, 4), (6, 0)])
def test_a_side_that_does_not_divide_the_picture_is_refused(edge, side):
    with pytest.raises(ValueError, match=f"side={side} needs"):
        CONNECTORS.make(f"pixel_shuffle:side={side}", encoder=encoder(edge, True), channels=5)
