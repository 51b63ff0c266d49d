# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Triton kernels of gated_depthwise_conv.py. A program walks down a strip of a few columns, for one block of channels,
and keeps three rows of SiLU's results: of a strip of n columns each is computed (n + 2) / n times and not nine, which
is what the special function units of a GPU can follow. The next row is fetched while one is computed.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from .triton_utils import INTERPRETED, on_device, silu


def _config(block_c, columns, rows, num_warps):
    return triton.Config({"BLOCK_C": block_c, "COLUMNS": columns, "ROWS": rows}, num_warps=num_warps)


# Channels, columns and rows of a program. An output's sum is in the same order in all of them; only the gradients of
# weight and bias, whose parts are a program's, depend on rows and columns, which are fixed there.
CONFIGS = [_config(64, 4, 16, 1), _config(128, 4, 16, 2), _config(128, 2, 16, 2), _config(64, 2, 32, 1)]
GATE_COLUMNS, GATE_ROWS = 2, 32
GATE_CONFIGS = [_config(64, GATE_COLUMNS, GATE_ROWS, 1), _config(128, GATE_COLUMNS, GATE_ROWS, 4)]


def _tuned(configs, small):
    # The interpreter has nothing to tune, and small tiles have edges in small pictures.
    return triton.autotune(configs=[small] if INTERPRETED else configs, key=["channels"])


@triton.jit
def _mask(c, channels, inside):
    """The channels that there are, if `inside`: no block of truth values, which the interpreter cannot spread."""
    return c < tl.where(inside, channels, 0)


@triton.jit
def _load_row(states, row, column, height, width, stride, c, channels, COLUMNS: tl.constexpr):
    """A row of the strip and its neighbours left and right; zeros outside the picture."""
    values = ()
    for j in tl.static_range(COLUMNS + 2):
        at = column + j - 1
        inside = (row >= 0) & (row < height) & (at >= 0) & (at < width)
        offset = tl.cast(row * width + at, tl.int64) * stride
        values = values + (tl.load(states + offset, mask=_mask(c, channels, inside), other=0.0),)
    return values


@triton.jit
def _activate(row, COLUMNS: tl.constexpr):
    values = ()
    for j in tl.static_range(COLUMNS + 2):
        values = values + (silu(row[j].to(tl.float32)),)
    return values


@triton.jit
def _to_float(row, COLUMNS: tl.constexpr):
    values = ()
    for j in tl.static_range(COLUMNS + 2):
        values = values + (row[j].to(tl.float32),)
    return values


