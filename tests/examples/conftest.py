"""What the tests of the examples share: data of the picture world."""

from pathlib import Path

import pytest

from diffusers_dim.tiny.dataset import write_edits


@pytest.fixture(scope="session")
def edits(tmp_path_factory) -> Path:
    """A jsonl of 12 edits, told by instructions, with its pictures."""
    return write_edits(tmp_path_factory.mktemp("edits"), 12, seed=1)
