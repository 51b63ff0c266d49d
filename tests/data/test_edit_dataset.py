import json

import pytest
from PIL import Image

from diffusers_dim.data import EditDataset, EpochSampler


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def row(**fields):
    return {"id": "0", "image_path": "a.png", "image_path_target": "b.png", "prompt": "do", **fields}


def test_items_hold_fields_and_rgb_pictures(tmp_path):
    Image.new("L", (8, 4), 7).save(tmp_path / "a.png")
    Image.new("RGB", (4, 8), "red").save(tmp_path / "b.png")
    dataset = EditDataset(write(tmp_path / "edits.jsonl", row(kind="recolor"), ""))
    assert len(dataset) == 1
    item = dataset[0]
    assert (item["prompt"], item["kind"]) == ("do", "recolor")
    assert (item["source"].mode, item["source"].size) == ("RGB", (8, 4))
    assert item["target"].getpixel((0, 0)) == (255, 0, 0)


def test_image_root_is_where_paths_start(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / f"{name}.png")
    assert EditDataset(write(tmp_path / "edits.jsonl", row()), tmp_path / "pictures")[0]["source"].size == (4, 4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([row(), "{broken"], "line 2 is not JSON"),
        ([row(), {"id": "1", "prompt": "do"}], r"line 2 lacks \['image_path', 'image_path_target'\]"),
        (["[1, 2]"], "line 1 lacks"),
        ([""], "holds no samples"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        EditDataset(write(tmp_path / "edits.jsonl", *lines))


def test_epochs_have_orders_of_their_own_that_seeds_decide():
    sampler = EpochSampler(20, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(20))
    sampler.epoch = 1
    assert list(sampler) != first
    sampler.epoch = 0
    assert list(sampler) == first == list(EpochSampler(20, seed=3))