@triton.jit
def _load_taps(weight, stride_row, stride_column, mask, FLIP: tl.constexpr):
    taps = ()
    for i in tl.static_range(9):
        t = 8 - i if FLIP else i
        tap = tl.load(weight + (t // 3) * stride_row + (t % 3) * stride_column, mask=mask, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def _convolve(top, middle, bottom, taps, j: tl.constexpr):
    """The convolution at column j of the strip."""
    out = top[j] * taps[0] + top[j + 1] * taps[1] + top[j + 2] * taps[2]
    out += middle[j] * taps[3] + middle[j + 1] * taps[4] + middle[j + 2] * taps[5]
    return out + bottom[j] * taps[6] + bottom[j + 1] * taps[7] + bottom[j + 2] * taps[8]


@triton.jit
def _add_taps(sums, top, middle, bottom, grad, j: tl.constexpr):
    """Adds to the gradients of the taps what column j of the strip gives them."""
    return (
        sums[0] + grad * top[j],
        sums[1] + grad * top[j + 1],
        sums[2] + grad * top[j + 2],
        sums[3] + grad * middle[j],
        sums[4] + grad * middle[j + 1],
        sums[5] + grad * middle[j + 2],
        sums[6] + grad * bottom[j],
        sums[7] + grad * bottom[j + 1],
        sums[8] + grad * bottom[j + 2],
    )


@_tuned(CONFIGS, small=_config(16, 2, 4, 1))
@triton.jit
def _forward_kernel(
    hidden_states,
    weight,
    bias,
    output,
    height,
    width,
    channels,
    states_batch,
    states_token,
    states_channel,
    weight_channel,
    weight_row,
    weight_column,
    bias_channel,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) // blocks * COLUMNS
    first = tl.program_id(1) * ROWS
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    value = hidden_states + batch * states_batch + c * states_channel
    gate = value + channels * states_channel
    output += batch * height * width * channels + c
    weight += c * weight_channel
    value_taps = _load_taps(weight, weight_row, weight_column, mask, False)
    gate_taps = _load_taps(weight + channels * weight_channel, weight_row, weight_column, mask, False)
    value_bias = tl.load(bias + c * bias_channel, mask=mask, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias + (c + channels) * bias_channel, mask=mask, other=0.0).to(tl.float32)

    value_top = _activate(
        _load_row(value, first - 1, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    gate_top = _activate(
        _load_row(gate, first - 1, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    value_middle = _activate(
        _load_row(value, first, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    gate_middle = _activate(_load_row(gate, first, column, height, width, states_token, c, channels, COLUMNS), COLUMNS)
    value_next = _load_row(value, first + 1, column, height, width, states_token, c, channels, COLUMNS)
    gate_next = _load_row(gate, first + 1, column, height, width, states_token, c, channels, COLUMNS)
    for row in tl.range(first, tl.minimum(first + ROWS, height)):
        value_bottom = _activate(value_next, COLUMNS)
        gate_bottom = _activate(gate_next, COLUMNS)
        value_next = _load_row(value, row + 2, column, height, width, states_token, c, channels, COLUMNS)
        gate_next = _load_row(gate, row + 2, column, height, width, states_token, c, channels, COLUMNS)
        for j in tl.static_range(COLUMNS):
            v = value_bias + _convolve(value_top, value_middle, value_bottom, value_taps, j)
            g = gate_bias + _convolve(gate_top, gate_middle, gate_bottom, gate_taps, j)
            out = (v * silu(g)).to(output.dtype.element_ty)
            offset = tl.cast(row * width + column + j, tl.int64) * channels
            tl.store(output + offset, out, mask=_mask(c, channels, column + j < width))
        value_top, value_middle = value_middle, value_bottom
        gate_top, gate_middle = gate_middle, gate_bottom


@_tuned(GATE_CONFIGS, small=_config(16, GATE_COLUMNS, GATE_ROWS, 1))
@triton.jit
def _backward_gate_kernel(
    grad_output,
    hidden_states,
    weight,
    bias,
    grad_conv,
    parts,
    height,
    width,
    channels,
    grad_batch,
    grad_token,
    grad_channel,
    states_batch,
    states_token,
    states_channel,
    weight_channel,
    weight_row,
    weight_column,
    bias_channel,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """
    Convolves again, for the gradient of the convolution's output, and sums a program's part of the gradients of weight
    (rows 0 to 8 of `parts`) and bias (row 9).
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = tl.program_id(2).to(tl.int64)
    strip = tl.program_id(0) // blocks
    column = strip * COLUMNS
    first = tl.program_id(1) * ROWS
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    grad_output += batch * grad_batch + c * grad_channel
    value = hidden_states + batch * states_batch + c * states_channel
    gate = value + channels * states_channel
    grad_conv += batch * height * width * 2 * channels + c
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.cdiv(width, COLUMNS) + strip
    parts += part * 20 * channels + c
    weight += c * weight_channel
    value_taps = _load_taps(weight, weight_row, weight_column, mask, False)
    gate_taps = _load_taps(weight + channels * weight_channel, weight_row, weight_column, mask, False)
    value_bias = tl.load(bias + c * bias_channel, mask=mask, other=0.0).to(tl.float32)
    gate_bias = tl.load(bias + (c + channels) * bias_channel, mask=mask, other=0.0).to(tl.float32)
    zero = tl.zeros([BLOCK_C], tl.float32)
    value_sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    gate_sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    value_sum = zero
    gate_sum = zero

    value_top = _activate(
        _load_row(value, first - 1, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    gate_top = _activate(
        _load_row(gate, first - 1, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    value_middle = _activate(
        _load_row(value, first, column, height, width, states_token, c, channels, COLUMNS), COLUMNS
    )
    gate_middle = _activate(_load_row(gate, first, column, height, width, states_token, c, channels, COLUMNS), COLUMNS)
    value_next = _load_row(value, first + 1, column, height, width, states_token, c, channels, COLUMNS)
    gate_next = _load_row(gate, first + 1, column, height, width, states_token, c, channels, COLUMNS)
    for row in tl.range(first, tl.minimum(first + ROWS, height)):
        value_bottom = _activate(value_next, COLUMNS)
        gate_bottom = _activate(gate_next, COLUMNS)
        value_next = _load_row(value, row + 2, column, height, width, states_token, c, channels, COLUMNS)
        gate_next = _load_row(gate, row + 2, column, height, width, states_token, c, channels, COLUMNS)
        for j in tl.static_range(COLUMNS):
            v = value_bias + _convolve(value_top, value_middle, value_bottom, value_taps, j)
            g = gate_bias + _convolve(gate_top, gate_middle, gate_bottom, gate_taps, j)
            inside = _mask(c, channels, column + j < width)
            n = tl.cast(row * width + column + j, tl.int64)
            grad = tl.load(grad_output + n * grad_token, mask=inside, other=0.0).to(tl.float32)
            gated = tl.sigmoid(g)
            grad_v = grad * g * gated
            grad_g = grad * v * gated * (1 + g * (1 - gated))
            tl.store(grad_conv + n * 2 * channels, grad_v.to(grad_conv.dtype.element_ty), mask=inside)
            tl.store(grad_conv + (n * 2 + 1) * channels, grad_g.to(grad_conv.dtype.element_ty), mask=inside)
            value_sums = _add_taps(value_sums, value_top, value_middle, value_bottom, grad_v, j)
            gate_sums = _add_taps(gate_sums, gate_top, gate_middle, gate_bottom, grad_g, j)
            value_sum += grad_v
            gate_sum += grad_g
        value_top, value_middle = value_middle, value_bottom
        gate_top, gate_middle = gate_middle, gate_bottom

    for t in tl.static_range(9):
        tl.store(parts + t * 2 * channels, value_sums[t], mask=mask)
        tl.store(parts + (t * 2 + 1) * channels, gate_sums[t], mask=mask)
    tl.store(parts + 18 * channels, value_sum, mask=mask)
    tl.store(parts + 19 * channels, gate_sum, mask=mask)


@_tuned(CONFIGS, small=_config(16, 2, 4, 1))
@triton.jit
def _backward_input_kernel(
    grad_conv,
    hidden_states,
    weight,
    grad_states,
    height,
    width,
    channels,
    states_batch,
    states_token,
    states_channel,
    weight_channel,
    weight_row,
    weight_column,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The convolution's transpose, which is a convolution with its taps turned round, then SiLU's derivative."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) // blocks * COLUMNS
    first = tl.program_id(1) * ROWS
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = c < channels
    grad_conv += batch * height * width * channels + c
    hidden_states += batch * states_batch + c * states_channel
    grad_states += batch * height * width * channels + c
    taps = _load_taps(weight + c * weight_channel, weight_row, weight_column, mask, True)

    top = _to_float(_load_row(grad_conv, first - 1, column, height, width, channels, c, channels, COLUMNS), COLUMNS)
    middle = _to_float(_load_row(grad_conv, first, column, height, width, channels, c, channels, COLUMNS), COLUMNS)
    following = _load_row(grad_conv, first + 1, column, height, width, channels, c, channels, COLUMNS)
    for row in tl.range(first, tl.minimum(first + ROWS, height)):
        bottom = _to_float(following, COLUMNS)
        following = _load_row(grad_conv, row + 2, column, height, width, channels, c, channels, COLUMNS)
        for j in tl.static_range(COLUMNS):
            inside = _mask(c, channels, column + j < width)
            n = tl.cast(row * width + column + j, tl.int64)
            x = tl.load(hidden_states + n * states_token, mask=inside, other=0.0).to(tl.float32)
            active = tl.sigmoid(x)
            grad = _convolve(top, middle, bottom, taps, j) * active * (1 + x * (1 - active))
            tl.store(grad_states + n * channels, grad.to(grad_states.dtype.element_ty), mask=inside)
        top, middle = middle, bottom


def _grid(batch_size, height, width, channels):
    def grid(meta):
        strips = triton.cdiv(width, meta["COLUMNS"])
        return triton.cdiv(channels, meta["BLOCK_C"]) * strips, triton.cdiv(height, meta["ROWS"]), batch_size

    return grid


def convolve(hidden_states, weight, bias, height, width):
    batch_size, tokens, channels = hidden_states.shape
    hidden_channels = channels // 2
    output = hidden_states.new_empty(batch_size, tokens, hidden_channels)
    with on_device(hidden_states):
        _forward_kernel[_grid(batch_size, height, width, hidden_channels)](
            hidden_states,
            weight,
            bias,
            output,
            height,
            width,
            hidden_channels,
            *hidden_states.stride(),
            weight.stride(0),
            weight.stride(2),
            weight.stride(3),
            bias.stride(0),
        )
    return output


def convolve_backward(grad_output, hidden_states, weight, bias, height, width):
    batch_size, tokens, channels = hidden_states.shape
    hidden_channels = channels // 2
    grad_conv = hidden_states.new_empty(hidden_states.shape)
    grad_states = hidden_states.new_empty(hidden_states.shape)
    programs = batch_size * triton.cdiv(height, GATE_ROWS) * triton.cdiv(width, GATE_COLUMNS)
    parts = torch.empty(programs, 10, channels, dtype=torch.float32, device=hidden_states.device)
    weight_strides = (weight.stride(0), weight.stride(2), weight.stride(3))
    with on_device(hidden_states):
        _backward_gate_kernel[_grid(batch_size, height, width, hidden_channels)](
            grad_output,
            hidden_states,
            weight,
            bias,
            grad_conv,
            parts,
            height,
            width,
            hidden_channels,
            *grad_output.stride(),
            *hidden_states.stride(),
            *weight_strides,
            bias.stride(0),
        )
        _backward_input_kernel[_grid(batch_size, height, width, channels)](
            grad_conv,
            hidden_states,
            weight,
            grad_states,
            height,
            width,
            channels,
            *hidden_states.stride(),
            *weight_strides,
        )
    # In one fixed order: no atomics, so that two runs agree bit for bit.
    sums = parts.sum(0)
    grad_weight = sums[:9].t().reshape(weight.shape).to(weight.dtype)
    return grad_states, grad_weight, sums[9].to(bias.dtype, copy=True)
