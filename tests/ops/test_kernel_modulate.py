import pytest
import torch

from diffusers_dim.ops import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    gate_residual_layer_norm_modulate_reference,
    gate_residual_reference,
    layer_norm_modulate,
    layer_norm_modulate_reference,
)


def norm(function, residual, update, shift, scale, gate):
    return (function[0](residual, shift, scale),)


def residual(function, residual, update, shift, scale, gate):
    return (function[1](residual, gate, update),)


def both(function, residual, update, shift, scale, gate):
    return function[2](residual, gate, update, shift, scale)


def both_without_gate(function, residual, update, shift, scale, gate):
    return function[2](residual, None, update, shift, scale)


KERNELS = (layer_norm_modulate, gate_residual, gate_residual_layer_norm_modulate)
REFERENCES = (
    layer_norm_modulate_reference,
    gate_residual_reference,
    gate_residual_layer_norm_modulate_reference,
)


@pytest.mark.parametrize("operation", [norm, residual, both, both_without_gate])
@pytest.mark.parametrize(
    ("batch_size", "tokens", "channels", "dtype", "vectors_dtype"),
    [
        (2, 13, 40, torch.float32, torch.float32),  # two programs a sample, backward
        (1, 9, 2240, torch.bfloat16, torch.bfloat16),
        (3, 1, 7, torch.float16, torch.float16),
        (2, 11, 96, torch.bfloat16, torch.float32),
    ],
)
def test_output_and_gradients(device, random, close, operation, batch_size, tokens, channels, dtype, vectors_dtype):
    # Tokens in the middle of wider ones, tokens last, and vectors as the block chunks them.
    inputs = [
        random(batch_size, tokens, 2 * channels, dtype=dtype)[..., 1 : channels + 1].requires_grad_(),
        random(batch_size, channels, tokens, dtype=dtype).transpose(1, 2).requires_grad_(),
        *(view.requires_grad_() for view in random(batch_size, 6, channels, dtype=vectors_dtype).chunk(6, 1)[:3]),
    ]
    outputs = operation(KERNELS, *inputs)
    grads = [random(*output.shape, dtype=dtype) for output in outputs]
    used = [0, 2, 3] if operation is norm else [0, 1, 4] if operation is residual else [0, 1, 2, 3]
    used += [4] if operation is both else []
    found = torch.autograd.grad(outputs, [inputs[i] for i in used], grads)

    wide = [states.detach().double().requires_grad_() for states in inputs]
    wide_outputs = operation(REFERENCES, *wide)
    wanted = torch.autograd.grad(wide_outputs, [wide[i] for i in used], [grad.double() for grad in grads])
    close(dict(enumerate(outputs)), dict(enumerate(wide_outputs)), dtype)
    close(dict(zip(used, found)), dict(zip(used, wanted)), dtype)
    assert all(output.dtype == dtype for output in outputs)


def test_one_vector_for_all_samples(device, random, close):
    tokens, vector = random(3, 5, 16), random(1, 1, 16).requires_grad_()
    grads = []
    for function, states in ((layer_norm_modulate, tokens), (layer_norm_modulate_reference, tokens.double())):
        output = function(states, vector, vector)
        grads.append(torch.autograd.grad(output.sum(), vector)[0])
    close({"vector": grads[0]}, {"vector": grads[1]}, torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_of_two_outputs(device, random, close, used):
    states, update = random(2, 2, 5, 16).requires_grad_().unbind()
    gate, shift, scale = random(3, 2, 1, 16)
    grads = []
    for function in (gate_residual_layer_norm_modulate, gate_residual_layer_norm_modulate_reference):
        output = function(states, gate, update, shift, scale)[used]
        grads.append(torch.autograd.grad(output.square().sum(), (states, update)))
    close(dict(enumerate(grads[0])), dict(enumerate(grads[1])), torch.float32)
