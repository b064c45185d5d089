"""Pictures: every kind of file becomes a right RGB square, and every broken one says why."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dataset import images
from dataset.bad_rows import BadRow
from dataset.images import Picture, from_bytes, from_file, from_image, levels, pixels, resized
from dataset.vision.decoding import open_rgb, to_rgb

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """The smallest PNG that claims to be so large."""
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("mode", "kind", "colour", "expected"), [
    ("1", "PNG", 1, (255, 255, 255)),
    ("L", "PNG", 100, (100, 100, 100)),
    ("LA", "PNG", (100, 0), (255, 255, 255)),
    ("P", "PNG", 3, None),
    ("RGB", "PNG", (10, 20, 30), (10, 20, 30)),
    ("RGBA", "PNG", (10, 20, 30, 0), (255, 255, 255)),
    ("RGBA", "PNG", (0, 0, 0, 128), (127, 127, 127)),
    ("I;16", "PNG", 0x8000, (128, 128, 128)),
    ("I;16", "TIFF", 0xFFFF, (255, 255, 255)),
    ("CMYK", "TIFF", (0, 0, 0, 255), (0, 0, 0)),
    ("F", "TIFF", 77.0, (77, 77, 77)),
])  # fmt: skip
def test_every_mode_becomes_rgb(mode, kind, colour, expected):
    image = open_rgb(saved(Image.new(mode, (5, 4), colour), kind))
    assert image.mode == "RGB"
    assert image.size == (5, 4)
    assert expected is None or image.getpixel((2, 2)) == expected


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0, 0, 200, 0])
    assert open_rgb(saved(image, "PNG", transparency=0)).getpixel((1, 1)) == (255, 255, 255)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_rgb(data).getpixel((3, 3)) == (255, 0, 0)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "white")
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned: 8 x 4 as stored is 4 x 8 as seen
    assert open_rgb(saved(image, "PNG", exif=exif)).size == (4, 8)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_by_the_header_is_that_of_the_picture_however_the_camera_was_turned(kind):
    for orientation in range(1, 9):
        image = gradient(9, 5)
        exif = image.getexif()
        exif[0x0112] = orientation
        data = saved(image, kind, exif=exif)
        assert from_bytes(data).size == open_rgb(data).size == ((9, 5) if orientation < 5 else (5, 9))


def test_a_png_is_not_unpacked_for_its_size_unless_its_exif_may_turn_it(tmp_path):
    data = saved(gradient(90, 50), "PNG")
    half = data[:len(data) // 2]
    (tmp_path / "cut.png").write_bytes(half)
    assert from_file(tmp_path / "cut.png").size == from_bytes(half).size == (90, 50)
    with pytest.raises(BadRow, match="(?i)truncated"):
        from_bytes(half).load()
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    late = data[:-12] + chunk + data[-12:]  # behind the pixels, before IEND
    assert from_bytes(late).size == open_rgb(late).size == (50, 90)


def test_a_picture_that_no_header_describes_is_measured_by_opening_it():
    assert Picture("drawn", lambda: gradient(7, 3)).size == from_image(gradient(7, 3)).size == (7, 3)


@pytest.mark.parametrize(("data", "reason"), [
    (b"not an image at all", "cannot identify"),
    (b"", "cannot identify"),
    (saved(gradient(8, 8), "EPS"), "cannot identify"),  # of which PIL would start another program to draw it
    (saved(gradient(64, 64), "JPEG")[:-100], "truncated"),
    (saved(gradient(64, 64), "PNG")[:100], "(?i)truncated"),
    (png_header(60_000, 60_000), "pixels"),
    (png_header(9_000, 9_000), "pixels"),
])  # fmt: skip
def test_a_broken_image_is_a_bad_row(data, reason):
    with pytest.raises(BadRow, match=reason) as caught:
        from_bytes(data).load()
    assert caught.value.remedy


def test_damage_anywhere_is_a_bad_row_or_an_image():
    whole, random = bytearray(saved(gradient(40, 30), "JPEG")), np.random.default_rng(0)
    for _ in range(200):
        damaged = whole.copy()
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(256)
        try:
            assert open_rgb(bytes(damaged)).mode == "RGB"
        except BadRow:
            continue


def test_the_key_follows_the_content(tmp_path):
    path = tmp_path / "a.png"
    gradient(8, 8).save(path)
    before = from_file(path)
    gradient(9, 9).save(path)
    assert before != from_file(path)
    assert from_bytes(b"a") != from_bytes(b"b")
    assert from_image(gradient(8, 8)) == from_image(gradient(8, 8)) != from_image(gradient(8, 9))


def test_a_picture_is_opened_only_when_asked():
    Picture("never", lambda: pytest.fail("opened"))
    from_bytes(b"not an image")


@pytest.mark.parametrize("size", [(64, 64), (97, 64), (61, 200), (33, 31), (20, 300)])
def test_square_equals_resize_and_centre_crop(size):
    image = gradient(*size)
    width, height = (int(32 * side / min(size)) for side in size)  # torchvision.transforms.Resize, then CenterCrop
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    reference = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    reference = (np.asarray(reference, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    difference = (pixels(from_image(image), 32, MEAN, STD) - torch.from_numpy(reference).permute(2, 0, 1)).abs()
    assert difference.max() < 0.016  # one level of 255, where rounding falls on the other side
    assert difference.mean() < 1e-3


@pytest.mark.parametrize("size", [(640, 480), (300, 450), (97, 65), (64, 64)])
def test_pil_and_torch_shrink_a_picture_to_the_same_levels(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))
    by_torch = images.shrunk_middle(image, 32).int()
    by_pil = torch.from_numpy(np.array(resized(image, 32, MEAN, "square"))).permute(2, 0, 1).int()
    assert by_torch.float().std() > 2
    assert (by_torch - by_pil).abs().max() <= 1
    assert (by_torch != by_pil).float().mean() < 0.02


def test_torch_shrinks_only_pictures_that_are_larger_than_the_square_and_no_strips(monkeypatch):
    monkeypatch.setattr(images, "WIDE_VECTORS", True)
    shrunk = []
    monkeypatch.setattr(images, "shrunk_middle", lambda image, size: shrunk.append(image.size) or torch.zeros(3, size, size))
    for size in [(33, 33), (66, 33), (67, 33), (32, 32), (20, 40)]:
        levels(gradient(*size), 32, MEAN, "square")
    assert shrunk == [(33, 33), (66, 33)]
    monkeypatch.setattr(images, "WIDE_VECTORS", False)
    levels(gradient(33, 33), 32, MEAN, "square")
    assert len(shrunk) == 2


@pytest.mark.parametrize("fit", ["square", "pad", "stretch"])
def test_pixels_are_the_levels_normalised_one_channel_after_the_other(fit):
    image = gradient(60, 45)
    found, of_255 = pixels(from_image(image), 32, MEAN, STD, fit), levels(image, 32, MEAN, fit).permute(1, 2, 0)
    expected = ((of_255.numpy().astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1)
    assert np.array_equal(found.numpy(), expected)
    assert found.is_contiguous()  # pictures join a batch by plain copies


@pytest.mark.parametrize("fit", ["square", "pad", "stretch"])
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1), (7, 5)])
def test_every_shape_fits(fit, size):
    square = pixels(from_image(Image.new("RGB", size, "red")), 16, MEAN, STD, fit)
    assert square.shape == (3, 16, 16)
    assert square.dtype == torch.float32


def test_pad_keeps_everything_and_its_bands_are_zero():
    square = pixels(from_image(Image.new("RGB", (32, 16), "white")), 16, MEAN, STD, "pad")
    assert square[:, :4].abs().max() < 0.01  # the mean, to one level of 255
    assert torch.allclose(square[:, 4:12], ((1 - torch.tensor(MEAN)) / torch.tensor(STD))[:, None, None].expand(3, 8, 16))


def test_an_unknown_fit_is_named():
    with pytest.raises(ValueError, match="fit: square, pad or stretch, not 'naive'"):
        pixels(from_image(gradient(8, 8)), 16, MEAN, STD, "naive")


def test_to_rgb_leaves_an_rgb_image_alone():
    assert to_rgb(gradient(8, 8)).tobytes() == gradient(8, 8).tobytes()
