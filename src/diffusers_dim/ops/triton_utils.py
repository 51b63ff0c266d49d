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
"""What the Triton kernels share. Imported only where a kernel runs, since it needs triton."""

# Kernels are written in Triton's language, whose types are not Python's.
# mypy: ignore-errors

import contextlib

import torch
import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


# TRITON_INTERPRET=1: a kernel is a Python function over NumPy arrays, for tests on a CPU.
INTERPRETED = not isinstance(silu, triton.JITFunction)


def on_device(tensor):
    """A context in which a kernel is launched on `tensor`'s device: Triton launches on the current one."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def dot_precision():
    """
    The `input_precision` at which `tl.dot` of float32 operands keeps float32's accuracy: three tf32 products on the
    matrix units of NVIDIA and Intel, plain float32 on AMD.
    """
    return "ieee" if torch.version.hip is not None else "tf32x3"
