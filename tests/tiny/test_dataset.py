import json
from collections import Counter

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


def test_faults_are_planted_in_their_shares_and_told(tmp_path):
    rows = read(write_edits(tmp_path, 40, seed=3, faults=True))
    edits = sample_edits(40, seed=3)
    assert Counter(row["fault"] for row in rows) == {"": 28, "wrong": 4, "vague": 4, "identical": 2, "corrupt": 2}
    kinds = {edit.instruction: edit.kind for edit in edits}
    for row, edit in zip(rows, edits, strict=True):
        assert (row["true_instruction"], row["true_blueprint"]) == (edit.instruction, edit.blueprint)
        files = [(tmp_path / row[name]).read_bytes() for name in ("image_path", "image_path_target")]
        assert (files[0] == files[1]) == (row["fault"] == "identical")
        assert sum(file.endswith(b"IEND\xaeB`\x82") for file in files) == 2 - (row["fault"] == "corrupt")
        if row["fault"] == "wrong":
            assert kinds[row["prompt"]] != edit.kind
        else:
            assert (row["prompt"] == edit.instruction) == (row["fault"] != "vague")


@pytest.mark.parametrize(
    ("options", "words"), [({"kinds": ["add"]}, "two kinds"), ({"prompts": "both"}, "'instruction', but it is 'both'")]
)
def test_faults_that_cannot_be_planted_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        write_edits(tmp_path, 20, seed=3, faults=True, **options)
