"""The published code's own numbers, stage by stage in the order of a call: each stage starts from the golden input."""

from typing import NamedTuple

import pytest
import torch
from PIL import Image
from pipeline_checks import assert_same

from diffusers_dim import DIMEditPipeline, DIMPipeline


class Case(NamedTuple):
    pipe: DIMPipeline
    images: list[Image.Image] | None  # an edit's source, as its one-image batch
    tensors: dict[str, torch.Tensor]
    settings: dict


@pytest.fixture(scope="module", params=["edit", "t2i"])
def case(request) -> Case:
    golden = request.getfixturevalue(f"golden_{request.param}")
    folder = request.getfixturevalue(f"{request.param}_folder")
    if request.param == "t2i":
        return Case(DIMPipeline.from_pretrained(folder), None, golden.tensors, golden.settings)
    source = Image.open(golden.path / "source.png").convert("RGB")
    return Case(DIMEditPipeline.from_pretrained(folder), [source], golden.tensors, golden.settings)


@pytest.fixture
def edit(case) -> Case:
    if case.images is None:
        pytest.skip("a text-to-image model has no source")
    return case


@pytest.fixture
def encoded(case):
    resolution = case.settings["res"]
    return case.pipe.processor.encode([case.settings["prompt"]], case.images, resolution, resolution)


def call(case: Case, **inputs):
    return case.pipe(
        **({} if case.images is None else {"image": case.images}),
        height=case.settings["res"],
        width=case.settings["res"],
        num_inference_steps=case.settings["steps"],
        guidance_scale=case.settings["guidance_scale"],
        **inputs,
    ).images


def test_input_ids(case, encoded):
    assert torch.equal(encoded["input_ids"], case.tensors["input_ids"])


def test_condition_mask(case, encoded):
    assert torch.equal(encoded["condition_mask"], case.tensors["user_mask"])


@torch.no_grad()
def test_hidden_states(case):
    resolution = case.settings["res"]
    hidden_states, mask = case.pipe.encode_hidden_states(
        [case.settings["prompt"]], case.images, resolution, resolution
    )
    assert mask.all()
    assert_same(hidden_states[0], case.tensors["hidden"][case.tensors["user_mask"]], 2e-5)


@torch.no_grad()
def test_condition(case):
    hidden_states = case.tensors["hidden"][case.tensors["user_mask"]][None]
    assert_same(case.pipe.connector(hidden_states).prompt_embeds, case.tensors["cond"], 5e-6)


@torch.no_grad()
def test_condition_from_prompt_and_source(case):
    resolution = case.settings["res"]
    condition, mask, null_condition, null_mask = case.pipe.encode_prompt(
        case.settings["prompt"], case.images, resolution, resolution
    )
    assert_same(condition, case.tensors["cond"], 1e-5)
    assert torch.equal(null_condition[0], case.pipe.connector.null_condition[: condition.shape[1]])
    assert mask.all() and null_mask.all()


def test_source_pixels(edit):
    resolution = edit.settings["res"]
    assert_same(edit.pipe.image_processor.preprocess(edit.images, resolution, resolution), edit.tensors["raw"], 1e-6)


@torch.no_grad()
def test_source_latents(edit):
    resolution = edit.settings["res"]
    latents = edit.pipe.prepare_image_latents(edit.images, resolution, resolution, torch.device("cpu"))
    assert_same(latents, edit.tensors["z_src"], 1e-5)


def test_noise(case):
    resolution = case.settings["res"]
    generator = torch.Generator().manual_seed(case.settings["seed"])
    noise = case.pipe.prepare_latents(1, resolution, resolution, torch.device("cpu"), generator)
    assert torch.equal(noise, case.tensors["z"])


def test_denoised_latents(case):
    latents = call(case, prompt_embeds=case.tensors["cond"], latents=case.tensors["z"], output_type="latent")
    assert_same(latents, case.tensors["latents"], 3e-4)


@torch.no_grad()
def test_image_before_clamping(case):
    scaling_factor = case.pipe.vae.config.scaling_factor
    image = case.pipe.vae.decode(case.tensors["latents"] / scaling_factor).sample
    assert_same(image, case.tensors["image"], 1e-4)


def test_image_after_clamping(case):
    image = case.pipe.decode_latents(case.tensors["latents"], "pt")
    assert_same(image, (case.tensors["image"] / 2 + 0.5).clamp(0, 1), 5e-5)


def test_whole_call(case):
    generator = torch.Generator().manual_seed(case.settings["seed"])
    images = call(case, prompt=case.settings["prompt"], generator=generator, output_type="pt")
    assert_same(images, (case.tensors["image"] / 2 + 0.5).clamp(0, 1), 5e-4)
