"""Images of every kind, made here: what becomes of each, and what is refused for which reason."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from training.data.decoding import BadImage, center_crop, read_image


RED = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 16, 16)
RAMP = np.tile(np.linspace(0, 255, 16).round().astype(np.uint8), (16, 1))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def ramp(channels: int = 3) -> torch.Tensor:
    """What the ramp must become."""
    return torch.from_numpy(RAMP.astype(np.float32) / 127.5 - 1).expand(channels, 16, 16)


@pytest.mark.parametrize(
    ("mode", "format", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("CMYK", "TIFF", 0),
        ("CMYK", "JPEG", 0.05),
        ("YCbCr", "JPEG", 0.05),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("RGBA", "PNG", 0),
        ("RGB", "WEBP", 0.05),
    ],
)
def test_red_is_red_in_every_mode(mode: str, format: str, tolerance: float) -> None:
    image = Image.new("RGB", (16, 16), "red").convert(mode)
    torch.testing.assert_close(read_image(encoded(image, format), 16, 3), RED, atol=tolerance, rtol=0)


def test_grey_images_fill_three_channels_and_colour_makes_grey_for_one() -> None:
    grey = encoded(Image.fromarray(RAMP), "PNG")
    assert torch.equal(read_image(grey, 16, 3), ramp())
    assert torch.equal(read_image(grey, 16, 1), ramp(1))
    (value,) = read_image(Image.new("RGB", (16, 16), "red"), 16, 1).unique().tolist()
    assert value == pytest.approx(76 / 127.5 - 1)  # ITU-R 601 luma of red


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_brightness(format: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert torch.equal(read_image(encoded(image, format), 16, 3), ramp())


def test_32_bit_integers_beyond_16_bits_and_floats_are_refused() -> None:
    wide = Image.fromarray(RAMP.astype(np.int32) * 257 * 2)
    with pytest.raises(BadImage, match="integer pixels from 0 to 131070"):
        read_image(encoded(wide, "TIFF"), 16, 3)
    with pytest.raises(BadImage, match="range is unknown"):
        read_image(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), 16, 3)


def test_transparency_is_laid_over_white() -> None:
    clear = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG")
    half = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 128)), "PNG")
    grey = encoded(Image.new("LA", (16, 16), (0, 0)), "PNG")
    indexed = Image.new("RGB", (16, 16), "red").quantize(4)
    palette = encoded(indexed, "PNG", transparency=indexed.getpixel((0, 0)))
    for source in (clear, grey, palette):
        assert torch.equal(read_image(source, 16, 3), torch.ones(3, 16, 16))
    pink = read_image(half, 16, 3)
    assert pink[0].unique().tolist() == [1.0]
    assert pink[1:].mean().item() == pytest.approx(0, abs=0.01)


def test_exif_orientation_is_undone() -> None:
    upright = Image.fromarray(RAMP)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees to the left: a viewer turns it clockwise
    stored = encoded(upright.rotate(90, expand=True), "PNG", exif=exif)
    assert torch.equal(read_image(stored, 16, 3), read_image(upright, 16, 3))


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    assert torch.equal(read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 16, 3), RED)


def test_small_images_are_enlarged_down_to_a_limit() -> None:
    tiny = encoded(Image.new("RGB", (5, 3), "red"), "PNG")
    assert torch.equal(read_image(tiny, 16, 3), RED)
    with pytest.raises(BadImage, match="5x3 pixels; the shorter side must have 4"):
        read_image(tiny, 16, 3, min_side=4)


@pytest.mark.parametrize("keep", [0, 4, 30, 60])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_a_truncated_file_is_refused_in_every_format(format: str, keep: int) -> None:
    with pytest.raises(BadImage):
        read_image(encoded(Image.linear_gradient("L").convert("RGB"), format)[:keep], 16, 3)


def test_damaged_files_are_read_or_refused_and_raise_nothing_else() -> None:
    random = np.random.default_rng(0)
    refused = 0
    for format in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        whole = encoded(Image.linear_gradient("L").resize((40, 30)), format)
        for _ in range(30):
            damaged = bytearray(whole)
            for position in random.integers(0, len(whole), 5):
                damaged[position] = random.integers(0, 256)
            try:
                assert read_image(bytes(damaged), 16, 3).shape == (3, 16, 16)
            except BadImage:
                refused += 1
    assert 0 < refused < 150


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="DecompressionBombError"):
        read_image(encoded(Image.new("L", (40, 30)), "PNG"), 16, 3)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path) -> None:
    image = Image.fromarray(RAMP)
    data = encoded(image, "PNG")
    path = tmp_path / "ramp.png"
    path.write_bytes(data)
    dictionaries = [{"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in (path, str(path), data, image, RAMP, *dictionaries):
        assert torch.equal(read_image(source, 16, 3), ramp())
    for nothing in (None, 7, {"bytes": None, "path": None}):
        with pytest.raises(BadImage, match="is not an image"):
            read_image(nothing, 16, 3)


@pytest.mark.parametrize("size", [(16, 16), (40, 16), (33, 70), (5, 9)])
def test_the_crop_is_square_central_and_of_the_asked_size(size: tuple[int, int]) -> None:
    image = Image.linear_gradient("L").resize(size)
    cropped = center_crop(image, 16)
    assert cropped.size == (16, 16)
    assert abs(cropped.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)) - 127) < 12
