"""What the tests of the examples share: data of the picture world, and one thread where bits are compared."""

from pathlib import Path

import pytest
import torch

from diffusers_dim.tiny.dataset import write_edits


@pytest.fixture(scope="session")
def edits(tmp_path_factory) -> Path:
    """A jsonl of 12 edits, told by instructions, with its pictures."""
    return write_edits(tmp_path_factory.mktemp("edits"), 12, seed=1)


@pytest.fixture(scope="module")
def one_thread_on_the_cpu():
    """How many threads add up decides about the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)
