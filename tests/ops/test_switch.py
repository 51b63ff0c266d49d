import subprocess
import sys

import pytest
import torch

from diffusers_dim.ops import set_kernels, switch, uses_kernels


class OnGPU:
    """As much of a tensor on a GPU as the choice looks at."""

    def __init__(self, dtype=torch.bfloat16, elements=1, device="cuda:0"):
        self.device, self.dtype, self.elements = torch.device(device), dtype, elements

    def numel(self):
        return self.elements


@pytest.fixture
def gpu(monkeypatch):
    """A machine with triton and an H100."""
    monkeypatch.setattr(switch, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_kernels_run_on_a_gpu(gpu):
    assert uses_kernels(OnGPU(), OnGPU(torch.float32))


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(1)],
        [OnGPU(torch.float64)],
        [OnGPU(elements=0)],
        [OnGPU(), torch.zeros(1)],
        [OnGPU(), OnGPU(device="cuda:1")],
        [OnGPU(device="mps")],
    ],
)
def test_the_definition_runs(gpu, tensors):
    assert not uses_kernels(*tensors)


def test_the_definition_runs_on_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not uses_kernels(OnGPU())


def test_the_definition_runs_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(switch, "HAS_TRITON", False)
    assert not uses_kernels(OnGPU())


def test_switch_for_a_block_and_for_good(gpu):
    with set_kernels(True):
        with set_kernels(False):
            assert not uses_kernels(OnGPU())
        assert uses_kernels(OnGPU())
        set_kernels(False)
        assert not uses_kernels(OnGPU())


@pytest.mark.parametrize(("value", "used"), [("0", False), ("1", True)])
def test_environment_variable(gpu, monkeypatch, value, used):
    with set_kernels(True):
        monkeypatch.setenv("DIFFUSERS_DIM_KERNELS", value)
        switch._set_kernels_from_environment()
        assert uses_kernels(OnGPU()) == used


def test_environment_variable_that_makes_no_sense(monkeypatch):
    monkeypatch.setenv("DIFFUSERS_DIM_KERNELS", "yes")
    with pytest.raises(ValueError, match="0, 1 or interpret, not 'yes'"):
        switch._set_kernels_from_environment()


def test_interpreter_that_is_not_there(monkeypatch):
    monkeypatch.setattr(switch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        set_kernels(True, interpret=True)


def test_imported_without_triton():
    code = "import sys; sys.modules['triton'] = None; from diffusers_dim.ops import switch; print(switch.HAS_TRITON)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
