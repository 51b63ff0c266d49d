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
"""The designer behind a chat-completions server, against a real local one."""

import base64
import copy
import gc
import io
import logging
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from chat_server import REFUSAL, Reply, blueprint_for, serve
from PIL import Image

from diffusers_dim.data.engine import Caption, DataEngine, EngineSample
from diffusers_dim.designers import openai as openai_designer
from diffusers_dim.designers.cache import BlueprintCache
from diffusers_dim.designers.designer import Conversation, DesignError
from diffusers_dim.designers.openai import OpenAIDesigner


openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

KEY = "sk-local-0123456789abcdef"
IMAGE = Image.new("RGB", (16, 12), "red")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(openai_designer, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with serve() as server:
        yield server


def make(server, **kwargs):
    return OpenAIDesigner("painter", base_url=server.url, **{"api_key": KEY, "timeout": 20.0, **kwargs})


def one(designer, instruction="Make it blue"):
    return designer.design([IMAGE], [instruction])[0]


def failure(designer, instruction="Make it blue"):
    """The result of a design that fails by itself."""
    (design,) = designer.design_each([IMAGE], [instruction])
    assert design.blueprint is None
    return design.error


def ask(designer, *turns):
    """The answers to conversations of one turn and no picture, in order."""
    answers = designer.write([Conversation((turn,)) for turn in turns], lambda index, text: None)
    return [draft for _, draft in sorted(answers)]


def prepared_after(wait):
    """A picture whose preparation takes as long as `wait()`."""
    picture = IMAGE.copy()

    def save(*args, **kwargs):
        wait()
        IMAGE.save(*args, **kwargs)

    picture.save = save
    return picture


# What is sent


def test_the_server_answers_the_official_client_without_streaming_too(server):
    client = openai.OpenAI(base_url=server.url, api_key=KEY)
    answer = client.chat.completions.create(model="painter", messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == blueprint_for("hello")


def test_blueprints_come_back_in_the_order_of_their_instructions(server):
    instructions = [f"Paint {i} stars" for i in range(20)]
    assert make(server).design([IMAGE] * 20, instructions) == [blueprint_for(text) for text in instructions]


def test_temperature_seed_and_limit_are_sent(server):
    one(make(server, max_new_tokens=77))
    body = server.requests[0]["body"]
    assert {name: body[name] for name in ("model", "temperature", "seed", "max_tokens", "stream")} == {
        "model": "painter",
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": 77,
        "stream": True,
    }
    assert server.requests[0]["path"] == "/v1/chat/completions"
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"


def test_no_temperature_and_no_seed_are_sent_if_none(server):
    one(make(server, temperature=None, seed=None))
    assert not {"temperature", "seed"} & set(server.requests[0]["body"])


@pytest.mark.parametrize(
    ("url", "limit"),
    [
        (None, "max_completion_tokens"),
        ("https://eu.api.openai.com/v1", "max_completion_tokens"),
        ("https://mine.openai.azure.com/openai/v1/", "max_completion_tokens"),
        ("https://notopenai.com/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_name_of_the_limit_fits_the_host(url, limit):
    designer = OpenAIDesigner("painter", base_url=url, api_key=KEY)
    request = designer._request(Conversation(("hello",)))
    assert {"max_tokens", "max_completion_tokens"} & set(request) == {limit}


def test_the_picture_comes_before_the_text(server):
    one(make(server))
    (message,) = server.requests[0]["body"]["messages"]
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert "Instruction: Make it blue" in message["content"][1]["text"]


def test_several_pictures_come_in_order_before_or_after_the_text(server):
    pictures = [Image.new("RGB", (width, 30)) for width in (20, 40)]
    for first in (False, True):
        asked = Conversation(("hello",), pictures[0], others=(pictures[1],), text_first=first)
        content = make(server)._request(asked)["messages"][0]["content"]
        assert content.pop(0 if first else 2) == {"type": "text", "text": "hello"}
        datas = [base64.b64decode(part["image_url"]["url"].split(",")[1]) for part in content]
        assert [Image.open(io.BytesIO(data)).width for data in datas] == [20, 40]


@pytest.mark.parametrize(
    ("size", "bound", "sent"),
    [((300, 100), 1200, (60, 20)), ((30, 40), 1200, (30, 40)), ((1000, 10), 100, (100, 1)), ((31, 57), 500, (16, 30))],
)
def test_the_picture_is_sent_at_a_bounded_size_with_its_aspect(server, size, bound, sent):
    make(server, max_image_pixels=bound).design([Image.new("RGB", size, (200, 30, 90))], ["Make it blue"])
    url = server.requests[0]["body"]["messages"][0]["content"][0]["image_url"]["url"]
    head, data = url.split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert head == "data:image/jpeg;base64"
    assert picture.size == sent
    assert all(abs(a - b) <= 2 for a, b in zip(picture.getpixel((0, 0)), (200, 30, 90)))


def test_a_prompt_without_a_picture_is_sent_as_plain_text(server):
    server.replies[""] = [Reply(delta={"content": "A red fox in deep snow."})]
    assert make(server).rewrite(["a fox"]) == ["A red fox in deep snow."]
    assert isinstance(server.requests[0]["body"]["messages"][0]["content"], str)


def test_a_repair_is_sent_as_alternating_turns_without_thoughts(server):
    server.replies[""] = [Reply(delta={"reasoning_content": "Hmm, a square.", "content": "Just paint it."})]
    assert one(make(server)) == blueprint_for("Make it blue")
    messages = server.requests[1]["body"]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[0] == server.requests[0]["body"]["messages"][0]
    assert messages[1]["content"] == "Just paint it."


def test_the_query_of_an_address_is_kept(server):
    OpenAIDesigner("painter", base_url=f"{server.url}/?api-version=preview").design([IMAGE], ["Make it blue"])
    assert server.requests[0]["path"] == "/v1/chat/completions?api-version=preview"


def test_another_server_needs_no_key(server):
    one(OpenAIDesigner("painter", base_url=server.url))
    assert server.requests[0]["headers"]["Authorization"] == "Bearer EMPTY"


def test_key_and_address_are_read_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    one(OpenAIDesigner("painter"))
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"


# How many at once


def test_no_more_requests_than_allowed_run_at_once(server):
    server.seconds = 0.05
    make(server, concurrency=5).design([IMAGE] * 20, [f"Paint {i} stars" for i in range(20)])
    assert server.most_at_once == 5


def test_a_caller_who_stops_cancels_what_has_not_begun(server):
    server.seconds = 0.05
    designs = make(server, concurrency=4).design_each([IMAGE] * 100, [f"Paint {i} stars" for i in range(100)])
    next(designs)
    designs.close()
    asked = len(server.requests)
    time.sleep(0.2)
    assert len(server.requests) == asked <= 12


def test_stopping_does_not_wait_for_answers_under_way(server):
    server.replies["slow"] = [Reply(fault="drip")]
    designs = make(server).design_each([IMAGE] * 2, ["slow", "fast"])
    assert next(designs).index == 1
    start = time.monotonic()
    designs.close()
    assert time.monotonic() - start < 2


def test_an_error_of_the_callback_ends_the_run(server):
    def stop(index, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(server).design([IMAGE] * 20, [f"Paint {i} stars" for i in range(20)], on_text=stop)


def test_the_host_is_looked_up_while_pictures_are_prepared(server):
    def until_asked():
        end = time.monotonic() + 10
        while not server.requests and time.monotonic() < end:
            time.sleep(0.01)

    # More than an event loop has threads. Prepared in them, they would be waited for before the first is sent.
    threads = min(32, (os.cpu_count() or 1) + 4) + 1
    conversations = [Conversation(("first",)), *[Conversation(("hello",), prepared_after(until_asked))] * threads]
    url = f"http://localhost:{server.server_port}/v1"
    designer = OpenAIDesigner("painter", base_url=url, concurrency=threads + 1, timeout=5.0, max_retries=0)
    answers = [draft.text for _, draft in designer.write(conversations, lambda index, text: None)]
    assert sorted(answers) == [blueprint_for("first"), *[blueprint_for("hello")] * threads]


def test_a_connection_is_used_again_within_a_call(server):
    ask(make(server, concurrency=1), "one", "two", "three")
    assert server.connections == 1


def test_a_connection_that_the_server_has_closed_costs_no_try(server, caplog):
    caplog.set_level(logging.INFO, logger="diffusers_dim")
    server.replies[""] = [Reply(fault="leave") for _ in range(3)]
    conversations = [Conversation(("hello",), prepared_after(lambda: time.sleep(0.1)))] * 3
    answers = list(make(server, concurrency=1).write(conversations, lambda index, text: None))
    assert len(answers) == server.connections == 3
    assert "failed" not in caplog.text


def test_a_server_that_leaves_the_stream_open_is_not_waited_for(server):
    server.replies[""] = [Reply(fault="open")]
    start = time.monotonic()
    one(make(server))
    assert time.monotonic() - start < 3


# From call to call


def test_tls_settings_are_made_once_for_calls_one_after_another(server, monkeypatch):
    made = []
    make_context = httpx2.create_ssl_context
    monkeypatch.setattr(httpx2, "create_ssl_context", lambda: made.append(make_context()) or made[-1])
    designer = make(server)
    for turn in "abc":
        ask(designer, turn)
    assert len(made) == 1


def test_many_threads_may_call_at_once(server):
    designer = make(server)
    server.seconds = 0.02
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda turn: ask(designer, turn)[0].text, [f"Paint {i} stars" for i in range(40)]))
    assert found == [blueprint_for(f"Paint {i} stars") for i in range(40)]
    assert 1 < server.most_at_once <= 8


def test_calls_that_overlap_share_connections(server):
    designer = make(server)
    server.replies["slow"] = [Reply(fault="drip")]
    slow = designer.write([Conversation(("slow",)), Conversation(("fast",))], lambda index, text: None)
    next(slow)
    for turn in "abcde":
        ask(designer, turn)
    assert server.connections == 2
    slow.close()
    ask(designer, "f")
    assert server.connections == 3


def test_a_call_that_fails_leaves_another_alone(server):
    designer = make(server)
    server.seconds = 0.2
    other = designer.write([Conversation((turn,)) for turn in "abc"], lambda index, text: None)
    first = next(other)

    def stop(index, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(designer.write([Conversation(("d",))], stop))
    assert len([first, *other]) == 3


def test_texts_that_need_escapes_arrive_as_they_are_beside_pictures(server):
    turn = 'Say "{mark}\\" in \u00e4\U0001f600\n'
    list(make(server).write([Conversation((turn,), IMAGE, others=(IMAGE,))], lambda index, text: None))
    body = server.requests[0]["body"]
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[2]["text"] == turn and content[0] == content[1]
    assert body["stream_options"] == {"include_usage": True}


def test_nothing_is_left_running_between_calls(server):
    before = threading.active_count()
    designs = make(server).design_each([IMAGE] * 20, ["Make it blue"] * 20)
    next(designs)
    designs.close()
    assert not any(thread.name == "OpenAIDesigner" for thread in threading.enumerate())
    assert threading.active_count() <= before + 10  # the server's


def test_requests_are_not_left_to_the_garbage_collector(server):
    # With two pictures of a megapixel each holds some 6 MB.
    designer = make(server)
    gc.collect()
    gc.disable()
    try:
        before = {id(item) for item in gc.get_objects() if type(item) is httpx2.Request}  # of other tests
        ask(designer, "one", "two", "three")
        assert not [item for item in gc.get_objects() if type(item) is httpx2.Request and id(item) not in before]
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda designer: pickle.loads(pickle.dumps(designer))])
def test_a_designer_that_was_used_can_be_copied(server, copied):
    designer = make(server)
    ask(designer, "hello")
    twin = copied(designer)
    assert ask(twin, "hello") == ask(designer, "hello")
    assert twin.settings == designer.settings


@pytest.mark.slow
def test_unfinished_calls_stop_neither_a_forked_process_nor_the_end(server):
    script = """
import os, sys
from diffusers_dim.designers.designer import Conversation
from diffusers_dim.designers.openai import OpenAIDesigner

def ask(*turns):
    return designer.write([Conversation((turn,)) for turn in turns], lambda index, text: None)

designer = OpenAIDesigner("painter", base_url=sys.argv[1])
asking = ask("slow", "fast")
next(asking)
if not (child := os.fork()):
    del asking
    print(len(list(ask("fast"))), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("end")
"""
    server.replies["slow"] = [Reply(fault="drip")]
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script, server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ("1\nend\n", "", 0)


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate")
    path = tmp_path / "certificate.pem"
    names = ["-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made = ["openssl", "req", "-x509", *curve, *names, "-keyout", str(path), "-out", str(tmp_path / "public.pem")]
    subprocess.run(made, check=True, capture_output=True)
    with open(path, "a") as file:
        file.write((tmp_path / "public.pem").read_text())
    return path


@pytest.fixture
def tls_server(certificate):
    with serve() as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        yield server


def test_tls_is_spoken_in_each_call(tls_server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    designer = OpenAIDesigner("painter", base_url=tls_server.url.replace("http", "https"), max_retries=0)
    assert ask(designer, "one") == ask(designer, "one")
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(lambda turn: ask(designer, turn), "abcdefghijklmnop"))) == 16


def test_an_unknown_certificate_is_refused(tls_server):
    designer = OpenAIDesigner("painter", base_url=tls_server.url.replace("http", "https"), max_retries=0)
    with pytest.raises(ConnectionError, match="certificate verify failed"):
        ask(designer, "hello")
    assert not tls_server.requests


def test_the_text_is_told_as_it_grows_one_call_at_a_time(server):
    told, inside = {}, []

    def on_text(index, text):
        inside.append(index)
        time.sleep(0.001)
        assert inside == [index]
        inside.pop()
        told.setdefault(index, []).append(text)

    blueprints = make(server, concurrency=8).design([IMAGE] * 8, [f"Paint {i} stars" for i in range(8)], on_text)
    for index, blueprint in enumerate(blueprints):
        assert len(told[index]) > 2
        assert all(b.startswith(a) for a, b in zip(told[index], told[index][1:]))
        assert told[index][-1] == blueprint


# What is answered


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_told_and_are_not_part_of_the_blueprint(server, name):
    told = []
    server.replies[""] = [Reply(delta={name: "A square, hm.", "content": blueprint_for("Make it blue")})]
    blueprint = make(server).design([IMAGE], ["Make it blue"], lambda index, text: told.append(text))[0]
    assert blueprint == blueprint_for("Make it blue")
    assert told[0] == "<think>A square, hm."
    assert told[-1] == f"<think>A square, hm.</think>\n{blueprint}"


def test_line_ends_of_unicode_within_a_text_do_not_break_it(server):
    text = "One\u2028two\x85three\x0cfour\u2029five"
    server.replies[""] = [Reply(delta={"content": text})]
    (draft,) = ask(make(server), "hello")
    assert draft.text == text
    assert len(server.requests) == 1


def test_events_of_no_known_form_are_passed_over(server):
    server.replies["hello"] = [Reply(fault="odd")]
    (draft,) = ask(make(server), "hello")
    assert (draft.text, draft.tokens) == (blueprint_for("hello"), len(blueprint_for("hello").split()))
    assert len(server.requests) == 1


def test_tokens_are_counted(server):
    (design,) = make(server).design_each([IMAGE], ["Make it blue"])
    assert design.tokens == len(blueprint_for("Make it blue").split())


def test_tokens_are_0_where_the_server_does_not_count(server):
    server.usage = False
    (design,) = make(server).design_each([IMAGE], ["Make it blue"])
    assert (design.blueprint, design.tokens) == (blueprint_for("Make it blue"), 0)


def test_tokens_are_not_asked_for_where_the_server_refuses_that(server):
    server.replies[""] = [Reply(422, {"message": "extra_forbidden: body.stream_options"})]
    designer = make(server)
    assert one(designer) == blueprint_for("Make it blue")
    assert "stream_options" not in server.requests[1]["body"]


def test_an_answer_that_is_cut_off_is_asked_for_once_more(server):
    server.replies[""] = [Reply(finish_reason="length")]
    (design,) = make(server).design_each([IMAGE], ["Make it blue"])
    assert design.repaired
    assert "cut off" in server.requests[1]["body"]["messages"][2]["content"]


@pytest.mark.parametrize("delta", [{"content": ""}, {"content": " \n"}, {"refusal": REFUSAL}])
def test_an_empty_answer_or_a_refusal_is_asked_for_once_more(server, delta):
    server.replies[""] = [Reply(delta=delta)]
    (design,) = make(server).design_each([IMAGE], ["Make it blue"])
    assert design.repaired
    assert design.blueprint == blueprint_for("Make it blue")
    assert server.requests[1]["body"]["messages"][1]["content"]


def test_a_second_refusal_is_an_error_with_the_model_s_words(server):
    server.replies[""] = [Reply(delta={"refusal": REFUSAL}) for _ in range(2)]
    error = failure(make(server))
    assert error.text == REFUSAL
    assert "'painter' refused" in str(error) and REFUSAL in str(error)
    assert len(server.requests) == 2


def test_a_refusal_is_never_taken_for_a_rewritten_prompt(server):
    server.replies[""] = [Reply(delta={"refusal": REFUSAL}) for _ in range(2)]
    with pytest.raises(DesignError, match="refused"):
        make(server).rewrite(["a fox"])


def test_a_second_empty_answer_is_an_error(server):
    server.replies[""] = [Reply(delta={"content": ""}) for _ in range(2)]
    assert "wrote nothing" in str(failure(make(server)))


def test_a_filtered_answer_is_an_error_with_what_came_before(server):
    server.replies[""] = [Reply(delta={"content": "1. Edit Instr"}, finish_reason="content_filter")]
    error = failure(make(server))
    assert "content filter" in str(error)
    assert error.text == "1. Edit Instr"
    assert len(server.requests) == 1


def test_a_failed_design_can_fall_back_to_the_instruction(server):
    server.replies["Make it blue"] = [Reply(400, {"message": "Invalid image."})]
    blueprints = make(server, on_failure="instruction").design([IMAGE] * 2, ["Make it blue", "Add a star"])
    assert blueprints == ["Make it blue", blueprint_for("Add a star")]


# Faults that pass


@pytest.mark.parametrize(
    "reply",
    [
        Reply(429, {"message": "Slow down."}, {"Retry-After": "0.02"}),
        Reply(429, {"message": "Slow down."}),
        Reply(408, {"message": "Too late."}),
        Reply(409, {"message": "Locked."}),
        Reply(500, {"message": "Oh no."}),
        Reply(503, {"message": "Loading."}),
        Reply(error={"message": "The engine died.", "type": "server_error"}),
        Reply(error={"message": "The engine died.", "code": 500}),
        Reply(fault="drop"),
        Reply(fault="cut"),
        Reply(fault="end"),
        Reply(fault="json"),
        Reply(fault="drip"),
    ],
    ids=lambda reply: reply.fault or f"{reply.status}{'-stream' if reply.status == 200 else ''}",
)
def test_a_fault_that_passes_is_asked_through(server, reply):
    server.replies["Make it blue"] = [reply]
    designer = make(server, timeout=2.0)
    designs = list(designer.design_each([IMAGE] * 2, ["Make it blue", "Add a star"]))
    assert {design.index: design.blueprint for design in designs} == {
        0: blueprint_for("Make it blue"),
        1: blueprint_for("Add a star"),
    }
    assert not any(design.repaired for design in designs)
    assert len(server.requests) == 3


@pytest.mark.parametrize("seconds", ["0.4", "date"])
def test_the_wait_that_a_server_asks_for_is_kept(server, seconds):
    if seconds == "date":
        # A date has no fractions of seconds: between 1 and 2 seconds from now.
        seconds = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 2))
    server.replies[""] = [Reply(429, {"message": "Slow down."}, {"Retry-After": seconds})]
    one(make(server))
    assert server.requests[1]["time"] - server.requests[0]["time"] > 0.39


def test_waits_grow_from_try_to_try(server, monkeypatch):
    monkeypatch.setattr(openai_designer, "BACKOFF_SECONDS", 0.05)
    server.replies[""] = [Reply(500, {"message": "Oh no."}) for _ in range(4)]
    one(make(server))
    times = [request["time"] for request in server.requests]
    assert all(b - a >= 0.025 * 2**i for i, (a, b) in enumerate(zip(times, times[1:])))


def test_a_server_that_wants_a_long_rest_is_not_asked_again(server):
    server.replies[""] = [Reply(429, {"message": "No more today."}, {"Retry-After": "7200"})]
    error = failure(make(server))
    assert "No more today. " in str(error) and "7200 seconds" in str(error)
    assert len(server.requests) == 1


def test_more_requests_than_a_server_allows_are_asked_at_its_pace(server):
    server.seconds, server.allowed_at_once = 0.02, 2
    instructions = [f"Paint {i} stars" for i in range(60)]
    blueprints = make(server, concurrency=20).design([IMAGE] * 60, instructions)
    assert blueprints == [blueprint_for(text) for text in instructions]


def test_a_server_that_allows_nothing_is_given_up(server):
    server.allowed_at_once = 0
    designs = list(make(server, max_retries=2).design_each([IMAGE] * 4, ["Make it blue"] * 4))
    assert all("HTTP 429" in str(design.error) and "asked 3 times" in str(design.error) for design in designs)


def test_a_server_that_stays_down_fails_its_design_alone(server):
    server.replies["Make it blue"] = [Reply(503, {"message": "Loading."}) for _ in range(3)]
    designs = make(server, max_retries=2).design_each([IMAGE] * 2, ["Make it blue", "Add a star"])
    found = {design.index: design for design in designs}
    assert "HTTP 503: Loading. " in str(found[0].error) and "asked 3 times" in str(found[0].error)
    assert found[1].blueprint == blueprint_for("Add a star")


def test_an_answer_that_never_ends_is_given_up_at_the_time_limit(server):
    server.replies[""] = [Reply(fault="drip")]
    start = time.monotonic()
    error = failure(make(server, timeout=0.3, max_retries=0))
    assert "within 0.3 seconds" in str(error)
    assert time.monotonic() - start < 3


# Faults that stay


@pytest.mark.parametrize(
    "reply",
    [
        Reply(400, {"message": "Invalid image."}),
        Reply(400, {"message": "This model's maximum context length is 4096 tokens."}),
        Reply(413, {"message": "Too large."}),
        Reply(422, {"message": "Unprocessable."}),
        Reply(error={"message": "The prompt is too long.", "code": 400}),
    ],
    ids=lambda reply: reply.error["message"],
)
def test_a_refused_request_fails_its_design_alone_and_is_not_repeated(server, reply):
    server.replies["Make it blue"] = [reply]
    found = {design.index: design for design in make(server).design_each([IMAGE] * 2, ["Make it blue", "Add a star"])}
    assert "HTTP 4" in str(found[0].error) and reply.error["message"] in str(found[0].error)
    assert "max_image_pixels" in str(found[0].error)
    assert found[1].blueprint == blueprint_for("Add a star")
    assert len(server.requests) == 2


def test_a_long_message_of_a_server_is_shortened(server):
    server.replies[""] = [Reply(400, {"message": "data:image/jpeg;base64," + "A" * 100_000})]
    assert len(str(failure(make(server)))) < 1000


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run_and_is_not_shown(server, status):
    server.replies[""] = [Reply(status, {"message": f"Incorrect API key provided: {KEY[:8]}****{KEY[-4:]}."})] * 100
    with pytest.raises(ValueError, match=f"does not accept the key.*HTTP {status}.*OPENAI_API_KEY") as raised:
        make(server, concurrency=2).design([IMAGE] * 50, ["Make it blue"] * 50)
    assert not isinstance(raised.value, DesignError)
    assert KEY[-4:] not in str(raised.value)
    assert len(server.requests) <= 4


def test_an_unknown_model_ends_the_run_with_the_models_there_are(server):
    server.models = ["gpt-5", "qwen"]
    with pytest.raises(ValueError, match="no model 'painter'.*It has: gpt-5, qwen"):
        one(make(server))


def test_a_wrong_path_names_the_address(server):
    server.replies[""] = [Reply(404, {"message": "Not Found"})]
    with pytest.raises(ValueError, match=rf"HTTP 404.*base_url.*{server.url}"):
        one(make(server))


@pytest.mark.parametrize("name", ["temperature", "seed"])
def test_a_model_that_refuses_temperature_or_seed_ends_the_run(server, name):
    error = {"message": f"Unsupported value: '{name}' does not support 0 with this model.", "param": name}
    server.replies[""] = [Reply(400, error)]
    with pytest.raises(ValueError, match=f"{name}=None"):
        one(make(server))


def test_an_account_without_credit_ends_the_run(server):
    server.replies[""] = [Reply(429, {"message": "You exceeded your quota.", "code": "insufficient_quota"})]
    with pytest.raises(ValueError, match="exceeded your quota"):
        one(make(server))
    assert len(server.requests) == 1


def test_a_host_that_is_not_there_ends_the_run():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    designer = OpenAIDesigner("painter", base_url=f"http://{host}/v1", max_retries=2)
    with pytest.raises(ConnectionError, match=f"{host} cannot be reached.*`base_url`"):
        designer.design([IMAGE] * 1000, ["Make it blue"] * 1000)


def test_openai_without_a_key_is_an_error_at_once():
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIDesigner("gpt-4o")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusers-dim\[openai\]'"):
        OpenAIDesigner("gpt-4o", api_key=KEY)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"model": ""}, "model"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_image_pixels": 0}, "max_image_pixels"),
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": f"http://host:{KEY}/v1"}, "base_url"),
        ({"api_key": f"{KEY}\n{KEY}"}, "api_key"),
        ({"api_key": f"{KEY}…"}, "api_key"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(kwargs, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        OpenAIDesigner(**{"model": "painter", "api_key": KEY, **kwargs})


# Secrets


def secrets_in(error):
    """All that a shown error says, its causes and hidden contexts too."""
    said = ["".join(traceback.format_exception(error))]
    while error is not None:
        said.append(f"{error!r}")
        error = error.__cause__ or error.__context__
    return "\n".join(said)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 418, 422, 429, 500])
