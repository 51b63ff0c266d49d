"""What both pipelines do: all of a call but the source picture, and what diffusers does with a pipeline."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipeline_checks import assert_differ, assert_same, generators
from safetensors.torch import load_file

from diffusers_dim import DIMConnector, DIMEditPipeline, DIMPipeline, DIMPipelineOutput, DIMTransformer2DModel


PROMPTS = ["Make it red.", "Remove the small green square that lies to the left of the big blue star.", "Add a star."]
LORA = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


@contextmanager
def recorded_batch_sizes(pipe: DIMPipeline):
    """How many pictures each forward of the transformer gave."""
    batch_sizes = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output[0])))
    try:
        yield batch_sizes
    finally:
        handle.remove()


@torch.no_grad()
def encode(pipe: DIMPipeline, source: Image.Image, prompt: str | list[str], **inputs) -> dict[str, torch.Tensor]:
    """`encode_prompt`'s outputs under the names that a call takes them by."""
    number = 1 if isinstance(prompt, str) else len(prompt)
    if isinstance(pipe, DIMEditPipeline):
        inputs = {"image": [source] * number, "height": 32, "width": 32, **inputs}
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    return dict(zip(names, pipe.encode_prompt(prompt, **inputs)))


def lora_folder(pipe: DIMPipeline, folder, seed: int = 0):
    """Adds a random adapter to the transformer and saves it as SANA's pipeline does."""
    torch.manual_seed(seed)
    pipe.transformer.add_adapter(LORA)
    SanaPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


# Batches


def test_prompts_of_unequal_lengths_equal_each_alone(pipe, paint):
    together = paint(pipe, prompt=PROMPTS, generator=generators(0, 1, 2))
    for seed, prompt in enumerate(PROMPTS):
        assert_same(together[seed : seed + 1], paint(pipe, prompt=prompt, generator=generators(seed)))


def test_prompts_of_unequal_lengths_equal_each_alone_without_guidance(pipe, paint):
    together = paint(pipe, prompt=PROMPTS, generator=generators(0, 1, 2), guidance_scale=1.0)
    for seed, prompt in enumerate(PROMPTS):
        alone = paint(pipe, prompt=prompt, generator=generators(seed), guidance_scale=1.0)
        assert_same(together[seed : seed + 1], alone)


def test_negative_prompts_with_empty_ones_among_them_equal_each_alone(pipe, paint):
    negative = ["dark", "", "a blurred picture with very, very many artefacts of compression in it"]
    together = paint(pipe, prompt=PROMPTS, negative_prompt=negative, generator=generators(0, 1, 2))
    for seed, (prompt, text) in enumerate(zip(PROMPTS, negative)):
        alone = paint(pipe, prompt=prompt, negative_prompt=text or None, generator=generators(seed))
        assert_same(together[seed : seed + 1], alone)


def test_negative_prompt_serves_all_prompts(pipe, paint):
    one = paint(pipe, prompt=PROMPTS, negative_prompt="dark", generator=generators(0, 1, 2))
    assert_same(one, paint(pipe, prompt=PROMPTS, negative_prompt=["dark"] * 3, generator=generators(0, 1, 2)), 0)


