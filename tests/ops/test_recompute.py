"""Definitions whose backward pass keeps their inputs alone."""

import pytest
import torch

from diffusers_dim import ops
from diffusers_dim.ops import recompute
from diffusers_dim.ops.recompute import recomputed


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


CASES = {
    "layer_norm_modulate": (((2, 16, 8), (2, 1, 8), (2, 1, 8)), (1e-6,)),
    "gate_residual": (((2, 16, 8), (2, 1, 8), (2, 16, 8)), ()),
    "relu_linear_attention_state": (((2, 16, 2, 4), (2, 16, 2, 4)), ()),
    "relu_linear_attention_apply": (((2, 16, 2, 4), (2, 2, 5, 4)), (1e-6,)),
    "gated_depthwise_conv": (((2, 16, 8), (8, 1, 3, 3), (8,)), (4, 4)),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_definitions(name, autocast, monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    shapes, settings = CASES[name]
    definition, inputs = getattr(ops, f"{name}_reference"), [randn(*shape) for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = definition(*inputs, *settings), recomputed(definition, *inputs, settings=settings)
    grad = torch.randn_like(expected)
    assert torch.equal(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("numel, kept", [(recompute.SMALL, 1), (recompute.SMALL - 1, 2)])
def test_large_operations_keep_their_inputs_alone(numel, kept):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        recomputed(lambda x: x.sin().exp().cos(), randn(numel))
    assert len(set(saved)) == kept


def test_an_input_without_gradient_gets_none(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)
    a, b = randn(4), torch.randn(4)
    recomputed(torch.mul, a, b).sum().backward()
    assert torch.equal(a.grad, b) and b.grad is None
