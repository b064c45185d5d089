"""The linear probe: it reads what is there, it does not read what is not, and its cells are those of the connector."""

import random
import re

import pytest
import torch
from PIL import Image

from dataset.studies import probe
from dataset.world import drawings, figures
from dataset.world.drawings import Drawing, Region
from model.connector.pixel_shuffle_compare import PixelShuffleCompare
from model.registry import ENCODERS


@pytest.fixture(scope="module")
def encoder():
    return ENCODERS.make("tiny_clip").eval()


def test_a_cell_has_the_features_that_the_connector_projects(encoder):
    picture = drawings.digits([1, 2, 3], random.Random(0))
    connector = PixelShuffleCompare(encoder, channels=4 * encoder.dim)
    with torch.no_grad():
        connector.proj.weight.copy_(torch.eye(4 * encoder.dim))
        shown = probe.pixels(probe.from_image(picture.image), encoder.size, encoder.mean, encoder.std, "square")
        connector.index.weight.zero_()
        expected = connector(encoder(shown[None]), torch.tensor([0]))
    torch.testing.assert_close(probe.cell_features(encoder, [picture]), expected)


def test_ridge_without_a_penalty_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    rows = torch.cat([inputs, torch.ones(60, 1)], dim=1).double()
    expected = torch.linalg.lstsq(rows, torch.eye(3, dtype=torch.double)[targets]).solution
    torch.testing.assert_close(probe.ridge(inputs, targets, 3, penalty=0.0).double(), expected, atol=1e-5, rtol=1e-4)


def test_labels_belong_to_the_cell_of_their_middle():
    regions = (Region((0, 0, 30, 30), "one", ""), Region((60, 30, 80, 50), "five", ""), Region((70, 70, 90, 90), "nine", ""))
    assert probe.by_cell(Drawing(Image.new("RGB", (96, 96)), "", "", regions)) == [(0, "one"), (5, "five"), (8, "nine")]
    board = drawings.board(["#@$   ", " .    ", *["      "] * 4], random.Random(0))
    found = [probe.by_quarter(board, quarter) for quarter in range(4)]
    assert [names[0] for names in found] == [(0, "wall"), (0, "player"), (0, "floor"), (0, "target")]
    assert found[0][1] == (1, "box") and all(len(names) == 9 for names in found)


def test_a_number_is_read_digit_by_digit():
    picture = figures.right_triangle([7, 24], random.Random(0))
    assert sorted(name for _, name in probe.digit(picture, 0)) == ["-", "2"]
    assert sorted(name for _, name in probe.digit(picture, 1)) == ["4", "7"]


def test_every_label_that_a_problem_needs_is_readable(encoder):
    """The floor is below the table's 97 %, because a test fits on a fifth of its drawings."""
    for name in ("sides of L shapes", "dice"):
        reading = probe.probe(encoder, probe.SOURCES[name], n=400)
        assert reading.right >= 0.97 and reading.commonest < 0.25, (name, reading)


def test_what_is_not_in_the_picture_is_not_read(encoder):
    def hidden(rng):
        return Drawing(Image.new("RGB", (96, 96), (240, 240, 240)), "", "", (Region((0, 0, 9, 9), str(rng.randint(0, 9)), ""),))

    assert probe.probe(encoder, (hidden, probe.by_cell), n=200).right < 0.25


def test_the_command_prints_a_row_for_each_kind_of_drawing(capsys):
    probe.main(probe.Config(only=("dice",), drawings=80))
    *_, row = capsys.readouterr().out.splitlines()
    right, commonest = re.fullmatch(r"\| dice \| ([\d.]+)% \| \d+ \| \d+ \| ([\d.]+)% \|", row).groups()
    assert float(right) > 2 * float(commonest)
    with pytest.raises(ValueError, match="unknown drawing 'cubes'; known: .*dice"):
        probe.main(probe.Config(only=("cubes",)))
