"""The golden models as pipelines and in blocks."""

import pytest
from modular_pairs import Pair, make_modular
from PIL import Image

from diffusers_dim import DIMBlocks, DIMEditBlocks, DIMEditPipeline, DIMPipeline


@pytest.fixture(scope="session")
def source(golden_edit) -> Image.Image:
    """An RGB picture to edit."""
    return Image.open(golden_edit.path / "source.png").convert("RGB")


@pytest.fixture(scope="session")
def edit_pipe(edit_folder) -> DIMEditPipeline:
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def t2i_pipe(t2i_folder) -> DIMPipeline:
    pipe = DIMPipeline.from_pretrained(t2i_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def edit(edit_pipe) -> Pair:
    return Pair(edit_pipe, make_modular(DIMEditBlocks(), edit_pipe))


@pytest.fixture
def t2i(t2i_pipe) -> Pair:
    return Pair(t2i_pipe, make_modular(DIMBlocks(), t2i_pipe))
