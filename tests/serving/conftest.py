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
"""What the tests of serving share: the embedded model, and a server before it."""

from collections.abc import Iterator

import pytest
from server_runs import HoldingDesigner, Running, load_embedded, serve_app

from diffusers_dim.tiny import sample_edits


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For all of the tests here."""


@pytest.fixture(scope="session")
def samples():
    return sample_edits(6, seed=0)


@pytest.fixture(scope="session")
def pipe():
    """For one server or painter at a time, and for calls when there is none."""
    pytest.importorskip("fastapi")
    return load_embedded()


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """A server for all tests that change nothing of it."""
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    with serve_app(load_embedded(), max_batch_size=4, max_upload_pixels=512 * 512) as server:
        yield server


@pytest.fixture
def holding(pipe):
    """A designer of the shared pipeline by which it can be kept busy."""
    designer = HoldingDesigner()
    pipe.designer = designer
    yield designer
    designer.released.set()
    pipe.designer = None
