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
"""Plain-torch definitions whose backward pass keeps their inputs alone, as that of the kernels does."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable


# Numbers under which memory is not worth the time that it takes to compute again.
SMALL = 2**17


def recomputed(definition: Callable[..., Any], *inputs: torch.Tensor, settings: tuple[Any, ...] = ()) -> Any:
    r"""
    `definition(*inputs, *settings)`, of which autograd keeps the inputs and nothing that lies between: the backward
    pass computes that again. Worth it where an operation's steps are cheap and its intermediate results are many.
    Results and gradients are those of the definition, bit for bit; they cannot be differentiated twice.

    Args:
        definition (`Callable`): Plain torch operations.
        inputs (`torch.Tensor`): What gradients may go to, the largest first.
        settings (`tuple`): What follows the inputs.

    Returns:
        What `definition` returns: a tensor, or a tuple of such.
    """
    # A compiler decides by itself what to keep.
    if inputs[0].numel() < SMALL or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return definition(*inputs, *settings)
    return _Recomputed.apply(definition, settings, *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, definition: Callable[..., Any], settings: tuple[Any, ...], *inputs: torch.Tensor) -> Any:
        ctx.definition, ctx.settings = definition, settings
        ctx.save_for_backward(*inputs)
        ctx.device_type = inputs[0].device.type
        ctx.autocast = {
            "enabled": torch.is_autocast_enabled(ctx.device_type),
            "dtype": torch.get_autocast_dtype(ctx.device_type),
        }
        return definition(*inputs, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed)]
        with torch.enable_grad(), torch.autocast(ctx.device_type, **ctx.autocast):
            outputs = ctx.definition(*inputs, *ctx.settings)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = iter(
            torch.autograd.grad(outputs, [tensor for tensor, need in zip(inputs, needed) if need], grad_outputs)
        )
        return None, None, *(next(found) if need else None for need in needed)
