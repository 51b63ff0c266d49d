import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusers_dim import DIMConnector, DIMTransformer2DModel
from diffusers_dim.ops import recompute
from diffusers_dim.training import DIMTrainingModel, training_flops


TINY = {
    "in_channels": 8,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 48,
    "qk_norm": "rms_norm_across_heads",
}
# The released width; the defaults are the released model's.
WIDE = {"in_channels": 64, "out_channels": 32, "num_layers": 1, "qk_norm": "rms_norm_across_heads"}
SIZES = {"tiny": (TINY, 24, 8, 12, 17), "wide": (WIDE, 2048, 32, 32, 1791)}
BATCH = 2


def convolution_backward_flops(grad_out, x, weight, *rest, **kwargs):
    """As many as forward for each gradient. torch's own count takes a depthwise convolution for a dense one."""
    output_mask = rest[7]
    batch, _, height, width = grad_out
    return 2 * batch * height * width * torch.Size(weight).numel() * (output_mask[0] + output_mask[1])


def count(
    transformer_config, hidden_size, height, width, tokens, frozen_weights=False, gradient_checkpointing=False
) -> float:
    """What torch counts of a training step, for one sample; no arithmetic is done."""
    # Fused attention computes its scores again in the backward pass.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FakeTensorMode():
        transformer = DIMTransformer2DModel(**transformer_config)
        connector = DIMConnector(hidden_size, transformer.config.caption_channels, max_sequence_length=tokens)
        model = DIMTrainingModel(connector, transformer).train()
        if gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if frozen_weights:
            # With every vector trained, gradients go the whole way down, and there is no work of adapters.
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.ndim == 1)
        latents = torch.randn(BATCH, transformer_config["out_channels"], height, width)
        hidden_states = torch.randn(BATCH, tokens, hidden_size)
        dropped = torch.zeros(BATCH, dtype=torch.bool)
        timesteps = torch.full((BATCH,), 500)
        mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(hidden_states, latents, latents, timesteps, dropped, image_latents=latents).sum().backward()
    return counter.get_total_flops() / BATCH


def formula(transformer_config, hidden_size, height, width, tokens, **settings) -> int:
    with FakeTensorMode():
        config = DIMTransformer2DModel(**transformer_config).config
    connector_config = {"hidden_size": hidden_size, "caption_channels": config.caption_channels}
    return training_flops(config, connector_config, height, width, tokens, **settings)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"frozen_weights": True}])
@pytest.mark.parametrize("size", SIZES)
def test_training_on_a_sample_takes_what_torch_counts(size, settings, monkeypatch):
    # What is computed twice to spare memory is no further work of the model.
    monkeypatch.setattr(recompute, "SMALL", math.inf)
    assert formula(*SIZES[size], **settings) == count(*SIZES[size], **settings)


def test_released_model_at_1024_pixels():
    config = {"in_channels": 64, "out_channels": 32, "qk_norm": "rms_norm_across_heads"}
    assert formula(config, 2048, 32, 32, 1791) == pytest.approx(11.7e12, rel=0.01)
    with_recomputing = formula(config, 2048, 32, 32, 1791, gradient_checkpointing=True)
    assert with_recomputing == pytest.approx(4 / 3 * 11.7e12, rel=0.01)
