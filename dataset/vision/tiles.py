"""Tiles: a large picture is seen several times, the whole of it small and then its parts, each as large as the encoder sees.

In:  a picture of any size.  Out: `tiles(picture)`, what the model sees of it: the picture alone, or its thumbnail and the tiles
of a grid in reading order, pictures again, each size x size and with a key of its own for the feature cache.

    280 x 100, an encoder of 96 x 96, --tiles 6       thumbnail, then tiles of 96 x 96
       +-----------+                                  +-----+   +---+---+---+
       |           |                                  |     |   | 1 | 2 | 3 |
       +-----------+                                  +-----+   +---+---+---+

In the text they are one picture: its number stands once, then the placeholders of all its tiles. The model counts tiles (the
`image_index` of a connector), so that the place of a tile can be told by its number, and the shape of the grid by the thumbnail.
Source: any-resolution of LLaVA-NeXT and LLaVA-OneVision (arXiv 2408.03326); the grid whose shape is nearest to the picture's as
in InternVL 1.5 (arXiv 2404.16821), which has the thumbnail last.
"""
from __future__ import annotations

from PIL import Image

from dataset.images import Picture, padded


def grid(width: int, height: int, size: int, most: int) -> tuple[int, int]:
    """(columns, rows) of the tiles of a picture; (1, 1) where it stays one.

    Of all grids of at most `most` tiles the one whose shape is nearest to the picture's, of equals the largest. A column (or a
    row) that the picture would not fill half with its own pixels only enlarges, and is left out.
    """
    columns, rows = (max(1, (2 * side + size) // (2 * size)) for side in (width, height))  # side / size, rounded
    grids = [(c, r) for c in range(1, columns + 1) for r in range(1, rows + 1) if c * r <= max(1, most)]

    def stretch(shape: tuple[int, int]) -> float:
        """How many times more one side is squeezed than the other."""
        across, down = width * shape[1], height * shape[0]
        return max(across, down) / min(across, down)

    return min(grids, key=lambda shape: (stretch(shape), -shape[0] * shape[1]))


def cut(image: Image.Image, columns: int, rows: int, size: int, mean: tuple, fit: str) -> list[Image.Image]:
    """The thumbnail and the tiles of an RGB image, each size x size.

    All of the image is in both: with bands where `fit` is pad, else squeezed. The middle square alone, which `square` takes of
    a picture without tiles, would leave out what tiles are for.
    """
    def fitted(width: int, height: int) -> Image.Image:
        return padded(image, (width, height), mean) if fit == "pad" else image.resize((width, height), Image.Resampling.BICUBIC)

    canvas = fitted(columns * size, rows * size)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    return [fitted(size, size), *(canvas.crop((left, top, left + size, top + size)) for left, top in corners)]


class Tiles:
    """What an encoder for size x size pixels sees of a picture: `tiles(picture)`, itself or its thumbnail and tiles.

    most   the most tiles of one picture; 0: none
    A picture's size is read once, from its header where it is a file; BadRow where it does not open.
    """

    def __init__(self, size: int, mean: tuple, fit: str, most: int):
        self.size, self.mean, self.fit, self.most = size, mean, fit, most
        self.grids: dict[str, tuple[int, int]] = {}  # by a picture's key
        self.last: tuple[str, list[Image.Image]] = "", []  # the tiles of one picture are asked for one after another

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
                           picture.held)

        return tuple(tile(k) for k in range(1 + columns * rows))

    def cut(self, picture: Picture, key: str, columns: int, rows: int) -> list[Image.Image]:
        """Thumbnail and tiles; the picture is opened once for all of them."""
        known, images = self.last
        if known != key:
            images = cut(picture.load(), columns, rows, self.size, self.mean, self.fit)
            self.last = key, images  # in one assignment: two threads may look at different pictures
        return images
