"""The operators behind the kernels, as torch.compile and autograd meet them."""

import pytest
import torch

import diffusers_dim.ops as ops


def attention(random):
    inputs = random(3, 1, 9, 2, 8).unbind()
    return ops.relu_linear_attention, inputs, ["relu_linear_attention_state", "relu_linear_attention_apply"]


def norm(random):
    return ops.layer_norm_modulate, (random(2, 5, 12), *random(2, 2, 1, 12)), ["modulate"]


def residual(random):
    states, update = random(2, 2, 5, 12)
    return ops.gate_residual, (states, random(2, 1, 12), update), ["modulate"]


def both(random):
    states, update = random(2, 2, 5, 12)
    function = ops.gate_residual_layer_norm_modulate
    return function, (states, random(2, 1, 12), update, *random(2, 2, 1, 12)), ["modulate"]


def conv(random):
    def function(*inputs):
        return ops.gated_depthwise_conv(*inputs, height=2, width=3)

    return function, (random(2, 6, 8), random(8, 1, 3, 3), random(8)), ["gated_depthwise_conv"]


OPERATIONS = pytest.mark.parametrize("operation", [attention, norm, residual, both, conv])


@OPERATIONS
def test_compiled_whole_with_gradients(device, random, operation):
    function, inputs, names = operation(random)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    results = []
    torch.compiler.reset()
    for run in (torch.compile(function, fullgraph=True, backend=backend), function):
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(output.square().sum() for output in outputs)
        results.append((*outputs, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(compiled, eager) for compiled, eager in zip(*results))
    assert len(graphs) == 1
    called = [str(node.target) for node in graphs[0].graph.nodes if "diffusers_dim" in str(node.target)]
    assert [name.removeprefix("diffusers_dim.").removesuffix(".default") for name in called] == names


def test_switch_compiles_again(device, random):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    function, inputs, _ = norm(random)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    compiled(*inputs)
    with ops.set_kernels(False):
        compiled(*inputs)
    texts = [str(graph.graph) for graph in graphs]
    assert ["diffusers_dim" in text for text in texts] == [True, False]


@OPERATIONS
def test_operators_pass_opcheck(device, random, operation):
    function, inputs, names = operation(random)
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    defined = torch.ops.diffusers_dim
    if operation is attention:
        query, key, value = inputs
        state = torch.randn(1, 2, 9, 8, device=device, requires_grad=True)
        calls = [
            (defined.relu_linear_attention_state, (key, value)),
            (defined.relu_linear_attention_apply, (query, state, 1e-15)),
        ]
    elif operation is norm:
        calls = [(defined.modulate, (inputs[0], None, None, *inputs[1:], 1e-6))]
    elif operation is residual:
        calls = [(defined.modulate, (*inputs, None, None, 0.0))]
    elif operation is both:
        calls = [(defined.modulate, (*inputs, 1e-6))]
    else:
        calls = [(defined.gated_depthwise_conv, (*inputs, 2, 3))]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)
