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
"""SANA's ReLU linear attention: one pass over keys and values sums a state, one over queries applies it."""

from typing import Any

import torch
import torch.nn.functional as F

from .recompute import recomputed
from .switch import uses_kernels


MAX_HEAD_DIM = 128


def relu_linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float = 1e-15
) -> torch.Tensor:
    r"""
    ReLU linear attention, SANA's self-attention (https://huggingface.co/papers/2410.10629, section 2.2; diffusers'
    `SanaLinearAttnProcessor2_0` between the projections): every query sees every key, at a cost linear in tokens.

        state = sum over tokens of [value, 1] relu(key)^T
        output = (state relu(query))[:-1] / ((state relu(query))[-1] + eps)

    State, products and quotient are float32 whatever the inputs are, also under autocast, as in SANA's own code.

    Args:
        query (`torch.Tensor` of shape `(batch_size, query_tokens, heads, head_dim)`):
            Queries, in any layout: views of one fused projection do. At most 128 channels a head for the kernel.
        key (`torch.Tensor` of shape `(batch_size, tokens, heads, head_dim)`):
            Keys.
        value (`torch.Tensor` of shape `(batch_size, tokens, heads, head_dim)`):
            Values.
        eps (`float`, defaults to 1e-15):
            Added to the denominator, which is zero where a query has no positive channel.

    Returns:
        `torch.Tensor` of shape `(batch_size, query_tokens, heads, head_dim)`: in `query`'s dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    return relu_linear_attention_apply(query, relu_linear_attention_state(key, value), eps)


def relu_linear_attention_state(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    r"""
    The first half of [`relu_linear_attention`]. A state is a sum over tokens: states of parts of a sequence, even on
    several devices, add up to the whole one's.

    Args:
        key (`torch.Tensor` of shape `(batch_size, tokens, heads, head_dim)`): Keys.
        value (`torch.Tensor` of shape `(batch_size, tokens, heads, head_dim)`): Values.

    Returns:
        `torch.Tensor` of shape `(batch_size, heads, head_dim + 1, head_dim)`: float32; rows are the values' channels
        and, last, the sum of the keys; columns are the keys' channels.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "key and value must both be (batch_size, tokens, heads, head_dim), not "
            f"{tuple(key.shape)} and {tuple(value.shape)}."
        )
    if key.shape[-1] <= MAX_HEAD_DIM and uses_kernels(key, value):
        return _state(key, value)
    return recomputed(relu_linear_attention_state_reference, key, value)


def relu_linear_attention_apply(query: torch.Tensor, state: torch.Tensor, eps: float = 1e-15) -> torch.Tensor:
    r"""
    The second half of [`relu_linear_attention`].

    Args:
        query (`torch.Tensor` of shape `(batch_size, query_tokens, heads, head_dim)`): Queries.
        state (`torch.Tensor` of shape `(batch_size, heads, head_dim + 1, head_dim)`):
            What [`relu_linear_attention_state`] returned, float32.
        eps (`float`, defaults to 1e-15): Added to the denominator.

    Returns:
        `torch.Tensor` of shape `(batch_size, query_tokens, heads, head_dim)`: in `query`'s dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    if query.ndim != 4 or state.shape != _state_shape(query):
        raise ValueError(
            "query must be (batch_size, tokens, heads, head_dim) and state (batch_size, heads, head_dim + 1, "
            f"head_dim), not {tuple(query.shape)} and {tuple(state.shape)}."
        )
    if query.shape[-1] <= MAX_HEAD_DIM and uses_kernels(query, state):
        return _apply(query, state, eps)
    return recomputed(relu_linear_attention_apply_reference, query, state, settings=(eps,))


def relu_linear_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, eps: float = 1e-15
) -> torch.Tensor:
    """The plain-torch definition of [`relu_linear_attention`], diffusers' operations in diffusers' order."""
    return relu_linear_attention_apply_reference(query, relu_linear_attention_state_reference(key, value), eps)


def relu_linear_attention_state_reference(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The plain-torch definition of [`relu_linear_attention_state`]."""
    with torch.autocast(key.device.type, enabled=False):
        key = F.relu(key.transpose(1, 2)).float()
        value = F.pad(value.permute(0, 2, 3, 1).float(), (0, 0, 0, 1), value=1.0)
        return torch.matmul(value, key)


def relu_linear_attention_apply_reference(
    query: torch.Tensor, state: torch.Tensor, eps: float = 1e-15
) -> torch.Tensor:
    """The plain-torch definition of [`relu_linear_attention_apply`]."""
    with torch.autocast(query.device.type, enabled=False):
        hidden_states = torch.matmul(state, F.relu(query.permute(0, 2, 3, 1)).float())
        hidden_states = hidden_states[:, :, :-1] / (hidden_states[:, :, -1:] + eps)
        return hidden_states.permute(0, 3, 1, 2).to(query.dtype)


def _state_shape(states: torch.Tensor) -> tuple[int, int, int, int]:
    batch_size, _, heads, head_dim = states.shape
    return batch_size, heads, head_dim + 1, head_dim


# Opaque to torch.compile, so that a graph holds each as one node; a kernel's own code is Triton's to compile.
@torch.library.custom_op("diffusers_dim::relu_linear_attention_state", mutates_args=())
def _state(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from .linear_attention_triton import state

    return state(key, value)


@_state.register_fake
def _(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return key.new_empty(_state_shape(key), dtype=torch.float32)


@torch.library.custom_op("diffusers_dim::relu_linear_attention_state_backward", mutates_args=())
def _state_backward(
    grad_state: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from .linear_attention_triton import state_backward

    return state_backward(grad_state, key, value)


@_state_backward.register_fake
def _(grad_state: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return key.new_empty(key.shape), value.new_empty(value.shape)


@torch.library.custom_op("diffusers_dim::relu_linear_attention_apply", mutates_args=())
def _apply(query: torch.Tensor, state: torch.Tensor, eps: float) -> torch.Tensor:
    from .linear_attention_triton import apply

    return apply(query, state, eps)


@_apply.register_fake
def _(query: torch.Tensor, state: torch.Tensor, eps: float) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("diffusers_dim::relu_linear_attention_apply_backward", mutates_args=())
def _apply_backward(
    grad_output: torch.Tensor, query: torch.Tensor, state: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from .linear_attention_triton import apply_backward

    return apply_backward(grad_output, query, state, eps)


@_apply_backward.register_fake
def _(
    grad_output: torch.Tensor, query: torch.Tensor, state: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(_state_shape(query), dtype=torch.float32)


def _save_state_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_state(ctx: Any, grad_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _state_backward(grad_state, *ctx.saved_tensors)


def _save_apply_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    query, state, ctx.eps = inputs
    ctx.save_for_backward(query, state)


def _differentiate_apply(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    return *_apply_backward(grad_output, *ctx.saved_tensors, ctx.eps), None


_state.register_autograd(_differentiate_state, setup_context=_save_state_inputs)
_apply.register_autograd(_differentiate_apply, setup_context=_save_apply_inputs)
