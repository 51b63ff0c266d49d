import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from PIL import Image

from diffusers_dim.designers.cache import BlueprintCache


def key(name):
    return BlueprintCache.key(None, str(name), {})


def entries(folder):
    return [path for path in folder.rglob("*") if path.suffix == ".blueprint"]


@pytest.fixture
def cache(tmp_path):
    return BlueprintCache(tmp_path / "cache")


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((8, 6)).convert("RGB")


@pytest.mark.parametrize("text", ["1. Edit Instruction: a\n", "把红色雨伞换成透明雨伞。🌂", "", "a\r\nb\0\ud800"])
def test_a_text_is_kept(cache, text):
    cache.put(key("a"), text)

    assert cache.get(key("a")) == text
    assert BlueprintCache(cache.folder).get(key("a")) == text


def test_what_was_never_kept_is_absent(cache):
    assert cache.get(key("a")) is None


def test_a_later_text_takes_the_place_of_an_earlier_one(cache):
    cache.put(key("a"), "earlier and longer")
    cache.put(key("a"), "later")

    assert cache.get(key("a")) == "later"
    assert len(entries(cache.folder)) == 1


@pytest.mark.parametrize("size", [0, 1, 64, 70, -1])
def test_a_file_cut_short_is_absent(cache, size):
    cache.put(key("a"), "a long enough text")
    (path,) = entries(cache.folder)
    path.write_bytes(path.read_bytes()[:size])

    assert cache.get(key("a")) is None


