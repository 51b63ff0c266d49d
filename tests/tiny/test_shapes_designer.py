"""The designer of the picture world reads its pictures and instructions as the world meant them."""

import io
import re

import pytest
import torch
from PIL import Image

from diffusers_dim import TINY_SHAPES, DesignError, DIMEditPipeline
from diffusers_dim.tiny import sample_edits
from diffusers_dim.tiny.designer import ShapesDesigner, design_edit, read_scene
from diffusers_dim.tiny.scenes import Ground, Scene, Shape


SCENE = Scene(
    (Shape("circle", "red", "small", "top left"), Shape("star", "blue", "large", "center", (1, -1))), Ground("mint")
)


@pytest.fixture(scope="module")
def samples():
    return sample_edits(60, seed=11)


def test_scenes_are_read_exactly(samples):
    for sample in samples[:30]:
        assert read_scene(sample.source).render().tobytes() == sample.source.tobytes()


def test_scenes_are_read_from_large_and_compressed_pictures(samples):
    for sample in samples[:12]:
        file = io.BytesIO()
        sample.source.resize((512, 512), Image.Resampling.NEAREST).save(file, "JPEG", quality=70)
        assert read_scene(Image.open(file).convert("RGB")) == read_scene(sample.source)


def test_scenes_are_read_that_were_drawn_large():
    for large, small in zip(sample_edits(8, seed=3, size=512), sample_edits(8, seed=3)):
        assert read_scene(large.source) == read_scene(small.source)


@pytest.mark.parametrize("picture", [Image.radial_gradient("L").convert("RGB"), Image.new("RGB", (64, 64), "red")])
def test_other_pictures_are_none_of_the_world(picture):
    assert read_scene(picture) is None
    with pytest.raises(DesignError, match="embedded model's world"):
        design_edit(picture, "Remove the red circle.")


def test_blueprints_are_those_of_the_world(samples):
    for sample in samples:
        parts, true = design_edit(sample.source, sample.instruction).split("\n"), sample.blueprint.split("\n")
        assert (parts[0], parts[3:]) == (true[0], true[3:])
        # The second and third list the same shapes, in reading order.
        for part, known in zip(parts[1:3], true[1:3]):
            assert sorted(re.split("[.,:]", part)) == sorted(re.split("[.,:]", known))


def test_words_of_people_are_understood():
    design = design_edit(SCENE.render(), "  please PAINT the red circle   purple! ")
    assert "The red circle in the top left becomes purple" in design


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        ("Make it nicer", "plain edits of its world only"),
        ("Remove the green square.", "no green square in the picture. It shows a small red circle"),
        ("Remove the large red circle.", "no large red circle"),
        ("Remove the red circle at the bottom.", "no red circle at the bottom"),
        ("Put a small cyan star in the middle.", "There is a shape in the center already. There is room at the top,"),
        ("Replace the red circle with a large blue square.", "of its size"),
    ],
)
def test_what_cannot_be_done_is_told(instruction, words):
    with pytest.raises(DesignError, match=words):
        design_edit(SCENE.render(), instruction)


def test_it_designs_within_a_pipeline(samples):
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    pipe.designer = ShapesDesigner()
    sample = samples[0]
    output = pipe(sample.source, sample.instruction, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert output.blueprints == [design_edit(sample.source, sample.instruction)]
