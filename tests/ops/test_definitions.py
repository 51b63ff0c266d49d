"""The plain-torch definitions compute what diffusers computes, bit for bit, and say what does not fit."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaModulatedNorm, SanaTransformerBlock

import diffusers_dim.ops as ops


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def same(found, wanted):
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def attend(attn, hidden_states):
    query, key, value = (
        layer(hidden_states).unflatten(2, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    return attn.to_out[0](ops.relu_linear_attention(query, key, value).flatten(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 64, 77])
def test_linear_attention(tokens, dtype):
    attn = Attention(query_dim=96, heads=3, dim_head=32, processor=SanaLinearAttnProcessor2_0()).to(dtype)
    hidden_states = torch.randn(2, tokens, 96, dtype=dtype)
    same(attend(attn, hidden_states), attn(hidden_states))


def test_linear_attention_stays_float32_under_autocast():
    query, key, value = torch.randn(3, 1, 20, 2, 8)
    wanted = ops.relu_linear_attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        same(ops.relu_linear_attention(query, key, value), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 7), (1, 6), (9, 1)])
def test_gated_depthwise_conv(height, width, dtype):
    layer = GLUMBConv(24, 24, 2.5, residual_connection=False).to(dtype)
    seen = {}
    layer.conv_inverted.register_forward_hook(lambda module, args, output: seen.update(before=output))
    layer.conv_point.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    hidden_states = torch.randn(2, height * width, 24, dtype=dtype)
    layer(hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    before, after = (states.flatten(2, 3).permute(0, 2, 1) for states in (seen["before"], seen["after"]))
    same(ops.gated_depthwise_conv(before, layer.conv_depth.weight, layer.conv_depth.bias, height, width), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_modulate(dtype):
    hidden_states, temb, table = torch.randn(2, 15, 48), torch.randn(2, 48), torch.randn(2, 48)
    hidden_states, temb, table = (tensor.to(dtype) for tensor in (hidden_states, temb, table))
    shift, scale = (table[None] + temb[:, None]).chunk(2, dim=1)
    wanted = SanaModulatedNorm(48)(hidden_states, temb, table)
    same(ops.layer_norm_modulate(hidden_states, shift, scale), wanted)


def test_a_whole_block_of_them():
    block = SanaTransformerBlock(
        64, 2, 32, num_cross_attention_heads=2, cross_attention_head_dim=32, cross_attention_dim=64
    )
    hidden_states, condition, timestep = torch.randn(2, 15, 64), torch.randn(2, 9, 64), torch.randn(2, 6 * 64)
    wanted = block(hidden_states, encoder_hidden_states=condition, timestep=timestep, height=3, width=5)

    table = block.scale_shift_table[None] + timestep.reshape(2, 6, -1)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
    attn_output = attend(block.attn1, ops.layer_norm_modulate(hidden_states, shift_msa, scale_msa))
    hidden_states = ops.gate_residual(hidden_states, gate_msa, attn_output)
    attn_output = block.attn2(hidden_states, encoder_hidden_states=condition)
    hidden_states, norm_hidden_states = ops.gate_residual_layer_norm_modulate(
        hidden_states, None, attn_output, shift_mlp, scale_mlp
    )
    inner = block.ff.conv_inverted(norm_hidden_states.unflatten(1, (3, 5)).permute(0, 3, 1, 2))
    inner = inner.flatten(2, 3).permute(0, 2, 1)
    inner = ops.gated_depthwise_conv(inner, block.ff.conv_depth.weight, block.ff.conv_depth.bias, 3, 5)
    ff_output = block.ff.conv_point(inner.permute(0, 2, 1).unflatten(2, (3, 5))).flatten(2, 3).permute(0, 2, 1)
    same(ops.gate_residual(hidden_states, gate_mlp, ff_output), wanted)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_outputs_keep_the_type_of_the_tokens(state_dtype):
    hidden_states, vector = torch.randn(1, 4, 8, dtype=state_dtype), torch.randn(1, 1, 8)
    outputs = ops.gate_residual_layer_norm_modulate(hidden_states, vector, hidden_states, vector, vector)
    assert [output.dtype for output in outputs] == [state_dtype, state_dtype]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.relu_linear_attention(x(1, 4, 2, 8), x(1, 4, 2, 8), x(1, 5, 2, 8)), "key and value"),
        (lambda x: ops.relu_linear_attention(x(1, 4, 2, 8), x(1, 4, 16), x(1, 4, 16)), "key and value"),
        (lambda x: ops.relu_linear_attention(x(1, 4, 3, 8), x(1, 4, 2, 8), x(1, 4, 2, 8)), "query must be"),
        (lambda x: ops.layer_norm_modulate(x(2, 4, 8), x(2, 8), x(2, 1, 8)), "shift must be"),
        (lambda x: ops.layer_norm_modulate(x(2, 4, 8), x(2, 1, 8), x(3, 1, 8)), "scale must be"),
        (lambda x: ops.gate_residual(x(2, 4, 8), x(2, 4, 8), x(2, 4, 8)), "gate must be"),
        (lambda x: ops.gate_residual(x(2, 4, 8), x(2, 1, 8), x(2, 5, 8)), "residual and update"),
        (lambda x: ops.gated_depthwise_conv(x(1, 6, 8), x(8, 1, 3, 3), x(8), 2, 4), r"2 \* 4"),
        (lambda x: ops.gated_depthwise_conv(x(1, 6, 7), x(7, 1, 3, 3), x(7), 2, 3), "even number"),
        (lambda x: ops.gated_depthwise_conv(x(1, 6, 8), x(4, 1, 3, 3), x(4), 2, 3), "weight and bias"),
    ],
)
def test_shapes_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros)


@pytest.mark.parametrize("name", sorted(set(ops.__all__) - {"set_kernels", "uses_kernels"}))
def test_every_operation_has_its_definition(name):
    assert name.endswith("_reference") or callable(getattr(ops, f"{name}_reference"))


def call_everything(query, key, value, tokens, vector, wide, weight, bias):
    output = ops.relu_linear_attention(query, key, value).sum()
    tokens, norm = ops.gate_residual_layer_norm_modulate(tokens, vector, tokens, vector, vector)
    tokens = ops.gate_residual(tokens, vector, ops.layer_norm_modulate(norm, vector, vector))
    return output + tokens.sum() + ops.gated_depthwise_conv(wide, weight, bias, 3, 2).sum()


def test_compiled_whole_without_kernels():
    shapes = [(1, 6, 2, 8)] * 3 + [(2, 6, 8), (2, 1, 8), (1, 6, 12), (12, 1, 3, 3), (12,)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    torch.compiler.reset()
    results = []
    for run in (torch.compile(call_everything, fullgraph=True, backend="aot_eager"), call_everything):
        output = run(*inputs)
        results.append((output, *torch.autograd.grad(output, inputs)))
    torch.testing.assert_close(*results)