def test_the_key_is_in_no_error_and_no_log(server, caplog, status):
    caplog.set_level(logging.DEBUG)
    # A server that sends back the header which it was sent.
    server.replies[""] = [Reply(status, {"message": f"Bad header: Bearer {KEY}", "code": KEY}) for _ in range(2)]
    with pytest.raises(ValueError, match="HTTP") as raised:
        one(make(server, max_retries=1))
    assert KEY not in secrets_in(raised.value)
    assert KEY not in caplog.text


def test_the_key_is_not_in_repr_settings_and_cache(server, tmp_path):
    designer = make(server, cache=BlueprintCache(tmp_path))
    one(designer)
    assert repr(designer) == f"OpenAIDesigner(model='painter', host='{server.host}')"
    assert KEY not in f"{designer.settings} {designer}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not any(KEY.encode() in path.read_bytes() or KEY in str(path) for path in files)


def test_password_and_query_of_an_address_are_not_shown(server, caplog):
    caplog.set_level(logging.DEBUG, logger="diffusers_dim")
    url = f"http://me:pass-word@{server.host}/v1?key=quer-y"
    designer = OpenAIDesigner("painter", base_url=url, max_retries=1)
    server.replies[""] = [Reply(500, {"message": "No: /v1/chat/completions?key=quer-y, me:pass-word"})] * 2
    shown = f"{failure(designer)} {designer} {designer.base_url} {designer.settings} {caplog.text}"
    assert designer.base_url == server.url
    assert not any(secret in shown for secret in ("pass-word", "quer-y"))
    login = base64.b64encode(b"me:pass-word").decode()
    assert server.requests[0]["headers"]["Authorization"] == f"Basic {login}"


