"""The filters on real files, and filters and checks on the picture world."""

import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusers_dim.data.engine.filters import (
    AreasAgree,
    Aspect,
    Identical,
    Length,
    NearDuplicate,
    Tiny,
    TooLarge,
    UnsafeType,
    default_filters,
    find_areas,
)
from diffusers_dim.data.engine.pictures import change_mask
from diffusers_dim.data.engine.records import EngineSample
from diffusers_dim.designers import Blueprint
from diffusers_dim.tiny import sample_edits, sample_scenes


def write(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **({"compress_level": 1} if format == "PNG" else {}), **options)
    return file.getvalue()


def noise(width=128, height=96, seed=0):
    """A picture with something to see at every scale."""
    generator = np.random.default_rng(seed)
    layers = [
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).resize((width, height), 3)
        for side in (4, 16)
    ]
    return Image.blend(*layers, 0.3)


def bomb_png(width=30_000, height=30_000):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def sample(source, target, id="1", **columns):
    return EngineSample(id, target, source, "Paint it red.", columns=columns)


def edit_sample(edit, number, **columns):
    return EngineSample(str(number), write(edit.target), write(edit.source), edit.instruction, columns=columns)


def drop_reason(filters, sample):
    return next((reason for item in filters if (reason := item(sample))), None)


