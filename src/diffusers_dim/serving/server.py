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
"""Runs an app until it is asked to end, and lets it finish what it has begun."""

import time
from types import FrameType
from typing import TYPE_CHECKING, Any


try:
    import uvicorn
except ImportError as error:
    raise ImportError("Serving needs uvicorn: pip install 'diffusers-dim[serve]'") from error


if TYPE_CHECKING:
    from fastapi import FastAPI

    from .app import ServerState

# For the last answers to reach their clients.
FLUSH_SECONDS = 5


class GracefulServer(uvicorn.Server):
    """
    A server that at SIGTERM or SIGINT refuses new requests with HTTP 503, answers those that it has within a grace
    time, and ends with exit code 0. A second signal ends it at once.

    Args:
        config ([`uvicorn.Config`]): Of an app by [`create_app`].
        state ([`ServerState`]): The app's.
        grace_seconds (`float`): The grace time.
    """

    def __init__(self, config: uvicorn.Config, state: "ServerState", grace_seconds: float):
        super().__init__(config)
        self._state, self._grace_seconds = state, grace_seconds
        self._ends_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the grace time; ends it if it has begun."""
        self._ends_at = 0.0 if self._state.is_draining else time.monotonic() + self._grace_seconds
        self._state.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to end."""
        if self._ends_at is not None:
            if time.monotonic() >= self._ends_at:
                self._state.painter.give_up()
                self.should_exit = True
            elif self._state.open_requests == 0:
                self.should_exit = True
        return await super().on_tick(counter)


def run_server(app: "FastAPI", host: str = "127.0.0.1", port: int = 8000, grace_seconds: float = 60.0) -> None:
    """
    Serves an app by [`create_app`] until SIGTERM or SIGINT.

    Args:
        app (`FastAPI`): The app.
        host (`str`, defaults to "127.0.0.1"): The address to listen at; this machine alone by default.
        port (`int`, defaults to 8000): The port to listen at; 0 for any.
        grace_seconds (`float`, defaults to 60.0): For what is still to be painted at the end.
    """
    options: dict[str, Any] = {"server_header": False, "timeout_graceful_shutdown": FLUSH_SECONDS}
    config = uvicorn.Config(app, host=host, port=port, **options)
    GracefulServer(config, app.state.server, grace_seconds).run()