def test_pictures_of_one_prompt_lie_together(pipe, paint):
    images = paint(pipe, prompt=PROMPTS[:2], num_images_per_prompt=2, generator=generators(0, 1, 2, 3))
    alone = [
        paint(pipe, prompt=PROMPTS[index // 2], generator=generators(index))  # prompts 0, 0, 1, 1
        for index in range(4)
    ]
    assert_same(images, torch.cat(alone))


def test_one_generator_for_a_batch_repeats(pipe, paint):
    first = paint(pipe, prompt=PROMPTS, generator=torch.Generator().manual_seed(7))
    assert_same(first, paint(pipe, prompt=PROMPTS, generator=torch.Generator().manual_seed(7)), 0)
    assert_differ(first[:1], first[1:2])


def test_given_latents_are_the_noise(pipe, paint):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert_same(paint(pipe, latents=noise), paint(pipe, generator=torch.Generator().manual_seed(5)), 0)


# Guidance


@pytest.mark.parametrize(("guidance_scale", "batch_size"), [(1.0, 1), (0.0, 1), (4.0, 2)])
def test_one_forward_a_step_of_twice_the_batch_under_guidance(pipe, paint, guidance_scale, batch_size):
    with recorded_batch_sizes(pipe) as batch_sizes:
        paint(pipe, guidance_scale=guidance_scale, num_inference_steps=3)
    assert batch_sizes == [batch_size] * 3


def test_empty_negative_prompt_is_the_null_condition(pipe, paint):
    assert_same(paint(pipe, negative_prompt=""), paint(pipe, negative_prompt=None), 0)


def test_negative_prompt_changes_the_picture(pipe, paint):
    assert_differ(paint(pipe, negative_prompt="dark"), paint(pipe))


def test_negative_prompt_has_no_effect_without_guidance(pipe, paint):
    guided_off = paint(pipe, guidance_scale=1.0)
    assert_same(paint(pipe, guidance_scale=1.0, negative_prompt="dark"), guided_off, 0)


def test_guidance_scale_defaults_to_the_checkpoints_own(pipe, own, paint):
    assert pipe.config.default_guidance_scale == 7.5
    assert_same(paint(pipe, guidance_scale=None), paint(pipe, guidance_scale=7.5), 0)
    unguided = own(pipe, default_guidance_scale=1.0)
    with recorded_batch_sizes(unguided) as batch_sizes:
        paint(unguided, guidance_scale=None)
    assert batch_sizes == [1, 1]


# Embeddings


def test_embeddings_equal_their_prompts(pipe, paint, source):
    embeddings = encode(pipe, source, PROMPTS, negative_prompt=["dark", "", "light"])
    from_embeddings = paint(pipe, **embeddings, generator=generators(0, 1, 2))
    negative = ["dark", "", "light"]
    assert_same(from_embeddings, paint(pipe, prompt=PROMPTS, negative_prompt=negative, generator=generators(0, 1, 2)))


def test_embeddings_without_masks_hold_a_token_everywhere(pipe, paint, source):
    embeddings = encode(pipe, source, PROMPTS[0])
    del embeddings["prompt_attention_mask"], embeddings["negative_prompt_attention_mask"]
    assert_same(paint(pipe, **embeddings), paint(pipe, prompt=PROMPTS[0]), 0)


def test_prompt_embeds_are_guided_by_the_null_condition(pipe, paint, source):
    embeddings = encode(pipe, source, PROMPTS, do_classifier_free_guidance=False)
    assert embeddings.pop("negative_prompt_embeds") is None
    assert embeddings.pop("negative_prompt_attention_mask") is None
    from_embeddings = paint(pipe, **embeddings, generator=generators(0, 1, 2))
    assert_same(from_embeddings, paint(pipe, prompt=PROMPTS, generator=generators(0, 1, 2)))


def test_prompt_embeds_with_a_negative_prompt(pipe, paint, source):
    prompt_embeds = encode(pipe, source, PROMPTS[0])["prompt_embeds"]
    assert_same(
        paint(pipe, prompt_embeds=prompt_embeds, negative_prompt="dark"),
        paint(pipe, prompt=PROMPTS[0], negative_prompt="dark"),
        0,
    )


def test_prompt_with_negative_embeddings_of_another_length(pipe, paint, source):
    longer = encode(pipe, source, PROMPTS[1])["prompt_embeds"]
    assert_same(
        paint(pipe, prompt=PROMPTS[0], negative_prompt_embeds=longer),
        paint(pipe, prompt=PROMPTS[0], negative_prompt=PROMPTS[1]),
    )


def test_embeddings_of_another_dtype_are_cast(pipe, paint, source):
    embeddings = encode(pipe, source, PROMPTS[0])
    halves = {name: value.bfloat16() for name, value in embeddings.items() if name.endswith("embeds")}
    rounded = {name: value.float() for name, value in halves.items()}
    assert_same(paint(pipe, **halves), paint(pipe, **rounded), 0)


def test_encode_prompt_needs_the_text_side_alone_and_a_call_the_rest(pipe, own, paint, source):
    text_side = own(pipe, transformer=None, vae=None, scheduler=None)
    painter = own(pipe, text_encoder=None, processor=None, connector=None)
    embeddings = encode(text_side, source, PROMPTS[0], negative_prompt="dark")
    assert_same(paint(painter, **embeddings), paint(pipe, prompt=PROMPTS[0], negative_prompt="dark"), 0)


def test_without_guidance_prompt_embeds_are_all_that_a_call_needs(pipe, own, paint, source):
    painter = own(pipe, text_encoder=None, processor=None, connector=None)
    prompt_embeds = encode(pipe, source, PROMPTS[0])["prompt_embeds"]
    assert_same(
        paint(painter, prompt_embeds=prompt_embeds, guidance_scale=1.0),
        paint(pipe, prompt=PROMPTS[0], guidance_scale=1.0),
        0,
    )


def test_connector_alone_guides_embeddings(pipe, own, paint, source):
    painter = own(pipe, text_encoder=None, processor=None)
    prompt_embeds = encode(pipe, source, PROMPTS[0])["prompt_embeds"]
    assert_same(paint(painter, prompt_embeds=prompt_embeds), paint(pipe, prompt=PROMPTS[0]), 0)


def test_pipeline_without_its_text_side_is_saved_and_loaded(pipe, own, paint, source, tmp_path):
    own(pipe, text_encoder=None, processor=None, connector=None).save_pretrained(tmp_path)
    painter = type(pipe).from_pretrained(tmp_path)
    assert painter.text_encoder is None and painter.processor is None and painter.connector is None
    embeddings = encode(pipe, source, PROMPTS[0])
    assert_same(paint(painter, **embeddings), paint(pipe, prompt=PROMPTS[0]), 0)


def test_too_long_a_condition_keeps_its_last_tokens(pipe, source):
    whole = encode(pipe, source, PROMPTS[1])
    last = encode(pipe, source, PROMPTS[1], max_sequence_length=5)
    assert_same(last["prompt_embeds"], whole["prompt_embeds"][:, -5:], 1e-6)
    assert_same(last["negative_prompt_embeds"], whole["negative_prompt_embeds"][:, :5], 0)


def test_null_condition_bounds_a_condition(pipe, own, paint, source):
    short = DIMConnector(hidden_size=32, caption_channels=48, max_sequence_length=6).eval()
    bounded = own(pipe, connector=short)
    assert encode(bounded, source, PROMPTS[1])["prompt_embeds"].shape[1] == 6
    assert paint(bounded, prompt=PROMPTS[1]).isfinite().all()


# Callbacks


def test_callback_is_given_every_tensor_it_may_ask_for(pipe, paint):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {}

    paint(
        pipe,
        prompt=PROMPTS[:2],
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
    )
    assert [step for step, _, _ in seen] == [0, 1]
    assert [timestep for _, timestep, _ in seen] == pipe.scheduler.timesteps.tolist()
    length = seen[0][2]["prompt_embeds"][1]
    latents, embeddings = (2, 4, 8, 8), (2, length, 48)
    expected = {"latents": latents, "prompt_embeds": embeddings, "negative_prompt_embeds": embeddings}
    if isinstance(pipe, DIMEditPipeline):
        expected["image_latents"] = latents
    assert all(shapes == expected for _, _, shapes in seen)


def test_callback_is_given_latents_by_default(pipe, paint):
    names = []
    paint(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: names.append(list(tensors)))
    assert names == [["latents"], ["latents"]]


def test_latents_that_a_callback_returns_replace_the_pipelines(pipe, paint):
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    assert paint(pipe, callback_on_step_end=callback).abs().max() == 0


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_a_callback_returns_replace_the_pipelines(pipe, paint, name):
    def callback(pipe, step, timestep, tensors):
        return {name: tensors[name] * 2}

    changed = paint(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=[name])
    assert_differ(changed, paint(pipe))


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_that_a_callback_changes_in_place_are_changed(pipe, paint, name):
    def in_place(pipe, step, timestep, tensors):
        tensors[name].mul_(2)
        return {}

    def replaced(pipe, step, timestep, tensors):
        return {name: tensors[name] * 2}

    inputs = {"callback_on_step_end_tensor_inputs": [name], "num_inference_steps": 3}
    changed = paint(pipe, callback_on_step_end=in_place, **inputs)
    assert_same(changed, paint(pipe, callback_on_step_end=replaced, **inputs), 0)


def test_callback_may_return_nothing(pipe, paint):
    assert_same(paint(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: None), paint(pipe), 0)


def test_guidance_that_a_callback_cuts_off_halves_the_batch(pipe, paint):
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    with recorded_batch_sizes(pipe) as batch_sizes:
        paint(pipe, num_inference_steps=4, callback_on_step_end=cutoff)
    assert batch_sizes == [2, 2, 2, 1]  # the callback comes at the end of step 2 of 0 to 3
    assert pipe.guidance_scale == 0.0


def test_guidance_that_a_callback_turns_off_and_on_again_takes_effect(pipe, paint):
    def switch(pipe, step, timestep, tensors):
        pipe._guidance_scale = [1.0, 1.0, 4.0, 4.0][step]

    with recorded_batch_sizes(pipe) as batch_sizes:
        latents = paint(pipe, num_inference_steps=4, callback_on_step_end=switch)
    assert batch_sizes == [2, 1, 1, 2]
    assert latents.isfinite().all()


def test_guidance_that_a_callback_raises_takes_effect(pipe, paint):
    def raise_guidance(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    raised = paint(pipe, guidance_scale=2.0, callback_on_step_end=raise_guidance)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert_differ(raised, paint(pipe, guidance_scale=2.0))


def test_pipeline_callbacks_are_asked_for_the_tensors_they_take(pipe, paint):
    class Count(PipelineCallback):
        tensor_inputs = ["prompt_embeds"]
        count = 0

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            assert list(callback_kwargs) == self.tensor_inputs
            self.count += 1
            return callback_kwargs

    count = Count(cutoff_step_ratio=1.0)
    paint(pipe, callback_on_step_end=MultiPipelineCallbacks([count]))
    assert count.count == 2


def test_interrupt_stops_the_denoising(pipe, paint):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    with recorded_batch_sizes(pipe) as batch_sizes:
        latents = paint(pipe, num_inference_steps=5, callback_on_step_end=stop)
    assert batch_sizes == [2]
    assert latents.isfinite().all()
    with recorded_batch_sizes(pipe) as batch_sizes:
        paint(pipe)
    assert batch_sizes == [2, 2]  # the next call is not interrupted


def test_current_timestep_is_known_in_a_call_and_none_after(pipe, paint):
    timesteps = []

    def callback(pipe, step, timestep, tensors):
        timesteps.append(int(pipe.current_timestep))

    paint(pipe, callback_on_step_end=callback)
    assert timesteps == pipe.scheduler.timesteps.tolist()
    assert pipe.current_timestep is None


# Outputs


def test_output_types_hold_the_same_picture(pipe, paint):
    tensor = paint(pipe, output_type="pt")
    array = paint(pipe, output_type="np")
    (image,) = paint(pipe, output_type="pil")
    assert tensor.shape == (1, 3, 32, 32) and array.shape == (1, 32, 32, 3)
    assert image.mode == "RGB" and image.size == (32, 32)
    assert 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.asarray(image) / 255, array[0], atol=0.5 / 255 + 1e-6)


def test_output_is_a_dim_pipeline_output(pipe, source):
    inputs = {"image": source} if isinstance(pipe, DIMEditPipeline) else {}
    output = pipe(prompt=PROMPTS[0], height=32, width=32, num_inference_steps=1, **inputs)
    assert isinstance(output, DIMPipelineOutput)
    assert [image.size for image in output.images] == [(32, 32)]


def test_tuple_holds_the_pictures_first(pipe, paint):
    assert_same(paint(pipe, return_dict=False)[0], paint(pipe), 0)


def test_size_is_exactly_that_asked_for(pipe, paint):
    assert paint(pipe, height=36, width=20, output_type="pt").shape == (1, 3, 36, 20)


def test_text_to_image_defaults_to_the_base_size(t2i_pipe, paint):
    assert paint(t2i_pipe, height=None, width=None).shape == (1, 4, 16, 16)
    assert t2i_pipe.image_processor.base_size == 64


# Bad input

EMBEDS = torch.zeros(1, 5, 48)
BAD_INPUTS = {
    "prompt and embeddings": (
        {"prompt": "x", "prompt_embeds": EMBEDS},
        "either `prompt` or `prompt_embeds`, not both",
    ),
    "neither": ({"prompt": None}, "either `prompt` or `prompt_embeds`, not neither"),
    "prompt of another type": ({"prompt": 5}, "`prompt` has to be a str or a list of str, but is 5"),
    "prompts of another type": ({"prompt": ["x", 5]}, "`prompt` has to be a str or a list of str"),
    "empty prompt": ({"prompt": " "}, r"`prompt` has to hold at least one non-empty text, but is \[?' '"),
    "empty prompt among others": ({"prompt": ["x", ""]}, "at least one non-empty text"),
    "no prompts": ({"prompt": []}, r"but is \[\]"),
    "special token in the prompt": ({"prompt": "x<|im_end|>"}, r"must not hold .* \['<\|im_end\|>'\]"),
    "negative prompt of another type": ({"negative_prompt": 5}, "`negative_prompt` has to be a str or a list of str"),
    "negative prompt twice": (
        {"negative_prompt": "x", "negative_prompt_embeds": EMBEDS},
        "either `negative_prompt` or `negative_prompt_embeds`, not both",
    ),
    "negative prompts too many": ({"negative_prompt": ["x", "y"]}, "2 negative prompts for 1 prompts"),
    "negative embeddings too many": (
        {"negative_prompt_embeds": EMBEDS.expand(2, -1, -1)},
        "2 `negative_prompt_embeds` for 1 prompts",
    ),
    "height alone": ({"height": 32, "width": None}, "both `height` and `width` or neither, not height=32"),
    "width alone": ({"height": None, "width": 32}, "both `height` and `width` or neither"),
    "size not of the VAE's": ({"height": 32, "width": 30}, "positive multiples of 4, but are 32 and 30"),
    "negative size": ({"height": -32, "width": 32}, "positive multiples of 4, but are -32 and 32"),
    "no size": ({"height": 0, "width": 32}, "positive multiples of 4, but are 0 and 32"),
    "too long a size": ({"height": 4, "width": 804}, "4x804 pixels .* beyond the aspect ratio of 200:1"),
    "no steps": ({"num_inference_steps": 0}, "`num_inference_steps` has to be at least 1, but is 0"),
    "no timesteps": ({"timesteps": []}, r"`timesteps` has to hold at least one value, but is \[\]"),
    "no sigmas": ({"sigmas": []}, r"`sigmas` has to hold at least one value, but is \[\]"),
    "timesteps of one's own": (
        {"timesteps": [900, 500]},
        "`timesteps` cannot be given to a DPMSolverMultistepScheduler",
    ),
    "sigmas of one's own": ({"sigmas": [0.9, 0.5]}, "does not support custom sigmas"),
    "no pictures": ({"num_images_per_prompt": 0}, "`num_images_per_prompt` has to be at least 1, but is 0"),
    "output type": ({"output_type": "jpg"}, r"one of \['pil', 'np', 'pt', 'latent'\], but is 'jpg'"),
    "callback tensors": (
        {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
        r"has to be among \['latents', .*\], but holds \['noise'\]",
    ),
    "no condition": ({"max_sequence_length": 0}, "`max_sequence_length` has to be at least 1, but is 0"),
    "embeddings of other dimensions": (
        {"prompt_embeds": EMBEDS[0]},
        r"\(batch, tokens, 48\), but are of shape \(5, 48\)",
    ),
    "embeddings of another width": (
        {"prompt_embeds": EMBEDS[..., :32]},
        r"\(batch, tokens, 48\), but are of shape \(1, 5, 32\)",
    ),
    "embeddings of no tokens": ({"prompt_embeds": EMBEDS[:, :0]}, r"but are of shape \(1, 0, 48\)"),
    "mask alone": ({"prompt_attention_mask": EMBEDS[..., 0]}, "goes with `prompt_embeds`, which are not given"),
    "mask of another shape": (
        {"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(1, 4)},
        r"has to be of shape \(1, 5\) like `prompt_embeds`, but is of shape \(1, 4\)",
    ),
    "negative mask alone": (
        {"negative_prompt_attention_mask": EMBEDS[..., 0]},
        "goes with `negative_prompt_embeds`, which are not given",
    ),
    "embeddings longer than the null condition": (
        {"prompt_embeds": torch.zeros(1, 513, 48)},
        "hold 513 tokens, but this connector's null condition has only 512 rows",
    ),
    "generators too few": (
        {"prompt": ["x", "y"], "generator": generators(0)},
        r"1 generators for 2 images \(2 prompts x 1\)",
    ),
    "generators too many": ({"generator": generators(0, 1)}, "2 generators for 1 images"),
    "latents of another shape": (
        {"latents": torch.zeros(1, 4, 4, 4)},
        r"have to be of shape \(1, 4, 8, 8\), but are of shape \(1, 4, 4, 4\)",
    ),
    "latents too few": ({"latents": torch.zeros(1, 4, 8, 8), "num_images_per_prompt": 2}, r"of shape \(2, 4, 8, 8\)"),
}


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_raises_what_was_given_and_what_is_allowed(pipe, paint, inputs, message):
    with recorded_batch_sizes(pipe) as batch_sizes, pytest.raises(ValueError, match=message):
        paint(pipe, **inputs)
    assert batch_sizes == []


def test_prompt_without_a_text_side_raises(pipe, own, paint):
    with pytest.raises(ValueError, match=r"needs \['text_encoder', 'connector'\].*None there: give embeddings"):
        paint(own(pipe, text_encoder=None, connector=None))


def test_guidance_without_a_null_condition_raises(pipe, own, paint):
    with pytest.raises(ValueError, match="connector is None: give `negative_prompt_embeds`"):
        paint(own(pipe, text_encoder=None, processor=None, connector=None), prompt_embeds=EMBEDS)


# Schedulers


def test_flow_match_euler_scheduler_takes_sigmas(pipe, own, paint):
    euler = own(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    sigmas = [1.0, 0.7, 0.4]
    timesteps = []
    latents = paint(
        euler,
        sigmas=sigmas,
        callback_on_step_end=lambda pipe, step, timestep, tensors: timesteps.append(timestep.item()),
    )
    assert latents.isfinite().all()
    assert timesteps == pytest.approx([1000.0, 700.0, 400.0])


def test_flow_match_euler_scheduler_takes_timesteps(pipe, own, paint):
    euler = own(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0))
    by_timesteps = paint(euler, timesteps=[1000.0, 700.0, 400.0])
    assert_same(by_timesteps, paint(euler, sigmas=[1.0, 0.7, 0.4]), 1e-5)


def test_timesteps_and_sigmas_together_raise(pipe, own, paint):
    euler = own(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas`"):
        paint(euler, timesteps=[900.0], sigmas=[0.9])


def test_other_solver_of_the_same_flow_comes_to_the_same_picture(pipe, own, paint):
    unipc = own(pipe, scheduler=UniPCMultistepScheduler.from_config(pipe.scheduler.config))
    many = {"num_inference_steps": 20, "guidance_scale": 1.0}
    assert (paint(unipc, **many) - paint(pipe, **many)).abs().mean() < 0.02


def test_scheduler_that_adds_noise_draws_it_from_the_generator(pipe, own, paint):
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    noisy = own(pipe, scheduler=scheduler)
    first = paint(noisy, num_inference_steps=3)
    assert_same(first, paint(noisy, num_inference_steps=3), 0)
    assert_differ(first, paint(pipe, num_inference_steps=3))


# Saving and loading


def test_saved_pipeline_paints_the_same(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert_same(paint(type(pipe).from_pretrained(tmp_path)), paint(pipe), 0)


def test_saved_pipeline_keeps_its_default_guidance_scale(pipe, own, tmp_path):
    own(pipe, default_guidance_scale=2.5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["default_guidance_scale"] == 2.5
    assert type(pipe).from_pretrained(tmp_path).config.default_guidance_scale == 2.5


def test_pipeline_is_sharded_and_loaded(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 1
    assert_same(paint(type(pipe).from_pretrained(tmp_path)), paint(pipe), 0)


def test_pipeline_is_saved_and_loaded_as_a_variant(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path, variant="ema")
    assert (tmp_path / "connector" / "diffusion_pytorch_model.ema.safetensors").is_file()
    assert (tmp_path / "text_encoder" / "model.ema.safetensors").is_file()
    with pytest.raises((OSError, ValueError)):
        type(pipe).from_pretrained(tmp_path)
    assert_same(paint(type(pipe).from_pretrained(tmp_path, variant="ema")), paint(pipe), 0)


def test_pipeline_loads_in_bfloat16_and_paints(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path)
    halved = type(pipe).from_pretrained(tmp_path, dtype=torch.bfloat16)
    models = (halved.text_encoder, halved.connector, halved.transformer, halved.vae)
    assert all(parameter.dtype == torch.bfloat16 for model in models for parameter in model.parameters())
    image = paint(halved, output_type="pt")
    assert image.dtype == torch.float32 and image.isfinite().all()
    assert (image - paint(pipe, output_type="pt")).abs().mean() < 0.05


def test_pipeline_loads_in_a_dtype_for_each_component(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path)
    mixed = type(pipe).from_pretrained(tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert mixed.transformer.dtype == torch.bfloat16
    assert mixed.text_encoder.dtype == mixed.connector.dtype == mixed.vae.dtype == torch.float32
    assert paint(mixed).isfinite().all()


def test_pipeline_loads_with_a_device_map(pipe, paint, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert_same(paint(type(pipe).from_pretrained(tmp_path, device_map="cpu")), paint(pipe), 0)


def test_from_pipe_shares_components_and_config(pipe, own, paint):
    guided = own(pipe, default_guidance_scale=3.0)
    other = type(pipe).from_pipe(guided)
    assert all(other.components[name] is component for name, component in guided.components.items())
    assert other.config.default_guidance_scale == 3.0
    assert_same(paint(other), paint(guided), 0)


def test_from_pipe_turns_an_edit_pipeline_into_one_for_text(edit_pipe, t2i_pipe, paint):
    converted = DIMPipeline.from_pipe(edit_pipe, transformer=t2i_pipe.transformer, connector=t2i_pipe.connector)
    assert type(converted) is DIMPipeline
    assert converted.vae is edit_pipe.vae
    assert paint(converted).isfinite().all()


# Memory


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="offloading to the CPU takes an accelerator")
def test_offloaded_pipeline_paints_the_same(pipe, own, paint, offload):
    offloaded = own(pipe)
    getattr(offloaded, offload)()
    assert_same(paint(offloaded).cpu(), paint(pipe), 1e-3)
    assert_same(paint(offloaded).cpu(), paint(pipe), 1e-3)


def test_components_offloaded_layer_by_layer_paint_the_same(pipe, own, paint):
    # What enable_sequential_cpu_offload does with each component, on whatever device there is.
    offloaded = own(pipe)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    for name in ("text_encoder", "connector", "transformer", "vae"):
        component = offloaded.components[name]
        cpu_offload(component, device, offload_buffers=len(component._parameters) > 0)
        assert all(parameter.is_meta for parameter in component.parameters())
    assert_same(paint(offloaded).cpu(), paint(pipe), 1e-3 if device.type != "cpu" else 0)


@pytest.mark.parametrize(
    "settings",
    [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}],
    ids=["leaf", "block"],
)
def test_group_offloaded_pipeline_paints_the_same(pipe, own, paint, settings):
    offloaded = own(pipe)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    offloaded.enable_group_offload(onload_device=device, offload_device=torch.device("cpu"), **settings)
    assert_same(paint(offloaded).cpu(), paint(pipe), 1e-3 if device.type != "cpu" else 0)


def test_components_offload_in_groups_to_disk(pipe, own, paint, tmp_path):
    offloaded = own(pipe)
    for name in ("connector", "transformer"):
        offloaded.components[name].enable_group_offload(
            torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path / name)
        )
        assert list((tmp_path / name).glob("*.safetensors"))
    assert_same(paint(offloaded), paint(pipe), 0)


def test_connector_and_transformer_store_float8(pipe, own, paint):
    stored = own(pipe)
    for model in (stored.connector, stored.transformer):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert stored.transformer.transformer_blocks[0].attn2.to_k.weight.dtype == torch.float8_e4m3fn
    assert stored.connector.linear_1.weight.dtype == torch.float8_e4m3fn
    assert stored.connector.null_condition.dtype == torch.float32
    assert paint(stored).isfinite().all()


def test_vae_slicing_changes_nothing(pipe, own, paint):
    sliced = own(pipe)
    sliced.vae.enable_slicing()
    inputs = {"prompt": PROMPTS, "generator": generators(0, 1, 2), "output_type": "pt"}
    expected = paint(pipe, **inputs)
    assert_same(paint(sliced, **{**inputs, "generator": generators(0, 1, 2)}), expected, 1e-5)


def test_vae_tiling_paints_nearly_the_same(pipe, own, paint):
    tiled = own(pipe)
    tiled.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )
    size = {"height": 64, "width": 64, "output_type": "pt"}
    image = paint(tiled, **size)
    assert image.shape == (1, 3, 64, 64)
    assert (image - paint(pipe, **size)).abs().mean() < 0.05


def test_first_block_cache_that_never_skips_changes_nothing(pipe, own, paint):
    cached = own(pipe)
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    inputs = {"num_inference_steps": 4, "callback_on_step_end": cutoff}
    expected = paint(pipe, **inputs)
    assert_same(paint(cached, **inputs), expected, 1e-6)
    assert_same(paint(cached, **inputs), expected, 1e-6)  # nothing is left of the first call


def test_first_block_cache_of_the_guided_batch_is_not_taken_for_the_unguided_one(pipe, own, paint):
    cached = own(pipe)
    cached.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))  # skips whenever it may
    latents = paint(cached, num_inference_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25))
    assert latents.shape == (1, 4, 8, 8)


# LoRA


def test_lora_is_loaded_from_the_format_of_sanas_pipeline(pipe, own, paint, tmp_path):
    adapted = own(pipe)
    lora_folder(adapted, tmp_path)
    keys = load_file(tmp_path / "pytorch_lora_weights.safetensors").keys()
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in keys
    loaded = own(pipe)
    loaded.load_lora_weights(tmp_path)
    assert_same(paint(loaded), paint(adapted), 0)
    assert_differ(paint(loaded), paint(pipe))


def test_lora_is_saved_as_sanas_pipeline_does(pipe, own, tmp_path):
    adapted = own(pipe)
    lora_folder(adapted, tmp_path / "sana")
    layers = get_peft_model_state_dict(adapted.transformer)
    type(pipe).save_lora_weights(tmp_path / "dim", transformer_lora_layers=layers)
    sana = load_file(tmp_path / "sana" / "pytorch_lora_weights.safetensors")
    dim = load_file(tmp_path / "dim" / "pytorch_lora_weights.safetensors")
    assert sana.keys() == dim.keys()
    assert all(torch.equal(sana[key], dim[key]) for key in sana)


def test_lora_is_unloaded(pipe, own, paint, tmp_path):
    adapted = own(pipe)
    lora_folder(adapted, tmp_path)
    adapted.unload_lora_weights()
    assert_same(paint(adapted), paint(pipe), 0)


def test_lora_is_fused_and_unfused(pipe, own, paint, tmp_path):
    adapted = own(pipe)
    lora_folder(adapted, tmp_path)
    dynamic = paint(adapted)
    adapted.fuse_lora()
    assert adapted.num_fused_loras == 1
    assert_same(paint(adapted), dynamic)
    adapted.unfuse_lora()
    assert_same(paint(adapted), dynamic)


def test_lora_scale_of_a_call_equals_the_adapters_weight(pipe, own, paint, tmp_path):
    adapted = own(pipe)
    lora_folder(adapted, tmp_path)
    full = paint(adapted)
    half = paint(adapted, attention_kwargs={"scale": 0.5})
    assert_differ(half, full)
    assert_same(paint(adapted), full, 0)  # the scale is that call's alone
    assert_same(paint(adapted, attention_kwargs={"scale": 0.0}), paint(pipe))
    adapted.set_adapters("default", 0.5)
    assert_same(paint(adapted), half)


def test_loras_are_mixed(pipe, own, paint, tmp_path):
    for seed in (0, 1):
        lora_folder(own(pipe), tmp_path / str(seed), seed)
    mixed = own(pipe)
    mixed.load_lora_weights(tmp_path / "0", adapter_name="first")
    mixed.load_lora_weights(tmp_path / "1", adapter_name="second")
    mixed.set_adapters("first")
    first = paint(mixed)
    mixed.set_adapters(["first", "second"], [1.0, 0.0])
    assert_same(paint(mixed), first)
    mixed.set_adapters(["first", "second"], [0.7, 0.6])
    assert_differ(paint(mixed), first)
    mixed.delete_adapters(["first", "second"])
    assert_same(paint(mixed), paint(pipe))


# Components


def test_transformer_saved_by_sana_paints_the_same(pipe, own, paint, tmp_path):
    pipe.transformer.save_pretrained(tmp_path / "dim")
    SanaTransformer2DModel.from_pretrained(tmp_path / "dim").save_pretrained(tmp_path / "sana")
    transformer = DIMTransformer2DModel.from_pretrained(tmp_path / "sana")
    assert_same(paint(own(pipe, transformer=transformer)), paint(pipe), 0)


def test_timesteps_are_scaled_as_the_transformer_asks(pipe, own, paint):
    scaled = own(pipe)
    scaled.transformer.register_to_config(timestep_scale=0.001)
    assert_differ(paint(scaled), paint(pipe))


def test_picture_is_no_prompt(t2i_pipe, source):
    with pytest.raises(ValueError, match="`prompt` has to be a str or a list of str, but is <PIL"):
        t2i_pipe(source)


def test_text_to_image_with_an_edit_checkpoint_raises(edit_pipe):
    wrong = DIMPipeline(**edit_pipe.components)
    with pytest.raises(ValueError, match=r"DIMPipeline needs .* 4 input channels .* has 8: it is of the edit kind"):
        wrong("A table.")


# Attention of the vision-language model


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_of_the_text_encoder_is_chosen_at_load(pipe, paint, tmp_path, implementation):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, attn_implementation=implementation)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.text_encoder.config._attn_implementation == implementation
    assert loaded.text_encoder.model.visual.config._attn_implementation == implementation
    torch.testing.assert_close(paint(loaded), paint(pipe), atol=1e-4, rtol=0)


def test_attention_of_the_text_encoder_is_sdpa_where_flash_is_not_there(pipe):
    assert pipe.text_encoder.config._attn_implementation == "sdpa"


def test_unknown_attention_of_the_text_encoder_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="flash_attention_7"):
        type(pipe).from_pretrained(tmp_path, attn_implementation="flash_attention_7")
    with pytest.raises(ValueError, match="this pipeline has none"):
        type(pipe).from_pretrained(
            tmp_path, attn_implementation="sdpa", text_encoder=None, processor=None, connector=None
        )
