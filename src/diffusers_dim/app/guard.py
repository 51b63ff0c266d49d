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
What the app takes from strangers: Gradio's components and routes, less what they would fetch, open or keep.

Gradio opens pictures of any format and size, fetches pictures from public addresses for any client that names one, and
has routes that this app does not need.
"""

import asyncio
from abc import ABCMeta
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import gradio as gr
from gradio import processing_utils
from gradio.component_meta import ComponentMeta
from gradio.data_classes import FileData, ImageData
from PIL import Image
from starlette.responses import PlainTextResponse

from ..serving.intake import MAX_BYTES, MAX_PIXELS, UploadError, read_upload


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PREFIX = "/gradio_api"
# Of all that is not a file: settings, texts and the names of files.
MAX_REQUEST_BYTES = 1024**2
DRAINED_BYTES, DRAIN_SECONDS = 256 * 1024**2, 10.0
CLOSED_ROUTES = tuple(
    f"{PREFIX}/{name}"
    for name in (
        "proxy=",
        "stream",
        "process_recording",
        "component_server",
        "deep_link",
        "vibe",
        "undo-vibe",
        "custom_component",
        "dev",
    )
) + ("/monitoring", "/custom_component")
# No page, script, font or picture of another host: not even one that slipped in by a text.
HEADERS = {
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none';"
    " form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class _NoStubs(ComponentMeta):
    """Makes a component of a component without Gradio's writing a .pyi file beside this one."""

    def __new__(mcs, *args: Any) -> Any:
        return ABCMeta.__new__(mcs, *args)


def read_file(data: bytes, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """[`read_upload`] for a component: its errors are shown in the browser."""
    try:
        return read_upload(data, max_bytes=max_bytes, max_pixels=max_pixels)
    except UploadError as error:
        raise gr.Error(str(error), print_exception=False, title="This picture cannot be taken") from error


class Picture(gr.Image, metaclass=_NoStubs):
    """An image that is read by [`read_upload`] from a file that was uploaded, and from nothing else."""

    is_template = True
    max_bytes, max_pixels = MAX_BYTES, MAX_PIXELS

    def preprocess(self, payload: ImageData | None) -> Image.Image | None:
        if payload is None or payload.path is None:
            return None
        return read_file(Path(payload.path).read_bytes(), self.max_bytes, self.max_pixels)


class Sketch(gr.ImageEditor, metaclass=_NoStubs):
    """An editor whose drawing is read by [`read_upload`]."""

    is_template = True
    max_bytes, max_pixels = MAX_BYTES, MAX_PIXELS

    def convert_and_format_image(
        self, file: FileData | None | bytes, flatten_on_white: bool = False
    ) -> Image.Image | None:
        if file is None:
            return None
        data = Path(file.path).read_bytes() if isinstance(file, FileData) else bytes(file)
        return read_file(data, self.max_bytes, self.max_pixels)


async def _refuse_address(url: str, cache_dir: str) -> NoReturn:
    raise gr.Error("Pictures are uploaded here, not fetched from addresses.", print_exception=False)


def close_downloads() -> None:
    """
    Makes Gradio, in this whole process, fetch nothing from addresses: before a function runs it otherwise does so for
    every input of any component that looks like a file.
    """
    processing_utils.async_ssrf_protected_download = _refuse_address


class Gate:
    """
    ASGI middleware: closes routes that this app does not need, limits what is sent to it, and tells the browser to
    load nothing from other hosts.

    Args:
        app (`Callable`): The app behind it.
        max_bytes (`int`): The longest file.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], max_bytes: int = MAX_BYTES):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        named = unquote(path.partition("file=")[2])
        if (
            path.startswith(CLOSED_ROUTES)
            or "://" in named
            or named.startswith("//")
            or b"deep_link" in scope["query_string"]
        ):
            return await PlainTextResponse("There is nothing here.", 404)(scope, receive, send)

        most = MAX_REQUEST_BYTES + (self.max_bytes if path.startswith(f"{PREFIX}/upload") else 0)
        refusal = PlainTextResponse(f"The request is too long: at most {most:,} bytes are allowed.", 413)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > most:
            await _drain(receive)
            return await refusal(scope, receive, send)
        received, started = 0, False

        async def counted_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise _TooLong
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if received > most and not started:
                return  # what the app makes of a body that breaks off
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                added = [
                    (name.encode(), text.encode()) for name, text in HEADERS.items() if name.encode() not in given
                ]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        with suppress(_TooLong):
            await self.app(scope, counted_receive, send_with_headers)
        if received > most and not started:
            await _drain(receive)
            await refusal(scope, receive, send)


async def _drain(receive: Receive) -> None:
    """Reads the rest of a refused body, within limits: most clients look at no answer before they have sent it all."""
    dropped = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while dropped <= DRAINED_BYTES:
                message = await receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return


class _TooLong(Exception):
    """A body is longer than it may be."""
