"""diffusers' approximate step caches on the painter, through whole calls of both pipelines with the embedded model."""

import ast
import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from PIL import Image

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, DIMPipeline, DIMTransformer2DModel
from diffusers_dim.tiny import sample_edits


STEPS = 10
EDITS = sample_edits(2, seed=1)
# What two calls of `calibrate` print, to two digits.
MAG_RATIOS = [1.0, 1.03, 0.97, 0.96, 0.95, 0.94, 0.91, 0.88, 0.81, 0.68]


def taylor(**changes) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32, **changes)


def broadcast(pipe: DIMPipeline) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 850),
        cross_attention_timestep_skip_range=(100, 850),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe: DIMPipeline) -> FasterCacheConfig:
    return FasterCacheConfig(
        tensor_format="BCHW",
        spatial_attention_timestep_skip_range=(-1, 850),
        unconditional_batch_timestep_skip_range=(-1, 850),
        unconditional_batch_skip_range=3,
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
    )


ALL = {"self-attention", "cross-attention", "convolution"}
# How each cache is made, which rows it saves, and how far from the exact latents it may lead, relative, in an edit and
# in painting from text, of which the embedded model has learned less. No distance seen was over 0.75 of these.
CACHES = {
    "first block": (lambda pipe: FirstBlockCacheConfig(threshold=0.2), ALL, (0.03, 0.4)),
    "mag": (lambda pipe: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=MAG_RATIOS), ALL, (0.03, 0.2)),
    "taylor": (lambda pipe: taylor(), ALL, (0.15, 0.6)),
    "taylor of named modules": (
        lambda pipe: taylor(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]),
        {"self-attention"},
        (0.1, 0.4),
    ),
    "taylor lite": (lambda pipe: taylor(use_lite_mode=True), ALL, (0.2, 0.8)),
    "pyramid attention broadcast": (broadcast, {"self-attention", "cross-attention"}, (0.15, 0.7)),
    "faster": (faster, ALL, (0.03, 0.5)),
}


@pytest.fixture(scope="module")
def edit_model() -> DIMEditPipeline:
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
@torch.no_grad()
def t2i_model(edit_model) -> DIMPipeline:
    """The embedded model as one that paints from text: a blank picture's latents, alike everywhere, made its bias."""
    blank = Image.new("RGB", (64, 64), (235, 235, 235))
    blank_latents = edit_model.prepare_image_latents([blank], 64, 64, torch.device("cpu")).mean(dim=(0, 2, 3))
    config = {name: value for name, value in edit_model.transformer.config.items() if not name.startswith("_")}
    transformer = DIMTransformer2DModel(**{**config, "in_channels": 16})
    weights = edit_model.transformer.state_dict()
    noisy, source = weights["patch_embed.proj.weight"].chunk(2, dim=1)
    weights["patch_embed.proj.weight"] = noisy
    weights["patch_embed.proj.bias"] = weights["patch_embed.proj.bias"] + source[..., 0, 0] @ blank_latents
    transformer.load_state_dict(weights)
    pipe = DIMPipeline(**{**edit_model.components, "transformer": transformer.eval()}, default_guidance_scale=2.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["edit", "t2i"])
def pipe(request) -> DIMPipeline:
    """Each pipeline in turn, without a cache before and after a test."""
    pipe = request.getfixturevalue(f"{request.param}_model")
    yield pipe
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()


@pytest.fixture(params=CACHES)
def cache(request) -> str:
    """The name of each cache in turn."""
    return request.param


def prompts(pipe: DIMPipeline) -> list[str]:
    """Two that suit what the pipeline paints on."""
    if isinstance(pipe, DIMEditPipeline):
        return [edit.instruction for edit in EDITS]
    return ["Move the red star to the center.", "Change the background to mint."]


