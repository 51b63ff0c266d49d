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
A pipeline behind an HTTP interface that OpenAI's clients know: `/v1/images/edits`, `/v1/images/generations` and
`/v1/models`, besides `/health`, `/ready` and `/metrics`.
"""

import asyncio
import base64
import contextlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..designers import DesignError
from ..image_processor import DIMImageProcessor
from ..pipelines import DIMEditPipeline, DIMPipeline
from .fields import PictureFields, RequestError, read_fields
from .gate import Gate
from .intake import MAX_BYTES, MAX_PIXELS, MAX_PROMPT_CHARACTERS, UploadError, fetch_image, read_upload
from .metrics import ServerMetrics
from .painter import Overloaded, Painted, Painter, PaintRequest, Stopped


if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

logger = logging.getLogger(__name__)

# Uploads are decoded and pictures encoded in threads, not more at a time, for memory's sake.
PICTURE_THREADS = 4
MAX_FIELDS = 64


@dataclass(frozen=True)
class ServingSettings:
    """
    What a server is and allows.

    Args:
        model_name (`str`): What clients call the model.
        api_key (`str`, *optional*): What clients have to send; nobody is asked for one by default.
        num_inference_steps (`int`, defaults to 30): Denoising steps where a request names none.
        max_inference_steps (`int`, defaults to 100): The most that one may ask for.
        max_images (`int`, defaults to 4): Pictures a request.
        max_output_pixels (`int`, *optional*): Of a painted picture; twice the model's own area by default.
        max_prompt_characters (`int`, defaults to 8000): Of a prompt or blueprint.
        max_upload_bytes (`int`, defaults to 16 MiB): Of a source's file.
        max_upload_pixels (`int`, defaults to 16 * 1024 * 1024): Of a source.
        max_body_bytes (`int`, *optional*): Of a whole request; half a MiB above `max_upload_bytes` by default.
        max_uploads (`int`, defaults to 32): Requests whose bodies are read at a time.
        body_seconds (`float`, defaults to 30.0): In which a request has to arrive.
        drain_seconds (`float`, defaults to 10.0): For the rest of a refused body.
        max_batch_size (`int`, defaults to 8): Pictures a call of the pipeline.
        max_wait_seconds (`float`, defaults to 0.02): How long a request waits for others to share its call.
        max_queue (`int`, defaults to 64): Pictures that may wait.
        max_queue_pixels (`int`, defaults to 256 * 1024 * 1024): Their sources' pixels in all.
        queue_seconds (`float`, defaults to 300.0): That a request may wait for its call.
        paint_seconds (`float`, defaults to 300.0): That its call may take.
        grace_seconds (`float`, defaults to 60.0): For what is still to be painted at the end.
        fetch_urls (`bool`, defaults to `False`): Whether an edit's source may be an address, `image_url`.
    """

    model_name: str
    api_key: str | None = field(default=None, repr=False)
    num_inference_steps: int = 30
    max_inference_steps: int = 100
    max_images: int = 4
    max_output_pixels: int | None = None
    max_prompt_characters: int = MAX_PROMPT_CHARACTERS
    max_upload_bytes: int = MAX_BYTES
    max_upload_pixels: int = MAX_PIXELS
    max_body_bytes: int | None = None
    max_uploads: int = 32
    body_seconds: float = 30.0
    drain_seconds: float = 10.0
    max_batch_size: int = 8
    max_wait_seconds: float = 0.02
    max_queue: int = 64
    max_queue_pixels: int = 256 * 1024**2
    queue_seconds: float = 300.0
    paint_seconds: float = 300.0
    grace_seconds: float = 60.0
    fetch_urls: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_seconds"):
                if not (value > 0 or value == 0 and name == "max_wait_seconds"):
                    raise ValueError(f"`{name}` has to be above 0, but is {value}.")
            elif isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {value}.")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("`api_key` holds no text.")
        if self.num_inference_steps > self.max_inference_steps:
            raise ValueError(
                f"`num_inference_steps` has to be at most `max_inference_steps`, {self.max_inference_steps}, but is"
                f" {self.num_inference_steps}."
            )


class ServerState:
    """
    What a server's parts know of each other.

    Args:
        painter ([`Painter`]): Paints.
        metrics ([`ServerMetrics`]): Counts.

    Attributes:
        open_requests (`int`): That are not answered to their ends.
        is_draining (`bool`): Whether new requests are refused.
    """

    def __init__(self, painter: Painter, metrics: ServerMetrics):
        self.painter, self.metrics = painter, metrics
        self.open_requests = 0
        self.is_draining = False


def create_app(pipe: DIMPipeline, settings: ServingSettings) -> "FastAPI":
    """
    The server's app.

    Args:
        pipe ([`DIMPipeline`] or [`DIMEditPipeline`]): Belongs to the app from now on. Its designer, if there is one,
            writes blueprints.
        settings ([`ServingSettings`]): Names and limits.

    Returns:
        `FastAPI`: Its `state.server` is a [`ServerState`].

    Raises:
        ImportError: Without the extra `serve`.
    """
    try:
        import python_multipart  # noqa: F401
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, Response
        from starlette.exceptions import HTTPException
    except ImportError as error:
        raise ImportError("Serving needs FastAPI: pip install 'diffusers-dim[serve]'") from error

    settings = replace(
        settings,
        max_output_pixels=settings.max_output_pixels or 2 * pipe.image_processor.base_size**2,
        max_body_bytes=settings.max_body_bytes or settings.max_upload_bytes + 512 * 1024,
    )
    metrics = ServerMetrics()
    painter = Painter(
        pipe,
        settings.max_batch_size,
        settings.max_wait_seconds,
        settings.max_queue,
        settings.max_queue_pixels,
        metrics,
    )
    state = ServerState(painter, metrics)
    service = _Service(pipe, settings, state)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        painter.start()
        yield
        painter.close()
        # A thread that still computes while Python ends may crash it.
        await asyncio.to_thread(painter.join, settings.grace_seconds)

    # Its own pages would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = state

    def answer(error: RequestError) -> JSONResponse:
        return JSONResponse(error_body(error), error.status, error.headers)

    app.add_middleware(Gate, settings=settings, metrics=metrics, answer=answer, state=state)

    async def on_request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        metrics.rejected.labels(error.code).inc()
        return answer(error)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        words = {404: "There is nothing at this address.", 405: "This address takes no such method."}
        message = words.get(error.status_code, str(error.detail))
        return answer(RequestError(message, status=error.status_code, headers=error.headers))

    async def on_surprise(request: Request, error: Exception) -> JSONResponse:
        return answer(RequestError("Something went wrong in the server.", code="internal_error", status=500))

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_surprise)

    async def edits(request: Request) -> Response:
        return await service.edit(request)

    async def generations(request: Request) -> Response:
        return await service.generate(request)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [service.model]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != settings.model_name:
            raise RequestError(
                f"There is no such model here: there is {settings.model_name!r}.", "model", "model_not_found", 404
            )
        return JSONResponse(service.model)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok" if painter.is_alive else "broken"}, 200 if painter.is_alive else 503)

    async def ready(request: Request) -> Response:
        status = "draining" if state.is_draining else "ready" if painter.is_alive else "broken"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_route("/v1/images/edits", edits, methods=["POST"])
    app.add_route("/v1/images/generations", generations, methods=["POST"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/models/{name:path}", model, methods=["GET"])
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/ready", ready, methods=["GET"])
    app.add_route("/metrics", show_metrics, methods=["GET"])
    return app


def error_body(error: RequestError) -> dict[str, Any]:
    """An error as OpenAI words it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def encode_picture(image: Image.Image, image_format: str, quality: int) -> str:
    """A picture's file, in Base64."""
    data = io.BytesIO()
    image.save(data, image_format.upper(), **({} if image_format == "png" else {"quality": max(1, quality)}))
    return base64.b64encode(data.getvalue()).decode()


