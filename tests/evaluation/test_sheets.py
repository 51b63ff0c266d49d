import pytest
from PIL import Image, ImageChops, ImageFont

from diffusers_dim.evaluation.sheets import MARGIN, SheetRow, draw_sheet, fit_picture, wrap_text


def test_pictures_stand_side_by_side_pixel_for_pixel():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    sheet = draw_sheet([SheetRow("", [("", red), ("", blue)])], picture_size=64)
    colors = dict((color, count) for count, color in sheet.getcolors())
    assert colors[(255, 0, 0)] == colors[(0, 0, 255)] == 64 * 64
    assert sheet.getpixel((MARGIN + 1, MARGIN + 1)) == (255, 0, 0)


def test_rows_of_different_lengths_fit():
    picture = Image.new("RGB", (64, 64), "red")
    rows = [SheetRow("one", [("a", picture)]), SheetRow("three", [("a", picture), ("b", picture), ("c", picture)])]
    sheet = draw_sheet(rows, heading="Heading")
    assert dict((color, count) for count, color in sheet.getcolors(1 << 20))[(255, 0, 0)] == 4 * 256 * 256


def test_long_title_makes_the_sheet_higher_not_wider():
    picture = Image.new("RGB", (64, 64), "red")
    short, long = (draw_sheet([SheetRow(title, [("", picture)])]) for title in ("word", "word " * 60))
    assert long.width == short.width
    assert long.height > short.height


def test_title_is_drawn():
    picture = Image.new("RGB", (64, 64), "red")
    sheets = [draw_sheet([SheetRow(title, [("", picture)])]) for title in ("one", "two")]
    assert ImageChops.difference(*sheets).getbbox() is not None


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 32), (256, 128)), ((100, 100), (200, 200)), ((1024, 512), (256, 128))]
)
def test_picture_is_fitted(size, expected):
    assert fit_picture(Image.new("L", size), 256).size == expected


def test_wrapped_lines_fit_and_keep_the_words():
    font = ImageFont.load_default(19)
    text = "Several words, and " + "one" * 60 + " of great length.\nA second line."
    lines = wrap_text(text, font, 300)
    assert all(font.getlength(line) <= 300 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert "A second line." in lines


@pytest.mark.parametrize("rows", [[], [SheetRow("empty", [])]])
def test_sheet_without_pictures_is_refused(rows):
    with pytest.raises(ValueError, match="at least one picture"):
        draw_sheet(rows)
