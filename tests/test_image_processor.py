import io

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusers_dim import DIMImageProcessor


PROCESSOR = DIMImageProcessor(vae_scale_factor=32, base_size=1024)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
GREY = PICTURE.convert("L")


def pixels(image) -> np.ndarray:
    """The one RGB picture that the processor reads."""
    (picture,) = PROCESSOR.to_rgb(image)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def reopened(image: Image.Image, image_format: str, **options) -> Image.Image:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return Image.open(file)


# Modes of PIL


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX"])
def test_opaque_colours_are_kept(mode):
    np.testing.assert_array_equal(pixels(PICTURE.convert(mode)), PIXELS)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_are_converted(mode):
    image = PICTURE.convert(mode)
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_becomes_grey_in_three_channels(mode):
    np.testing.assert_array_equal(pixels(GREY.convert(mode)), np.asarray(GREY)[..., None].repeat(3, axis=-1))


def test_black_and_white_are_the_darkest_and_the_lightest():
    assert set(pixels(GREY.convert("1")).flat) == {0, 255}


def test_palette_is_resolved():
    image = PICTURE.quantize(4)
    assert image.mode == "P"
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(("alpha", "expected"), [(0, 255), (255, 0), (51, 204)])
def test_transparency_is_over_white(alpha, expected):
    assert (pixels(Image.new("RGBA", (4, 4), (0, 0, 0, alpha))) == expected).all()
    assert (pixels(Image.new("LA", (4, 4), (0, alpha))) == expected).all()


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
def test_transparent_colour_of_a_palette_is_white(image_format):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    read = pixels(reopened(image, image_format, transparency=0))
    assert read[0, 0].tolist() == [255, 255, 255] and read[1, 1].tolist() == [40, 50, 60]


