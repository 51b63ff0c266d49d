import pytest
import torch
from diffusers import SanaTransformer2DModel

from diffusers_dim import DIMTransformer2DModel
from diffusers_dim.models.transformer_dim import DIMDenoisingCache
from measure import Cost, Machine, count_flops, denoising_cost, measure, transformer_cost
from presets import TRANSFORMER
from stock import share_weights


@pytest.fixture(scope="module")
def transformer() -> DIMTransformer2DModel:
    """Of sizes that all differ, so that none can stand in for another."""
    sizes = {"in_channels": 10, "out_channels": 5, "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2}
    sizes |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 24}
    return DIMTransformer2DModel(
        **sizes, caption_channels=20, mlp_ratio=1.5, patch_size=2, qk_norm="rms_norm_across_heads", sample_size=8
    ).eval()


@pytest.fixture
def inputs(transformer) -> dict[str, torch.Tensor]:
    """Four pictures, a pair of which shares a condition."""
    return {
        "hidden_states": torch.randn(4, 10, 8, 12),
        "encoder_hidden_states": torch.randn(2, 7, 20),
        "timestep": torch.tensor([500]),
    }


SIZES = {"pictures": 4, "height": 8, "width": 12, "tokens": 7}


@torch.no_grad()
def test_counted_work_is_torchs_count_for_the_stock_transformer(transformer, inputs):
    stock = share_weights(SanaTransformer2DModel, transformer)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].repeat_interleave(2, dim=0)
    inputs["timestep"] = inputs["timestep"].expand(4)
    expected = transformer_cost(transformer.config, conditions=4, **SIZES).flops
    assert count_flops(lambda: stock(**inputs)) == expected


@torch.no_grad()
def test_counted_work_is_torchs_count_for_the_first_and_a_later_step(transformer, inputs):
    cache = DIMDenoisingCache(torch.tensor([500, 400, 300]))
    first = transformer_cost(transformer.config, conditions=2, timesteps=3, **SIZES)
    later = transformer_cost(transformer.config, conditions=2, timesteps=0, condition_is_cached=True, **SIZES)
    assert count_flops(lambda: transformer(**inputs, denoising_cache=cache)) == first.flops
    assert count_flops(lambda: transformer(**inputs, denoising_cache=cache)) == later.flops
    assert denoising_cost(transformer.config, steps=3, conditions=2, **SIZES) == first + later * 2


@torch.no_grad()
def test_counted_work_is_torchs_count_for_two_branches_of_guidance(transformer, inputs):
    inputs["hidden_states"] = inputs["hidden_states"][:2]
    expected = transformer_cost(transformer.config, conditions=2, timesteps=1, guidance_branches=2, **SIZES)
    assert count_flops(lambda: transformer(**inputs, guidance_branches=2)) == expected.flops


def test_counted_bytes_hold_every_matrix_of_weights(transformer):
    with_one_layer = {**transformer.config, "num_layers": 1}
    sizes = {**SIZES, "conditions": 1, "tokens": 0, "bytes_per_number": 1}  # no condition, so no keys and values
    both, one = (transformer_cost(config, **sizes).bytes for config in (transformer.config, with_one_layer))
    layer = transformer.transformer_blocks[0]
    assert both - one == sum(
        item.numel() for name, item in layer.named_parameters() if name.endswith("weight") and "norm" not in name
    )


def test_counted_work_of_the_published_size_at_1024_pixels():
    sizes = {"pictures": 1, "height": 32, "width": 32, "conditions": 1, "tokens": 1791}
    assert transformer_cost(TRANSFORMER, **sizes).flops == pytest.approx(3.9e12, rel=0.02)
    assert transformer_cost(TRANSFORMER, **sizes, condition_is_cached=True).flops == pytest.approx(3.1e12, rel=0.02)


def test_the_slower_of_arithmetic_and_memory_is_the_floor():
    machine = Machine(flops_per_second=100.0, bytes_per_second=10.0)
    assert Cost(flops=300, bytes=10).seconds(machine) == 3.0
    assert Cost(flops=300, bytes=50).seconds(machine) == 5.0


def test_variants_take_turns_and_all_samples_are_kept():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = measure(variants, runs=4, device=torch.device("cpu"))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert all(len(timing["seconds"]) == 4 for timing in timings.values())
    assert all(min(t["seconds"]) <= t["median_seconds"] <= max(t["seconds"]) for t in timings.values())