# What is kept


def test_the_cache_knows_models_and_settings_apart(server):
    settings = [
        make(server, **kwargs).settings
        for kwargs in ({}, {"temperature": 1.0}, {"seed": 1}, {"max_new_tokens": 5}, {"max_image_pixels": 99})
    ]
    settings.append(OpenAIDesigner("other", base_url=server.url).settings)
    assert len({str(sorted(each.items())) for each in settings}) == len(settings)


def test_the_same_model_at_another_address_is_not_asked_for_what_the_cache_has(server, tmp_path):
    blueprint = one(make(server, cache=BlueprintCache(tmp_path)))
    with serve() as elsewhere:
        assert one(make(elsewhere, cache=BlueprintCache(tmp_path))) == blueprint
        assert not elsewhere.requests


def test_the_same_model_at_another_address_is_not_asked_for_what_the_data_engine_has(server, tmp_path):
    file = io.BytesIO()
    IMAGE.save(file, format="PNG")
    samples = [EngineSample(str(i), file.getvalue() + bytes(i)) for i in range(3)]

    def run(server, samples):
        return DataEngine([Caption({}, "judge")], make(server), tmp_path).run(samples, progress=False)

    server.replies[""] = [Reply(delta={"content": "Caption: A red square."}) for _ in range(4)]
    assert run(server, samples[:2]).kept == 2
    with serve() as elsewhere:
        elsewhere.replies[""] = server.replies[""]
        summary = run(elsewhere, samples)
        assert (summary.kept, summary.asked) == (3, 1)
        assert len(elsewhere.requests) == 1


