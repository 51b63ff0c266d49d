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
"""
What stands before the app: keys, foreign web pages, bodies that are too long or too slow, and the count of requests.

A body is read here to its end, or to a limit, before anything looks into it.
"""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .fields import RequestError
from .metrics import ServerMetrics


if TYPE_CHECKING:
    from .app import ServingSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTES = ("/v1/images/edits", "/v1/images/generations", "/v1/models", "/health", "/ready", "/metrics")
# Without a key: who looks after a server asks for these.
OPEN_ROUTES = ("/health", "/ready", "/metrics")
# Of a body that is refused so much is read and dropped: most clients look at no answer before they have sent it all.
DRAINED_BYTES = 256 * 1024**2
# What stands in the count for a client that left.
CLIENT_GONE = "499"


class Gate:
    """
    ASGI middleware, see the module.

    Args:
        app (`Callable`): The ASGI app behind it.
        settings ([`ServingSettings`]): The limits.
        metrics ([`ServerMetrics`]): Where requests are counted.
        answer (`Callable`): Called as `answer(error)`: the ASGI response to a [`RequestError`].
        state (`Any`): Of the app: its `is_draining` is read, and its `open_requests` kept.
    """

    def __init__(
        self,
        app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]],
        settings: "ServingSettings",
        metrics: ServerMetrics,
        answer: Callable[[RequestError], Any],
        state: Any,
    ):
        self.app, self.settings, self.metrics, self.answer, self.state = app, settings, metrics, answer, state
        self._bodies = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = next((known for known in ROUTES if path == known or path.startswith(f"{known}/")), "other")
        status = "500"  # of an error that nobody foresaw, which is answered outside

        async def counted_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self.state.open_requests += 1
        self.metrics.open.inc()
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            try:
                self._check(path, headers)
                received = await self._read_body(headers, receive)
            except RequestError as error:
                self.metrics.rejected.labels(error.code).inc()
                if error.status != 408:
                    await self._drain(headers, receive)
                return await self.answer(error)(scope, receive, counted_send)
            if received is None:
                status = CLIENT_GONE
            else:
                await self.app(scope, received, counted_send)
        finally:
            self.state.open_requests -= 1
            self.metrics.open.dec()
            self.metrics.requests.labels(route, status).inc()

    def _check(self, path: str, headers: dict[str, str]) -> None:
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            raise RequestError("Web pages of other sites may not use this server.", code="foreign_origin", status=403)
        if path in OPEN_ROUTES:
            return
        if key := self.settings.api_key:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), key.encode()):
                words = "The API key is wrong." if given else "An API key is needed: `Authorization: Bearer KEY`."
                raise RequestError(words, code="invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"})
        if self.state.is_draining:
            raise RequestError(
                "The server is being shut down.", code="shutting_down", status=503, headers={"Retry-After": "5"}
            )

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> Receive | None:
        """A `receive` of the whole body, and after it of what comes then; `None` if the client left."""
        settings = self.settings
        too_long = RequestError(
            f"The request is too long: at most {settings.max_body_bytes:,} bytes are allowed.",
            code="request_too_large",
            status=413,
        )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > settings.max_body_bytes:
            raise too_long
        if self._bodies >= settings.max_uploads:
            raise RequestError(
                "The server is reading too many requests: try again in 1 s.",
                code="too_many_uploads",
                status=429,
                headers={"Retry-After": "1"},
            )
        body = bytearray()
        self._bodies += 1
        try:
            async with asyncio.timeout(settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > settings.max_body_bytes:
                        raise too_long
        except TimeoutError as error:
            raise RequestError(
                f"The request took longer than {settings.body_seconds:g} s to arrive.",
                code="request_timeout",
                status=408,
                headers={"Connection": "close"},
            ) from error
        finally:
            self._bodies -= 1
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}
        del body

        async def received() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        return received

    async def _drain(self, headers: dict[str, str], receive: Receive) -> None:
        """Reads the rest of a refused body, within limits, so that the client comes to read why."""
        if "expect" in headers or int(headers.get("content-length", "0")[:20] or 0) > DRAINED_BYTES:
            return
        dropped = 0
        try:
            async with asyncio.timeout(self.settings.drain_seconds):
                while dropped <= DRAINED_BYTES:
                    message = await receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return
