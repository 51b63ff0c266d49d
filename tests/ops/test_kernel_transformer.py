"""The painter with the kernels in it, against itself with the plain definitions."""

import pytest
import torch
from peft import LoraConfig

from diffusers_dim import DIMTransformer2DModel
from diffusers_dim.models import transformer_dim
from diffusers_dim.models.transformer_dim import DIMDenoisingCache
from diffusers_dim.ops import set_kernels


@pytest.fixture
def transformer(device) -> DIMTransformer2DModel:
    torch.manual_seed(0)
    return DIMTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=10,
        mlp_ratio=1.0,  # one block of channels, as the interpreter is slow
        qk_norm="rms_norm_across_heads",
    ).to(device)


@pytest.fixture
def inputs(random):
    return random(2, 4, 2, 3), random(2, 6, 10), torch.tensor([700, 700])


def forward(transformer, inputs):
    hidden_states, condition, timestep = inputs
    return transformer(hidden_states, condition, timestep.to(hidden_states.device)).sample


def test_prediction(transformer, inputs, close):
    with torch.no_grad():
        output = forward(transformer, inputs)
        with set_kernels(False):
            expected = forward(transformer, inputs)
    close({"output": output}, {"output": expected}, torch.float32)
    assert not torch.equal(output, expected)  # it was another computation


def test_gradients(transformer, inputs, close):
    def gradients():
        transformer.zero_grad()
        forward(transformer, inputs).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in transformer.named_parameters()}

    found = gradients()
    with set_kernels(False):
        expected = gradients()
    found, expected = ({name: grads[name] for name in grads if "norm_k" not in name} for grads in (found, expected))
    close(found, expected, torch.float32)


def test_denoising_cache(transformer, inputs):
    hidden_states, condition, timestep = inputs
    cache = DIMDenoisingCache()
    with torch.no_grad():
        expected = forward(transformer, inputs)
        for _ in range(2):
            output = transformer(
                hidden_states, condition, timestep.to(hidden_states.device), denoising_cache=cache
            ).sample
            assert torch.equal(output, expected)


def test_what_is_around_the_depthwise_convolution_is_not_passed_by(transformer, inputs, close, monkeypatch):
    used = []
    kernel = transformer_dim.gated_depthwise_conv
    monkeypatch.setattr(
        transformer_dim, "gated_depthwise_conv", lambda *args: [used.append(1), kernel(*args)][1], raising=True
    )
    with torch.no_grad():
        forward(transformer, inputs)
        assert len(used) == 1
        # As an offloading hook does.
        conv = transformer.transformer_blocks[0].ff.conv_depth
        original = conv.forward
        conv.forward = lambda hidden_states: original(hidden_states)
        forward(transformer, inputs)
        assert len(used) == 1
        del conv.forward
        transformer.add_adapter(LoraConfig(r=32, target_modules=["conv_depth"], init_lora_weights=False))
        forward(transformer, inputs)
        assert len(used) == 1


def test_kernels_are_in_one_graph_with_the_rest(transformer, inputs):
    with torch.no_grad():
        expected = forward(transformer, inputs)
        transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert torch.equal(forward(transformer, inputs), expected)
