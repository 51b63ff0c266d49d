"""Any guider of diffusers that hooks into no layers stands for classifier-free guidance."""

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    TangentialClassifierFreeGuidance,
)

from diffusers_dim import TINY_SHAPES, DIMEditBlocks


INPUTS = {"prompt": ["Make the red circle blue.", "Add a green square."], "height": 32, "width": 32}


class SeparateGuidance(ClassifierFreeGuidance):
    """One that says it changes the model between predictions, which are made one by one then."""

    def prepare_models(self, denoiser):
        super().prepare_models(denoiser)


@pytest.fixture
def rows(edit_pipe):
    """Pictures in each forward of the transformer."""
    rows = []
    handle = edit_pipe.transformer.register_forward_hook(lambda _, args, output: rows.append(len(output[0])))
    yield rows
    handle.remove()


def paint_with(edit, source, guider, **inputs):
    edit.modular.update_components(guider=guider)
    return edit.call_blocks(image=source, **{**INPUTS, **inputs})


def test_scale_is_the_checkpoint_s_own():
    assert DIMEditBlocks().init_pipeline(TINY_SHAPES).guider.guidance_scale == 2.5


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_scale_of_the_guider_is_that_of_a_call(edit, source, rows, guidance_scale):
    found = paint_with(edit, source, ClassifierFreeGuidance(guidance_scale=guidance_scale))
    assert rows == [2 if guidance_scale == 1.0 else 4] * 2
    assert torch.equal(found, edit.call_pipe(image=source, guidance_scale=guidance_scale, **INPUTS))


def test_guider_s_start_and_stop_are_a_guidance_interval(edit, source, rows):
    found = paint_with(edit, source, ClassifierFreeGuidance(3.0, start=0.2, stop=0.6), num_inference_steps=5)
    assert rows == [2, 4, 4, 2, 2]
    interval = {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.6), "num_inference_steps": 5}
    assert torch.equal(found, edit.call_pipe(image=source, **interval, **INPUTS))


def test_guider_that_was_off_at_the_end_is_on_again_in_the_next_call(edit, source):
    guider = ClassifierFreeGuidance(3.0, stop=0.5)
    first = paint_with(edit, source, guider)
    assert torch.equal(paint_with(edit, source, guider), first)


def test_what_it_guides_away_from_is_the_learned_null_condition(edit, source):
    found = edit.call_blocks(["prompt_embeds", "negative_prompt_embeds"], image=source, **INPUTS)
    length = found["prompt_embeds"].shape[1]
    null_condition = edit.pipe.connector.null_condition[:length].expand(2, -1, -1)
    assert torch.equal(found["negative_prompt_embeds"], null_condition)


def test_disabled_guider_makes_no_null_condition(edit, source):
    edit.modular.guider.disable()
    assert edit.call_blocks("negative_prompt_embeds", image=source, **INPUTS) is None


def test_predictions_one_by_one_are_those_of_one_batch(edit, source, rows):
    found = paint_with(edit, source, SeparateGuidance(3.0))
    assert rows == [2] * 4
    expected = edit.call_pipe(image=source, guidance_scale=3.0, **INPUTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_projected_guidance_without_its_limits_is_classifier_free_guidance(edit, source, rows):
    found = paint_with(edit, source, AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_rescale=0.0))
    assert rows == [4] * 2
    expected = edit.call_pipe(image=source, guidance_scale=3.0, **INPUTS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "guider",
    [
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5, eta=0.2),
        ClassifierFreeZeroStarGuidance(3.0),
        TangentialClassifierFreeGuidance(3.0),
        ClassifierFreeGuidance(3.0, guidance_rescale=0.7),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_other_guiders_paint_otherwise(edit, source, guider):
    found = paint_with(edit, source, guider)
    assert found.isfinite().all()
    assert (found - edit.call_pipe(image=source, guidance_scale=3.0, **INPUTS)).abs().max() > 1e-3


def test_guider_put_in_after_encoding_without_one_is_an_error(edit, source):
    edit.modular.guider.disable()
    state = edit.modular(image=source, num_inference_steps=1, **INPUTS)
    denoise = edit.modular.blocks.sub_blocks["denoise"].init_pipeline()
    denoise.update_components(
        transformer=edit.pipe.transformer, scheduler=edit.pipe.scheduler, guider=ClassifierFreeGuidance(3.0)
    )
    with pytest.raises(ValueError, match="ClassifierFreeGuidance guides away.*no `negative_prompt_embeds`"):
        denoise(state=state)


def test_step_caches_are_those_of_the_pipeline(edit_pipe, edit, source, request):
    request.addfinalizer(edit_pipe.transformer.disable_cache)
    inputs = {"image": source, "num_inference_steps": 6, **INPUTS}
    exact = edit.call_pipe(**inputs)
    edit_pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    expected, found = edit.paint(**inputs)
    assert torch.equal(found, expected) and not torch.equal(found, exact)


def test_step_cache_that_compares_branches_needs_one_batch(edit_pipe, edit, source, request):
    request.addfinalizer(edit_pipe.transformer.disable_cache)
    config = FasterCacheConfig(current_timestep_callback=lambda: 0, tensor_format="BCHW")
    edit_pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="FasterCacheConfig is on.*SeparateGuidance"):
        paint_with(edit, source, SeparateGuidance(3.0))
