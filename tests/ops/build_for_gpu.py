"""
Compiles kernels for a GPU that need not be there, as their launches would, and prints what each one takes of a
multiprocessor: `python build_for_gpu.py 90 bfloat16 32 --all` for compute capability 9.0, heads of 32 channels, and
more kernels than attention's.
"""

import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from diffusers_dim.ops import gated_depthwise_conv_triton, linear_attention_triton, modulate_triton


class TargetOnly:
    """As much of Triton's driver as compiling takes."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def build(kernel, *args, grid, warmup, **kwargs):
    built = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
    print(json.dumps({"name": kernel.__name__, "shared": built.metadata.shared, "bytes": len(built.asm["cubin"])}))


def build_each(tuner, *args, **kwargs):
    for config in tuner.configs:
        tuner.fn.run(*args, **kwargs, **config.all_kwargs())


capability, dtype, head_dim = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
driver.set_active(TargetOnly(capability))
launch, JITFunction.run, Autotuner.run = JITFunction.run, build, build_each

query, key, value = torch.zeros(1, 512, 6, head_dim, dtype=dtype).chunk(3, dim=2)
state = linear_attention_triton.state(key, value)
output = linear_attention_triton.apply(query, state, 1e-15)
linear_attention_triton.apply_backward(output, query, state, 1e-15)
linear_attention_triton.state_backward(state, key, value)

if "--all" in sys.argv:
    tokens, vectors = torch.zeros(1, 64, 2240, dtype=dtype), torch.zeros(1, 6, 2240, dtype=dtype).chunk(6, dim=1)
    modulate_triton.modulate(tokens, vectors[0], tokens, vectors[1], vectors[2], 1e-6)
    modulate_triton.modulate_backward(tokens, tokens, tokens, vectors[0], tokens, vectors[2], 1e-6)

    inputs = [torch.zeros(shape, dtype=dtype) for shape in ((1, 64, 11200), (11200, 1, 3, 3), (11200,))]
    output = gated_depthwise_conv_triton.convolve(*inputs, 8, 8)
    gated_depthwise_conv_triton.convolve_backward(output, *inputs, 8, 8)
