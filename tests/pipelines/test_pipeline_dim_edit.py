"""What an edit adds to a call: its source picture, its size, and its blueprint."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pipeline_checks import assert_differ, assert_same, generators

from diffusers_dim import DIMEditPipeline


class Designer:
    """Writes a blueprint from the source's size and the instruction, and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def design(self, images: list[Image.Image], instructions: list[str]) -> list[str]:
        self.asked.append((images, instructions))
        return [f"{image.width} pixels. {text}" for image, text in zip(images, instructions)]


class Blueprint:
    """A blueprint that is more than its text."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text


@pytest.fixture
def designing(edit_pipe, own) -> DIMEditPipeline:
    pipe = own(edit_pipe)
    pipe.designer = Designer()
    return pipe


# Sources


def test_sources_of_unequal_shapes_and_prompts_of_unequal_lengths_equal_each_alone(edit_pipe, paint, source):
    images = [source, source.resize((50, 90)), source.rotate(90).resize((200, 33))]
    prompts = ["Make it red.", "Remove the small green square to the left of the big blue star.", "Add a star."]
    together = paint(edit_pipe, image=images, prompt=prompts, generator=generators(0, 1, 2))
    for seed, (image, prompt) in enumerate(zip(images, prompts)):
        alone = paint(edit_pipe, image=image, prompt=prompt, generator=generators(seed))
        assert_same(together[seed : seed + 1], alone)


def test_one_source_serves_all_prompts(edit_pipe, paint, source):
    prompts = ["Make it red.", "Add a star."]
    one = paint(edit_pipe, image=source, prompt=prompts, generator=generators(0, 1))
    assert_same(one, paint(edit_pipe, image=[source] * 2, prompt=prompts, generator=generators(0, 1)), 0)


def test_one_prompt_serves_all_sources(edit_pipe, paint, source):
    images = [source, ImageOps.mirror(source)]
    one = paint(edit_pipe, image=images, prompt="Make it red.", generator=generators(0, 1))
    assert_same(one, paint(edit_pipe, image=images, prompt=["Make it red."] * 2, generator=generators(0, 1)), 0)


def test_pictures_of_one_source_lie_together(edit_pipe, paint, source):
    images = [source, ImageOps.mirror(source)]
    inputs = {"prompt": "Make it red.", "num_images_per_prompt": 2}
    together = paint(edit_pipe, image=images, generator=generators(0, 1, 2, 3), **inputs)
    for index in range(2):
        alone = paint(edit_pipe, image=images[index], generator=generators(2 * index, 2 * index + 1), **inputs)
        assert_same(together[2 * index : 2 * index + 2], alone)


def test_painter_and_reader_both_see_the_source(edit_pipe, paint, source, own):
    other = ImageOps.mirror(source)
    embeddings = edit_pipe.encode_prompt("Make it red.", [source], 32, 32)[0].detach()
    other_embeddings = edit_pipe.encode_prompt("Make it red.", [other], 32, 32)[0].detach()
    assert_differ(embeddings, other_embeddings)
    seen = paint(edit_pipe, image=source, prompt_embeds=embeddings)
    assert_differ(paint(edit_pipe, image=other, prompt_embeds=embeddings), seen)
    assert_differ(paint(edit_pipe, image=source, prompt_embeds=other_embeddings), seen)


@pytest.mark.parametrize(
    "kind",
    [
        lambda image: np.asarray(image),
        lambda image: np.asarray(image, dtype=np.float32) / 255,
        lambda image: np.asarray(image)[None],
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1),
        lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255,
        lambda image: [np.asarray(image)],
        lambda image: image.convert("RGBA"),
    ],
    ids=["array", "float array", "array batch", "tensor", "float tensor batch", "list", "RGBA"],
)
def test_source_of_any_kind_is_the_same_picture(edit_pipe, paint, source, kind):
    assert_same(paint(edit_pipe, image=kind(source)), paint(edit_pipe, image=source), 0)


def test_rotated_source_is_edited_upright(edit_pipe, paint, source):
    rotated = source.transpose(Image.Transpose.ROTATE_90)
    rotated.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert_same(paint(edit_pipe, image=rotated), paint(edit_pipe, image=source), 0)


def test_source_is_not_changed(edit_pipe, paint, source):
    before = source.tobytes()
    paint(edit_pipe, image=source)
    assert source.tobytes() == before


def test_source_latents_that_a_callback_returns_replace_the_pipelines(edit_pipe, paint):
    def callback(pipe, step, timestep, tensors):
        return {"image_latents": torch.zeros_like(tensors["image_latents"])}

    inputs = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["image_latents"]}
    assert_differ(paint(edit_pipe, **inputs), paint(edit_pipe))


# Size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (64, 64)), ((90, 60), (52, 76)), ((60, 90), (76, 52)), ((400, 100), (32, 128))],
)
def test_size_defaults_to_the_nearest_aspect_ratio(edit_pipe, paint, source, size, expected):
    image = source.resize(size)
    painted = paint(edit_pipe, image=image, height=None, width=None, output_type="pt", num_inference_steps=1)
    assert painted.shape[2:] == expected


def test_size_without_binning_keeps_the_sources_own_ratio(edit_pipe, paint, source):
    image = source.resize((130, 70))
    inputs = {"height": None, "width": None, "output_type": "pt", "num_inference_steps": 1}
    painted = paint(edit_pipe, image=image, use_resolution_binning=False, **inputs)
    assert painted.shape[2:] == (48, 88)  # 64 x 64 pixels of area at 130:70, in multiples of 4
    assert abs(88 / 48 - 130 / 70) < abs(paint(edit_pipe, image=image, **inputs).shape[3] / 48 - 130 / 70) + 0.1


def test_sources_of_one_bin_need_no_size(edit_pipe, paint, source):
    images = [source.resize((90, 60)), source.resize((180, 121))]
    assert paint(edit_pipe, image=images, height=None, width=None, num_inference_steps=1).shape == (2, 4, 13, 19)


def test_sources_of_different_bins_raise_without_a_size(edit_pipe, paint, source):
    images = [source, source.resize((90, 60))]
    with pytest.raises(ValueError, match=r"\[\(52, 76\), \(64, 64\)\]: give `height` and `width`, or edit them in"):
        paint(edit_pipe, image=images, height=None, width=None)


def test_longest_source_that_is_allowed_is_edited(edit_pipe, paint):
    image = Image.new("RGB", (20 * 199, 20), "red")
    height, width = edit_pipe.get_height_width([image])
    assert (height, width) == (4, 800)
    assert paint(edit_pipe, image=image, height=None, width=None, num_inference_steps=1).isfinite().all()


# Blueprints


def test_prompt_goes_in_verbatim_without_a_blueprint(edit_pipe, source):
    output = edit_pipe(source, "Make it red.", height=32, width=32, num_inference_steps=1)
    assert output.blueprints == [None]


def test_blueprint_is_read_in_the_prompts_place(edit_pipe, paint):
    blueprint = "1. Edit Instruction: make it red."
    painted = paint(edit_pipe, prompt="Make it red.", blueprint=blueprint)
    assert_same(painted, paint(edit_pipe, prompt=blueprint), 0)
    assert_differ(painted, paint(edit_pipe, prompt="Make it red."))


def test_blueprint_needs_no_prompt(edit_pipe, paint):
    assert_same(paint(edit_pipe, prompt=None, blueprint="A plan."), paint(edit_pipe, prompt="A plan."), 0)


def test_blueprints_are_given_one_a_source(edit_pipe, paint, source):
    images = [source, ImageOps.mirror(source)]
    plans = ["A plan.", "Another and much longer plan."]
    painted = paint(edit_pipe, image=images, prompt="Make it red.", blueprint=plans, generator=generators(0, 1))
    assert_same(painted, paint(edit_pipe, image=images, prompt=plans, generator=generators(0, 1)), 0)


def test_output_says_which_blueprints_were_used(edit_pipe, source):
    size = {"height": 32, "width": 32, "num_inference_steps": 1}
    assert edit_pipe([source] * 2, "Make it red.", blueprint="A plan.", **size).blueprints == ["A plan."] * 2
    assert edit_pipe(source, blueprint=["A plan."], return_dict=False, **size)[1] == ["A plan."]


def test_designer_writes_what_the_painter_reads(designing, paint, source):
    wide = source.resize((90, 64))
    painted = paint(designing, image=[source, wide], prompt="Make it red.", generator=generators(0, 1))
    images, instructions = designing.designer.asked[0]
    assert [image.size for image in images] == [source.size, (90, 64)] and instructions == ["Make it red."] * 2
    plans = [f"{source.width} pixels. Make it red.", "90 pixels. Make it red."]
    designing.designer = None
    assert_same(painted, paint(designing, image=[source, wide], prompt=plans, generator=generators(0, 1)), 0)


def test_designers_blueprints_are_in_the_output(designing, source):
    output = designing(source, "Make it red.", height=32, width=32, num_inference_steps=1)
    assert output.blueprints == [f"{source.width} pixels. Make it red."]


def test_designer_sees_the_source_as_a_person_does(designing, paint, source):
    paint(designing, image=np.asarray(source.convert("RGBA")))
    (images, _), *_ = designing.designer.asked
    assert images[0].mode == "RGB" and images[0].tobytes() == source.tobytes()


def test_designer_is_not_asked_for_a_given_blueprint(designing, paint):
    paint(designing, blueprint="A plan.")
    assert designing.designer.asked == []


def test_designer_is_not_asked_for_embeddings(designing, paint):
    paint(designing, prompt_embeds=torch.zeros(1, 5, 48))
    assert designing.designer.asked == []


def test_designer_is_not_asked_before_all_inputs_are_checked(designing, paint):
    for inputs in ({"num_inference_steps": 0}, {"sigmas": [0.9]}, {"latents": torch.zeros(1)}):
        with pytest.raises(ValueError):
            paint(designing, **inputs)
    assert designing.designer.asked == []


def test_blueprint_that_is_more_than_text_is_read_as_its_text(designing, paint):
    designing.designer.design = lambda images, instructions: [Blueprint("A plan.")]
    painted = paint(designing, prompt="Make it red.")
    designing.designer = None
    assert_same(painted, paint(designing, prompt="A plan."), 0)


def test_designer_of_too_few_blueprints_raises(designing, paint, source):
    designing.designer.design = lambda images, instructions: ["A plan."]
    with pytest.raises(ValueError, match="1 texts for 2 prompts"):
        paint(designing, image=[source] * 2)


# Bad input

GREY = Image.new("RGB", (8, 8), "grey")
BAD_INPUTS = {
    "no source": ({"image": None}, "`image` is what to edit and cannot be None: use DIMPipeline"),
    "path": ({"image": "picture.png"}, "a PIL image, a NumPy array, a torch tensor or a list of them, but is str"),
    "empty list": ({"image": []}, "`image` is an empty list"),
    "empty batch": ({"image": torch.zeros(0, 3, 8, 8)}, r"a batch of no images, of shape \(0, 3, 8, 8\)"),
    "0 pixels": ({"image": Image.new("RGB", (0, 8))}, "0x8 pixels is empty"),
    "too long a source": ({"image": Image.new("RGB", (1, 201))}, "1x201 pixels is beyond the aspect ratio of 200:1"),
    "values out of range": ({"image": np.full((8, 8, 3), -1.0)}, r"in \[0, 1\], but one lies in \[-1.0, -1.0\]"),
    "more sources than prompts": ({"image": [GREY] * 2, "prompt": ["x"]}, "2 images for 1 prompts"),
    "more prompts than sources": ({"image": [GREY] * 2, "prompt": ["x"] * 3}, "2 images for 3 prompts"),
    "more embeddings than sources": (
        {"image": [GREY] * 2, "prompt_embeds": torch.zeros(3, 5, 48)},
        "2 images for 3 prompts",
    ),
    "blueprint and embeddings": (
        {"blueprint": "x", "prompt_embeds": torch.zeros(1, 5, 48)},
        "either `blueprint` or `prompt_embeds`, not both",
    ),
    "empty blueprint": ({"blueprint": " "}, "`blueprint` has to hold at least one non-empty text, but is ' '"),
    "empty blueprint among others": ({"blueprint": ["x", ""]}, "`blueprint` has to hold at least one non-empty text"),
    "no blueprints": ({"blueprint": []}, r"`blueprint` has to hold at least one non-empty text, but is \[\]"),
    "blueprints too many": ({"blueprint": ["x", "y"]}, "2 blueprints for 1 images"),
    "source latents unknown to the callback": (
        {"callback_on_step_end_tensor_inputs": ["image"]},
        r"among \['latents', 'prompt_embeds', 'negative_prompt_embeds', 'image_latents'\], but holds \['image'\]",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_raises_what_was_given_and_what_is_allowed(edit_pipe, paint, inputs, message):
    with pytest.raises(ValueError, match=message):
        paint(edit_pipe, **inputs)


def test_edit_with_a_text_to_image_checkpoint_raises(t2i_pipe, source):
    wrong = DIMEditPipeline(**t2i_pipe.components)
    with pytest.raises(ValueError, match=r"DIMEditPipeline needs .* 8 input channels .* has 4: .* text-to-image kind"):
        wrong(source, "Make it red.")
