"""The baseline paints what the pipelines do: its time is compared at equal results."""

import pytest
import torch
from PIL import Image

from diffusers_dim import DIMEditPipeline
from stock import stock_pipeline


pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["Make the red circle blue.", "Remove it, then paint the ground behind all of it a quiet grey."]


@pytest.fixture(scope="module")
def paint(golden_edit):
    """Calls a pipeline and gives its latents."""
    image = Image.open(golden_edit.path / "source.png").convert("RGB")

    def paint(pipe, **inputs):
        if isinstance(pipe, DIMEditPipeline):
            inputs["image"] = image
        inputs = {"prompt": PROMPTS[0], "height": 32, "width": 32, "num_inference_steps": 5, **inputs}
        return pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="latent").images

    return paint


CASES = {
    "one": {},
    "no guidance": {"guidance_scale": 1.0},
    "padded batch": {"prompt": PROMPTS},
    "padded batch, no guidance": {"prompt": PROMPTS, "guidance_scale": 1.0},
    "negative prompt of another length": {"negative_prompt": PROMPTS[1]},
    "two a prompt": {"num_images_per_prompt": 2},
    "three a prompt": {"num_images_per_prompt": 3},
    "three a prompt, no guidance": {"num_images_per_prompt": 3, "guidance_scale": 1.0},
    "two a prompt, padded batch": {"prompt": PROMPTS, "num_images_per_prompt": 2},
    "three a prompt, padded batch": {"prompt": PROMPTS, "num_images_per_prompt": 3},
}


@pytest.mark.parametrize("inputs", CASES.values(), ids=CASES)
def test_baseline_gives_the_same_latents_bit_for_bit(golden_pipe, paint, inputs):
    assert torch.equal(paint(golden_pipe, **inputs), paint(stock_pipeline(golden_pipe), **inputs))


def test_baseline_shares_the_weights(golden_pipe):
    stock = stock_pipeline(golden_pipe)
    assert type(stock.transformer).__name__ == "SanaTransformer2DModel"
    ours = dict(golden_pipe.transformer.named_parameters())
    assert all(item.data_ptr() == ours[name].data_ptr() for name, item in stock.transformer.named_parameters())


def test_baseline_takes_no_guidance_interval(golden_pipe, paint):
    with pytest.raises(ValueError, match="guidance_interval"):
        paint(stock_pipeline(golden_pipe), guidance_interval=(0.0, 0.5))
