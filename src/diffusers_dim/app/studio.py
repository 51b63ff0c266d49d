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
"""Designing and painting for several people at once, with limits, previews and a stop for each."""

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..designers import Designer, SelfDesigner
from ..serving.fields import MAX_SEED
from ..serving.intake import UploadError, read_prompt
from ..serving.painter import Stopped, expected_latents
from .preview import LatentPreview


if TYPE_CHECKING:
    from ..pipelines import DIMEditPipeline

# Sides of the pictures that are offered, as ratios of height to width.
RATIOS = (1.0, 3 / 4, 4 / 3, 2 / 3, 3 / 2, 9 / 16, 16 / 9)
AUTOMATIC = "like the picture"


@dataclass(frozen=True)
class Limits:
    """
    What one person may ask for.

    Args:
        bytes (`int`): The longest file.
        pixels (`int`): The largest picture.
        characters (`int`): The longest instruction.
        blueprint_characters (`int`): The longest blueprint.
        steps (`int`): The most denoising steps.
        guidance_scale (`float`): The highest.
        candidates (`int`): The most pictures at a time.
        per_minute (`int`): How many designs, and how many paintings, may be begun within a minute.
        history (`int`): How many pictures are kept to go back to.
    """

    bytes: int = 16 * 1024**2
    pixels: int = 16 * 1024**2
    characters: int = 1000
    blueprint_characters: int = 8000
    steps: int = 100
    guidance_scale: float = 20.0
    candidates: int = 4
    per_minute: int = 20
    history: int = 24


@dataclass(frozen=True)
class Settings:
    """
    How to paint.

    Args:
        steps (`int`): Denoising steps.
        guidance_scale (`float`): Off at 1.
        seed (`int`, *optional*): Of the first picture's noise, the others' count up; `None` for any.
        candidates (`int`): How many pictures.
        size (`str`): A key of [`Studio.sizes`].
    """

    steps: int = 30
    guidance_scale: float = 7.5
    seed: int | None = None
    candidates: int = 1
    size: str = AUTOMATIC


@dataclass(frozen=True)
class Progress:
    """After a step: how many of how many are done, the seconds so far, and perhaps previews."""

    step: int
    steps: int
    seconds: float
    previews: list[Image.Image]


@dataclass(frozen=True)
class Painting:
    """The pictures, their seeds, the source as the painter saw it, what was painted from, and the seconds it took."""

    images: list[Image.Image]
    seeds: list[int]
    before: Image.Image
    blueprint: str | None
    steps: int
    guidance_scale: float
    seconds: float