def paint(pipe: DIMPipeline, **inputs) -> torch.Tensor:
    """Latents of a short call of one prompt, unless told otherwise."""
    defaults = {
        "prompt": prompts(pipe)[0],
        "num_inference_steps": STEPS,
        "height": 64,
        "width": 64,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if isinstance(pipe, DIMEditPipeline):
        defaults["image"] = EDITS[0].source
    return pipe(**{**defaults, **inputs}).images


def enable(pipe: DIMPipeline, cache: str) -> None:
    pipe.transformer.enable_cache(CACHES[cache][0](pipe))


def tolerance(pipe: DIMPipeline, cache: str) -> float:
    return CACHES[cache][2][not isinstance(pipe, DIMEditPipeline)]


def distance(latents: torch.Tensor, exact: torch.Tensor) -> float:
    return ((latents - exact).norm() / exact.norm()).item()


@contextmanager
def counted(pipe: DIMPipeline):
    """How many rows went through both attentions and the convolution of all blocks."""
    counts: Counter[str] = Counter()

    def count(name):
        return lambda module, args, output: counts.update({name: output.shape[0]})

    handles = []
    for block in pipe.transformer.transformer_blocks:
        parts = {"self-attention": block.attn1, "cross-attention": block.attn2}
        handles += [attn.to_out[0].register_forward_hook(count(name)) for name, attn in parts.items()]
        handles.append(block.ff.conv_point.register_forward_hook(count("convolution")))
    yield counts
    for handle in handles:
        handle.remove()


INPUTS = {
    "one picture": lambda pipe: {},
    "two prompts, two pictures each": lambda pipe: {
        "prompt": prompts(pipe),
        "num_images_per_prompt": 2,
        **({"image": [edit.source for edit in EDITS]} if isinstance(pipe, DIMEditPipeline) else {}),
    },
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_cache_saves_work_and_stays_near_the_exact_result(pipe, cache, inputs):
    saved = CACHES[cache][1]
    with counted(pipe) as exact_rows:
        exact = paint(pipe, **inputs(pipe))
    enable(pipe, cache)
    with counted(pipe) as rows:
        latents = paint(pipe, **inputs(pipe))
    assert {name for name in ALL if rows[name] < exact_rows[name]} == saved
    assert all(rows[name] == exact_rows[name] for name in ALL - saved)
    assert 1e-4 < distance(latents, exact) < tolerance(pipe, cache)


def test_next_call_begins_anew(pipe, cache):
    enable(pipe, cache)
    first = paint(pipe)
    assert torch.equal(paint(pipe), first)


def test_call_after_one_that_broke_off_begins_anew(pipe, cache):
    def stop(pipe, step, timestep, tensors):
        if step == 6:
            raise KeyboardInterrupt

    enable(pipe, cache)
    first = paint(pipe)
    with pytest.raises(KeyboardInterrupt):
        paint(pipe, prompt="Remove it.", callback_on_step_end=stop)
    assert torch.equal(paint(pipe), first)


def test_exact_result_is_back_without_the_cache(pipe, cache):
    exact = paint(pipe)
    enable(pipe, cache)
    paint(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(paint(pipe), exact)


@pytest.mark.parametrize("cache", [name for name in CACHES if name not in ("faster", "mag")])
def test_cache_goes_with_a_guidance_interval(pipe, cache):
    inputs = {"guidance_interval": (0.2, 0.7)}
    exact = paint(pipe, **inputs)
    enable(pipe, cache)
    with counted(pipe) as rows:
        latents = paint(pipe, **inputs)
    assert rows["self-attention"] < 5 * (2 * 5 + 5)  # layers, guided steps and others
    assert 1e-5 < distance(latents, exact) < tolerance(pipe, cache)
    assert torch.equal(paint(pipe, **inputs), latents)


@pytest.mark.parametrize(
    ("cache", "inputs", "message"),
    [
        (
            "faster",
            {"guidance_scale": 1.0},
            "FasterCacheConfig is on.*: `guidance_scale` has to be above 1.0, but is 1.0",
        ),
        (
            "faster",
            {"guidance_interval": (0.0, 0.5)},
            r"FasterCacheConfig is on.*to be \(0.0, 1.0\), but is \(0.0, 0.5\)",
        ),
        (
            "mag",
            {"guidance_interval": (0.1, 1.0)},
            r"MagCacheConfig is on.*has to be \(0.0, 1.0\), but is \(0.1, 1.0\)",
        ),
        ("mag", {"num_inference_steps": 12}, "MagCacheConfig is on for 10 steps, but this call has 12"),
        ("mag", {"num_inference_steps": 8}, "MagCacheConfig is on for 10 steps, but this call has 8"),
    ],
)
def test_call_that_a_cache_cannot_serve_is_refused(pipe, cache, inputs, message):
    enable(pipe, cache)
    with pytest.raises(ValueError, match=message):
        paint(pipe, **inputs)


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "faster"])
def test_cache_goes_without_guidance(pipe, cache):
    exact = paint(pipe, guidance_scale=1.0)
    enable(pipe, cache)
    latents = paint(pipe, guidance_scale=1.0)
    assert not torch.equal(latents, exact)
    assert torch.equal(paint(pipe, guidance_scale=1.0), latents)


@pytest.mark.parametrize("cache", [name for name in CACHES if name != "faster"])
def test_condition_is_still_projected_once(pipe, cache):
    enable(pipe, cache)
    projected = []
    handle = pipe.transformer.caption_projection.register_forward_hook(lambda *_: projected.append(1))
    paint(pipe)
    handle.remove()
    assert len(projected) == 1


def test_calibration_is_exact_and_prints_the_ratios(pipe, capsys):
    exact = paint(pipe)
    pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=STEPS))
    assert torch.equal(paint(pipe), exact)
    ratios = ast.literal_eval(capsys.readouterr().out.strip().splitlines()[-1])
    assert len(ratios) == STEPS and ratios[0] == 1.0
    if isinstance(pipe, DIMEditPipeline):
        assert [round(ratio, 2) for ratio in ratios] == MAG_RATIOS

    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=ratios, num_inference_steps=STEPS))
    with counted(pipe) as rows:
        latents = paint(pipe)
    assert rows["self-attention"] < STEPS * 5 * 2
    assert 1e-4 < distance(latents, exact) < tolerance(pipe, "mag")


