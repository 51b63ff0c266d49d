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
"""Which of the two runs: the Triton kernel or the plain-torch definition."""

import importlib.util
import os
from types import TracebackType

import torch


# The kernels need Triton 3.3, which came with torch 2.7.
HAS_TRITON = importlib.util.find_spec("triton") is not None and torch.__version__ >= "2.7"
KERNEL_DEVICES = ("cuda", "xpu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_enabled = True
_interpret = False


class set_kernels:
    r"""
    Turns the Triton kernels on or off, for good when called, or for a block when used as a context manager.

    They are on to begin with, and run where [`uses_kernels`] says. The environment variable `DIFFUSERS_DIM_KERNELS`
    says otherwise for a whole process: `0` for off, `1` for on, `interpret` for `interpret=True`. A compiled function
    is compiled again after a change.

    Args:
        enabled (`bool`):
            `False` for the plain-torch definitions everywhere.
        interpret (`bool`, defaults to `False`):
            Whether tensors on the CPU go to the kernels as well, through Triton's interpreter. It is slow, and for
            tests: `TRITON_INTERPRET=1` must have been set before anything imported `triton` (diffusers does).

    Raises:
        RuntimeError: If `interpret` is asked for and Triton is not there or does not interpret.

    Example:

        >>> with set_kernels(False):
        ...     reference = pipe(image, prompt)
    """

    def __init__(self, enabled: bool, interpret: bool = False) -> None:
        global _enabled, _interpret
        if interpret and not _triton_interprets():
            raise RuntimeError(
                "Kernels run on the CPU only where triton is installed and TRITON_INTERPRET=1 was set before triton "
                "was imported."
            )
        self.previous = (_enabled, _interpret)
        _enabled, _interpret = enabled, interpret

    def __enter__(self) -> "set_kernels":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _enabled, _interpret
        _enabled, _interpret = self.previous


def uses_kernels(*tensors: torch.Tensor) -> bool:
    r"""
    Whether an operation on these tensors runs as a Triton kernel: kernels are on, Triton is there (3.3 or newer, as
    torch has it from 2.7 on), and all tensors are on one GPU (NVIDIA of compute capability 8.0 or newer, AMD, Intel),
    are float32, float16 or bfloat16, and are not empty.

    Args:
        tensors (`torch.Tensor`): The operation's inputs.
    """
    device = tensors[0].device
    if not (_enabled and HAS_TRITON):
        return False
    if device.type == "cpu":
        if not _interpret:
            return False
    elif device.type not in KERNEL_DEVICES or not _device_fits(device):
        return False
    return all(tensor.device == device and tensor.dtype in KERNEL_DTYPES and tensor.numel() > 0 for tensor in tensors)


# Marked for torch.compile, which cannot look into a driver's answer and need not: it does not change.
@torch.compiler.assume_constant_result
def _device_fits(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _triton_interprets() -> bool:
    if not HAS_TRITON:
        return False
    from .triton_utils import INTERPRETED

    return INTERPRETED


def _set_kernels_from_environment() -> None:
    value = os.environ.get("DIFFUSERS_DIM_KERNELS", "1")
    if value not in ("0", "1", "interpret"):
        raise ValueError(f"DIFFUSERS_DIM_KERNELS must be 0, 1 or interpret, not {value!r}.")
    set_kernels(value != "0", interpret=value == "interpret")


_set_kernels_from_environment()
