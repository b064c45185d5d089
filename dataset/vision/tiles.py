"""Tiles: a large picture is encoded as a thumbnail and as parts, each at the encoder's full resolution.

In:  a picture of any size.  Out: `tiles(picture)`: the picture itself, or its thumbnail and the tiles of a grid in reading order.
Tiles are pictures again, each size x size and with its own key for the feature cache.

    280 x 100, an encoder of 96 x 96, --tiles 6       thumbnail, then tiles of 96 x 96
       +-----------+                                  +-----+   +---+---+---+
       |           |                                  |     |   | 1 | 2 | 3 |
       +-----------+                                  +-----+   +---+---+---+

In the text they are one picture: its number stands once, then the placeholders of all its tiles. The model counts tiles (the
`image_index` of a connector), so the number of a tile tells its place, and the thumbnail tells the shape of the grid.
Source: any-resolution of LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326). As in InternVL 1.5 (arXiv 2404.16821) the grid has
the shape nearest to the picture's; InternVL puts the thumbnail last.
"""
from __future__ import annotations

from PIL import Image

from dataset.images import Picture, padded


def grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the tiles of a picture; (1, 1) where it is not cut.

    Of all grids with at most `most` tiles it is the one whose shape is nearest to the picture's; among equals the largest. A
    column or row that the picture would fill less than half with its own pixels would only enlarge it, and is left out.
    """
    columns, rows = (max(1, (2 * side + size) // (2 * size)) for side in (width, height))  # side / size, rounded
    grids = [(c, r) for c in range(1, columns + 1) for r in range(1, rows + 1) if c * r <= max(1, most)]

    def stretch(shape: tuple[int, int]) -> float:
        """The ratio by which one side is squeezed more than the other, at least 1."""
        across, down = width * shape[1], height * shape[0]
        return max(across, down) / min(across, down)

    return min(grids, key=lambda shape: (stretch(shape), -shape[0] * shape[1]))


def cut(image: Image.Image, shape: tuple[int, int], size: int, mean: tuple, fit: str) -> list[Image.Image]:
    """The thumbnail and the tiles of an RGB image, each size x size.

    Both show the full image: with bands where `fit` is pad, else squeezed. The middle square, which `square` takes of a picture
    without tiles, would leave out what tiles are for.
    """
    def fitted(width: int, height: int) -> Image.Image:
        return padded(image, (width, height), mean) if fit == "pad" else image.resize((width, height), Image.Resampling.BICUBIC)

    columns, rows = shape
    canvas = fitted(columns * size, rows * size)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    return [fitted(size, size), *(canvas.crop((left, top, left + size, top + size)) for left, top in corners)]


class Tiles:
    """The pictures that an encoder for size x size pixels gets: `tiles(picture)`, itself or its thumbnail and tiles.

    most   the most tiles of one picture; 0: none
    A picture's size is read once, from the header of a file; BadRow where it does not open.
    """

    def __init__(self, size: int, mean: tuple, fit: str, most: int):
        self.size, self.mean, self.fit, self.most = size, mean, fit, most
        self.grids: dict[str, tuple[int, int]] = {}  # by a picture's key
        self.last: tuple[str, list[Image.Image]] = "", []  # tiles of the last picture: they are loaded one after another

    def __call__(self, picture: Picture) -> tuple[Picture, ...]:
        if not self.most:
            return (picture,)
        if picture.key not in self.grids:
            self.grids[picture.key] = grid(*picture.size, self.size, self.most)
        columns, rows = self.grids[picture.key]
        if columns * rows == 1:
            return (picture,)
        key = f"{picture.key}#{columns}x{rows}"

        def tile(k: int) -> Picture:
            return Picture(f"{key}/{k}", lambda: self.cut(picture, key, columns, rows)[k], lambda: (self.size, self.size),
                           picture.memory_bytes)

        return tuple(tile(k) for k in range(1 + columns * rows))

    def cut(self, picture: Picture, key: str, columns: int, rows: int) -> list[Image.Image]:
        """Thumbnail and tiles. The picture is opened once for all of them."""
        key_of_last, images = self.last
        if key_of_last != key:
            images = cut(picture.at_least(2 * self.size * max(columns, rows)), (columns, rows), self.size, self.mean, self.fit)
            self.last = key, images  # in one assignment, because two threads may load different pictures
        return images
