"""Pipelines of the golden models, and a short call of them."""

import copy

import pytest
import torch

from diffusers_dim import DIMEditPipeline, DIMPipeline


@pytest.fixture(params=["edit", "t2i"])
def pipe(request) -> DIMPipeline:
    """Each pipeline in turn; not to be changed: see `own`."""
    return request.getfixturevalue(f"{request.param}_pipe")


@pytest.fixture
def own():
    """Copies a pipeline for a test that changes it: `own(pipe, transformer=...)` with other components or config."""

    def own(pipe: DIMPipeline, **changes) -> DIMPipeline:
        copied = type(pipe)(**{**copy.deepcopy(pipe.components), **changes})
        copied.set_progress_bar_config(disable=True)
        return copied

    return own


@pytest.fixture
def paint(source):
    """Calls a pipeline with two steps at 32 pixels, unless told otherwise, and gives the latents."""

    def paint(pipe: DIMPipeline, **inputs):
        defaults = {
            "height": 32,
            "width": 32,
            "num_inference_steps": 2,
            "guidance_scale": 4.0,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }
        if isinstance(pipe, DIMEditPipeline):
            defaults["image"] = source
        if "prompt_embeds" not in inputs:
            defaults["prompt"] = "Make the red circle blue."
        output = pipe(**{**defaults, **inputs})
        return output.images if isinstance(output, dict) else output

    return paint
