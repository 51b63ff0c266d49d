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
"""The thread that paints: what goes together, and what becomes of each."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("prometheus_client")

from diffusers_dim.serving.painter import Overloaded, Painter, PaintRequest, Stopped  # noqa: E402


@pytest.fixture
def start(pipe):
    """Starts a painter, which is at its end when the test is."""
    started = []

    def start(**settings):
        painter = Painter(pipe, **settings)
        painter.start()
        started.append(painter)
        return painter

    yield start
    for painter in started:
        painter.give_up()
        painter.join(60)
        assert not painter.is_alive


def ask(sample, seed=0, count=1, prompt=None, **more):
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 2.5, **more}
    return PaintRequest(
        prompt=prompt or sample.instruction, image=sample.source, seeds=tuple(range(seed, seed + count)), **settings
    )


def paint_alone(pipe, request):
    """The pipeline's own pictures."""
    return pipe(
        request.image,
        request.prompt,
        blueprint=request.blueprint,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        num_images_per_prompt=len(request.seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in request.seeds],
    ).images


def assert_same(images, expected):
    assert len(images) == len(expected)
    for image, other in zip(images, expected):
        # Sums of a batch are rounded otherwise than those of one.
        assert np.abs(np.asarray(image, np.int16) - np.asarray(other, np.int16)).max() <= 1


def batches_of(painter):
    total, count = (
        painter.metrics.registry.get_sample_value(f"dim_batch_pictures_{name}") for name in ("sum", "count")
    )
    return count, total


