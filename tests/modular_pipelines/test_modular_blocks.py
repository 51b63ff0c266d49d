"""The blocks paint what the pipelines paint, run on their own, and can be swapped and left out."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, InputParam, ModularPipelineBlocks, OutputParam
from modular_pairs import Pair, make_modular

from diffusers_dim import TINY_SHAPES, DIMEditBlocks, DIMEditPipeline, SelfDesigner
from diffusers_dim.tiny import sample_edits


PROMPTS = ["Make the red circle blue.", "Add a small green square in the upper left corner, please."]
SIZE = {"height": 32, "width": 32}
EDITS = {
    "size": {"prompt": PROMPTS[0], "height": 32, "width": 64},
    "nearest bin": {"prompt": PROMPTS[0]},
    "own ratio": {"prompt": PROMPTS[0], "use_resolution_binning": False},
    "batch of prompts": {"prompt": PROMPTS, **SIZE},
    "pictures a prompt": {"prompt": PROMPTS, "num_images_per_prompt": 2, **SIZE},
    "a generator a picture": {"prompt": PROMPTS, "seeds": [3, 4], **SIZE},
    "blueprint": {"prompt": PROMPTS[0], "blueprint": "A blue circle on grey.", **SIZE},
    "blueprint alone": {"blueprint": "A blue circle on grey.", **SIZE},
    "blueprint of one": {"prompt": PROMPTS, "blueprint": [None, "A blue circle."], **SIZE},
    "negative prompts": {"prompt": PROMPTS, "negative_prompt": ["", "a very dark picture of nothing"], **SIZE},
    "few condition tokens": {"prompt": PROMPTS[0], "max_sequence_length": 4, **SIZE},
}


@pytest.mark.parametrize("inputs", EDITS.values(), ids=EDITS)
def test_edits_are_those_of_the_pipeline_bit_for_bit(edit, source, inputs):
    expected, found = edit.paint(image=source, **inputs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs", [{}, {"height": 32, "width": 64}, {"num_images_per_prompt": 2, **SIZE}])
def test_pictures_of_text_are_those_of_the_pipeline_bit_for_bit(t2i, inputs):
    expected, found = t2i.paint(prompt=PROMPTS, negative_prompt=["", "dark"], **inputs)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_output_types_are_those_of_the_pipeline(edit, source, output_type):
    expected, found = edit.paint(image=source, prompt=PROMPTS[0], output_type=output_type, **SIZE)
    assert type(found) is type(expected)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_published_picture(edit, golden_edit, source):
    settings = golden_edit.settings
    edit.modular.update_components(guider=edit.modular.guider.new(guidance_scale=settings["guidance_scale"]))
    images = edit.call_blocks(
        image=source,
        prompt=settings["prompt"],
        height=settings["res"],
        width=settings["res"],
        num_inference_steps=settings["steps"],
        seeds=settings["seed"],
        output_type="pt",
    )
    expected = (golden_edit.tensors["image"] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images, expected, atol=5e-4, rtol=0)


def test_embedded_model_edits_as_its_pipeline_does():
    sample = sample_edits(1, seed=1)[0]
    modular = DIMEditBlocks().init_pipeline(TINY_SHAPES)
    modular.load_components(dtype=torch.float32)
    pair = Pair(DIMEditPipeline.from_pretrained(TINY_SHAPES), modular)
    for text in ({"prompt": sample.instruction}, {"blueprint": sample.blueprint}):
        expected, found = pair.paint(image=sample.source, num_inference_steps=3, output_type="pil", **text)
        assert found[0].tobytes() == expected[0].tobytes()


def test_noise_goes_in_and_latents_come_out(edit, source):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    inputs = {"image": source, "prompt": PROMPTS[0], "latents": noise, **SIZE}
    expected = edit.call_pipe(**inputs)
    assert torch.equal(edit.call_blocks(output="latents", **inputs, seeds=1), expected)


def test_scheduler_of_other_sigmas_and_of_noise_in_each_step(edit, source):
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    pair = edit._replace(pipe=DIMEditPipeline(**{**edit.pipe.components, "scheduler": scheduler}))
    pair.modular.update_components(scheduler=scheduler, guider=pair.modular.guider.new(guidance_scale=7.5))
    expected, found = pair.paint(image=source, prompt=PROMPTS, sigmas=[1.0, 0.6, 0.2], **SIZE)
    assert torch.equal(found, expected)


def test_own_model_designs_and_sees_the_picture_once(edit, source):
    views = []
    handle = edit.pipe.text_encoder.model.visual.register_forward_hook(lambda *_: views.append(1))
    pair = Pair(DIMEditPipeline(**edit.pipe.components, default_guidance_scale=4.0), edit.modular)
    pair.modular.update_components(guider=pair.modular.guider.new(guidance_scale=4.0))
    for pipe in pair:
        pipe.designer = SelfDesigner(pipe, on_failure="instruction", max_new_tokens=4)
    expected, found = pair.paint(image=source, prompt=PROMPTS[0], **SIZE)
    handle.remove()
    assert torch.equal(found, expected)
    assert len(views) == len(pair)


class Wordy:
    """A designer that is any object with the two methods."""

    def design(self, images, instructions):
        return [f"{text} All else stays." for text in instructions]

    def rewrite(self, prompts):
        return [f"{text} On grey." for text in prompts]


def test_designer_of_the_pipeline_writes_what_is_painted_from(edit, source):
    edit.modular.designer = Wordy()
    found = edit.call_blocks(output=["images", "blueprint"], image=source, prompt=PROMPTS, **SIZE)
    designed = [f"{text} All else stays." for text in PROMPTS]
    assert found["blueprint"] == designed
    assert torch.equal(found["images"], edit.call_pipe(image=source, prompt=PROMPTS, blueprint=designed, **SIZE))


def test_designer_writes_only_what_is_not_given(edit, source):
    edit.modular.designer = Wordy()
    found = edit.call_blocks("blueprint", image=source, prompt=PROMPTS, blueprint=["A blue circle.", None], **SIZE)
    assert found == ["A blue circle.", f"{PROMPTS[1]} All else stays."]


def test_designer_rewrites_prompts_of_text_to_image(t2i):
    t2i.modular.designer = Wordy()
    found = t2i.call_blocks(output=["images", "blueprint"], prompt=PROMPTS[0], **SIZE)
    assert found["blueprint"] == [f"{PROMPTS[0]} On grey."]
    assert torch.equal(found["images"], t2i.call_pipe(prompt=f"{PROMPTS[0]} On grey.", **SIZE))


class ShoutStep(ModularPipelineBlocks):
    """A designer block of a user's own: it needs nothing but the prompt, and takes one more input."""

    @property
    def inputs(self):
        return [InputParam("prompt", required=True), InputParam("marks", default="!")]

    @property
    def intermediate_outputs(self):
        return [OutputParam("blueprint")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.blueprint = block_state.prompt.upper() + block_state.marks
        self.set_block_state(state, block_state)
        return components, state


def test_designer_block_can_be_swapped(edit_pipe, source):
    blocks = DIMEditBlocks()
    blocks.sub_blocks["designer"] = ShoutStep()
    pair = Pair(edit_pipe, make_modular(blocks, edit_pipe))
    found = pair.call_blocks(image=source, prompt=PROMPTS[0], marks="?!", **SIZE)
    assert torch.equal(found, pair.call_pipe(image=source, prompt=f"{PROMPTS[0].upper()}?!", **SIZE))


def test_designer_block_can_be_left_out(edit_pipe, source):
    blocks = DIMEditBlocks()
    del blocks.sub_blocks["designer"]
    pair = Pair(edit_pipe, make_modular(blocks, edit_pipe))
    expected, found = pair.paint(image=source, prompt=PROMPTS[0], **SIZE)
    assert torch.equal(found, expected)
    expected, found = pair.paint(image=source, blueprint="A blue circle.", **SIZE)
    assert torch.equal(found, expected)


def test_blocks_run_one_by_one_and_hand_on_what_they_made(edit, source):
    blocks = edit.modular.blocks.sub_blocks
    alone = {name: make_modular(block, edit.pipe) for name, block in blocks.items()}
    encoded = alone["text_encoder"](
        image=source, prompt=PROMPTS, **SIZE, output=["prompt_embeds", "prompt_embeds_mask"] + NEGATIVE
    )
    image_latents = alone["vae_encoder"](image=source, **SIZE, output="image_latents")
    assert len(encoded["prompt_embeds"]) == 2 and len(image_latents) == 1
    started = alone["before_denoise"](
        prompt_embeds=encoded["prompt_embeds"],
        image_latents=image_latents,
        num_inference_steps=2,
        num_images_per_prompt=2,
        generator=torch.Generator().manual_seed(0),
        output=["timesteps", "num_inference_steps", "latents", "image_latents"],
    )
    latents = alone["denoise"](**encoded, **started, output="latents")
    images = alone["decode"](latents=latents, output_type="pt", output="images")
    expected = edit.call_pipe(image=source, prompt=PROMPTS, num_images_per_prompt=2, output_type="pt", **SIZE)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)  # the source is encoded once here, not twice