def test_transparent_colour_of_an_rgb_file_is_white():
    image = Image.new("RGB", (4, 4), (40, 50, 60))
    image.putpixel((0, 0), (10, 20, 30))
    read = pixels(reopened(image, "PNG", transparency=(10, 20, 30)))
    assert read[0, 0].tolist() == [255, 255, 255] and read[1, 1].tolist() == [40, 50, 60]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_of_grey_are_scaled_to_8(mode):
    values = [0, 128, 257, 32896, 65535]
    image = Image.new(mode, (5, 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_16_bit_file_is_scaled_to_8():
    image = Image.fromarray(np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8))
    read = pixels(reopened(image, "PNG"))
    assert (read[0, 0, 0], read[-1, -1, 0]) == (0, 255) and len(np.unique(read)) == 48


def test_floating_point_of_grey_is_scaled_to_8():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert image.mode == "F"
    assert pixels(image)[0, :, 0].tolist() == [0, 128, 255]


def test_floating_point_of_grey_out_of_range_raises():
    with pytest.raises(ValueError, match=r"has to lie in \[0, 1\], but one lies in \[0.0, 255.0\]"):
        PROCESSOR.to_rgb(Image.fromarray(np.array([[0.0, 255.0]], dtype=np.float32)))


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_picture_stored_turned_is_read_upright(orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(PICTURE.transpose(stored), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(image), PIXELS)


def test_picture_is_not_changed():
    image = PICTURE.convert("RGBA")
    PROCESSOR.to_rgb(image)
    assert image.mode == "RGBA"


# Arrays and tensors


@pytest.mark.parametrize(
    "array",
    [PIXELS, PIXELS[None], PIXELS.astype(np.uint16) * 257, PIXELS / 255, (PIXELS / 255).astype(np.float32)],
    ids=["uint8", "batch", "uint16", "float64", "float32"],
)
def test_array_is_read(array):
    np.testing.assert_array_equal(pixels(array), PIXELS)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_tensor_is_read(dtype):
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    tensor = tensor if dtype == torch.uint8 else (tensor / 255).to(dtype)
    tolerance = {torch.float16: 1, torch.bfloat16: 1}.get(dtype, 0)
    assert np.abs(pixels(tensor).astype(int) - PIXELS).max() <= tolerance
    assert np.abs(pixels(tensor[None]).astype(int) - PIXELS).max() <= tolerance


def test_tensor_that_takes_a_gradient_is_read():
    tensor = (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255).requires_grad_()
    np.testing.assert_array_equal(pixels(tensor), PIXELS)


@pytest.mark.parametrize("array", [np.asarray(GREY), np.asarray(GREY)[..., None]], ids=["2-D", "1 channel"])
def test_grey_array_is_read(array):
    np.testing.assert_array_equal(pixels(array), pixels(GREY))


def test_alpha_channel_of_an_array_is_over_white():
    transparent = np.concatenate([PIXELS, np.zeros((6, 8, 1), np.uint8)], axis=-1)
    assert (pixels(transparent) == 255).all()
    assert (pixels(transparent[..., 2:]) == 255).all()


def test_batches_are_as_many_pictures():
    assert len(PROCESSOR.to_rgb(np.stack([PIXELS] * 3))) == 3
    assert len(PROCESSOR.to_rgb(torch.zeros(2, 3, 4, 4))) == 2


def test_lists_are_read_in_order_however_nested():
    pictures = PROCESSOR.to_rgb([PICTURE, [PIXELS, (GREY, torch.zeros(2, 3, 4, 4))]])
    assert [picture.size for picture in pictures] == [(8, 6), (8, 6), (8, 6), (4, 4), (4, 4)]


# Bad input

BAD_IMAGES = {
    "None": (None, "a PIL image, a NumPy array, a torch tensor or a list of them, but is NoneType"),
    "path": ("picture.png", "but is str"),
    "no pictures": ([], "`image` is an empty list"),
    "no pictures in a list": ([PICTURE, []], "`image` is an empty list"),
    "empty array batch": (np.zeros((0, 4, 4, 3)), r"batch of no images, of shape \(0, 4, 4, 3\)"),
    "empty tensor batch": (torch.zeros(0, 3, 4, 4), r"batch of no images, of shape \(0, 3, 4, 4\)"),
    "picture of no width": (Image.new("RGB", (0, 4)), "0x4 pixels is empty"),
    "array of no height": (np.zeros((0, 4, 3), np.uint8), "4x0 pixels is empty"),
    "tensor of no width": (torch.zeros(3, 4, 0), "0x4 pixels is empty"),
    "array of 1 dimension": (np.zeros(4), r"but is of shape \(4,\)"),
    "array of 5 dimensions": (np.zeros((1, 1, 4, 4, 3)), r"but is of shape \(1, 1, 4, 4, 3\)"),
    "tensor of 2 dimensions": (torch.zeros(4, 4), r"\(channels, height, width\) .* but is of shape \(4, 4\)"),
    "5 channels": (np.zeros((4, 4, 5)), "1 to 4 channels, but one has 5"),
    "channels first in an array": (np.zeros((3, 16, 16)), "1 to 4 channels, but one has 16"),
    "channels last in a tensor": (torch.zeros(16, 16, 3), "1 to 4 channels, but one has 16"),
    "integers": (np.zeros((4, 4, 3), np.int64), "uint8, uint16 or floating point, but one is int64"),
    "truth values": (torch.zeros(3, 4, 4, dtype=torch.bool), "uint8, uint16 or floating point, but one is bool"),
    "values below 0": (torch.full((3, 4, 4), -0.5), r"in \[0, 1\], but one lies in \[-0.5, -0.5\]"),
    "values above 1": (np.full((4, 4, 3), 255.0), r"in \[0, 1\], but one lies in \[255.0, 255.0\]"),
    "values just above 1": (np.full((4, 4, 3), 1.0001), r"in \[0, 1\], but one lies in \[1.0001, 1.0001\]"),
    "not a number": (np.full((4, 4, 3), np.nan), r"in \[0, 1\], but one lies in \[nan, nan\]"),
    "too long": (Image.new("RGB", (2010, 10)), "2010x10 pixels is beyond the aspect ratio of 200:1"),
    "too tall": (np.zeros((201, 1, 3), np.uint8), "1x201 pixels is beyond the aspect ratio of 200:1"),
}


@pytest.mark.parametrize(("image", "message"), BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_image_raises_what_it_is_and_what_is_allowed(image, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR.to_rgb(image)


def test_picture_of_the_longest_ratio_is_read():
    assert PROCESSOR.to_rgb(Image.new("RGB", (200, 1)))[0].size == (200, 1)


# Default sizes

BINS = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("base_size", BINS)
def test_picture_of_a_bins_shape_has_the_bins_size(base_size):
    processor = DIMImageProcessor(32, base_size)
    for height, width in BINS[base_size].values():
        picture = Image.new("1", (int(width), int(height)))
        assert processor.get_default_height_width(picture) == (height, width)


@given(st.integers(100, 400), st.integers(100, 400))
@settings(max_examples=50, deadline=None)
def test_size_is_that_of_the_nearest_bin(height, width):
    nearest = min(ASPECT_RATIO_1024_BIN, key=lambda ratio: abs(float(ratio) - height / width))
    size = PROCESSOR.get_default_height_width(Image.new("1", (width, height)))
    assert size == tuple(ASPECT_RATIO_1024_BIN[nearest])


def test_other_base_size_takes_the_same_ratios_at_its_own_area():
    processor = DIMImageProcessor(vae_scale_factor=8, base_size=64)
    for height, width in ASPECT_RATIO_1024_BIN.values():
        size = processor.get_default_height_width(Image.new("1", (int(width), int(height))))
        assert size == (max(8, round(height / 128) * 8), max(8, round(width / 128) * 8))


@pytest.mark.parametrize("binning", [True, False])
@pytest.mark.parametrize("ratio", [1 / 200, 1 / 199, 1 / 33, 1 / 5, 1 / 2, 1, 3, 17, 150, 200])
@pytest.mark.parametrize(("factor", "base_size"), [(32, 1024), (8, 64), (32, 32)])
def test_size_is_of_the_factor_near_the_ratio_and_the_area(factor, base_size, ratio, binning):
    picture = Image.new("1", (2000, round(2000 * ratio)) if ratio < 1 else (round(2000 / ratio), 2000))
    height, width = DIMImageProcessor(factor, base_size).get_default_height_width(picture, binning)
    assert height % factor == 0 and width % factor == 0 and min(height, width) >= factor
    assert max(height, width) <= 200 * min(height, width)
    # A short side of a few factors rounds coarsely.
    long, short = max(height, width), min(height, width)
    ideal_short = base_size * min(ratio, 1 / ratio) ** 0.5
    assert abs(short - ideal_short) <= max(factor, 0.25 * ideal_short)
    assert long <= base_size * max(ratio, 1 / ratio) ** 0.5 * 1.25 + factor


# Geometry


def resize_and_center_crop(image: Image.Image, size: int) -> Image.Image:
    """torchvision's `Resize(size)` and `CenterCrop(size)` in their own arithmetic (`functional.py`)."""
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    top = int(round((new_height - size) / 2.0))
    left = int(round((new_width - size) / 2.0))
    return image.crop((left, top, left + size, top + size))


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([32, 64, 96]))
@settings(max_examples=60, deadline=None)
def test_square_is_cut_as_torchvision_does(width, height, size):
    noise = np.random.default_rng(width * 100 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    cut = PROCESSOR.resize_and_crop(image, size, size)
    np.testing.assert_array_equal(np.asarray(cut), np.asarray(resize_and_center_crop(image, size)))


@given(st.integers(1, 200), st.integers(1, 200), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96]))
@settings(max_examples=60, deadline=None)
def test_cut_fills_the_size_and_loses_one_direction_alone(width, height, target_height, target_width):
    # A mark in each corner's quarter: whichever direction is cut, the other keeps both its ends.
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    ramp[..., 1] = np.linspace(0, 255, width).astype(np.uint8)[None]
    cut = np.asarray(PROCESSOR.resize_and_crop(Image.fromarray(ramp), target_height, target_width)).astype(int)
    assert cut.shape == (target_height, target_width, 3)
    scale = max(target_height / height, target_width / width)
    kept_height, kept_width = target_height / (scale * height), target_width / (scale * width)
    assert max(kept_height, kept_width) == pytest.approx(1.0)
    if min(height, width) > 32 and kept_height > 0.99:
        assert cut[0, 0, 0] <= 10 and cut[-1, 0, 0] >= 245
    if min(height, width) > 32 and kept_width > 0.99:
        assert cut[0, 0, 1] <= 10 and cut[0, -1, 1] >= 245


def test_picture_of_the_size_is_not_resampled():
    np.testing.assert_array_equal(np.asarray(PROCESSOR.resize_and_crop(PICTURE, 6, 8)), PIXELS)


def test_offset_of_half_a_pixel_rounds_to_the_even():
    # 3 and 1 rows too many: torchvision's round() takes 1.5 to 2 and 0.5 to 0.
    column = Image.fromarray(np.arange(7, dtype=np.uint8)[:, None].repeat(4, axis=1)).convert("RGB")
    assert np.asarray(PROCESSOR.resize_and_crop(column, 4, 4))[:, 0, 0].tolist() == [2, 3, 4, 5]
    assert np.asarray(PROCESSOR.resize_and_crop(column.crop((0, 0, 4, 5)), 4, 4))[:, 0, 0].tolist() == [0, 1, 2, 3]


def test_preprocessed_picture_lies_in_minus_1_to_1():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (4, 0, 8, 8))
    tensor = PROCESSOR.preprocess(image, 8, 8)
    assert tensor.shape == (1, 3, 8, 8) and tensor.dtype == torch.float32
    assert (tensor[..., :4] == -1).all() and (tensor[..., 4:] == 1).all()


def test_preprocessed_pictures_of_unequal_shapes_are_one_batch():
    tensor = PROCESSOR.preprocess([PICTURE, Image.new("RGB", (50, 90))], 32, 64)
    assert tensor.shape == (2, 3, 32, 64)


def test_array_and_picture_are_preprocessed_alike():
    torch.testing.assert_close(
        PROCESSOR.preprocess(PIXELS, 32, 64), PROCESSOR.preprocess(PICTURE, 32, 64), atol=0, rtol=0
    )
