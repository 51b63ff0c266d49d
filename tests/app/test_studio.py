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
"""The app's parts without a browser: previews, limits, stops."""

import threading
import time

import pytest
import torch

from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.app.preview import LatentPreview
from diffusers_dim.app.studio import Limits, Painting, Progress, Rate, Settings, Studio, follow
from diffusers_dim.designers import DesignError, FunctionDesigner, SelfDesigner
from diffusers_dim.serving.intake import UploadError
from diffusers_dim.serving.painter import Stopped
from diffusers_dim.tiny import sample_edits
from diffusers_dim.tiny.designer import ShapesDesigner


SAMPLE = sample_edits(1, seed=1)[0]
QUICK = Settings(steps=4, guidance_scale=2.5, seed=3)


@pytest.fixture(scope="module")
def pipe():
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def studio(pipe):
    designers = {"shapes": ShapesDesigner(), "self": SelfDesigner(pipe, max_new_tokens=2), "none": None}
    return Studio(pipe, designers, preview_seconds=0.0)


def paint(studio, settings=QUICK, stop=None, blueprint=None):
    return list(studio.paint(SAMPLE.source, SAMPLE.instruction, settings, stop or threading.Event(), blueprint))


@torch.no_grad()
def test_a_preview_shows_the_picture_of_the_latents(pipe):
    latents = pipe.prepare_image_latents([SAMPLE.source], 64, 64, pipe.device)
    known = LatentPreview(SAMPLE.source, latents)
    for sample in sample_edits(3, seed=1):
        latents = pipe(sample.source, sample.blueprint, num_inference_steps=8, output_type="latent").images
        source_latents = pipe.prepare_image_latents([sample.source], 64, 64, pipe.device)
        (small,) = LatentPreview(sample.source, source_latents).draw(latents)
        assert small.size == (32, 32)
        seen, true = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).double()
            for image in (small, pipe.decode_latents(latents)[0].resize((32, 32), 4))
        )
        error = (seen - true).square().mean().sqrt()
        plain = (true - true.mean()).square().mean().sqrt()
        assert error < 0.6 * plain
    assert len(known.draw(torch.zeros(3, 16, 4, 6))) == 3


def test_a_painting_is_the_pipelines_own(studio, pipe):
    *progress, painting = paint(studio, Settings(4, 2.5, 3, candidates=2), blueprint=SAMPLE.blueprint)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    known = pipe(
        SAMPLE.source,
        SAMPLE.instruction,
        blueprint=SAMPLE.blueprint,
        num_inference_steps=4,
        num_images_per_prompt=2,
        generator=generators,
    ).images
    assert [image.tobytes() for image in painting.images] == [image.tobytes() for image in known]
    assert painting.seeds == [3, 4] and painting.blueprint == SAMPLE.blueprint and painting.steps == 4
    assert progress and all(isinstance(step, Progress) and len(step.previews) == 2 for step in progress)
    assert [step.step for step in progress] == sorted({step.step for step in progress})


def test_a_size_can_be_chosen(studio):
    size = next(name for name, size in studio.sizes.items() if size and size[0] < size[1])
    height, width = studio.sizes[size]
    painting = paint(studio, Settings(1, 1.0, 3, size=size))[-1]
    assert painting.images[0].size == painting.before.size == (width, height)


def test_no_seed_is_another_one_each_time(studio):
    assert paint(studio, Settings(1, 1.0))[-1].seeds != paint(studio, Settings(1, 1.0))[-1].seeds


def test_a_stop_ends_one_painting_and_no_other(studio):
    mine, others = threading.Event(), threading.Event()
    done = []
    thread = threading.Thread(target=lambda: done.extend(paint(studio, QUICK, others)))
    with pytest.raises(Stopped):
        for number, _ in enumerate(studio.paint(SAMPLE.source, "Remove all.", Settings(100, 2.5, 1), mine)):
            if number == 0:
                thread.start()
            mine.set()
    thread.join()
    assert isinstance(done[-1], Painting) and not others.is_set()


def test_a_stop_while_waiting_ends_the_wait(studio):
    stop = threading.Event()
    first = studio.paint(SAMPLE.source, "Remove all.", Settings(100, 2.5, 1), threading.Event())
    next(first)  # has the pipeline
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(Stopped):
        paint(studio, QUICK, stop)
    first.close()


