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
"""The middle of SANA's gated feed-forward, between its two pointwise convolutions, on tokens with channels last."""

from typing import Any

import torch
import torch.nn.functional as F

from .recompute import recomputed
from .switch import uses_kernels


def gated_depthwise_conv(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    r"""
    SiLU, a 3x3 depthwise convolution padded with zeros, and the first half of the channels times SiLU of the second:
    what SANA's Mix-FFN (https://huggingface.co/papers/2410.10629, section 2.2; diffusers' `GLUMBConv` in
    `sana_transformer.py`) does between `conv_inverted` and `conv_point`.

    The kernel computes in float32 and rounds once; the plain definition rounds after each operation.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, height * width, 2 * hidden_channels)`):
            Tokens, row by row, in any layout.
        weight (`torch.Tensor` of shape `(2 * hidden_channels, 1, 3, 3)`):
            As `nn.Conv2d` stores it.
        bias (`torch.Tensor` of shape `(2 * hidden_channels,)`):
            The convolution's bias.
        height (`int`):
            Rows of the picture.
        width (`int`):
            Columns of the picture.

    Returns:
        `torch.Tensor` of shape `(batch_size, height * width, hidden_channels)`: in `hidden_states`' dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check(hidden_states, weight, bias, height, width)
    if uses_kernels(hidden_states, weight, bias):
        return _gated_depthwise_conv(hidden_states, weight, bias, height, width)
    return recomputed(gated_depthwise_conv_reference, hidden_states, weight, bias, settings=(height, width))


def gated_depthwise_conv_reference(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """The plain-torch definition of [`gated_depthwise_conv`], diffusers' operations in diffusers' order."""
    hidden_states = F.silu(hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2))
    hidden_states = F.conv2d(hidden_states, weight, bias, padding=1, groups=hidden_states.shape[1])
    hidden_states, gate = hidden_states.chunk(2, dim=1)
    return (hidden_states * F.silu(gate)).flatten(2, 3).permute(0, 2, 1)


def _check(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> None:
    channels = hidden_states.shape[-1]
    if hidden_states.ndim != 3 or channels % 2 or hidden_states.shape[1] != height * width:
        raise ValueError(
            f"hidden_states must be (batch_size, {height} * {width}, an even number of channels), not "
            f"{tuple(hidden_states.shape)}."
        )
    if weight.shape != (channels, 1, 3, 3) or bias.shape != (channels,):
        raise ValueError(
            f"weight and bias must be ({channels}, 1, 3, 3) and ({channels},), not {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}."
        )


@torch.library.custom_op("diffusers_dim::gated_depthwise_conv", mutates_args=())
def _gated_depthwise_conv(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    from .gated_depthwise_conv_triton import convolve

    return convolve(hidden_states, weight, bias, height, width)


@_gated_depthwise_conv.register_fake
def _(hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return hidden_states.new_empty(*hidden_states.shape[:2], hidden_states.shape[2] // 2)


@torch.library.custom_op("diffusers_dim::gated_depthwise_conv_backward", mutates_args=())
def _gated_depthwise_conv_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from .gated_depthwise_conv_triton import convolve_backward

    return convolve_backward(grad_output, hidden_states, weight, bias, height, width)


@_gated_depthwise_conv_backward.register_fake
def _(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return hidden_states.new_empty(hidden_states.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_conv_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden_states, weight, bias, ctx.height, ctx.width = inputs
    ctx.save_for_backward(hidden_states, weight, bias)


def _differentiate_conv(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_gated_depthwise_conv_backward(grad_output, *ctx.saved_tensors, ctx.height, ctx.width), None, None


_gated_depthwise_conv.register_autograd(_differentiate_conv, setup_context=_save_conv_inputs)
