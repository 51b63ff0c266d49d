"""What saves memory: float8 storage, offloading and the VAE's tiles and slices. Offloading to a GPU needs one."""

import contextlib
import gc

import pytest
import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting

from diffusers_dim import DIMEditPipeline, DIMPipeline


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to offload from")
STEPS = 4


@pytest.fixture
def changed(pipe, own) -> DIMPipeline:
    """Each pipeline in turn, to be changed."""
    return own(pipe)


@contextlib.contextmanager
def counted(module: torch.nn.Module):
    """How often a module is called."""
    calls: list[int] = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# Float8 storage


def store_in_float8(pipe: DIMPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    apply_layerwise_casting(pipe.text_encoder, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def test_painter_and_reader_in_float8_paint_nearly_the_same(pipe, changed, paint):
    exact = paint(pipe, num_inference_steps=STEPS)
    store_in_float8(changed)
    latents = paint(changed, num_inference_steps=STEPS)
    assert 1e-4 < distance(latents, exact) < 0.05


def test_linear_layers_and_convolutions_are_kept_in_float8_and_norms_are_not(changed, paint):
    store_in_float8(changed)
    paint(changed)
    kept = {
        name
        for name, parameter in changed.transformer.named_parameters()
        if parameter.dtype != torch.float8_e4m3fn and not name.endswith("scale_shift_table")
    }
    assert all("norm" in name or name.startswith(("patch_embed.", "proj_out.")) for name in kept)
    blocks = changed.text_encoder.model.language_model.layers
    assert blocks[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert blocks[0].input_layernorm.weight.dtype == torch.float32


def test_float8_casts_leave_the_denoising_cache_as_it_is(changed, paint):
    store_in_float8(changed)
    latents = paint(changed, num_inference_steps=STEPS)
    with counted(changed.transformer.caption_projection) as projected:
        seen = paint(changed, num_inference_steps=STEPS, callback_on_step_end=lambda *_: {})
    assert len(projected) == 1
    assert torch.equal(seen, latents)


# Group offload, from the CPU to the CPU

LEVELS = {
    "each block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "each layer": {"offload_type": "leaf_level"},
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("inputs", [{}, {"guidance_interval": (0.3, 0.8)}], ids=["guided", "interval"])
def test_group_offload_changes_nothing(pipe, changed, paint, level, inputs):
    expected = paint(pipe, num_inference_steps=STEPS, output_type="pt", **inputs)
    changed.enable_group_offload(torch.device("cpu"), **level)
    with counted(changed.transformer.caption_projection) as projected:
        found = paint(
            changed, num_inference_steps=STEPS, output_type="pt", callback_on_step_end=lambda *_: {}, **inputs
        )
    assert torch.equal(found, expected)
    assert len(projected) == 1 + len(inputs)  # the step before guidance begins is another branch


def offload_to_disk(pipe: DIMPipeline, level: dict, folder) -> None:
    """Offloads the painter by `level` and the rest by layers, each to a folder of its own, lest files be mixed up."""
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            by = level if name == "transformer" else LEVELS["each layer"]
            apply_group_offloading(component, torch.device("cpu"), offload_to_disk_path=str(folder / name), **by)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_no_weight_is_read_while_it_is_offloaded(pipe, changed, paint, level, tmp_path):
    expected = paint(pipe, num_inference_steps=STEPS, output_type="pt")
    offload_to_disk(changed, level, tmp_path)
    assert not torch.equal(changed.transformer.proj_out.weight, pipe.transformer.proj_out.weight)
    assert torch.equal(paint(changed, num_inference_steps=STEPS, output_type="pt"), expected)


def test_float8_goes_with_group_offload(changed, paint):
    store_in_float8(changed)
    expected = paint(changed, num_inference_steps=STEPS)
    changed.enable_group_offload(torch.device("cpu"), **LEVELS["each block"])
    assert torch.equal(paint(changed, num_inference_steps=STEPS), expected)
    assert changed.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


# Offload from a GPU


def offload_groups(pipe: DIMPipeline) -> None:
    """As `docs/pipelines.md` says."""
    device = torch.device("cuda")
    pipe.transformer.enable_group_offload(device, use_stream=True, **LEVELS["each block"])
    for component in (pipe.text_encoder, pipe.connector, pipe.vae):
        apply_group_offloading(component, device, offload_type="leaf_level", use_stream=True)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "groups": offload_groups,
    "layers": lambda pipe: pipe.enable_group_offload(torch.device("cuda"), offload_type="leaf_level", use_stream=True),
}


@needs_gpu
@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS.keys())
def test_offload_from_a_gpu_paints_the_same_in_less_memory(pipe, own, paint, offload):
    inputs = {"num_inference_steps": STEPS, "output_type": "pt"}
    resident = own(pipe).to("cuda")
    expected = paint(resident, **inputs)
    weights = torch.cuda.memory_allocated()
    del resident
    gc.collect()
    torch.cuda.empty_cache()

    offloaded = own(pipe)
    offload(offloaded)
    assert torch.cuda.memory_allocated() < weights / 2
    for _ in range(2):
        torch.testing.assert_close(paint(offloaded, **inputs), expected, atol=1e-5, rtol=0)


# Tiles and slices of the VAE


def tile(pipe: DIMPipeline) -> None:
    pipe.vae.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=32,
        tile_sample_stride_height=24,
        tile_sample_stride_width=24,
    )


@pytest.mark.parametrize(
    ("height", "width", "tiles"), [(32, 32, 1), (48, 64, 2 * 3), (40, 32, 2 * 2), (36, 100, 2 * 5)]
)
def test_pictures_over_the_tiles_size_are_made_in_tiles(pipe, changed, paint, height, width, tiles):
    inputs = {"height": height, "width": width, "output_type": "pt"}
    whole = paint(pipe, **inputs)
    tile(changed)
    with counted(changed.vae.encoder) as encoded, counted(changed.vae.decoder) as decoded:
        tiled = paint(changed, **inputs)
    assert len(decoded) == tiles
    assert len(encoded) == (tiles if isinstance(changed, DIMEditPipeline) else 0)
    assert tiled.shape == whole.shape == (1, 3, height, width)
    if tiles == 1:
        assert torch.equal(tiled, whole)
    else:
        assert 0 < (tiled - whole).abs().mean() < 0.025


def test_slices_make_a_picture_at_a_time(pipe, changed, paint):
    inputs = {"prompt": ["Make it red.", "Add a star."], "output_type": "pt"}
    together = paint(pipe, **inputs)
    changed.vae.enable_slicing()
    with counted(changed.vae.encoder) as encoded, counted(changed.vae.decoder) as decoded:
        sliced = paint(changed, **inputs)
    assert len(decoded) == 2
    assert len(encoded) == (2 if isinstance(changed, DIMEditPipeline) else 0)
    torch.testing.assert_close(sliced, together, atol=1e-5, rtol=0)


def test_tiles_go_with_group_offload(changed, paint, tmp_path):
    inputs = {"height": 48, "width": 64, "output_type": "pt"}
    tile(changed)
    expected = paint(changed, **inputs)
    offload_to_disk(changed, LEVELS["each block"], tmp_path)
    assert torch.equal(paint(changed, **inputs), expected)
