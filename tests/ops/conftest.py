"""Where a test of a kernel runs it, and how far from the definition it may be."""

import importlib.util
import os

import pytest
import torch

from diffusers_dim.ops import set_kernels


# Relative, of norms, against the definition in a wider type. Rounding the result alone costs 2e-4 in float16 and 2e-3
# in bfloat16, twice that in the interpreter, which cuts bfloat16 off. On a GPU a float32 product is three of tf32.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@pytest.fixture
def close():
    """Asserts that tensors are as close to those of a wider type as rounding to `dtype` allows."""

    def check(found, wanted, dtype):
        for name, tensor in found.items():
            error = relative_error(tensor, wanted[name])
            assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"  # NaN is not

    return check


@pytest.fixture
def device():
    """The device on which kernels run, turned on, every new tensor of theirs full of NaN to begin with."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpret and not torch.cuda.is_available():
        pytest.skip("no GPU here; test_interpreter.py runs this test in a process with TRITON_INTERPRET=1")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with set_kernels(True, interpret=interpret):
        yield "cpu" if interpret else "cuda"
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def random(device):
    """Makes normal random tensors on the kernels' device, the same ones each time a test runs."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    return make
