import pytest
import torch

from diffusers_dim.ops import gated_depthwise_conv, gated_depthwise_conv_reference


def kernel_file():
    # Imported in a test: triton must not be imported while tests are collected.
    from diffusers_dim.ops import gated_depthwise_conv_triton

    return gated_depthwise_conv_triton


def compare(close, states, weight, bias, height, width, grad):
    inputs = [tensor.requires_grad_() for tensor in (states, weight, bias)]
    output = gated_depthwise_conv(*inputs, height, width)
    names = ("output", "hidden_states", "weight", "bias")
    found = dict(zip(names, (output, *torch.autograd.grad(output, inputs, grad))))
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    output = gated_depthwise_conv_reference(*wide, height, width)
    wanted = dict(zip(names, (output, *torch.autograd.grad(output, wide, grad.double()))))
    close(found, wanted, states.dtype)
    assert found["output"].dtype == states.dtype


@pytest.mark.parametrize(
    ("batch_size", "height", "width", "channels", "dtype"),
    [
        (2, 3, 3, 20, torch.float32),
        (1, 4, 4, 16, torch.float16),
        (1, 1, 6, 16, torch.bfloat16),
        (1, 9, 1, 8, torch.float16),
        (1, 1, 1, 1, torch.float32),
        (1, 33, 2, 5, torch.float32),  # two programs down a strip, backward
    ],
)
def test_output_and_gradients(device, random, close, batch_size, height, width, channels, dtype):
    states = random(batch_size, height * width, 2 * channels, dtype=dtype)
    weight, bias = random(2 * channels, 1, 3, 3, dtype=dtype), random(2 * channels, dtype=dtype)
    grad = random(batch_size, height * width, channels, dtype=dtype)
    compare(close, states, weight, bias, height, width, grad)


def test_strides(device, random, close):
    states = random(2, 12, 2 * 3).transpose(1, 2)
    weight = random(3, 3, 1, 12).permute(3, 2, 0, 1)
    grad = random(2, 6, 6).transpose(1, 2)
    compare(close, states, weight, random(24)[::2], 2, 3, grad)


@pytest.mark.parametrize("index", range(4))
def test_every_tuned_configuration(device, random, close, monkeypatch, index):
    kernels = kernel_file()
    monkeypatch.setattr(kernels._forward_kernel, "configs", [kernels.CONFIGS[index]])
    states, weight, bias = random(1, 17 * 3, 2 * 70), random(140, 1, 3, 3), random(140)
    found = gated_depthwise_conv(states, weight, bias, 17, 3)
    wanted = gated_depthwise_conv_reference(states.double(), weight.double(), bias.double(), 17, 3)
    close({"output": found}, {"output": wanted}, torch.float32)


@pytest.mark.parametrize("index", range(2))
def test_every_tuned_configuration_backward(device, random, close, monkeypatch, index):
    kernels = kernel_file()
    monkeypatch.setattr(kernels._backward_input_kernel, "configs", [kernels.CONFIGS[index]])
    monkeypatch.setattr(kernels._backward_gate_kernel, "configs", [kernels.GATE_CONFIGS[index]])
    states, grad = random(1, 2 * 3, 2 * 70), random(1, 2 * 3, 70)
    compare(close, states, random(140, 1, 3, 3), random(140), 2, 3, grad)