def test_a_file_with_other_bytes_is_absent_and_is_replaced(cache):
    cache.put(key("a"), "text")
    (path,) = entries(cache.folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert cache.get(key("a")) is None

    cache.put(key("a"), "text")

    assert cache.get(key("a")) == "text"


def test_key_tells_apart_all_that_a_text_depends_on(picture):
    other = picture.copy()
    other.putpixel((3, 3), (1, 2, 3))
    palette = picture.convert("P")
    repainted = palette.copy()
    repainted.putpalette([9] * 768)
    keys = [
        BlueprintCache.key(picture, "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(other, "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(picture.resize((6, 8)), "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(picture.convert("L"), "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(palette, "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(repainted, "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(None, "paint it", {"model": "a", "seed": 0}),
        BlueprintCache.key(picture, "paint it ", {"model": "a", "seed": 0}),
        BlueprintCache.key(picture, "paint it", {"model": "b", "seed": 0}),
        BlueprintCache.key(picture, "paint it", {"model": "a", "seed": 1}),
        BlueprintCache.key(picture, "paint it", {"model": "a"}),
    ]

    assert len(set(keys)) == len(keys)


def test_key_tells_apart_two_shapes_of_the_same_bytes():
    wide, tall = Image.new("L", (4, 2)), Image.new("L", (2, 4))

    assert BlueprintCache.key(wide, "a", {}) != BlueprintCache.key(tall, "a", {})


def test_key_is_the_same_for_the_same_pixels_and_settings_in_another_order(picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as read:
        again = BlueprintCache.key(read, "a", {"seed": 0, "model": "m"})

    assert again == BlueprintCache.key(picture, "a", {"model": "m", "seed": 0})


def test_the_least_recently_used_goes_first(tmp_path):
    cache = BlueprintCache(tmp_path, max_entries=3)
    for name in "abc":
        cache.put(key(name), name)
    cache.get(key("a"))

    cache.put(key("d"), "d")

    assert [cache.get(key(name)) for name in "abcd"] == ["a", None, "c", "d"]


@pytest.mark.parametrize("max_entries", [1, 10, 100])
def test_there_are_never_more_than_max_entries(tmp_path, max_entries):
    cache = BlueprintCache(tmp_path, max_entries)

    for number in range(2 * max_entries + 10):
        cache.put(key(number), str(number))
        assert len(entries(tmp_path)) <= max_entries
        assert cache.get(key(number)) == str(number)
    assert len(entries(tmp_path)) >= max_entries - max_entries // 64


def test_a_folder_that_holds_more_is_cut_down_at_the_first_put(tmp_path):
    large = BlueprintCache(tmp_path)
    for number in range(30):
        large.put(key(number), "text")

    BlueprintCache(tmp_path, max_entries=5).put(key("new"), "text")

    assert len(entries(tmp_path)) == 5


def test_files_of_others_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    cache = BlueprintCache(tmp_path, max_entries=1)

    for number in range(5):
        cache.put(key(number), "text")

    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_full_cache_is_not_listed_at_each_put(tmp_path, monkeypatch):
    cache = BlueprintCache(tmp_path, max_entries=320)
    for number in range(321):
        cache.put(key(number), "text")
    listed = []
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda folder: listed.append(folder) or walk(folder))

    for number in range(1000, 1060):
        cache.put(key(number), "text")

    assert len(listed) == 10  # a 64th of 320 is 5: at each sixth


@pytest.mark.parametrize("max_entries", [0, -1])
def test_max_entries_below_one_is_refused(tmp_path, max_entries):
    with pytest.raises(ValueError, match=f"`max_entries` has to be at least 1, but is {max_entries}"):
        BlueprintCache(tmp_path, max_entries)


@pytest.mark.parametrize("below", ["", "cache"])
def test_a_folder_that_is_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")

    with pytest.raises(ValueError, match="`folder` has to be a folder that can be written to, but .*file"):
        BlueprintCache(tmp_path / "file" / below)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(ValueError, match="can be written to, but '/proc/cache'"):
        BlueprintCache("/proc/cache")


def use(folder, seed, wrong):
    """Writes, reads and evicts; what it reads has to be absent or right."""
    cache = BlueprintCache(folder, max_entries=20)
    draw = random.Random(seed)
    for _ in range(400):
        name = draw.randrange(60)
        if draw.random() < 0.5:
            cache.put(key(name), f"{name} " * 500)
        elif cache.get(key(name)) not in (None, f"{name} " * 500):
            wrong.set()


def test_many_processes_write_read_and_evict_in_one_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    wrong = context.Event()
    workers = [context.Process(target=use, args=(tmp_path, seed, wrong)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert [worker.exitcode for worker in workers] == [0] * 4
    assert not wrong.is_set()
    assert 0 < len(entries(tmp_path)) <= 20 + len(workers)
    assert not list(tmp_path.rglob("*-aside"))


def write_forever(folder, started):
    cache = BlueprintCache(folder)
    number = 0
    while True:
        cache.put(key(number % 5), "text " * 200_000)
        number += 1
        if number == 5:
            started.set()


def test_a_process_killed_while_it_writes_leaves_no_damaged_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    worker = context.Process(target=write_forever, args=(tmp_path, started))
    worker.start()
    assert started.wait(60)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()

    cache = BlueprintCache(tmp_path)

    assert [cache.get(key(number)) for number in range(5)] == ["text " * 200_000] * 5


def test_what_a_killed_process_left_aside_is_deleted_in_the_end(cache):
    cache.put(key("a"), "text")
    (path,) = entries(cache.folder)
    old, new = (path.with_name(f"{name}.blueprint-aside") for name in ("old", "new"))
    for aside in (old, new):
        aside.write_bytes(b"half")
    hours_ago = time.time() - 2 * 3600
    os.utime(old, (hours_ago, hours_ago))

    BlueprintCache(cache.folder).put(key("b"), "text")

    assert not old.exists()
    assert new.exists()


def test_a_text_that_cannot_be_written_leaves_nothing_aside(cache, tmp_path):
    path = cache.folder / key("a")[:2] / f"{key('a')}.blueprint"
    path.mkdir(parents=True)

    with pytest.raises(OSError):
        cache.put(key("a"), "text")

    assert not list(cache.folder.rglob("*-aside"))