NEGATIVE = ["negative_prompt_embeds", "negative_prompt_embeds_mask"]


def test_block_alone_loads_only_its_own_components(edit_folder):
    pipe = DIMEditBlocks().sub_blocks["text_encoder"].init_pipeline(edit_folder)
    pipe.load_components()
    assert sorted(pipe.components) == ["connector", "guider", "processor", "text_encoder"]
    assert all(part is not None for part in pipe.components.values())


def test_block_alone_knows_the_model_s_size(edit_folder, edit, source):
    for name in ("designer", "text_encoder", "vae_encoder"):
        pipe = DIMEditBlocks().sub_blocks[name].init_pipeline(edit_folder)
        assert pipe.image_processor.base_size == edit.pipe.image_processor.base_size
        assert pipe.vae_scale_factor == edit.pipe.vae_scale_factor


BAD_INPUTS = {
    "no picture": ({"image": None}, "'image' is missing"),
    "no words": ({"prompt": None}, "Give `prompt`, or a `blueprint` for each image"),
    "an empty prompt": ({"prompt": " "}, "`prompt` has to hold at least one non-empty text"),
    "an empty blueprint": ({"blueprint": ""}, "`blueprint` has to hold at least one non-empty text"),
    "blueprints too many": ({"blueprint": ["x", "y"]}, "2 blueprints for 1"),
    "one side": ({"width": None}, "Give both `height` and `width` or neither"),
    "an odd size": ({"width": 33}, "positive multiples of 4"),
    "negative prompts too many": ({"negative_prompt": ["x", "y"]}, "2 negative prompts for 1 prompts"),
    "no token": ({"max_sequence_length": 0}, "`max_sequence_length` has to be at least 1, but is 0"),
    "no step": ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1, but is 0"),
    "no picture a prompt": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` has to be at least 1, but is 0"),
    "generators too many": ({"seeds": [1, 2]}, "2 generators for 1 images"),
    "other latents": ({"latents": torch.zeros(1, 4, 9, 9)}, r"`latents` have to be of shape \(1, 4, 8, 8\)"),
    "an output type": ({"output_type": "jpeg"}, "`output_type` has to be one of .* but is 'jpeg'"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_is_named(edit, source, inputs, message):
    with pytest.raises(ValueError, match=message):
        edit.call_blocks(**{"image": source, "prompt": PROMPTS[0], **SIZE, **inputs})


def test_what_is_not_loaded_is_named(edit_folder):
    pipe = DIMEditBlocks().sub_blocks["decode"].init_pipeline(edit_folder)
    with pytest.raises(ValueError, match=r"DIMDecoderStep needs \['vae'\], which are not loaded"):
        pipe(latents=torch.zeros(1, 4, 8, 8))


def test_model_of_the_other_kind_is_named(t2i_pipe, source):
    modular = make_modular(DIMEditBlocks(), t2i_pipe)
    with pytest.raises(ValueError, match="DIMEditModularPipeline needs a transformer with 8 input channels"):
        modular(image=source, prompt=PROMPTS[0], **SIZE)


def test_sources_that_fit_no_prompts_are_named(edit, source):
    blocks = edit.modular.blocks.sub_blocks
    embeds = torch.zeros(2, 3, edit.pipe.transformer.config.caption_channels)
    with pytest.raises(ValueError, match="`image_latents` of 3 sources for 2 prompts"):
        make_modular(blocks["before_denoise"], edit.pipe)(prompt_embeds=embeds, image_latents=torch.zeros(3, 4, 8, 8))
