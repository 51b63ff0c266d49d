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
"""A thread that owns a pipeline, and the queue before it: requests that fit together share a call."""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..batches import make_batches
from ..designers import Designer
from ..pipelines import DIMPipeline
from .metrics import ServerMetrics


logger = logging.getLogger(__name__)

# What a call is thought to take before one was measured, in seconds.
FIRST_GUESS_SECONDS = 1.0
# Nobody is asked to come back later than that: clients take a longer wait for a refusal.
LONGEST_RETRY_SECONDS = 120


class Overloaded(RuntimeError):
    """
    The queue is full.

    Args:
        retry_after (`int`): Seconds until there may be room.
    """

    def __init__(self, retry_after: int):
        super().__init__(f"The server has too much to paint: try again in {retry_after} s.")
        self.retry_after = retry_after


class Stopped(RuntimeError):
    """The server takes no more, or ended before it came to a request."""

    def __init__(self) -> None:
        super().__init__("The server is being shut down.")


@dataclass(frozen=True)
class Painted:
    """
    What became of a request.

    Args:
        images (`list[PIL.Image.Image]`): One a seed.
        blueprint (`str`, *optional*): What was painted from in the prompt's place.
    """

    images: list[Image.Image]
    blueprint: str | None


@dataclass(eq=False)
class PaintRequest:
    """
    One request's pictures.

    Args:
        prompt (`str`): The instruction, or what to paint.
        height (`int`): In pixels.
        width (`int`): In pixels.
        num_inference_steps (`int`): Denoising steps.
        guidance_scale (`float`): Off at 1.
        seeds (`tuple[int, ...]`): One a picture.
        image (`PIL.Image.Image`, *optional*): The source of an edit.
        blueprint (`str`, *optional*): Of an edit; painted from in the prompt's place.
        use_designer (`bool`, defaults to `True`): Whether the pipeline's designer may write one.
        num_previews (`int`, defaults to 0): Unfinished pictures of the first seed to be shown on the way.
        on_preview (`Callable`, *optional*): Called with these, `on_preview(index, image)`, in the painter's thread.
    """

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seeds: tuple[int, ...]
    image: Image.Image | None = None
    blueprint: str | None = None
    use_designer: bool = True
    num_previews: int = 0
    on_preview: Callable[[int, Image.Image], None] | None = None
    arrived: float = field(default_factory=time.monotonic)
    begun: "Future[None]" = field(default_factory=Future)
    done: "Future[Painted]" = field(default_factory=Future)
    abandoned: bool = False

    @property
    def group(self) -> tuple:
        """What requests of one call have in common."""
        return (
            self.height,
            self.width,
            self.num_inference_steps,
            self.guidance_scale,
            len(self.seeds),
            self.use_designer,
        )

    @property
    def preview_steps(self) -> list[int]:
        """After which steps the unfinished pictures are shown, evenly spread."""
        steps = {
            round((index + 1) * self.num_inference_steps / (self.num_previews + 1)) - 1
            for index in range(self.num_previews)
        }
        return sorted(step for step in steps if 0 <= step < self.num_inference_steps - 1)


