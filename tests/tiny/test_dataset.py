import json

import pytest
from PIL import Image, ImageChops

from diffusers_dim.tiny import sample_edits
from diffusers_dim.tiny.dataset import write_edits


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_and_pictures_are_those_of_the_world(tmp_path):
    rows = read(write_edits(tmp_path / "edits", 6, seed=3))
    for row, edit in zip(rows, sample_edits(6, seed=3), strict=True):
        assert (row["prompt"], row["kind"]) == (edit.instruction, edit.kind)
        for name, picture in (("image_path", edit.source), ("image_path_target", edit.target)):
            written = Image.open(tmp_path / "edits" / row[name])
            assert ImageChops.difference(written, picture).getbbox() is None


def test_prompts_may_be_blueprints_or_both(tmp_path):
    edits = sample_edits(2, seed=3, kinds=["add"])
    blueprints, both = (
        [row["prompt"] for row in read(write_edits(tmp_path / name, 2, seed=3, kinds=["add"], prompts=name))]
        for name in ("blueprint", "both")
    )
    assert blueprints == [edit.blueprint for edit in edits]
    assert both == [prompt for edit in edits for prompt in (edit.instruction, edit.blueprint)]


def test_unknown_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'captions', but must be one of instruction, blueprint, both"):
        write_edits(tmp_path, 2, seed=3, prompts="captions")
