"""
The painter's memory-bound operations as Triton kernels, each beside its plain-torch definition.

A public function runs its kernel on a GPU where [`uses_kernels`] says so and its definition, named `*_reference`,
elsewhere; [`set_kernels`] and the environment variable `DIFFUSERS_DIM_KERNELS` turn the kernels off. Kernels and
definitions have gradients, work under `torch.compile(fullgraph=True)`, and are not twice differentiable as kernels.
"""

from .gated_depthwise_conv import gated_depthwise_conv, gated_depthwise_conv_reference
from .linear_attention import (
    relu_linear_attention,
    relu_linear_attention_apply,
    relu_linear_attention_apply_reference,
    relu_linear_attention_reference,
    relu_linear_attention_state,
    relu_linear_attention_state_reference,
)
from .modulate import (
    gate_residual,
    gate_residual_layer_norm_modulate,
    gate_residual_layer_norm_modulate_reference,
    gate_residual_reference,
    layer_norm_modulate,
    layer_norm_modulate_reference,
)
from .switch import set_kernels, uses_kernels


__all__ = [
    "gate_residual",
    "gate_residual_layer_norm_modulate",
    "gate_residual_layer_norm_modulate_reference",
    "gate_residual_reference",
    "gated_depthwise_conv",
    "gated_depthwise_conv_reference",
    "layer_norm_modulate",
    "layer_norm_modulate_reference",
    "relu_linear_attention",
    "relu_linear_attention_apply",
    "relu_linear_attention_apply_reference",
    "relu_linear_attention_reference",
    "relu_linear_attention_state",
    "relu_linear_attention_state_reference",
    "set_kernels",
    "uses_kernels",
]
