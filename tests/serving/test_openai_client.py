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
"""The official client against a server, unchanged."""

import base64
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from server_runs import MODEL, load_embedded, png, serve_app

from diffusers_dim import DIMPipeline


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")


def connect(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", **{"max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(running):
    return connect(running)


@pytest.fixture(scope="module")
def text_server(t2i_folder):
    """A server of a text-to-image model, and another pipeline of the same."""
    served, other = (DIMPipeline.from_pretrained(t2i_folder) for _ in range(2))
    for pipe in (served, other):
        pipe.set_progress_bar_config(disable=True)
    with serve_app(served) as server:
        yield server, other


def read(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture.b64_json)))


def largest_difference(image, other):
    return np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(other, np.int16)).max()


def edit(client, sample, **options):
    return client.images.edit(image=("source.png", png(sample.source)), prompt=sample.instruction, **options)


class TestEdit:
    def test_gives_the_pipelines_own_picture(self, client, pipe, samples):
        answer = edit(client, samples[0], model=MODEL, extra_body={"seed": 5, "num_inference_steps": 3})
        image = read(answer.data[0])
        (expected,) = pipe(
            samples[0].source,
            samples[0].instruction,
            num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(5),
        ).images
        assert (image.format, answer.size, answer.data[0].seed) == ("PNG", "64x64", 5)
        assert largest_difference(image, expected) <= 1
        assert answer.data[0].revised_prompt is None

    def test_paints_from_a_given_blueprint_with_given_guidance(self, client, pipe, samples):
        extra = {"seed": 1, "blueprint": samples[0].blueprint, "guidance_scale": 1.5, "designer": "none"}
        answer = edit(client, samples[0], extra_body=extra)
        (expected,) = pipe(
            samples[0].source,
            samples[0].instruction,
            blueprint=samples[0].blueprint,
            guidance_scale=1.5,
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(1),
        ).images
        assert largest_difference(read(answer.data[0]), expected) <= 1

    def test_gives_several_pictures_of_a_size_and_format(self, client, samples):
        answer = edit(client, samples[0], n=2, size="96x64", output_format="webp", output_compression=90)
        images = [read(picture) for picture in answer.data]
        assert [(image.format, image.size) for image in images] == [("WEBP", (96, 64))] * 2
        assert answer.data[1].seed == answer.data[0].seed + 1
        assert images[0].tobytes() != images[1].tobytes()

    def test_compresses_as_asked(self, client, samples):
        sizes = [
            len(edit(client, samples[0], output_format="jpeg", output_compression=share).data[0].b64_json)
            for share in (95, 10)
        ]
        assert sizes[0] > 1.3 * sizes[1]

    def test_takes_a_list_of_one_picture_and_fields_without_effect(self, client, samples):
        answer = client.images.edit(
            image=[("source.webp", png(samples[0].source))],
            prompt=samples[0].instruction,
            background="opaque",
            quality="auto",
            response_format="b64_json",
            user="somebody",
        )
        assert len(answer.data) == 1

    def test_takes_its_size_from_the_source(self, client, samples):
        wide = samples[0].source.resize((128, 64))
        answer = client.images.edit(image=("wide.png", png(wide)), prompt="x", extra_body={"num_inference_steps": 1})
        width, height = read(answer.data[0]).size
        assert width > 1.5 * height

    def test_many_at_once_share_calls_and_get_each_their_own(self, running, client, pipe, samples):
        calls = running.count("dim_batch_pictures_count")
        answers = {}

        def ask(row):
            extra = {"seed": row, "num_inference_steps": 3}
            answers[row] = read(edit(client, samples[row], extra_body=extra).data[0])

        threads = [threading.Thread(target=ask, args=(row,)) for row in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert running.count("dim_batch_pictures_count") - calls < 6
        for row, image in answers.items():
            (expected,) = pipe(
                samples[row].source,
                samples[row].instruction,
                num_inference_steps=3,
                generator=torch.Generator("cpu").manual_seed(row),
            ).images
            assert largest_difference(image, expected) <= 1


class TestStream:
    def test_shows_unfinished_pictures_and_ends_with_the_finished_one(self, client, samples):
        extra = {"seed": 5, "num_inference_steps": 5}
        events = list(edit(client, samples[0], stream=True, partial_images=2, extra_body=extra))
        assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert {(event.size, event.output_format, event.background) for event in events} == {
            ("64x64", "png", "opaque")
        }
        whole = read(edit(client, samples[0], extra_body=extra).data[0])
        assert largest_difference(read(events[-1]), whole) <= 1

    def test_without_previews_is_one_event(self, client, samples):
        assert [event.type for event in edit(client, samples[0], stream=True)] == ["image_edit.completed"]

    def test_of_text_to_image_has_its_own_events(self, text_server):
        events = list(connect(text_server[0]).images.generate(prompt="A table.", stream=True))
        assert [event.type for event in events] == ["image_generation.completed"]

    def test_says_in_an_event_what_went_wrong_later(self, pipe, samples, holding):
        with serve_app(pipe, paint_seconds=0.2) as server:
            image = ("source.png", png(samples[0].source))
            with pytest.raises(openai.APIError, match="Painting took longer than 0.2 s"):
                list(connect(server).images.edit(image=image, prompt="hold", stream=True))
            holding.released.set()


class TestGenerate:
    def test_gives_the_pipelines_own_picture(self, text_server):
        server, pipe = text_server
        answer = connect(server).images.generate(
            prompt="A table.", model=MODEL, size="64x64", extra_body={"seed": 5, "num_inference_steps": 3}
        )
        (expected,) = pipe(
            "A table.",
            height=64,
            width=64,
            num_inference_steps=3,
            generator=torch.Generator("cpu").manual_seed(5),
        ).images
        assert largest_difference(read(answer.data[0]), expected) <= 1

    def test_an_edit_server_says_that_it_edits(self, client):
        with pytest.raises(openai.BadRequestError, match="use /v1/images/edits"):
            client.images.generate(prompt="A table.", model=MODEL)

    def test_a_text_server_says_that_it_does_not_edit(self, text_server, samples):
        with pytest.raises(openai.BadRequestError, match="use /v1/images/generations"):
            edit(connect(text_server[0]), samples[0])

    @pytest.mark.parametrize("body", ["{", "[]", '"text"', "[" * 100_000, '{"prompt": "x", "n": 1e999}'])
    def test_refuses_what_is_no_json_object(self, text_server, body):
        client = connect(text_server[0])
        with pytest.raises(openai.BadRequestError):
            client.post(
                "/images/generations",
                cast_to=object,
                content=body.encode(),
                options={"headers": {"Content-Type": "application/json"}},
            )

    def test_has_no_blueprint(self, text_server):
        with pytest.raises(openai.BadRequestError, match="`blueprint` is no field"):
            connect(text_server[0]).images.generate(prompt="A table.", extra_body={"blueprint": "1. ..."})


class TestModels:
    def test_names_the_one_that_is_here(self, client):
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "diffusers-dim"

    def test_knows_no_other(self, client, samples):
        with pytest.raises(openai.NotFoundError, match=MODEL):
            client.models.retrieve("gpt-image-1")
        with pytest.raises(openai.NotFoundError, match=f"'gpt-image-1' is not here: there is '{MODEL}'"):
            edit(client, samples[0], model="gpt-image-1")


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "param", "words"),
        [
            ({"mask": ("mask.png", b"1")}, "mask", "edits are by words alone"),
            ({"response_format": "url"}, "response_format", "b64_json"),
            ({"background": "transparent"}, "background", "opaque or auto"),
            ({"quality": "high"}, "quality", "num_inference_steps"),
            ({"input_fidelity": "high"}, "input_fidelity", "not supported"),
            ({"output_format": "gif"}, "output_format", "png, jpeg, webp"),
            ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "from 0 to 100"),
            ({"output_compression": 50}, "output_compression", "jpeg and webp"),
            ({"n": 5}, "n", "from 1 to 4"),
            ({"n": 2, "stream": True}, "n", "1 with `stream`"),
            ({"partial_images": 1}, "partial_images", "goes with `stream`"),
            ({"partial_images": 4, "stream": True}, "partial_images", "from 0 to 3"),
            ({"size": "1024x1024"}, "size", "8,192 pixels"),
            ({"size": "65x64"}, "size", "multiples of 8"),
            ({"size": "0x64"}, "size", "multiples of 8"),
            ({"size": "big"}, "size", "WIDTHxHEIGHT"),
            ({"extra_body": {"seed": "-1"}}, "seed", "from 0"),
            ({"extra_body": {"seed": "1.5"}}, "seed", "whole number"),
            ({"extra_body": {"num_inference_steps": "101"}}, "num_inference_steps", "from 1 to 100"),
            ({"extra_body": {"guidance_scale": "nan"}}, "guidance_scale", "a number from 0.0 to 30.0"),
            ({"extra_body": {"designer": "gpt"}}, "designer", "default, none"),
            ({"extra_body": {"blueprint": " "}}, "blueprint", "holds no text"),
            ({"extra_body": {"steps": "3"}}, "steps", "no field that is known here: there are model, prompt"),
            ({"extra_body": {"image_url": "http://example.com/a.png"}}, "image", "either `image` or `image_url`"),
            ({"prompt": "a\0b"}, "prompt", "control character U+0000"),
            ({"prompt": "x" * 8001}, "prompt", "at most 8,000"),
            ({"prompt": ""}, "prompt", "holds no text"),
            ({"image": [("a.png", b"1"), ("b.png", b"2")]}, "image", "2 were sent"),
            ({"image": ("a.png", b"")}, "image", "empty"),
        ],
    )
    def test_name_the_field_and_say_what_is_allowed(self, client, samples, options, param, words):
        asked = {"image": ("source.png", png(samples[0].source)), "prompt": "x", **options}
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**asked)
        assert caught.value.param == param
        assert words in caught.value.message
        assert caught.value.type == "invalid_request_error"

    @pytest.mark.parametrize(
        ("data", "status"),
        [(b"GIF89a...", 415), (png(Image.new("RGB", (600, 600))), 413), (png(Image.new("RGB", (64, 64)))[:60], 422)],
    )
    def test_of_pictures_have_their_own_status(self, client, data, status):
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(image=("cat.png", data), prompt="x")
        assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, "image", "invalid_image")

    def test_a_prompt_comes_back_as_text_in_json(self, running, client, samples):
        with pytest.raises(openai.BadRequestError) as caught:
            edit(client, samples[0], extra_body={"<script>alert(1)</script>": "1"})
        assert caught.value.response.headers["content-type"] == "application/json"
        assert "<script>" in json.loads(caught.value.response.text)["error"]["message"]

    def test_a_designer_that_fails_is_named(self, samples):
        from diffusers_dim.designers import DesignError

        class Failing:
            def design(self, images, instructions):
                raise DesignError("No parts.")

        pipe = load_embedded()
        pipe.designer = Failing()
        with serve_app(pipe) as server:
            with pytest.raises(openai.APIStatusError, match="designer wrote no blueprint") as caught:
                edit(connect(server), samples[0])
            assert caught.value.status_code == 502
            assert edit(connect(server), samples[0], extra_body={"designer": "none"}).data

    def test_a_designers_words_are_the_revised_prompt(self, pipe, samples):
        class Wordy:
            def design(self, images, instructions):
                return [f"{instruction} Keep all else." for instruction in instructions]

        pipe.designer = Wordy()
        with serve_app(pipe) as server:
            answer = edit(connect(server), samples[0])
        pipe.designer = None
        assert answer.data[0].revised_prompt == f"{samples[0].instruction} Keep all else."


class TestRetries:
    def test_the_client_comes_again_when_there_is_room(self, pipe, samples, holding):
        with serve_app(pipe, max_batch_size=1, max_queue=1) as server:
            answers = []

            def ask(prompt, **options):
                image = ("source.png", png(samples[0].source))
                answers.append(connect(server, **options).images.edit(image=image, prompt=prompt))

            threads = [threading.Thread(target=ask, args=("hold",))]
            threads[0].start()
            assert holding.entered.wait(60)
            threads.append(threading.Thread(target=ask, args=("second",)))
            threads[1].start()
            server.wait_for("dim_queue_pictures")
            with pytest.raises(openai.RateLimitError) as caught:
                edit(connect(server), samples[0])
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.code == "rate_limit_exceeded"
            threads.append(threading.Thread(target=ask, args=("third",), kwargs={"max_retries": 5}))
            threads[2].start()
            server.wait_for("dim_rejected_total", 2, reason="rate_limit_exceeded")
            holding.released.set()
            for thread in threads:
                thread.join(60)
            assert len(answers) == 3
