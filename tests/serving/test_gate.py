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
"""What stands before the app: bodies, keys, clients that leave, limits of time, and the end."""

import http.client
import json
import socket
import threading
import time
import uuid

import pytest
from server_runs import MODEL, png, serve_app


pytest.importorskip("fastapi")


def form(sample, prompt="x", **fields):
    """A multipart body and its type."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in {"prompt": prompt, **fields}.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode()
    body = b"".join(parts) + head + png(sample.source) + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


def ask(server, method="POST", path="/v1/images/edits", body=None, content_type=None, **headers):
    """Status, JSON or text, and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    if content_type:
        headers["Content-Type"] = content_type
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text, answer.headers


def edit(server, sample, prompt="x", **fields):
    return ask(server, body=(sent := form(sample, prompt, **fields))[0], content_type=sent[1])


def send_raw(server, data):
    """A connection over which so much of a request has been sent."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(data)
    return connection


def head(length, content_type="application/octet-stream"):
    return (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: here\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


class TestBodies:
    def test_one_that_says_it_is_too_long_is_of_status_413(self, running):
        limit = 16 * 1024**2 + 512 * 1024
        status, answer, _ = ask(running, body=bytes(limit + 1))
        assert status == 413
        assert f"at most {limit:,} bytes" in answer["error"]["message"]

    def test_one_that_grows_too_long_is_of_status_413(self, running):
        status, answer, _ = ask(running, body=(bytes(1024**2) for _ in range(20)))
        assert (status, answer["error"]["code"]) == (413, "request_too_large")

    def test_one_far_too_long_is_refused_before_it_is_sent(self, running):
        with send_raw(running, head(10**12)) as connection:
            assert connection.recv(4096).startswith(b"HTTP/1.1 413")

    def test_a_slow_one_is_of_status_408(self, pipe):
        with serve_app(pipe, body_seconds=0.3) as server:
            with send_raw(server, head(1000) + b"x") as connection:
                answer = connection.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"longer than 0.3 s to arrive" in answer

    def test_one_whose_client_leaves_is_forgotten(self, running):
        gone = running.count("dim_requests_total", route="/v1/images/edits", status="499")
        send_raw(running, head(1000) + b"x").close()
        running.wait_for("dim_requests_total", gone + 1, route="/v1/images/edits", status="499")

    def test_only_so_many_are_read_at_a_time(self, pipe, samples):
        with serve_app(pipe, max_uploads=1) as server:
            with send_raw(server, head(1000) + b"x"):
                end = time.monotonic() + 60
                while (refused := edit(server, samples[0]))[0] == 200:
                    assert time.monotonic() < end
        status, answer, headers = refused
        assert (status, answer["error"]["code"], headers["Retry-After"]) == (429, "too_many_uploads", "1")

    @pytest.mark.parametrize(
        ("content_type", "body", "status"),
        [
            ("application/json", b'{"prompt": "x"}', 415),
            ("", b"x", 415),
            ("multipart/form-data", b"x", 400),
            ("multipart/form-data; boundary=b", b"no boundary at all", 400),
            ("multipart/form-data; boundary=b", b"--b\r\nbroken header\r\n\r\nx\r\n--b--\r\n", 400),
            ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx', 400),
            ("multipart/form-data; boundary=b", b"--b--\r\n", 400),
            (
                "multipart/form-data; boundary=b",
                b"".join(b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n' for _ in range(80))
                + b"--b--\r\n",
                400,
            ),
        ],
    )
    def test_of_no_right_form_are_answered_in_words(self, running, content_type, body, status):
        found, answer, _ = ask(running, body=body, content_type=content_type)
        assert found == status
        assert answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"

    def test_a_text_in_the_place_of_the_file_is_no_path(self, running):
        body = b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\n/etc/hostname\r\n--b--\r\n'
        status, answer, _ = ask(running, body=body, content_type="multipart/form-data; boundary=b")
        assert (status, answer["error"]["message"]) == (400, "`image` has to be a file, not a text.")


class TestKeys:
    @pytest.fixture
    def guarded(self, pipe):
        with serve_app(pipe, api_key="right") as server:
            yield server

    @pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "right!", "Bearer rïght"])
    def test_nobody_else_comes_in(self, guarded, header):
        headers = {} if header is None else {"Authorization": header}
        status, answer, _ = ask(guarded, "GET", "/v1/models", **headers)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert "right" not in answer["error"]["message"]

    def test_the_right_one_does(self, guarded):
        assert ask(guarded, "GET", "/v1/models", Authorization="Bearer right")[0] == 200

    def test_health_asks_for_none(self, guarded):
        assert ask(guarded, "GET", "/health")[0] == 200

    def test_is_not_shown_with_the_settings(self):
        from diffusers_dim.serving.app import ServingSettings

        assert "secret" not in repr(ServingSettings(model_name=MODEL, api_key="secret"))


class TestOrigins:
    def test_pages_of_other_sites_are_refused(self, running):
        status, answer, headers = ask(running, "GET", "/v1/models", Origin="https://evil.example")
        assert (status, answer["error"]["code"]) == (403, "foreign_origin")
        assert "Access-Control-Allow-Origin" not in headers

    def test_its_own_are_not(self, running):
        assert ask(running, "GET", "/v1/models", Origin=running.url)[0] == 200


class TestTimeLimits:
    def test_who_waits_too_long_for_a_turn_is_told(self, pipe, samples, holding):
        with serve_app(pipe, max_batch_size=1, queue_seconds=0.3) as server:
            first = threading.Thread(target=edit, args=(server, samples[0], "hold"))
            first.start()
            assert holding.entered.wait(60)
            status, answer, headers = edit(server, samples[1])
            holding.released.set()
            first.join(60)
            assert (status, answer["error"]["code"]) == (503, "queue_timeout")
            assert int(headers["Retry-After"]) >= 1
            assert server.count("dim_pictures_total") == 1

    def test_who_is_painted_for_too_long_is_told(self, pipe, samples, holding):
        with serve_app(pipe, paint_seconds=0.3) as server:
            status, answer, _ = edit(server, samples[0], "hold")
            holding.released.set()
        assert (status, answer["error"]["code"]) == (503, "paint_timeout")

    def test_a_client_that_leaves_is_painted_nothing(self, pipe, samples, holding):
        with serve_app(pipe, max_batch_size=1) as server:
            first = threading.Thread(target=edit, args=(server, samples[0], "hold"))
            first.start()
            assert holding.entered.wait(60)
            body, content_type = form(samples[1])
            connection = send_raw(server, head(len(body), content_type) + body)
            server.wait_for("dim_queue_pictures")
            connection.close()
            server.wait_for("dim_abandoned_total", reason="client_gone")
            assert server.count("dim_queue_pictures") == 0
            holding.released.set()
            first.join(60)
            assert server.count("dim_pictures_total") == 1

    def test_a_client_that_leaves_a_stream_is_painted_nothing(self, pipe, samples, holding):
        with serve_app(pipe, max_batch_size=1) as server:
            body, content_type = form(samples[1], "hold", stream="true", num_inference_steps="100")
            connection = send_raw(server, head(len(body), content_type) + body)
            assert holding.entered.wait(60)
            connection.close()
            server.wait_for("dim_abandoned_total", reason="client_gone")
            holding.released.set()
        assert server.count("dim_pictures_total") == 0


class TestOffices:
    def test_health_and_readiness(self, running):
        assert ask(running, "GET", "/health")[:2] == (200, {"status": "ok"})
        assert ask(running, "GET", "/ready")[:2] == (200, {"status": "ready"})

    def test_metrics_are_prometheus_text(self, running, samples):
        from prometheus_client.parser import text_string_to_metric_families

        assert edit(running, samples[0])[0] == 200
        status, text, headers = ask(running, "GET", "/metrics")
        assert status == 200 and headers["Content-Type"].startswith("text/plain")
        found = {family.name: family for family in text_string_to_metric_families(text)}
        names = "requests rejected abandoned pictures queue_pictures batch_pictures waiting_seconds painting_seconds"
        assert {f"dim_{name}" for name in names.split()} <= set(found)
        assert {"route": "/v1/images/edits", "status": "200"} in [
            sample.labels for sample in found["dim_requests"].samples
        ]

    @pytest.mark.parametrize(
        ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/images/edits", 405)]
    )
    def test_other_addresses_are_answered_alike(self, running, method, path, status):
        found, answer, _ = ask(running, method, path)
        assert found == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}

    def test_the_count_has_no_routes_of_strangers(self, running):
        for _ in range(3):
            ask(running, "GET", f"/{uuid.uuid4()}")
        routes = {
            sample.labels["route"]
            for family in running.metrics.registry.collect()
            if family.name == "dim_requests"
            for sample in family.samples
        }
        assert routes <= {
            "other",
            *[f"/v1/{name}" for name in ("images/edits", "images/generations", "models")],
            "/health",
            "/ready",
            "/metrics",
        }

    def test_a_broken_painter_is_told(self, pipe):
        with serve_app(pipe) as server:
            server.app.state.server.painter.give_up()
            server.app.state.server.painter.join(60)
            assert ask(server, "GET", "/health")[0] == 503
            assert ask(server, "GET", "/ready")[:2] == (503, {"status": "broken"})


class TestEnd:
    def test_finishes_what_it_has_and_takes_no_more(self, pipe, samples, holding):
        answers = []
        with serve_app(pipe, max_batch_size=1, grace_seconds=60.0) as server:
            threads = []
            for prompt in ("hold", "second"):
                thread = threading.Thread(
                    target=lambda prompt=prompt: answers.append(edit(server, samples[0], prompt)[0])
                )
                thread.start()
                threads.append(thread)
                assert holding.entered.wait(60)
            server.wait_for("dim_queue_pictures")
            server.server.handle_exit(15, None)
            status, answer, headers = edit(server, samples[1])
            assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "shutting_down", "5")
            assert ask(server, "GET", "/ready")[:2] == (503, {"status": "draining"})
            holding.released.set()
            for thread in threads:
                thread.join(60)
        assert answers == [200, 200]

    def test_gives_up_after_the_grace_time(self, pipe, samples, holding):
        answers = []
        with serve_app(pipe, max_batch_size=1, grace_seconds=0.3) as server:
            threads = []
            for prompt in ("hold", "second"):
                thread = threading.Thread(
                    target=lambda prompt=prompt: answers.append(edit(server, samples[0], prompt)[:2])
                )
                thread.start()
                threads.append(thread)
                assert holding.entered.wait(60)
            server.wait_for("dim_queue_pictures")
            server.server.handle_exit(15, None)
            threads[1].join(60)
            holding.released.set()
            threads[0].join(60)
        assert [(status, answer["error"]["code"]) for status, answer in answers] == [(503, "shutting_down")] * 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"max_batch_size": 0}, "`max_batch_size` has to be at least 1, but is 0"),
        ({"body_seconds": 0.0}, "`body_seconds` has to be above 0"),
        ({"num_inference_steps": 101}, "at most `max_inference_steps`, 100, but is 101"),
        ({"api_key": " "}, "`api_key` holds no text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, words):
    from diffusers_dim.serving.app import ServingSettings

    with pytest.raises(ValueError, match=words):
        ServingSettings(model_name=MODEL, **wrong)