class _Service:
    """What the routes do."""

    def __init__(self, pipe: DIMPipeline, settings: ServingSettings, state: ServerState):
        self.pipe, self.settings, self.state = pipe, settings, state
        self.edits = isinstance(pipe, DIMEditPipeline)
        self.processor: DIMImageProcessor = pipe.image_processor
        self.threads = ThreadPoolExecutor(PICTURE_THREADS, thread_name_prefix="pictures")
        self.model = {
            "id": settings.model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "diffusers-dim",
        }

    async def in_thread(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.threads, partial(function, *args, **kwargs))

    async def edit(self, request: "Request") -> "Response":
        from starlette.datastructures import UploadFile

        if not self.edits:
            raise RequestError(
                "This server paints from text and edits nothing: use /v1/images/generations.", code="wrong_endpoint"
            )
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise RequestError(
                "An edit has to be sent as multipart/form-data with the fields `image` and `prompt`.",
                code="unsupported_media_type",
                status=415,
            )
        async with request.form(max_files=4, max_fields=MAX_FIELDS) as form:
            fields: dict[str, Any] = {}
            uploads = []
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) and name in ("image", "image[]"):
                    uploads.append(await value.read())
                elif name in fields:
                    raise RequestError(f"`{name[:60]}` is given twice.", name[:60], "invalid_value")
                else:
                    fields[name] = value
        for name in ("image", "image[]"):
            if name in fields:
                raise RequestError("`image` has to be a file, not a text.", "image", "invalid_type")
        asked = read_fields(fields, "edit", self.pipe, self.settings)
        if len(uploads) + (asked.image_url is not None) != 1:
            raise RequestError(
                f"An edit needs one picture, `image`, but {len(uploads)} were sent."
                if asked.image_url is None
                else "Give either `image` or `image_url`.",
                "image",
                "invalid_value" if uploads else "missing_parameter",
            )
        limits = {"max_bytes": self.settings.max_upload_bytes, "max_pixels": self.settings.max_upload_pixels}
        try:
            if asked.image_url is not None:
                image = await self.in_thread(fetch_image, asked.image_url, enabled=self.settings.fetch_urls, **limits)
            else:
                image = await self.in_thread(read_upload, uploads.pop(), **limits)
        except UploadError as error:
            param = "image" if asked.image_url is None else "image_url"
            raise RequestError(str(error), param, "invalid_image", error.status) from error
        size = asked.size or self.processor.get_default_height_width(image)
        return await self.paint(request, asked, size, image)

    async def generate(self, request: "Request") -> "Response":
        if self.edits:
            raise RequestError(
                "This server edits pictures and paints none from text alone: use /v1/images/edits.",
                code="wrong_endpoint",
            )
        if not request.headers.get("content-type", "").lower().startswith("application/json"):
            raise RequestError(
                "The request has to be sent as application/json.", code="unsupported_media_type", status=415
            )
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise RequestError("The request is no JSON.", code="invalid_json") from error
        if not isinstance(fields, dict):
            raise RequestError("The request has to be a JSON object.", code="invalid_json")
        asked = read_fields(fields, "generate", self.pipe, self.settings)
        return await self.paint(request, asked, asked.size or (self.processor.base_size,) * 2, None)

    async def paint(
        self, request: "Request", asked: PictureFields, size: tuple[int, int], image: Image.Image | None
    ) -> "Response":
        from fastapi.responses import JSONResponse, Response, StreamingResponse

        loop = asyncio.get_running_loop()
        previews: asyncio.Queue[tuple[int, Image.Image]] = asyncio.Queue()
        wanted = PaintRequest(
            prompt=asked.prompt,
            height=size[0],
            width=size[1],
            num_inference_steps=asked.num_inference_steps,
            guidance_scale=asked.guidance_scale,
            seeds=asked.seeds,
            image=image,
            blueprint=asked.blueprint,
            use_designer=asked.use_designer,
            num_previews=asked.partial_images,
            on_preview=(lambda index, shown: _call_soon(loop, previews.put_nowait, (index, shown)))
            if asked.partial_images
            else None,
        )
        try:
            self.state.painter.submit(wanted)
        except Overloaded as error:
            raise RequestError(
                str(error), None, "rate_limit_exceeded", 429, {"Retry-After": str(error.retry_after)}
            ) from error
        except Stopped as error:
            raise _stopped() from error
        if asked.stream:
            events = self.stream(request, asked, wanted, previews)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        painted = await self.wait(request, wanted)
        if painted is None:
            return Response(status_code=499)
        files = [
            await self.in_thread(encode_picture, made, asked.output_format, asked.quality) for made in painted.images
        ]
        return JSONResponse(
            {
                "created": int(time.time()),
                "background": "opaque",
                "output_format": asked.output_format,
                "size": f"{size[1]}x{size[0]}",
                "data": [
                    {"b64_json": file, "seed": seed, **_describe(painted, asked)}
                    for file, seed in zip(files, asked.seeds, strict=True)
                ],
            }
        )

    async def wait(self, request: "Request", wanted: PaintRequest) -> Painted | None:
        """What became of a request; `None` if its client left."""
        settings, painter = self.settings, self.state.painter
        # After its body nothing comes from a client but its end.
        gone = asyncio.ensure_future(request.receive())
        begun, done = asyncio.wrap_future(wanted.begun), asyncio.wrap_future(wanted.done)
        reason = "client_gone"
        try:
            ends: list[asyncio.Future[Any]] = [gone, done]
            first = asyncio.FIRST_COMPLETED
            await asyncio.wait([*ends, begun], timeout=settings.queue_seconds, return_when=first)
            if begun.done() and not gone.done():
                await asyncio.wait(ends, timeout=settings.paint_seconds, return_when=first)
            if done.done():
                return await self.result(done)
            if gone.done():
                return None
            if begun.done():
                reason, words = "paint_timeout", f"Painting took longer than {settings.paint_seconds:g} s."
            else:
                reason, words = "queue_timeout", f"The request waited longer than {settings.queue_seconds:g} s."
            raise RequestError(words, code=reason, status=503, headers={"Retry-After": str(painter.retry_after())})
        finally:
            gone.cancel()
            if not done.done():
                done.add_done_callback(lambda future: future.cancelled() or future.exception())  # nobody asks for it
                painter.abandon(wanted)
                self.state.metrics.abandoned.labels(reason).inc()

    async def result(self, done: "asyncio.Future[Painted]") -> Painted:
        try:
            return await done
        except Stopped as error:
            raise _stopped() from error
        except (DesignError, ConnectionError) as error:
            logger.warning("The designer failed: %s", error)
            raise RequestError(
                "The designer wrote no blueprint: try again, give a `blueprint`, or send designer=none.",
                code="design_failed",
                status=502,
            ) from error
        except ValueError as error:
            raise RequestError(str(error), code="invalid_value") from error
        except (RuntimeError, OSError) as error:
            logger.error("A request could not be painted.", exc_info=error)
            raise RequestError("The picture could not be painted.", code="internal_error", status=500) from error

    async def stream(
        self,
        request: "Request",
        asked: PictureFields,
        wanted: PaintRequest,
        previews: "asyncio.Queue[tuple[int, Image.Image]]",
    ) -> AsyncIterator[str]:
        """Server-sent events, as OpenAI's clients read them."""
        kind = "image_edit" if self.edits else "image_generation"

        async def picture(name: str, image: Image.Image, more: Mapping[str, Any]) -> str:
            file = await self.in_thread(encode_picture, image, asked.output_format, asked.quality)
            told = {
                "type": f"{kind}.{name}",
                "b64_json": file,
                "created_at": int(time.time()),
                "size": f"{wanted.width}x{wanted.height}",
                "quality": "auto",
                "background": "opaque",
                "output_format": asked.output_format,
                **more,
            }
            return f"event: {kind}.{name}\ndata: {json.dumps(told)}\n\n"

        waiting = asyncio.ensure_future(self.wait(request, wanted))
        preview = asyncio.ensure_future(previews.get())
        try:
            while True:
                either: set[asyncio.Future[Any]] = {waiting, preview}
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if not preview.done():
                    break
                index, image = preview.result()
                yield await picture("partial_image", image, {"partial_image_index": index})
                preview = asyncio.ensure_future(previews.get())
            painted = await waiting
            if painted is not None:
                more = {"seed": asked.seeds[0], "usage": None, **_describe(painted, asked)}
                yield await picture("completed", painted.images[0], more)
        except RequestError as error:
            self.state.metrics.rejected.labels(error.code).inc()
            yield f"event: error\ndata: {json.dumps(error_body(error))}\n\n"
        finally:
            preview.cancel()
            waiting.cancel()


def _call_soon(loop: asyncio.AbstractEventLoop, function: Any, argument: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(function, argument)


def _describe(painted: Painted, asked: PictureFields) -> dict[str, Any]:
    """What was painted from in the prompt's place, if a designer wrote it."""
    if painted.blueprint is None or painted.blueprint == asked.blueprint:
        return {}
    return {"revised_prompt": painted.blueprint}


def _stopped() -> RequestError:
    return RequestError(str(Stopped()), code="shutting_down", status=503, headers={"Retry-After": "5"})
