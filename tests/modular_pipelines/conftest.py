"""The golden models as pipelines and in blocks."""

import pytest
from modular_pairs import Pair, make_modular

from diffusers_dim import DIMBlocks, DIMEditBlocks


@pytest.fixture
def edit(edit_pipe) -> Pair:
    return Pair(edit_pipe, make_modular(DIMEditBlocks(), edit_pipe))


@pytest.fixture
def t2i(t2i_pipe) -> Pair:
    return Pair(t2i_pipe, make_modular(DIMBlocks(), t2i_pipe))