class Rate:
    """So many within a minute for each key."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self.clock = per_minute, clock
        self._begun: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def check(self, key: str, what: str) -> None:
        """Counts one more of `what`. Raises an [`UploadError`] that says how long to wait if there were too many."""
        with self._lock:
            now = self.clock()
            for other in [name for name, times in self._begun.items() if times[-1] < now - 60]:
                del self._begun[other]
            times = self._begun.setdefault(key, deque())
            while times and times[0] < now - 60:
                times.popleft()
            if len(times) >= self.per_minute:
                wait = int(times[0] + 60 - now) + 1
                raise UploadError(
                    f"You have begun {self.per_minute} {what} within a minute: try again in {wait} s.", 429
                )
            times.append(now)


def follow(work: Callable[[Callable[[Any], None]], Any], stop: threading.Event) -> Iterator[Any]:
    """
    Does work in a thread and gives what it tells as it comes, of what was told meanwhile only the last, and its result
    at the end. When the iterator is closed the work is stopped and waited for.

    Args:
        work (`Callable`): Called as `work(tell)`.
        stop (`threading.Event`): What it looks at to stop.

    Raises:
        BaseException: What `work` raises.
    """
    told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            told.put(("done", work(lambda item: told.put(("told", item)))))
        except BaseException as error:  # it is the caller's
            told.put(("failed", error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    finished = False
    try:
        while True:
            kind, item = told.get()
            while kind == "told" and not told.empty():
                kind, item = told.get()
            finished = kind != "told"
            if kind == "failed":
                raise item
            yield item
            if finished:
                return
    finally:
        if not finished:
            stop.set()
        thread.join()


class Studio:
    """
    An edit pipeline that several people use, one painting at a time.

    Args:
        pipe ([`DIMEditPipeline`]): The pipeline; its `designer` is not used.
        designers (`Mapping[str, Designer | None]`): Who may be asked, by name; `None` for nobody.
        limits ([`Limits`]): What one person may ask for.
        preview_seconds (`float`, defaults to 0.15): The least time between two previews.
    """

    def __init__(
        self,
        pipe: "DIMEditPipeline",
        designers: Mapping[str, Designer | None],
        limits: Limits | None = None,
        preview_seconds: float = 0.15,
    ):
        self.pipe = pipe
        self.pipe.designer = None
        self.designers = dict(designers)
        self.limits = limits or Limits()
        self.preview_seconds = preview_seconds
        self.designs = Rate(self.limits.per_minute)
        self.paintings = Rate(self.limits.per_minute)
        self._lock = threading.Lock()
        sizes = {pipe.image_processor.get_bin(round(1000 * ratio), 1000) for ratio in RATIOS}
        self.sizes: dict[str, tuple[int, int] | None] = {AUTOMATIC: None}
        for height, width in sorted(sizes, key=lambda size: (size[0] != size[1], abs(size[0] - size[1]), size)):
            self.sizes[f"{width} x {height}"] = (height, width)

    def read_instruction(self, text: str) -> str:
        """An instruction within the limits. Raises an [`UploadError`] otherwise."""
        return read_prompt(text, self.limits.characters, "instruction")

    def read_blueprint(self, text: str | None) -> str | None:
        """A blueprint within the limits, `None` for none. Raises an [`UploadError`] otherwise."""
        if text is None or not text.strip():
            return None
        return read_prompt(text, self.limits.blueprint_characters, "blueprint")

    def check(self, settings: Settings) -> None:
        """Raises an [`UploadError`] if they are beyond the limits."""
        limits = self.limits
        for name, value, least, most in (
            ("steps", settings.steps, 1, limits.steps),
            ("guidance_scale", settings.guidance_scale, 1, limits.guidance_scale),
            ("candidates", settings.candidates, 1, limits.candidates),
            ("seed", settings.seed or 0, 0, MAX_SEED),
        ):
            if not least <= value <= most:  # also catches NaN
                raise UploadError(f"`{name}` has to be from {least} to {most}, but is {value}.")
        if settings.size not in self.sizes:
            raise UploadError(f"`size` has to be one of {', '.join(self.sizes)}.")

    def get_size(self, image: Image.Image, size: str) -> tuple[int, int]:
        """Height and width in pixels at which a picture is painted."""
        return self.sizes[size] or self.pipe.image_processor.get_default_height_width(image)

    def design(
        self, image: Image.Image, instruction: str, designer: str, size: str, stop: threading.Event
    ) -> Iterator[str | None]:
        """
        The blueprint of an edit as it is written: its words so far, and at the end all of it; `None` where nobody
        writes one.

        Raises:
            DesignError: If the designer gives none; in its words.
            Stopped: If `stop` was set.
            ValueError, OSError: If it cannot be asked.
        """
        if designer not in self.designers:
            raise UploadError(f"`designer` has to be one of {', '.join(self.designers)}.")
        chosen = self.designers[designer]

        def told(tell: Callable[[str], None], text: str) -> None:
            if stop.is_set():
                raise Stopped
            tell(text)

        def work(tell: Callable[[str], None]) -> str | None:
            if chosen is None:
                return None
            if not isinstance(chosen, SelfDesigner):
                return str(chosen.design([image], [instruction], lambda index, text: told(tell, text))[0])
            with self._turn(stop):
                height, width = self.get_size(image, size)
                texts = chosen.design(
                    [image], [instruction], lambda index, text: told(tell, text), height=height, width=width
                )
                return str(texts[0])

        return follow(work, stop)

    def paint(
        self, image: Image.Image, text: str, settings: Settings, stop: threading.Event, blueprint: str | None = None
    ) -> Iterator[Progress | Painting]:
        """
        Paints: a [`Progress`] now and then, and a [`Painting`] at the end.

        Args:
            image (`PIL.Image.Image`): The source, in RGB.
            text (`str`): The instruction.
            settings ([`Settings`]): Within the limits, see [`~Studio.check`].
            stop (`threading.Event`): Looked at after each step.
            blueprint (`str`, *optional*): What is painted from in the instruction's place.

        Raises:
            Stopped: If `stop` was set.
        """
        return follow(lambda tell: self._paint(image, text, settings, stop, blueprint, tell), stop)

    def _paint(
        self,
        image: Image.Image,
        text: str,
        settings: Settings,
        stop: threading.Event,
        blueprint: str | None,
        tell: Callable[[Progress], None],
    ) -> Painting:
        pipe = self.pipe
        height, width = self.get_size(image, settings.size)
        before = pipe.image_processor.resize_and_crop(image, height, width)
        seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
        seeds = [seed + i for i in range(settings.candidates)]
        preview: LatentPreview | None = None
        with self._turn(stop):
            start = last = time.perf_counter()

            def on_step(
                pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
            ) -> dict[str, torch.Tensor]:
                nonlocal preview, last
                if stop.is_set():
                    pipe._interrupt = True
                now = time.perf_counter()
                if now - last >= self.preview_seconds:
                    last = now
                    if preview is None:
                        preview = LatentPreview(before, tensors["image_latents"][:1])
                    pictures = preview.draw(expected_latents(pipe, tensors["latents"]))
                    tell(Progress(step + 1, pipe.num_timesteps, now - start, pictures))
                return {}

            painted: Any = pipe(
                image,
                text,
                height=height,
                width=width,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                num_images_per_prompt=settings.candidates,
                # On the CPU, so that a seed gives the same noise on every device.
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                blueprint=blueprint,
                callback_on_step_end=on_step,
                callback_on_step_end_tensor_inputs=["latents", "image_latents"],
            )
            if pipe.interrupt:
                raise Stopped
            seconds = time.perf_counter() - start
        return Painting(painted.images, seeds, before, blueprint, pipe.num_timesteps, pipe.guidance_scale, seconds)

    @contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        """The pipeline for one's own, once the others are done. Raises [`Stopped`] if one is stopped meanwhile."""
        while not self._lock.acquire(timeout=0.1):
            if stop.is_set():
                raise Stopped
        try:
            if stop.is_set():
                raise Stopped
            yield
        finally:
            self._lock.release()