GOOD = write(noise())
OTHER = write(noise(seed=1))
FRAMES = [noise(seed=seed) for seed in range(3)]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "is empty"),
        (b'<?xml version="1.0"?><!-- a --><svg xmlns="http://www.w3.org/2000/svg"></svg>', "is SVG"),
        (b"\xef\xbb\xbf\n<svg></svg>", "is SVG"),
        (b"<?xml version='1.0'?><note/>", "is XML"),
        (b"<!-- " * 200 + b"<!-- -->" * 20, "is of an unknown type"),
        (b"<!DOCTYPE html><html>404</html>", "is HTML"),
        (b"%PDF-1.7\n%\xe2\xe3", "is PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is PostScript"),
        (write(noise(), "EPS"), "is PostScript"),
        (b"MZ\x90\0" + bytes(60), "is a Windows program"),
        (b"\x7fELF\x02\x01", "is an ELF program"),
        (b"#!/bin/sh\nrm -rf /\n", "is a script"),
        (b"PK\x03\x04" + bytes(30), "is an archive"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIF picture or a film"),
        (b"\0\0\0\x20ftypisom\0\0\x02\0", "is a HEIF picture or a film"),
        (write(noise(), "ICO"), "is of an unknown type"),
        (write(noise(), "PPM"), "is of an unknown type"),
        (b'{"error": "not found"}', "is of an unknown type"),
        (write(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "is a GIF of several frames"),
        (write(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "is a WEBP of several frames"),
        (write(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "is a PNG of several frames"),
        (write(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "is a TIFF of several frames"),
    ],
)
def test_files_of_other_types_and_films_are_unsafe(data, words):
    assert UnsafeType()(sample(GOOD, data)) == f"unsafe type: the target {words}"
    assert UnsafeType()(sample(data, GOOD)) == f"unsafe type: the source {words}"
    assert UnsafeType()(sample(None, data)) == f"unsafe type: the target {words}"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "MPO"])
def test_plain_pictures_pass_whatever_their_type(format):
    options = {"save_all": True, "append_images": FRAMES[1:]} if format == "MPO" else {}
    good = sample(GOOD, write(noise(seed=1), format, **options))

    assert drop_reason(default_filters(), good) is None


def test_a_decompression_bomb_is_refused_by_its_header():
    begin = time.perf_counter()
    reason = drop_reason(default_filters(), sample(GOOD, bomb_png()))

    assert reason.startswith("too large: the target: ")
    assert time.perf_counter() - begin < 0.5


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_pils_or_ones_own():
    assert TooLarge()(sample(None, bomb_png(10_000, 9_000))) == (
        f"too large: the target has 10000x9000 pixels (at most {Image.MAX_IMAGE_PIXELS})"
    )
    assert TooLarge(100)(sample(GOOD, GOOD)) == "too large: the source has 128x96 pixels (at most 100)"
    assert TooLarge()(sample(GOOD, GOOD)) is None


@pytest.mark.parametrize(
    "data",
    [
        write(noise(), "JPEG")[:-400],
        write(noise(), "JPEG")[:30],
        write(noise(), "WEBP")[:-400],
        GOOD[: len(GOOD) // 2],
        GOOD[:2000] + bytes(8) + GOOD[2008:],
        write(noise(), "GIF")[:2000],
        b"BMW is a car",
    ],
)
def test_broken_files_are_unreadable(data):
    reason = drop_reason(default_filters(), sample(GOOD, data))

    assert reason.startswith("unreadable: ")


def test_small_pictures_are_tiny():
    assert Tiny()(sample(None, write(Image.new("RGB", (1, 1))))) == (
        "tiny: the target has 1x1 pixels (at least 64 a side)"
    )
    assert Tiny()(sample(GOOD, write(noise(200, 63)))).startswith("tiny: the target has 200x63")
    assert Tiny(63)(sample(GOOD, write(noise(200, 63)))) is None


def test_long_pictures_and_pairs_of_different_shapes_have_the_wrong_aspect():
    assert Aspect()(sample(None, write(noise(401, 100)))) == "aspect: the target has 401x100 pixels (at most 4.0:1)"
    assert Aspect()(sample(None, write(noise(400, 100)))) is None
    assert Aspect()(sample(write(noise(100, 80)), write(noise(100, 120)))) == (
        "aspect: source and target differ: 100x80 and 100x120"
    )
    assert Aspect()(sample(write(noise(100, 80)), write(noise(204, 160)))) is None


def test_a_picture_that_its_exif_turns_has_the_aspect_that_a_person_sees():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = write(noise(96, 128, seed=1), "JPEG", exif=exif)

    assert Aspect()(sample(GOOD, turned)) is None


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_pair_that_differs_by_noise_alone_is_identical(quality):
    for edit in sample_edits(5, seed=1, size=512):
        same = sample(write(edit.source), write(edit.source, "JPEG", quality=quality))
        assert Identical()(same).startswith("identical: 0.0")


@pytest.mark.parametrize("quality", [30, 75])
def test_a_photograph_saved_again_or_at_another_size_is_identical(quality):
    for seed in range(5):
        image = noise(400, 300, seed)
        other = image.resize((200, 150), Image.Resampling.LANCZOS)
        assert Identical()(sample(write(image), write(image, "JPEG", quality=quality)))
        assert Identical()(sample(write(image), write(other)))


def test_a_small_edit_is_none():
    source = noise(1024, 768)
    target = source.copy()
    ImageDraw.Draw(target).rectangle((500, 300, 530, 330), fill=(255, 0, 0))

    assert Identical()(sample(write(source), write(target))) is None
    assert Identical()(sample(None, write(target))) is None


def test_the_change_mask_has_the_sources_size_and_shows_what_changed():
    source = noise(1000, 600)
    target = source.copy()
    ImageDraw.Draw(target).rectangle((100, 100, 299, 299), fill=(0, 0, 0))

    mask = change_mask(source, target.resize((500, 300)))

    assert mask.mode == "L" and mask.size == (1000, 600)
    array = np.asarray(mask)
    assert set(np.unique(array)) == {0, 255}
    assert (array[110:290, 110:290] == 255).mean() > 0.9
    array = array.copy()
    array[85:315, 85:315] = 0
    assert not array.any()


# What a text says changes: over thirds, row by row, "#" where something does.
@pytest.mark.parametrize(
    "text, thirds",
    [
        ("The hat in the top left corner becomes red.", "#.. ... ..."),
        ("**Lower-right** of the image: the dog is replaced by a cat.", "... ... ..#"),
        ("The man on the left is removed; the tree on the right stays.", "#.. #.. #.."),
        ("- Sky: the upper half of the picture\n- Unchanged: the house in the center", "### ... ..."),
        ("Unchanged regions:\n- the house in the center\n\nChanged regions:\n- the car at the bottom", "... ... ###"),
        ("The bird in the middle left turns blue, while the cat in the center remains as it is.", "... #.. ..."),
        ("The lamp on the right-hand side, keeping the chair on the left.", "..# ..# ..#"),
        ("Only the central area changes. Nothing in the top left is modified.", "... .#. ..."),
        ("The star leaves its place at the top and lands in the bottom right.", "### ... ..#"),
        ("The sign at the very top of the photo, but not the one at the bottom: it is not changed.", "### ... ..."),
        ("She wears a red top in the center-right.", "... ..# ..."),
        ("The car in the bottom center of the frame", "... ... .#."),
        ("The entire image turns into a watercolor.", "### ### ###"),
        ("The whole background becomes plain pink; every shape stays.", "### ### ###"),
        ("The background of the picture becomes a beach.", None),
        ("The top of the table becomes red.", None),
        ("The plate in the center of the table is gone.", None),
        ("The car in the top left corner of the window becomes red.", None),
        ("His left hand and the dog's right ear are painted blue; her upper lip, too.", None),
        ("The ball moves to the right, where the man is left of it.", None),
        ("Everything except the dog in the center is blurred.", None),
        ("All else in the center is left unchanged.", None),
        ("Warm light falls on everything everywhere, above all in the top left.", None),
        ("The dog.", None),
    ],
)
def test_places_are_read_from_words(text, thirds):
    area = find_areas(text)

    if thirds is None:
        assert area is None
    else:
        seen = "".join("#" if cell else "." for cell in area[2::9, 2::9].ravel())
        assert " ".join((seen[:3], seen[3:6], seen[6:])) == thirds


@pytest.fixture(scope="module")
def edits():
    return sample_edits(300, seed=6)


def test_true_edits_pass_all_filters_and_their_blueprints_agree(edits):
    filters = [*default_filters(), AreasAgree(), Length()]

    reasons = [drop_reason(filters, edit_sample(edit, n, prompt=edit.blueprint)) for n, edit in enumerate(edits)]

    assert reasons == [None] * 300


def place_words(blueprint):
    return find_areas(Blueprint.parse(blueprint).edit_area_localization)


def test_mirrored_places_are_caught(edits):
    words = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    caught, asked = 0, 0
    for number, edit in enumerate(edits):
        *parts, area, image = Blueprint.parse(edit.blueprint).parts
        mirrored = " ".join(words.get(word, word) for word in area.replace(";", " ;").split(" "))
        said, true = find_areas(mirrored), find_areas(area)
        if (said & true).any():  # the center, the background, or a move from a place to its mirror
            continue
        asked += 1
        prompt = Blueprint(*parts, mirrored, image)
        caught += AreasAgree()(edit_sample(edit, number, prompt=prompt)) is not None

    assert asked > 150
    assert caught / asked >= 0.99


def test_blueprints_of_other_samples_are_caught_where_their_places_are_others(edits):
    generator = random.Random(0)
    results = {True: [], False: []}
    for number, edit in enumerate(edits):
        other = generator.choice([item for item in edits if item is not edit])
        said, true = place_words(other.blueprint), place_words(edit.blueprint)
        apart = not (said & true).any() or said.all() != true.all()
        caught = AreasAgree()(edit_sample(edit, number, prompt=other.blueprint)) is not None
        results[apart].append(caught)

    assert np.mean(results[True]) >= 0.95


def test_length_is_counted_or_estimated():
    class Words:
        def encode(self, text):
            return text.split()

    long = sample(GOOD, GOOD, prompt="word " * 100, caption="a")

    assert Length(99, Words())(long) == "too long: the prompt has 100 tokens (at most 99)"
    assert Length(100, Words())(long) is None
    assert Length(142)(long) == "too long: the prompt has 143 tokens (at most 142)"
    assert Length(1, column="caption")(long) is None


def again(data, quality=85, scale=1.0):
    image = Image.open(io.BytesIO(data))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return write(image, "JPEG", quality=quality)


def test_pairs_saved_again_are_near_duplicates_of_the_first():
    filter = NearDuplicate()
    edits = sample_edits(40, seed=3, size=256)
    first = [edit_sample(edit, number) for number, edit in enumerate(edits)]
    copies = [sample(again(s.source, 75, 0.75), again(s.target, 90), f"copy of {s.id}") for s in first]

    assert [filter(item) for item in first] == [None] * 40
    found = [filter(copy) == f"near duplicate: of {item.id}" for copy, item in zip(copies, first)]
    assert np.mean(found) >= 0.95


def test_photographs_saved_again_are_near_duplicates():
    filter = NearDuplicate()
    pairs = [(write(noise(400, 300, seed)), write(noise(400, 300, seed + 99))) for seed in range(12)]

    assert [filter(sample(*pair)) for pair in pairs] == [None] * 12
    assert all(filter(sample(again(source, 50), again(target, 50, 1.5))) for source, target in pairs)


def test_different_edits_of_one_picture_are_no_duplicates():
    filter = NearDuplicate()
    source = noise(512, 512)
    for x, y, color in [(100, 100, "red"), (100, 100, "blue"), (300, 100, "red"), (120, 420, "red")]:
        target = source.copy()
        ImageDraw.Draw(target).rectangle((x, y, x + 40, y + 40), fill=color)
        assert filter(sample(write(source), write(target))) is None
    assert filter(sample(write(target), write(source))) is None


def test_samples_of_the_picture_world_are_no_duplicates_of_each_other():
    filter = NearDuplicate()
    edits = sample_edits(600, seed=11)

    assert not [reason for n, edit in enumerate(edits) if (reason := filter(edit_sample(edit, n)))]


def test_single_pictures_are_compared_too():
    filter = NearDuplicate()
    scenes = [write(image) for image, _ in sample_scenes(100, seed=5, size=128)]

    assert not [reason for data in scenes if (reason := filter(sample(None, data)))]
    assert np.mean([filter(sample(None, again(data))) is not None for data in scenes]) >= 0.9


def test_only_the_last_samples_are_remembered():
    filter = NearDuplicate(capacity=2)
    first, second, third = (sample(GOOD, write(noise(seed=seed)), str(seed)) for seed in (1, 2, 3))

    assert [filter(item) for item in (first, first, second, first)] == [
        None,
        "near duplicate: of 1",
        None,
        "near duplicate: of 1",
    ]
    assert [filter(item) for item in (third, second, first)] == [None, "near duplicate: of 2", None]


@pytest.mark.parametrize("arguments", [{"distance": 64}, {"distance": -1}, {"capacity": 0}])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        NearDuplicate(**arguments)


def test_a_hundred_thousand_samples_are_looked_through_in_milliseconds():
    filter = NearDuplicate()
    filter(sample(GOOD, OTHER))
    generator = np.random.default_rng(0)
    filter._hashes[:, :100_000] = generator.integers(0, 1 << 16, (4, 100_000))
    filter._ids.extend(map(str, range(99_999)))
    filter._count = 100_000
    other = sample(OTHER, GOOD)
    other.pictures  # noqa: B018
    times = []
    for _ in range(20):
        begin = time.process_time()  # what else runs on the machine does not count
        filter(other)
        times.append(time.process_time() - begin)

    assert min(times) < 0.01