class Painter:
    """
    Paints requests in a thread of its own, the oldest first and with it all that fit into its call: a picture is that
    of a call of its own, up to rounding.

    Args:
        pipe ([`DIMPipeline`]): Used by nobody else from [`~Painter.start`] on.
        max_batch_size (`int`, defaults to 8): Pictures a call.
        max_wait_seconds (`float`, defaults to 0.02): How long the oldest request waits for others to join it.
        max_queue (`int`, defaults to 64): Pictures that may wait.
        max_queue_pixels (`int`, defaults to 256 * 1024 * 1024): Their sources' pixels in all.
        metrics ([`ServerMetrics`], *optional*): Where counts are kept.
    """

    def __init__(
        self,
        pipe: DIMPipeline,
        max_batch_size: int = 8,
        max_wait_seconds: float = 0.02,
        max_queue: int = 64,
        max_queue_pixels: int = 256 * 1024**2,
        metrics: ServerMetrics | None = None,
    ):
        self.pipe = pipe
        self.metrics = metrics or ServerMetrics()
        self._max_batch_size, self._max_wait_seconds = max_batch_size, max_wait_seconds
        self._max_queue, self._max_queue_pixels = max_queue, max_queue_pixels
        self._designer = pipe.designer
        self._changed = threading.Condition()
        self._waiting: list[PaintRequest] = []
        self._painting: list[PaintRequest] = []
        self._call_seconds: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="painter", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs: it ends by [`~Painter.close`], or by an error that nobody foresaw."""
        return self._thread.is_alive()

    def submit(self, request: PaintRequest) -> None:
        """
        Puts a request at the queue's end; its `done` is what becomes of it.

        Raises:
            Overloaded: If there is no room.
            Stopped: If the painter is closed.
        """
        with self._changed:
            if self._closed or not self.is_alive:
                raise Stopped
            pictures = sum(len(other.seeds) for other in self._waiting)
            pixels = sum(_count_pixels(other) for other in self._waiting)
            # A request larger than the whole queue has its turn when nobody waits.
            if self._waiting and (
                pictures + len(request.seeds) > self._max_queue
                or pixels + _count_pixels(request) > self._max_queue_pixels
            ):
                raise Overloaded(self._estimate_wait())
            self._waiting.append(request)
            self._tell()

    def abandon(self, request: PaintRequest) -> None:
        """Takes a request back that nobody waits for; a call whose requests are all of that kind is broken off."""
        with self._changed:
            request.abandoned = True
            if request in self._waiting:
                self._waiting.remove(request)
                self._tell()

    def close(self) -> None:
        """Takes no more requests; the thread ends when all are painted."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Takes no more requests, and drops those that are here: they end with [`Stopped`]."""
        with self._changed:
            dropped, self._waiting = self._waiting, []
            for request in (*dropped, *self._painting):
                request.abandoned = True
            self._closed = True
            self._tell()
        for request in dropped:
            request.done.set_exception(Stopped())

    def join(self, timeout: float) -> None:
        """Waits so many seconds at most for the thread's end."""
        self._thread.join(timeout)

    def retry_after(self) -> int:
        """Seconds, at least 1, after which all that is here now will be painted."""
        with self._changed:
            return self._estimate_wait()

    def _estimate_wait(self) -> int:
        pictures = sum(len(request.seeds) for request in (*self._waiting, *self._painting))
        calls = math.ceil(pictures / self._max_batch_size)
        seconds = calls * (FIRST_GUESS_SECONDS if self._call_seconds is None else self._call_seconds)
        return min(LONGEST_RETRY_SECONDS, max(1, math.ceil(seconds)))

    def _tell(self) -> None:
        self.metrics.queue.set(sum(len(request.seeds) for request in self._waiting))
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            while batch := self._take():
                self._paint(batch)
        finally:
            with self._changed:
                left = [*self._painting, *self._waiting]
                self._waiting, self._painting = [], []
                self._tell()
            for request in left:
                if not request.done.done():
                    request.done.set_exception(Stopped())

    def _take(self) -> list[PaintRequest]:
        """The next call's requests, as soon as they are enough or have waited long enough; none at the end."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                size = max(1, self._max_batch_size // len(oldest.seeds))
                _, batch = make_batches(self._waiting, lambda request: request.group, size)[0]
                left = oldest.arrived + self._max_wait_seconds - time.monotonic()
                if len(batch) < size and left > 0 and not self._closed:
                    self._changed.wait(left)
                    continue
                self._waiting = [request for request in self._waiting if request not in batch]
                self._painting = batch
                self._tell()
                return batch

    def _paint(self, batch: list[PaintRequest]) -> None:
        start = time.monotonic()
        for request in batch:
            self.metrics.waiting.observe(start - request.arrived)
            request.begun.set_result(None)
        self._paint_together(batch)
        seconds = time.monotonic() - start
        with self._changed:
            self._painting = []
            last = self._call_seconds
            self._call_seconds = seconds if last is None else 0.7 * last + 0.3 * seconds

    def _paint_together(self, batch: list[PaintRequest]) -> None:
        start = time.monotonic()
        try:
            painted = self._call(batch)
        except (ValueError, RuntimeError, OSError) as error:
            if len(batch) == 1 or isinstance(error, Stopped):
                for request in batch:
                    request.done.set_exception(error)
                return
            # One that cannot be painted must not spoil the others.
            logger.warning("A call of %d requests failed (%s): they are painted one by one.", len(batch), error)
            for request in batch:
                if request.abandoned:
                    request.done.set_exception(Stopped())
                else:
                    self._paint_together([request])
            return
        self.metrics.painting.observe(time.monotonic() - start)
        for request, result in zip(batch, painted, strict=True):
            request.done.set_result(result)

    def _call(self, batch: list[PaintRequest]) -> list[Painted]:
        first, count = batch[0], len(batch[0].seeds)
        previews = {row: request.preview_steps for row, request in enumerate(batch) if request.on_preview}

        def stop_if_unwanted(pipe: Any) -> None:
            if all(request.abandoned for request in batch):
                pipe._interrupt = True

        def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            stop_if_unwanted(pipe)
            for row, steps in previews.items():
                if step in steps and not batch[row].abandoned:
                    latents = expected_latents(pipe, tensors["latents"])[row * count : row * count + 1]
                    batch[row].on_preview(steps.index(step), pipe.decode_latents(latents)[0])
            return {}

        inputs: dict[str, Any] = {"prompt": [request.prompt for request in batch]}
        if first.image is not None:
            blueprints = [request.blueprint for request in batch]
            inputs["image"] = [request.image for request in batch]
            inputs["blueprint"] = blueprints if any(blueprints) else None
        self.pipe.designer = self._designer if first.use_designer else None
        if isinstance(self.pipe.designer, Designer):
            inputs["callback_on_design"] = lambda pipe, index, text: stop_if_unwanted(pipe)
        made: Any = self.pipe(
            **inputs,
            height=first.height,
            width=first.width,
            num_inference_steps=first.num_inference_steps,
            guidance_scale=first.guidance_scale,
            num_images_per_prompt=count,
            # On the CPU, so that a seed gives the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(seed) for request in batch for seed in request.seeds],
            callback_on_step_end=on_step,
        )
        if self.pipe.interrupt:
            raise Stopped
        self.metrics.batch.observe(len(made.images))
        self.metrics.pictures.inc(len(made.images))
        texts = made.blueprints or [None] * len(batch)
        return [
            Painted(made.images[row * count : (row + 1) * count], None if text is None else str(text))
            for row, text in enumerate(texts)
        ]


def _count_pixels(request: PaintRequest) -> int:
    return 0 if request.image is None else request.image.width * request.image.height


def expected_latents(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """
    What the latents of a step lead to as far as the painter can tell then: DPM-Solver++ keeps this estimate, elsewhere
    the noisy latents have to do.

    Args:
        pipe ([`DIMPipeline`]): Within a call.
        latents (`torch.Tensor`): After a step, `(pictures, latent_channels, height / factor, width / factor)`.
    """
    outputs: Sequence[torch.Tensor | None] = getattr(pipe.scheduler, "model_outputs", None) or [None]
    estimates = "dpmsolver++" in str(pipe.scheduler.config.get("algorithm_type"))
    return outputs[-1] if estimates and outputs[-1] is not None else latents