# All together


@pytest.mark.slow
def test_a_thousand_designs_with_faults_in_one_of_ten_survive_an_interruption(server, tmp_path):
    faults = [
        Reply(429, {"message": "Slow down."}, {"Retry-After": "0.05"}),
        Reply(500, {"message": "Oh no."}),
        Reply(fault="cut"),
        Reply(fault="drip"),
        Reply(fault="json"),
        Reply(delta={"refusal": REFUSAL}),
        Reply(delta={"content": ""}),
    ]
    instructions = [f"Paint {i} stars" for i in range(1000)]
    server.seconds = 0.02
    server.replies = {instructions[i]: [faults[i // 10 % len(faults)]] for i in range(0, 1000, 10)}
    designer = make(server, concurrency=16, timeout=2.0, cache=BlueprintCache(tmp_path))

    first = []
    with pytest.raises(KeyboardInterrupt):
        for design in designer.design_each([IMAGE] * 1000, instructions):
            first.append(design)
            if len(first) == 400:
                raise KeyboardInterrupt
    # The base gives repairs after all others.
    assert not any(design.repaired for design in first)

    told = []
    second = list(designer.design_each([IMAGE] * 1000, instructions, lambda index, text: told.append(index)))
    assert sorted(design.index for design in second) == list(range(1000))
    assert all(design.blueprint == blueprint_for(instructions[design.index]) for design in second)
    assert {design.index for design in second if design.cached} == {design.index for design in first}
    assert not set(told) & {design.index for design in first}
    assert any(design.repaired for design in second)
    # A little more than 16, as the server takes some time to see that a client has given up.
    assert server.most_at_once >= 16
    # Only what was under way at the interruption is designed again.
    assert sum(count - 1 for count in server.answered.values()) <= 2 * 16
    assert designer.design([IMAGE] * 1000, instructions) == [blueprint_for(text) for text in instructions]
