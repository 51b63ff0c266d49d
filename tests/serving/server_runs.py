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
"""Servers for tests: real ones at a port of this machine, before the embedded model."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffusers_dim import TINY_SHAPES, DIMEditPipeline


MODEL = "tiny-shapes"


@dataclass
class Running:
    """A server at work."""

    url: str
    port: int
    app: Any
    server: Any

    @property
    def metrics(self) -> Any:
        return self.app.state.server.metrics

    def count(self, name: str, **labels: str) -> float:
        """A metric's value, 0.0 if nothing was counted."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_for(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Waits until a metric is as high as that."""
        end = time.monotonic() + 60
        while self.count(name, **labels) < value:
            assert time.monotonic() < end, f"{name} {labels} is {self.count(name, **labels)}"
            time.sleep(0.01)


@contextmanager
def serve_app(pipe: Any, **settings: Any) -> Iterator[Running]:
    """A server in a thread of this process; it is at its end when the block is."""
    import uvicorn

    from diffusers_dim.serving.app import ServingSettings, create_app
    from diffusers_dim.serving.server import GracefulServer

    settings = {"model_name": MODEL, "num_inference_steps": 2, "grace_seconds": 10.0, **settings}
    app = create_app(pipe, ServingSettings(**settings))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning")
    server = GracefulServer(config, app.state.server, settings["grace_seconds"])
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", port, app, server)
    finally:
        server.should_exit = True
        thread.join(60)


class HoldingDesigner:
    """Writes nothing; at an instruction with "hold" it waits until it is let go, so that a server is busy."""

    def __init__(self) -> None:
        self.entered, self.released = threading.Event(), threading.Event()

    def design(self, images: list[Image.Image], instructions: list[str]) -> list[None]:
        if any("hold" in instruction for instruction in instructions):
            self.entered.set()
            assert self.released.wait(60)
        return [None] * len(instructions)


def load_embedded() -> DIMEditPipeline:
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