class TestPainter:
    def test_each_of_a_call_is_as_if_asked_for_alone(self, pipe, start, samples):
        requests = [ask(sample, seed=row) for row, sample in enumerate(samples[:3])]
        requests.append(ask(samples[3], seed=3, blueprint=samples[3].blueprint))
        painter = start(max_batch_size=4, max_wait_seconds=30.0)
        for request in requests:
            painter.submit(request)
        painted = [request.done.result(60) for request in requests]
        assert batches_of(painter) == (1, 4)
        painter.close()
        painter.join(60)
        for request, made in zip(requests, painted):
            assert_same(made.images, paint_alone(pipe, request))
        assert [made.blueprint for made in painted] == [None, None, None, samples[3].blueprint]

    def test_several_pictures_of_a_request_lie_with_it(self, pipe, start, samples):
        requests = [ask(samples[0], 5, count=2), ask(samples[1], 9, count=2)]
        painter = start(max_batch_size=4, max_wait_seconds=30.0)
        for request in requests:
            painter.submit(request)
        painted = [request.done.result(60).images for request in requests]
        assert batches_of(painter) == (1, 4)
        painter.close()
        painter.join(60)
        for request, images in zip(requests, painted):
            assert_same(images, paint_alone(pipe, request))

    def test_what_does_not_fit_has_a_call_of_its_own(self, start, samples):
        painter = start(max_batch_size=4, max_wait_seconds=0.5)
        requests = [
            ask(samples[0]),
            ask(samples[1], num_inference_steps=1),
            ask(samples[2], guidance_scale=1.0),
            ask(samples[3], width=96),
            ask(samples[4], count=2),
            ask(samples[5], use_designer=False),
            ask(samples[5]),
        ]
        for request in requests:
            painter.submit(request)
        sizes = [request.done.result(60).images[0].size for request in requests]
        assert batches_of(painter) == (6, 8)
        assert sizes[3] == (96, 64)

    def test_a_call_is_no_larger_than_allowed(self, start, samples):
        painter = start(max_batch_size=2, max_wait_seconds=0.2)
        requests = [ask(samples[row], row) for row in range(5)]
        for request in requests:
            painter.submit(request)
        for request in requests:
            request.done.result(60)
        assert batches_of(painter) == (3, 5)

    def test_one_that_fails_does_not_spoil_the_others(self, pipe, start, samples):
        class Choosy:
            def design(self, images, instructions):
                if any("nonsense" in instruction for instruction in instructions):
                    raise ValueError("I cannot do nonsense.")
                return [None] * len(instructions)

        pipe.designer = Choosy()
        painter = start(max_batch_size=3, max_wait_seconds=30.0)
        pipe.designer = None
        requests = [ask(samples[0]), ask(samples[1], prompt="nonsense"), ask(samples[2])]
        for request in requests:
            painter.submit(request)
        for request in (requests[0], requests[2]):
            assert len(request.done.result(60).images) == 1
        with pytest.raises(ValueError, match="cannot do nonsense"):
            requests[1].done.result(60)

    def test_refuses_what_finds_no_room_and_says_when_to_come_again(self, start, samples, holding):
        painter = start(max_batch_size=1, max_queue=2)
        painter.submit(ask(samples[0], prompt="hold"))
        assert holding.entered.wait(60)
        waiting = [ask(sample) for sample in samples[1:3]]
        for request in waiting:
            painter.submit(request)
        with pytest.raises(Overloaded, match="again in 3 s") as caught:
            painter.submit(ask(samples[3]))
        assert caught.value.retry_after == 3  # three calls of a second, as long as none was measured
        holding.released.set()
        assert all(request.done.result(60).images for request in waiting)

    def test_refuses_sources_that_are_too_large_together(self, start, samples, holding):
        painter = start(max_batch_size=1, max_queue_pixels=64 * 64)
        painter.submit(ask(samples[0], prompt="hold"))
        assert holding.entered.wait(60)
        painter.submit(ask(samples[1]))
        with pytest.raises(Overloaded):
            painter.submit(ask(samples[2]))

    def test_does_not_paint_what_was_taken_back(self, start, samples, holding):
        painter = start(max_batch_size=1)
        painter.submit(ask(samples[0], prompt="hold"))
        assert holding.entered.wait(60)
        unwanted, wanted = ask(samples[1]), ask(samples[2])
        painter.submit(unwanted)
        painter.submit(wanted)
        painter.abandon(unwanted)
        holding.released.set()
        wanted.done.result(60)
        assert not unwanted.begun.done()
        assert batches_of(painter) == (2, 2)

    def test_breaks_a_call_off_that_nobody_wants(self, pipe, start, samples):
        painter = start(max_batch_size=1)
        unwanted = ask(samples[0], num_inference_steps=1000, num_previews=3)
        reached = threading.Event()
        unwanted.on_preview = lambda index, image: reached.set()
        painter.submit(unwanted)
        unwanted.begun.result(60)
        painter.abandon(unwanted)
        with pytest.raises(Stopped):
            unwanted.done.result(60)
        assert not reached.is_set()
        assert batches_of(painter) == (0, 0)

    def test_goes_on_with_a_call_of_which_one_is_wanted(self, start, samples, holding):
        painter = start(max_batch_size=2, max_wait_seconds=30.0)
        unwanted, wanted = ask(samples[0], prompt="hold"), ask(samples[1])
        painter.submit(unwanted)
        painter.submit(wanted)
        assert holding.entered.wait(60)
        painter.abandon(unwanted)
        holding.released.set()
        assert len(wanted.done.result(60).images) == 1

    def test_shows_unfinished_pictures_that_near_the_finished_one(self, start, samples):
        shown = []
        request = ask(samples[0], num_inference_steps=6, num_previews=2)
        request.on_preview = lambda index, image: shown.append((index, image))
        painter = start(max_wait_seconds=0.0)
        painter.submit(request)
        finished = np.asarray(request.done.result(60).images[0], np.float32)
        assert [index for index, _ in shown] == [0, 1]
        noise = np.asarray(Image.effect_noise((64, 64), 80).convert("RGB"), np.float32)
        far, near = (np.abs(np.asarray(image, np.float32) - finished).mean() for _, image in shown)
        assert near < far < np.abs(noise - finished).mean() / 2

    @pytest.mark.parametrize(
        ("steps", "previews", "after"), [(30, 3, [7, 14, 21]), (4, 3, [0, 1, 2]), (1, 3, []), (2, 3, [0]), (9, 0, [])]
    )
    def test_spreads_previews_over_the_steps(self, samples, steps, previews, after):
        assert ask(samples[0], num_inference_steps=steps, num_previews=previews).preview_steps == after

    def test_finishes_what_is_there_when_it_is_closed(self, start, samples):
        painter = start(max_batch_size=4, max_wait_seconds=30.0)
        request = ask(samples[0])
        painter.submit(request)
        begin = time.monotonic()
        painter.close()
        assert request.done.result(60).images
        assert time.monotonic() - begin < 30
        with pytest.raises(Stopped):
            painter.submit(ask(samples[1]))

    def test_an_error_that_nobody_foresaw_ends_all_that_wait(self, pipe, samples, monkeypatch):
        class Surprise(Exception):
            pass

        def design(images, instructions):
            raise Surprise

        pipe.designer = type("Broken", (), {"design": staticmethod(design)})()
        painter = Painter(pipe, max_batch_size=1)
        pipe.designer = None
        monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
        requests = [ask(samples[0]), ask(samples[1])]
        painter.start()
        for request in requests:
            try:
                painter.submit(request)
            except Stopped:
                continue
            with pytest.raises(Stopped):
                request.done.result(60)
        painter.join(60)
        assert not painter.is_alive