def test_who_stops_listening_stops_the_painting(studio):
    stop = threading.Event()
    painting = studio.paint(SAMPLE.source, "Remove all.", Settings(100, 2.5, 1), stop)
    next(painting)
    painting.close()
    assert stop.is_set()
    assert isinstance(paint(studio)[-1], Painting)  # the pipeline is free


def test_a_blueprint_comes_as_it_is_written(pipe):
    shown = threading.Event()

    class Slow(FunctionDesigner):
        def write(self, conversations, on_text):
            for end in (20, 40):
                on_text(0, SAMPLE.blueprint[:end])
                assert shown.wait(10)
                shown.clear()
            yield from super().write(conversations, on_text)

    studio = Studio(pipe, {"slow": Slow(lambda image, text: SAMPLE.blueprint)})
    texts = []
    for text in studio.design(SAMPLE.source, SAMPLE.instruction, "slow", "like the picture", threading.Event()):
        texts.append(text)
        shown.set()
    assert texts[:2] == [SAMPLE.blueprint[:20], SAMPLE.blueprint[:40]] and texts[-1] == SAMPLE.blueprint


def test_a_design_can_be_stopped(studio):
    stop = threading.Event()
    stop.set()
    for designer in ("shapes", "self"):
        with pytest.raises(Stopped):
            list(studio.design(SAMPLE.source, SAMPLE.instruction, designer, "like the picture", stop))


def test_the_model_itself_can_be_asked(studio):
    # It is too small to write; that it was asked shows in its error.
    with pytest.raises(DesignError, match="cut off after 2 tokens"):
        list(studio.design(SAMPLE.source, SAMPLE.instruction, "self", "like the picture", threading.Event()))


def test_nobody_writes_no_blueprint(studio):
    assert list(studio.design(SAMPLE.source, "Remove all.", "none", "like the picture", threading.Event())) == [None]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(steps=101), "`steps` has to be from 1 to 100, but is 101"),
        (Settings(guidance_scale=float("nan")), "`guidance_scale` has to be from 1 to 20.0, but is nan"),
        (Settings(candidates=5), "`candidates` has to be from 1 to 4"),
        (Settings(seed=-1), "`seed` has to be from 0"),
        (Settings(size="9 x 9"), "`size` has to be one of like the picture, 64 x 64"),
    ],
)
def test_settings_beyond_the_limits_are_named(studio, settings, words):
    with pytest.raises(UploadError, match=words):
        studio.check(settings)


def test_texts_beyond_the_limits_are_named(pipe):
    studio = Studio(pipe, {}, Limits(characters=10, blueprint_characters=20))
    with pytest.raises(UploadError, match="`instruction` has 11 characters; at most 10"):
        studio.read_instruction("x" * 11)
    with pytest.raises(UploadError, match="`blueprint` has 21 characters; at most 20"):
        studio.read_blueprint("x" * 21)
    assert studio.read_blueprint(" ") is None


def test_a_rate_says_how_long_to_wait_and_knows_people_apart():
    now = 1000.0
    rate = Rate(2, clock=lambda: now)
    rate.check("a", "designs")
    now += 30
    rate.check("a", "designs")
    rate.check("b", "designs")
    with pytest.raises(UploadError, match="2 designs within a minute: try again in 31 s"):
        rate.check("a", "designs")
    now += 31
    rate.check("a", "designs")
    now += 1000
    rate.check("c", "designs")
    assert list(rate._begun) == ["c"]  # nothing is kept of those who left


def test_what_goes_wrong_in_the_work_is_raised_to_its_caller():
    def work(tell):
        tell(1)
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        list(follow(work, threading.Event()))


def test_of_what_was_told_meanwhile_only_the_last_is_given():
    told = threading.Event()

    def work(tell):
        for number in range(5):
            tell(number)
        told.set()
        time.sleep(0.01)
        return "end"

    items = follow(work, threading.Event())
    first = next(items)
    assert told.wait(10)
    rest = list(items)
    assert first in range(5) and rest[-1] == "end" and len(rest) <= 2
