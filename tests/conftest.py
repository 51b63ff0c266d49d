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
"""Fixtures of the golden models: tiny released checkpoints and what the published code computed from them."""

import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import PartialState
from diffusers import SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_dim import DIMEditPipeline, DIMPipeline
from diffusers_dim.loaders import convert_released_checkpoint


SANA_SETTINGS = list(inspect.signature(SanaTransformer2DModel.__init__).parameters)[1:]


class Golden(NamedTuple):
    """
    A golden case.

    Args:
        path (`Path`): Holds `model.safetensors`, `qwen`, `vae_base`, `transformer_config.json` and `source.png`.
        tensors (`dict[str, torch.Tensor]`): What the published code computed, step by step.
        settings (`dict`): The prompt, resolution, steps, guidance scale and seed.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any]


def load_golden(path: Path) -> Golden:
    return Golden(path, load_file(path / "golden.safetensors"), json.loads((path / "golden.json").read_text()))


def convert_golden(golden: Golden, output: Path) -> Path:
    return convert_released_checkpoint(
        checkpoint=golden.path / "model.safetensors",
        text_encoder=golden.path / "qwen",
        vae=golden.path / "vae_base",
        output=output,
        transformer_config=golden.path / "transformer_config.json",
        designer="none",  # a model of random weights writes no blueprints
    ).path


@pytest.fixture(scope="module", autouse=True)
def flash_attention_as_it_was():
    """Training in the tests' own process turns it off on a CPU, which changes the last bits of what follows."""
    is_enabled = torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.backends.cuda.enable_flash_sdp(is_enabled)


@pytest.fixture(scope="module")
def one_thread():
    """
    How many threads add up decides about the last bits, and how they split a matrix product by its rows about those of
    a row beside others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread_on_the_cpu(one_thread):
    """For accelerate, too, and in processes that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        PartialState._reset_state()
        yield
    PartialState._reset_state()


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return Path(__file__).parent / "fixtures" / "golden"


@pytest.fixture(scope="session")
def golden_edit(golden_dir) -> Golden:
    return load_golden(golden_dir / "edit")


@pytest.fixture(scope="session")
def golden_t2i(golden_dir) -> Golden:
    return load_golden(golden_dir / "t2i")


@pytest.fixture(scope="session")
def edit_folder(golden_edit, tmp_path_factory) -> Path:
    """The golden edit model as a diffusers folder; not to be changed."""
    return convert_golden(golden_edit, tmp_path_factory.mktemp("converted") / "edit")


@pytest.fixture(scope="session")
def t2i_folder(golden_t2i, tmp_path_factory) -> Path:
    """The golden text-to-image model as a diffusers folder; not to be changed."""
    return convert_golden(golden_t2i, tmp_path_factory.mktemp("converted") / "t2i")


@pytest.fixture(scope="session")
def source(golden_edit) -> Image.Image:
    """An RGB picture to edit."""
    return Image.open(golden_edit.path / "source.png").convert("RGB")


@pytest.fixture(scope="session")
def edit_pipe(edit_folder) -> DIMEditPipeline:
    """Not to be changed."""
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def t2i_pipe(t2i_folder) -> DIMPipeline:
    """Not to be changed."""
    pipe = DIMPipeline.from_pretrained(t2i_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def sana_folder(t2i_folder, tmp_path_factory) -> Path:
    """The golden text-to-image model's transformer, autoencoder and scheduler as a SanaPipeline's folder."""
    folder = tmp_path_factory.mktemp("sana") / "sana"
    pipe = DIMPipeline.from_pretrained(t2i_folder, text_encoder=None, processor=None, connector=None)
    sana = SanaTransformer2DModel(**{name: pipe.transformer.config[name] for name in SANA_SETTINGS})
    sana.load_state_dict(pipe.transformer.state_dict())
    sana.save_pretrained(folder / "transformer")
    pipe.vae.save_pretrained(folder / "vae")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    index = {name: ["diffusers", type(getattr(pipe, name)).__name__] for name in ("vae", "scheduler")}
    index |= {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
