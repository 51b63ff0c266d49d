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
"""LayerNorm with adaLN's shift and scale, and the gated residual before it: one pass over the tokens each."""

from typing import Any

import torch
import torch.nn.functional as F

from .recompute import recomputed
from .switch import uses_kernels


# A program holds a whole row of channels.
MAX_CHANNELS = 16384


def layer_norm_modulate(
    hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    r"""
    LayerNorm over the channels, without weights of its own, then `* (1 + scale) + shift`: adaLN as in diffusers'
    `SanaTransformerBlock` (`sana_transformer.py`).

    The kernel computes in float32 and rounds once; the plain definition rounds after each operation.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, tokens, channels)`):
            The tokens, in any layout. At most 16384 channels for the kernel.
        shift (`torch.Tensor` of shape `(batch_size, 1, channels)` or `(1, 1, channels)`):
            Added last; a view of a chunked table does.
        scale (`torch.Tensor` of shape `(batch_size, 1, channels)` or `(1, 1, channels)`):
            Multiplies, less one.
        eps (`float`, defaults to 1e-6):
            Added to the variance.

    Returns:
        `torch.Tensor` of shape `(batch_size, tokens, channels)`: in `hidden_states`' dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    shift, scale = _fit(hidden_states, shift=shift), _fit(hidden_states, scale=scale)
    if hidden_states.shape[-1] <= MAX_CHANNELS and uses_kernels(hidden_states, shift, scale):
        return _modulate(hidden_states, None, None, shift, scale, eps)[0]
    return recomputed(layer_norm_modulate_reference, hidden_states, shift, scale, settings=(eps,))


def gate_residual(residual: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    r"""
    `residual + gate * update`, the end of each branch of diffusers' `SanaTransformerBlock`.

    Args:
        residual (`torch.Tensor` of shape `(batch_size, tokens, channels)`): What the branch began with.
        gate (`torch.Tensor` of shape `(batch_size, 1, channels)` or `(1, 1, channels)`): The branch's weights.
        update (`torch.Tensor` of shape `(batch_size, tokens, channels)`): What the branch computed.

    Returns:
        `torch.Tensor` of shape `(batch_size, tokens, channels)`: in `residual`'s dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check_update(residual, update)
    gate = _fit(residual, gate=gate)
    if residual.shape[-1] <= MAX_CHANNELS and uses_kernels(residual, gate, update):
        return _modulate(residual, gate, update, None, None, 0.0)[0]
    return recomputed(gate_residual_reference, residual, gate, update)


def gate_residual_layer_norm_modulate(
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    [`gate_residual`] and, in the same pass, [`layer_norm_modulate`] of its result: where one branch ends and the next
    begins.

    Args:
        residual (`torch.Tensor` of shape `(batch_size, tokens, channels)`):
            What the branch began with.
        gate (`torch.Tensor` of shape `(batch_size, 1, channels)` or `(1, 1, channels)`, or `None`):
            The branch's weights; `None` for all one, as after SANA's cross-attention.
        update (`torch.Tensor` of shape `(batch_size, tokens, channels)`):
            What the branch computed.
        shift, scale (`torch.Tensor` of shape `(batch_size, 1, channels)` or `(1, 1, channels)`):
            As in [`layer_norm_modulate`].
        eps (`float`, defaults to 1e-6):
            Added to the variance.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(batch_size, tokens, channels)`: the sum, and its modulated norm, both
        in `residual`'s dtype.

    Raises:
        ValueError: If the shapes do not fit each other.
    """
    _check_update(residual, update)
    shift, scale = _fit(residual, shift=shift), _fit(residual, scale=scale)
    gate = gate if gate is None else _fit(residual, gate=gate)
    vectors = (shift, scale) if gate is None else (shift, scale, gate)
    if residual.shape[-1] <= MAX_CHANNELS and uses_kernels(residual, update, *vectors):
        return tuple(_modulate(residual, gate, update, shift, scale, eps))
    if gate is None:
        hidden_states = (residual + update).to(residual.dtype)
    else:
        hidden_states = recomputed(gate_residual_reference, residual, gate, update)
    # The norm is of the sum itself, which is kept anyway.
    return hidden_states, recomputed(layer_norm_modulate_reference, hidden_states, shift, scale, settings=(eps,))


def layer_norm_modulate_reference(
    hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """The plain-torch definition of [`layer_norm_modulate`]."""
    norm_hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=eps)
    return (norm_hidden_states * (1 + scale) + shift).to(hidden_states.dtype)


def gate_residual_reference(residual: torch.Tensor, gate: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The plain-torch definition of [`gate_residual`]."""
    return (residual + gate * update).to(residual.dtype)


def gate_residual_layer_norm_modulate_reference(
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain-torch definition of [`gate_residual_layer_norm_modulate`]."""
    if gate is None:
        hidden_states = (residual + update).to(residual.dtype)
    else:
        hidden_states = gate_residual_reference(residual, gate, update)
    return hidden_states, layer_norm_modulate_reference(hidden_states, shift, scale, eps)


def _fit(hidden_states: torch.Tensor, **vector: torch.Tensor) -> torch.Tensor:
    ((name, value),) = vector.items()
    batch_size, channels = hidden_states.shape[0], hidden_states.shape[-1]
    if hidden_states.ndim != 3 or value.shape not in ((batch_size, 1, channels), (1, 1, channels)):
        raise ValueError(
            f"{name} must be (batch_size, 1, channels) beside tokens (batch_size, tokens, channels), not "
            f"{tuple(value.shape)} beside {tuple(hidden_states.shape)}."
        )
    return value.expand(batch_size, 1, channels)


def _check_update(residual: torch.Tensor, update: torch.Tensor) -> None:
    if residual.shape != update.shape:
        raise ValueError(f"residual and update differ: {tuple(residual.shape)} and {tuple(update.shape)}.")


# One operator for all three: without update and gate only the norm, without shift and scale only the residual.
@torch.library.custom_op("diffusers_dim::modulate", mutates_args=())
def _modulate(
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    from .modulate_triton import modulate

    return modulate(residual, gate, update, shift, scale, eps)


@_modulate.register_fake
def _(
    residual: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    outputs = (update is not None) + (shift is not None)
    return [residual.new_empty(residual.shape) for _ in range(outputs)]


@torch.library.custom_op("diffusers_dim::modulate_backward", mutates_args=())
def _modulate_backward(
    grad_hidden_states: torch.Tensor | None,
    grad_norm_hidden_states: torch.Tensor | None,
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    from .modulate_triton import modulate_backward

    return modulate_backward(grad_hidden_states, grad_norm_hidden_states, hidden_states, gate, update, scale, eps)


@_modulate_backward.register_fake
def _(
    grad_hidden_states: torch.Tensor | None,
    grad_norm_hidden_states: torch.Tensor | None,
    hidden_states: torch.Tensor,
    gate: torch.Tensor | None,
    update: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    like = []
    if grad_norm_hidden_states is not None:
        like += [hidden_states, scale, scale]
    if gate is not None:
        like += [gate, update]
    return [tensor.new_empty(tensor.shape) for tensor in like]


def _save_modulate_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    residual, gate, update, shift, scale, ctx.eps = inputs
    hidden_states = residual if update is None else output[0]
    ctx.save_for_backward(hidden_states, gate, update, scale)
    ctx.set_materialize_grads(False)


def _differentiate_modulate(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    hidden_states, gate, update, scale = ctx.saved_tensors
    grads = list(grads)
    grad_hidden_states = grads.pop(0) if update is not None else None
    grad_norm_hidden_states = grads.pop(0) if scale is not None else None
    if gate is None and grad_norm_hidden_states is None:
        return grad_hidden_states, None, grad_hidden_states, None, None, None
    found = _modulate_backward(
        grad_hidden_states, grad_norm_hidden_states, hidden_states, gate, update, scale, ctx.eps
    )
    grad_residual, grad_shift, grad_scale = grad_hidden_states, None, None
    if grad_norm_hidden_states is not None:
        grad_residual, grad_shift, grad_scale = found[:3]
    grad_gate, grad_update = (None, grad_residual) if gate is None else found[-2:]
    return grad_residual, grad_gate, None if update is None else grad_update, grad_shift, grad_scale, None


_modulate.register_autograd(_differentiate_modulate, setup_context=_save_modulate_inputs)
