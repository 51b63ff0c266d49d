"""A kernel that the interpreter runs may yet not compile, or not fit: each is compiled for GPUs that are not here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# Bytes of shared memory that a block may have, by compute capability.
SHARED = {86: 99 * 1024, 90: 227 * 1024}

ATTENTION = {"_state_kernel", "_apply_kernel", "_apply_backward_kernel", "_state_backward_kernel"}
MODULATE = {"_modulate_kernel", "_modulate_backward_kernel"}
CONV = {"_forward_kernel", "_backward_gate_kernel", "_backward_input_kernel"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles on Linux")
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        pytest.param(["90", "bfloat16", "32", "--all"], ATTENTION | MODULATE | CONV, id="H100"),
        pytest.param(["86", "float32", "128"], ATTENTION, id="A10-widest-heads"),
    ],
)
def test_kernels_compile_and_fit(tmp_path, arguments, names):
    command = [sys.executable, str(Path(__file__).parent / "build_for_gpu.py"), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in built} == names
    limit = SHARED[int(arguments[0])]
    assert [kernel for kernel in built if kernel["shared"] > limit or not kernel["bytes"]] == []
