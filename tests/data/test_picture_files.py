# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Which files are passed on as they are, and which are decoded."""

import io

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from diffusers_dim.files import PictureFile, open_picture, read_picture


def encode(image=None, kind="PNG", **options):
    file = io.BytesIO()
    (image or Image.radial_gradient("L").convert("RGB").resize((40, 24))).save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def late_exif():
    """A PNG that says behind its pixels that it is rotated."""
    data, exif = encode(exif=rotated()), encode()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    end = exif.index(b"IEND") - 4
    return exif[:end] + chunk + exif[end:]


@pytest.mark.parametrize(
    ("kind", "media_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
def test_plain_files_are_passed_on_as_they_are(kind, media_type):
    data = encode(kind=kind)
    file = open_picture(data)
    assert file == PictureFile(data, media_type, (40, 24))
    assert file.decode() == read_picture(data)


def test_a_grey_picture_and_what_a_run_writes_into_its_own_are_passed_on(tmp_path):
    made = PngImagePlugin.PngInfo()
    made.add_text("parameters", '{"seed": 1}')
    path = tmp_path / "edit.png"
    path.write_bytes(encode(Image.radial_gradient("L"), pnginfo=made))
    assert open_picture(path) == PictureFile(path.read_bytes(), "image/png", (256, 256))


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.new("RGBA", (8, 8), (255, 0, 0, 128))),
        encode(Image.new("P", (8, 8))),
        encode(Image.new("RGB", (8, 8)), transparency=(0, 0, 0)),
        encode(Image.new("CMYK", (8, 8)), kind="JPEG"),
        encode(kind="GIF"),
        encode(kind="BMP"),
        encode(kind="TIFF"),
        encode(exif=rotated()),
        late_exif(),
        encode(kind="JPEG", exif=rotated()),
        encode(kind="WEBP", exif=rotated()),
        encode(kind="WEBP", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
        encode(save_all=True, append_images=[Image.new("RGB", (40, 24))]),
        encode(kind="MPO", save_all=True, append_images=[Image.new("RGB", (40, 24))]),
    ],
    ids=(
        "transparent palette colour_key cmyk gif bmp tiff png_rotated png_rotated_late jpeg_rotated webp_rotated"
        " webp_animated png_animated mpo"
    ).split(),
)
def test_what_not_everybody_reads_alike_is_decoded(data):
    assert open_picture(data) == read_picture(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("left", [0, 10, -30, -1])
def test_a_file_that_is_cut_is_not_passed_on(kind, left):
    data = encode(kind=kind)[:left]
    try:
        whole = read_picture(data)
    except ValueError:
        with pytest.raises(ValueError, match=f"A file of {len(data)} bytes cannot be read as a picture"):
            open_picture(data)
    else:
        assert open_picture(data) == whole


def test_a_png_with_a_wrong_checksum_is_refused():
    data = bytearray(encode())
    data[data.index(b"IDAT") + 20] ^= 1
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        open_picture(bytes(data))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png cannot be read as a picture"):
        open_picture(tmp_path / "none.png")