def test_cache_goes_with_group_offload(edit_model, cache, tmp_path):
    pipe = DIMEditPipeline(**copy.deepcopy(edit_model.components), default_guidance_scale=2.5)
    pipe.set_progress_bar_config(disable=True)
    enable(pipe, cache)
    expected = paint(pipe)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    enable(pipe, cache)
    assert torch.equal(paint(pipe), expected)


REFUSED = {
    "SeaCache": (
        SeaCacheConfig(),
        r"has to be one of \['FirstBlockCacheConfig', .*, 'FasterCacheConfig'\], but is SeaCacheConfig",
    ),
    "TextKVCache": (TextKVCacheConfig(), r"has to be one of \['FirstBlockCacheConfig', .*, but is TextKVCacheConfig"),
    "no cache": ("faster", r"has to be one of \['FirstBlockCacheConfig', .*, but is str"),
    "broadcast without a timestep": (
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2),
        "PyramidAttentionBroadcastConfig needs to know the timestep: give `current_timestep_callback=",
    ),
    "FasterCache without a timestep": (
        FasterCacheConfig(tensor_format="BCHW"),
        "FasterCacheConfig needs to know the timestep: give `current_timestep_callback=lambda: pipe.current_timestep`",
    ),
    "FasterCache of videos": (
        FasterCacheConfig(current_timestep_callback=lambda: 500),
        "`tensor_format` of FasterCacheConfig has to be 'BCHW' here, but is 'BCFHW'",
    ),
    "FasterCache of one branch": (
        FasterCacheConfig(tensor_format="BCHW", current_timestep_callback=lambda: 500, is_guidance_distilled=True),
        "`is_guidance_distilled` of FasterCacheConfig has to be False",
    ),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_cache_that_cannot_work_is_refused(edit_model, config, message):
    with pytest.raises(ValueError, match=message):
        edit_model.transformer.enable_cache(config)
    assert not edit_model.transformer.is_cache_enabled
