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
"""Triton kernels of modulate.py: a program holds whole rows, and a sample's shift, scale and gate beside them."""

# Kernels are written in Triton's language, whose types are not Python's.
# mypy: ignore-errors

import torch
import triton
import triton.language as tl

from .triton_utils import on_device


# Backward, a program sums the gradients of shift, scale and gate over its rows; programs' sums are added up after.
# How many there are depends on the tokens alone, so that a sum's order does not change with the batch.
MIN_ROWS = 8
MAX_PARTS = 128


@triton.jit
def _modulate_kernel(
    residual,
    gate,
    update,
    shift,
    scale,
    hidden_states,
    norm_hidden_states,
    tokens,
    channels,
    eps,
    residual_batch,
    residual_token,
    residual_channel,
    gate_batch,
    gate_channel,
    update_batch,
    update_token,
    update_channel,
    shift_batch,
    shift_channel,
    scale_batch,
    scale_channel,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    residual += batch * residual_batch + c * residual_channel
    if update is not None:
        update += batch * update_batch + c * update_channel
        hidden_states += batch * tokens * channels + c
    if gate is not None:
        g = tl.load(gate + batch * gate_batch + c * gate_channel, mask=mask, other=0.0).to(tl.float32)
    if shift is not None:
        norm_hidden_states += batch * tokens * channels + c
        add = tl.load(shift + batch * shift_batch + c * shift_channel, mask=mask, other=0.0).to(tl.float32)
        times = 1 + tl.load(scale + batch * scale_batch + c * scale_channel, mask=mask, other=0.0).to(tl.float32)

    first = tl.program_id(0).to(tl.int64) * ROWS
    for n in tl.range(first, tl.minimum(first + ROWS, tokens)):
        x = tl.load(residual + n * residual_token, mask=mask, other=0.0).to(tl.float32)
        if update is not None:
            y = tl.load(update + n * update_token, mask=mask, other=0.0).to(tl.float32)
            if gate is not None:
                y = g * y
            rounded = (x + y).to(hidden_states.dtype.element_ty)
            tl.store(hidden_states + n * channels, rounded, mask=mask)
            # The norm is of what is stored.
            x = rounded.to(tl.float32)
        if shift is not None:
            centred = tl.where(mask, x - tl.sum(x, axis=0) / channels, 0.0)
            variance = tl.sum(centred * centred, axis=0) / channels
            out = centred * tl.rsqrt(variance + eps) * times + add
            tl.store(norm_hidden_states + n * channels, out.to(norm_hidden_states.dtype.element_ty), mask=mask)


@triton.jit
def _modulate_backward_kernel(
    grad_hidden,
    grad_norm,
    hidden_states,
    gate,
    update,
    scale,
    grad_residual,
    grad_update,
    parts,
    tokens,
    channels,
    rows,
    eps,
    grad_hidden_batch,
    grad_hidden_token,
    grad_hidden_channel,
    grad_norm_batch,
    grad_norm_token,
    grad_norm_channel,
    hidden_batch,
    hidden_token,
    hidden_channel,
    gate_batch,
    gate_channel,
    update_batch,
    update_token,
    update_channel,
    scale_batch,
    scale_channel,
    BLOCK_C: tl.constexpr,
):
    """`parts` holds, a program, the sums over its rows that are the gradients of shift, scale and gate."""
    batch = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = c < channels
    parts += (batch * tl.num_programs(0) + tl.program_id(0)) * 3 * channels + c
    grad_shift = tl.zeros([BLOCK_C], tl.float32)
    grad_scale = tl.zeros([BLOCK_C], tl.float32)
    grad_gate = tl.zeros([BLOCK_C], tl.float32)
    if grad_hidden is not None:
        grad_hidden += batch * grad_hidden_batch + c * grad_hidden_channel
    if grad_norm is not None:
        grad_norm += batch * grad_norm_batch + c * grad_norm_channel
        hidden_states += batch * hidden_batch + c * hidden_channel
        grad_residual += batch * tokens * channels + c
        times = 1 + tl.load(scale + batch * scale_batch + c * scale_channel, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        update += batch * update_batch + c * update_channel
        grad_update += batch * tokens * channels + c
        g = tl.load(gate + batch * gate_batch + c * gate_channel, mask=mask, other=0.0).to(tl.float32)

    first = tl.program_id(0).to(tl.int64) * rows
    for n in tl.range(first, tl.minimum(first + rows, tokens)):
        grad = tl.zeros([BLOCK_C], tl.float32)
        if grad_hidden is not None:
            grad = tl.load(grad_hidden + n * grad_hidden_token, mask=mask, other=0.0).to(tl.float32)
        if grad_norm is not None:
            x = tl.load(hidden_states + n * hidden_token, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(grad_norm + n * grad_norm_token, mask=mask, other=0.0).to(tl.float32)
            centred = tl.where(mask, x - tl.sum(x, axis=0) / channels, 0.0)
            inverse = tl.rsqrt(tl.sum(centred * centred, axis=0) / channels + eps)
            normed = centred * inverse
            grad_shift += dy
            grad_scale += dy * normed
            dy = dy * times
            along = tl.sum(dy * normed, axis=0) / channels
            grad += inverse * (dy - tl.sum(dy, axis=0) / channels - normed * along)
            tl.store(grad_residual + n * channels, grad.to(grad_residual.dtype.element_ty), mask=mask)
        if gate is not None:
            y = tl.load(update + n * update_token, mask=mask, other=0.0).to(tl.float32)
            grad_gate += grad * y
            tl.store(grad_update + n * channels, (grad * g).to(grad_update.dtype.element_ty), mask=mask)

    if grad_norm is not None:
        tl.store(parts, grad_shift, mask=mask)
        tl.store(parts + channels, grad_scale, mask=mask)
    if gate is not None:
        tl.store(parts + 2 * channels, grad_gate, mask=mask)


def _row(channels):
    """A row's block, and the warps that hold it: 16 channels a thread."""
    block_c = triton.next_power_of_2(channels)
    return {"BLOCK_C": block_c, "num_warps": min(16, max(1, block_c // 512))}


def _token_strides(states):
    return (0, 0, 0) if states is None else states.stride()


def _vector_strides(vector):
    return (0, 0) if vector is None else (vector.stride(0), vector.stride(2))


def modulate(residual, gate, update, shift, scale, eps):
    batch_size, tokens, channels = residual.shape
    hidden_states = norm_hidden_states = None
    if update is not None:
        hidden_states = residual.new_empty(residual.shape)
    if shift is not None:
        norm_hidden_states = residual.new_empty(residual.shape)
    # Rows that share one reading of the vectors, as many as still leave each multiprocessor a few programs.
    rows = 2 if batch_size * tokens <= 4096 else 4
    with on_device(residual):
        _modulate_kernel[(triton.cdiv(tokens, rows), batch_size)](
            residual,
            gate,
            update,
            shift,
            scale,
            hidden_states,
            norm_hidden_states,
            tokens,
            channels,
            eps,
            *_token_strides(residual),
            *_vector_strides(gate),
            *_token_strides(update),
            *_vector_strides(shift),
            *_vector_strides(scale),
            ROWS=rows,
            **_row(channels),
        )
    return [states for states in (hidden_states, norm_hidden_states) if states is not None]


def modulate_backward(grad_hidden_states, grad_norm_hidden_states, hidden_states, gate, update, scale, eps):
    batch_size, tokens, channels = hidden_states.shape
    grad_residual = grad_update = None
    if grad_norm_hidden_states is not None:
        grad_residual = hidden_states.new_empty(hidden_states.shape)
    if gate is not None:
        grad_update = update.new_empty(update.shape)
    rows = max(MIN_ROWS, triton.cdiv(tokens, MAX_PARTS))
    programs = triton.cdiv(tokens, rows)
    parts = torch.empty(batch_size, programs, 3, channels, dtype=torch.float32, device=hidden_states.device)
    with on_device(hidden_states):
        _modulate_backward_kernel[(programs, batch_size)](
            grad_hidden_states,
            grad_norm_hidden_states,
            hidden_states,
            gate,
            update,
            scale,
            grad_residual,
            grad_update,
            parts,
            tokens,
            channels,
            rows,
            eps,
            *_token_strides(grad_hidden_states),
            *_token_strides(grad_norm_hidden_states),
            *_token_strides(hidden_states),
            *_vector_strides(gate),
            *_token_strides(update),
            *_vector_strides(scale),
            **_row(channels),
        )
    found = []
    if grad_norm_hidden_states is not None:
        grad_shift, grad_scale = (parts[:, :, i].sum(1, keepdim=True).to(scale.dtype) for i in (0, 1))
        found += [grad_residual, grad_shift, grad_scale]
    if gate is not None:
        found += [parts[:, :, 2].sum(1, keepdim=True).to(gate.dtype), grad_update]
    return found
