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
"""Triton kernels of linear_attention.py: each pass of the attention, forward and backward."""

# Kernels are written in Triton's language, whose types are not Python's.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from .triton_utils import INTERPRETED, dot_precision, on_device


# A sequence is cut into parts, one program each, for a GPU has more multiprocessors than a batch may have heads. How
# many depends on its length alone, so that a picture comes out the same in a batch of any size.
PART = 256
MAX_PARTS = 8

# By a head's padded width: channels and tokens of a tile, warps, and stages of the pipeline. A wide head goes in
# blocks of channels, for its whole state does not fit in a multiprocessor. Not tuned while running: a tile's length is
# part of the order of a sum, and so of its last bits.
FORWARD_TILES = {16: (16, 128, 4, 3), 32: (32, 128, 4, 3), 64: (64, 64, 4, 3), 128: (32, 32, 4, 2)}
BACKWARD_TILES = {16: (16, 64, 4, 2), 32: (32, 64, 4, 2), 64: (32, 32, 4, 2), 128: (32, 32, 8, 1)}

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _relu(x):
    """In float32; a comparison that is false for NaN keeps it, as torch's relu does."""
    x = x.to(tl.float32)
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _state_kernel(
    key,
    value,
    parts,
    tokens,
    tokens_per_part,
    heads,
    key_batch,
    key_token,
    key_head,
    key_channel,
    value_batch,
    value_token,
    value_head,
    value_channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """One part's sum of [value, 1] relu(key)^T: products of 16-bit inputs are exact in float32."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    key += batch * key_batch + head * key_head + d[None, :] * key_channel
    value += batch * value_batch + head * value_head + j[None, :] * value_channel

    state = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    key_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = tl.program_id(1) * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < last)[:, None]
        n = n.to(tl.int64)[:, None]
        k = _relu(tl.load(key + n * key_token, mask=inside & (d < HEAD_DIM)[None, :], other=0.0))
        v = tl.load(value + n * value_token, mask=inside & (j < HEAD_DIM)[None, :], other=0.0)
        state = tl.dot(tl.trans(v.to(FACTORS)), k.to(FACTORS), state, input_precision=PRECISION)
        key_sum += k

    parts += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (HEAD_DIM + 1) * HEAD_DIM
    mask = (j < HEAD_DIM)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(parts + j[:, None] * HEAD_DIM + d[None, :], state, mask=mask)
    if tl.program_id(2) == 0:
        tl.store(parts + HEAD_DIM * HEAD_DIM + d, tl.sum(key_sum, axis=0), mask=d < HEAD_DIM)


@triton.jit
def _load_state(state, rows, columns, HEAD_DIM: tl.constexpr):
    """Rows (values' channels) and columns (keys' channels) of this program's state."""
    state += tl.program_id(0).to(tl.int64) * (HEAD_DIM + 1) * HEAD_DIM
    mask = (rows < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(state + rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_key_sum(state, columns, HEAD_DIM: tl.constexpr):
    state += tl.program_id(0).to(tl.int64) * (HEAD_DIM + 1) * HEAD_DIM
    return tl.load(state + HEAD_DIM * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)


@triton.jit
def _apply_kernel(
    query,
    state,
    output,
    tokens,
    tokens_per_part,
    heads,
    eps,
    query_batch,
    query_token,
    query_head,
    query_channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    query += batch * query_batch + head * query_head + d[None, :] * query_channel
    output += (batch * tokens * heads + head) * HEAD_DIM + j[None, :]
    values = tl.trans(_load_state(state, j, d, HEAD_DIM))
    key_sum = _load_key_sum(state, d, HEAD_DIM)

    first = tl.program_id(1) * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < last)[:, None]
        n = n.to(tl.int64)[:, None]
        q = _relu(tl.load(query + n * query_token, mask=inside & (d < HEAD_DIM)[None, :], other=0.0))
        numerator = tl.dot(q, values, input_precision=PRECISION)
        denominator = tl.sum(q * key_sum[None, :], axis=1) + eps
        out = (numerator / denominator[:, None]).to(output.dtype.element_ty)
        tl.store(output + n * heads * HEAD_DIM, out, mask=inside & (j < HEAD_DIM)[None, :])


@triton.jit
def _apply_backward_kernel(
    grad_output,
    query,
    state,
    grad_query,
    parts,
    tokens,
    tokens_per_part,
    heads,
    eps,
    grad_batch,
    grad_token,
    grad_head,
    grad_channel,
    query_batch,
    query_token,
    query_head,
    query_channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """
    Some channels of the gradient of queries, and one part's of those columns of the state's. Of output = numerator /
    denominator the gradients are grad_output / denominator and -(grad_output . output) / denominator.
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    grad_output += batch * grad_batch + head * grad_head
    query += batch * query_batch + head * query_head
    grad_query += (batch * tokens * heads + head) * HEAD_DIM + j[None, :]
    values = _load_state(state, d, j, HEAD_DIM)
    key_sum = _load_key_sum(state, d, HEAD_DIM)
    key_sum_j = _load_key_sum(state, j, HEAD_DIM)

    grad_values = tl.zeros([BLOCK_D, BLOCK_J], tl.float32)
    grad_key_sum = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    first = tl.program_id(1) * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        mask_j = inside[:, None] & (j < HEAD_DIM)[None, :]
        n = n.to(tl.int64)[:, None]
        q = _relu(tl.load(query + n * query_token + d[None, :] * query_channel, mask=mask, other=0.0))
        # Past the end the denominator is one: no division by eps = 0 there.
        denominator = tl.where(inside, tl.sum(q * key_sum[None, :], axis=1) + eps, 1.0)[:, None]
        along = tl.zeros([BLOCK_N], tl.float32)
        for block in tl.static_range(0, BLOCK_D, BLOCK_J):
            e = block + tl.arange(0, BLOCK_J)
            mask_e = inside[:, None] & (e < HEAD_DIM)[None, :]
            grad = tl.load(grad_output + n * grad_token + e[None, :] * grad_channel, mask=mask_e, other=0.0)
            numerator = tl.dot(q, tl.trans(_load_state(state, e, d, HEAD_DIM)), input_precision=PRECISION)
            along += tl.sum(grad.to(tl.float32) * (numerator / denominator), axis=1)
        grad_denominator = -along[:, None] / denominator

        grad = tl.load(grad_output + n * grad_token + d[None, :] * grad_channel, mask=mask, other=0.0)
        grad_numerator = grad.to(tl.float32) / denominator
        q = _relu(tl.load(query + n * query_token + j[None, :] * query_channel, mask=mask_j, other=0.0))
        grad_q = tl.dot(grad_numerator, values, input_precision=PRECISION) + grad_denominator * key_sum_j[None, :]
        grad_q = tl.where(q > 0, grad_q, 0.0).to(grad_query.dtype.element_ty)
        tl.store(grad_query + n * heads * HEAD_DIM, grad_q, mask=mask_j)
        grad_values = tl.dot(tl.trans(grad_numerator), q, grad_values, input_precision=PRECISION)
        grad_key_sum += grad_denominator * q

    parts += (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (HEAD_DIM + 1) * HEAD_DIM
    mask = (d < HEAD_DIM)[:, None] & (j < HEAD_DIM)[None, :]
    tl.store(parts + d[:, None] * HEAD_DIM + j[None, :], grad_values, mask=mask)
    tl.store(parts + HEAD_DIM * HEAD_DIM + j, tl.sum(grad_key_sum, axis=0), mask=j < HEAD_DIM)


@triton.jit
def _state_backward_kernel(
    grad_state,
    key,
    value,
    grad_key,
    grad_value,
    tokens,
    tokens_per_part,
    heads,
    key_batch,
    key_token,
    key_head,
    key_channel,
    value_batch,
    value_token,
    value_head,
    value_channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some channels of the gradients of keys and of values."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    d = tl.arange(0, BLOCK_D)
    j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head + d[None, :] * value_channel
    grad_key += (batch * tokens * heads + head) * HEAD_DIM + j[None, :]
    grad_value += (batch * tokens * heads + head) * HEAD_DIM + j[None, :]
    to_key = _load_state(grad_state, d, j, HEAD_DIM)
    to_value = tl.trans(_load_state(grad_state, j, d, HEAD_DIM))
    grad_key_sum = _load_key_sum(grad_state, j, HEAD_DIM)

    first = tl.program_id(1) * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    for start in tl.range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < last)[:, None] & (d < HEAD_DIM)[None, :]
        mask_j = (n < last)[:, None] & (j < HEAD_DIM)[None, :]
        n = n.to(tl.int64)[:, None]
        v = tl.load(value + n * value_token, mask=mask, other=0.0).to(tl.float32)
        grad_k = tl.dot(v, to_key, input_precision=PRECISION) + grad_key_sum[None, :]
        k = tl.load(key + n * key_token + j[None, :] * key_channel, mask=mask_j, other=0.0).to(tl.float32)
        grad_k = tl.where(k > 0, grad_k, 0.0).to(grad_key.dtype.element_ty)
        tl.store(grad_key + n * heads * HEAD_DIM, grad_k, mask=mask_j)
        k = _relu(tl.load(key + n * key_token + d[None, :] * key_channel, mask=mask, other=0.0))
        grad_v = tl.dot(k, to_value, input_precision=PRECISION).to(grad_value.dtype.element_ty)
        tl.store(grad_value + n * heads * HEAD_DIM, grad_v, mask=mask_j)


def _launch(kernel, states, *arguments, tiles=FORWARD_TILES, **constants):
    """
    Launches over heads of all samples, parts of the sequence and blocks of a head's channels. `states` has the shape
    and device.
    """
    batch_size, tokens, heads, head_dim = states.shape
    _, parts = _divide(tokens)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_j, block_n, num_warps, num_stages = tiles[block_d]
    with on_device(states):
        kernel[(batch_size * heads, parts, triton.cdiv(head_dim, block_j))](
            *arguments,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_J=block_j,
            BLOCK_N=block_n,
            PRECISION=dot_precision(),
            **constants,
            num_warps=num_warps,
            num_stages=num_stages,
        )


def _divide(tokens):
    """Tokens a part, and parts."""
    tokens_per_part = max(PART, triton.cdiv(triton.cdiv(tokens, MAX_PARTS), PART) * PART)
    return tokens_per_part, triton.cdiv(tokens, tokens_per_part)


def _new_parts(states):
    batch_size, tokens, heads, head_dim = states.shape
    shape = (batch_size, heads, _divide(tokens)[1], head_dim + 1, head_dim)
    return torch.empty(shape, dtype=torch.float32, device=states.device)


def _sum_parts(parts):
    # In one fixed order: no atomics, so that two runs agree bit for bit.
    return parts.squeeze(2) if parts.shape[2] == 1 else parts.sum(2)


def state(key, value):
    _, tokens, heads, _ = key.shape
    parts = _new_parts(key)
    strides = (*key.stride(), *value.stride())
    # The interpreter cannot multiply bfloat16 matrices.
    factors = tl.float32 if INTERPRETED or key.dtype != value.dtype else DTYPES[key.dtype]
    arguments = (key, value, parts, tokens, _divide(tokens)[0], heads, *strides)
    _launch(_state_kernel, key, *arguments, FACTORS=factors)
    return _sum_parts(parts)


def apply(query, state, eps):
    _, tokens, heads, _ = query.shape
    output = query.new_empty(query.shape)
    arguments = (query, state.contiguous(), output, tokens, _divide(tokens)[0], heads, eps, *query.stride())
    _launch(_apply_kernel, query, *arguments)
    return output


def apply_backward(grad_output, query, state, eps):
    _, tokens, heads, _ = query.shape
    grad_query = query.new_empty(query.shape)
    parts = _new_parts(query)
    strides = (*grad_output.stride(), *query.stride())
    arguments = (grad_output, query, state.contiguous(), grad_query, parts, tokens, _divide(tokens)[0], heads, eps)
    _launch(_apply_backward_kernel, query, *arguments, *strides, tiles=BACKWARD_TILES)
    return grad_query, _sum_parts(parts)


def state_backward(grad_state, key, value):
    _, tokens, heads, _ = key.shape
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    strides = (*key.stride(), *value.stride())
    arguments = (grad_state.contiguous(), key, value, grad_key, grad_value, tokens, _divide(tokens)[0], heads)
    _launch(_state_backward_kernel, key, *arguments, *strides, tiles=BACKWARD_TILES)
    return grad_key, grad_value
