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
"""The app as a process of its own: in a real browser, by its API, and what strangers may try at it."""

import asyncio
import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gradio as gr
import numpy as np
import pytest
from gradio import processing_utils
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import diffusers_dim
from diffusers_dim.app.guard import MAX_REQUEST_BYTES, close_downloads
from diffusers_dim.tiny import sample_edits
from diffusers_dim.tiny.designer import design_edit, read_scene


EVIL = "<img src=x onerror=\"document.title='hacked'\">"
RECOLORED = sample_edits(8, seed=4, kinds=("recolor",))[2]


def difference(first, second):
    """How much pixels of two pictures of one size differ, 0 to 255, as an array (height, width)."""
    one, other = (np.asarray(image.convert("RGB"), dtype=float) for image in (first, second))
    return np.abs(one - other).mean(axis=-1)


@pytest.fixture
def visitor(visit):
    visitor = visit()
    visitor.choose_designer("By rule")
    return visitor


@pytest.fixture
def recolored(tmp_path):
    path = tmp_path / "recolored.png"
    RECOLORED.source.save(path)
    return path


def test_the_first_click_makes_an_edit(visitor):
    visitor.press("edit")
    assert "30 steps, guidance 2.5, seed 1" in visitor.note
    assert "Edit Area Localization: The cyan triangle" in visitor.blueprint
    before, after = visitor.picture("#source img"), visitor.picture("#result a[data-testid=download-link]", "href")
    assert "purple triangle in the bottom right" in read_scene(after).caption()
    assert "cyan triangle in the bottom right" in read_scene(before).caption()
    assert visitor.page.locator("#history img").count() == 1


def test_an_uploaded_picture_is_edited_and_its_blueprint_changed_and_painted_again(visitor, recolored):
    visitor.upload(recolored)
    assert visitor.picture("#source img").tobytes() == RECOLORED.source.tobytes()
    visitor.say(RECOLORED.instruction)
    first = visitor.press("edit")
    assert visitor.blueprint == design_edit(RECOLORED.source, RECOLORED.instruction)
    assert difference(first, RECOLORED.target).mean() < difference(first, RECOLORED.source).mean()
    color = re.search(r"becomes (\w+);", visitor.blueprint)[1]
    other = "yellow" if color != "yellow" else "blue"
    visitor.page.locator("#blueprint textarea").fill(visitor.blueprint.replace(color, other))
    second = visitor.press("paint")
    assert difference(first, second).max() > 60
    assert other in visitor.blueprint  # what was written by hand stays

    # The history brings the first one back.
    assert visitor.page.locator("#history img").count() == 2
    visitor.page.locator("#history button.thumbnail-item").nth(1).click()
    visitor.page.wait_for_function(
        "words => document.querySelector('#blueprint textarea').value.includes(words)", arg=f"becomes {color}"
    )
    visitor.page.wait_for_timeout(300)
    shown = visitor.picture("#result a[data-testid=download-link]", "href")
    assert shown.tobytes() == first.tobytes()

    # And the result becomes the next picture.
    visitor.page.click("#reuse")
    visitor.page.wait_for_function("() => document.querySelector('#blueprint textarea').value == ''")
    assert visitor.picture("#source img").tobytes() == first.tobytes()


def test_a_blueprint_grows_while_it_is_written(visitor, app):
    visitor.choose_designer("writer")
    app.chat.seconds_a_part = 0.25
    try:
        visitor.page.click("#design")
        visitor.page.wait_for_function("() => document.querySelector('#blueprint textarea').value.length > 50")
        growing = visitor.blueprint
        visitor.wait_for_note("The blueprint is written")
    finally:
        app.chat.seconds_a_part = 0.0
    assert visitor.blueprint.startswith(growing) and len(visitor.blueprint) > len(growing)
    assert visitor.blueprint.startswith("1. Edit Instruction: Do this:")
    assert app.chat.requests[-1]["headers"]["Authorization"] == "Bearer a-secret"


def test_a_designer_that_fails_is_told_and_the_instruction_painted(visitor):
    visitor.say("Make it nicer.")
    visitor.page.click("#edit")
    assert "plain edits of its world only" in visitor.toast()
    visitor.wait_for_note("30 steps")
    assert visitor.blueprint == ""
    visitor.page.click("#design")
    assert "plain edits of its world only" in visitor.toast()


def test_a_bad_file_is_refused_in_words(visitor, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"I am no picture")
    visitor.upload(tmp_path / "cat.png")
    visitor.page.click("#edit")
    words = visitor.toast()
    assert "The file is no picture that can be read: send a PNG, JPEG or WebP." in words
    assert "Traceback" not in visitor.page.content()
    visitor.wait_until_free()


def test_no_picture_is_told(visitor):
    visitor.page.get_by_label("Remove Image").click()
    visitor.page.click("#paint")
    assert "There is no picture to edit" in visitor.toast()


def test_an_instruction_that_is_too_long_is_refused(visitor):
    visitor.page.evaluate("document.querySelector('#instruction textarea').removeAttribute('maxlength')")
    visitor.say("long " * 300)
    visitor.page.click("#edit")
    assert re.search(r"1,?\d{3}.* characters", visitor.toast())
    visitor.wait_until_free()


def test_a_painting_is_stopped_midway(visitor):
    visitor.choose_designer("Nobody")
    visitor.choose_steps(2000)
    visitor.page.click("#edit")
    visitor.page.wait_for_selector("#stage .previews img")
    visitor.page.click("#stop")
    visitor.wait_for_note("Stopped.")
    visitor.wait_until_free()
    assert visitor.page.locator("#history img").count() == 0
    visitor.choose_steps(2)
    visitor.press("edit")
    assert "2 steps" in visitor.note


def test_two_people_keep_to_themselves(visitor, visit):
    other = visit(apart=True)
    for person, steps in ((visitor, 2000), (other, 3)):
        person.choose_designer("Nobody")
        person.choose_steps(steps)
    other.say("Remove the red square.")
    visitor.page.click("#edit")
    visitor.page.wait_for_selector("#stage .previews img")
    other.page.click("#edit")  # waits for its turn
    other.page.wait_for_function("() => document.querySelector('#edit').disabled")
    visitor.page.click("#stop")
    visitor.wait_for_note("Stopped.")
    other.wait_for_note("3 steps")
    other.wait_until_free()
    assert other.page.locator("#history img").count() == 1
    assert visitor.page.locator("#history img").count() == 0
    assert "Please change the color" in visitor.page.locator("#instruction textarea").input_value()


def test_who_leaves_frees_the_painter(visitor, visit):
    leaver = visit()
    leaver.choose_designer("Nobody")
    leaver.choose_steps(2000)
    leaver.page.get_by_label("number input for Pictures at a time").fill("4")
    leaver.page.get_by_label("number input for Pictures at a time").press("Tab")
    leaver.page.click("#edit")
    leaver.page.wait_for_selector("#stage .previews img")
    leaver.page.goto("about:blank")
    visitor.page.bring_to_front()  # a page behind another one may be late to take what is filled in
    visitor.choose_steps(2)
    visitor.page.wait_for_timeout(500)
    visitor.press("edit")  # would else wait longer than it does
    assert "2 steps" in visitor.note


def test_words_and_names_are_never_html(visitor, tmp_path):
    path = tmp_path / "<img src=x onerror=document.title='hacked'>.png"
    RECOLORED.source.save(path)
    visitor.upload(path)
    visitor.choose_steps(1)
    visitor.say(EVIL)
    visitor.page.click("#edit")
    visitor.toast()  # the designer's words, which quote the instruction
    visitor.wait_until_free()
    visitor.page.locator("#blueprint textarea").fill(EVIL)
    visitor.press("paint")
    visitor.page.locator("#history button.thumbnail-item").first.click()
    visitor.page.wait_for_timeout(500)
    visitor.choose_designer("writer")
    visitor.page.click("#design")
    visitor.wait_for_note("The blueprint is written")
    assert EVIL in visitor.blueprint
    visitor.page.locator("#blueprint textarea").fill(f"\u0007{EVIL}")
    visitor.page.click("#paint")
    assert "control character" in visitor.toast()
    assert visitor.page.title() == "Draw-In-Mind"
    assert visitor.page.locator("img[src=x]").count() == 0


def test_a_sketch_becomes_the_picture(visitor):
    page = visitor.page
    page.get_by_role("tab", name="Sketch").click()
    canvas = page.locator("#sketchpad canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)  # the editor shows no sign of being ready
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 50, y)
    page.mouse.down()
    page.mouse.move(x + 50, y, steps=8)
    page.mouse.up()
    before = page.locator("#source img").get_attribute("src")
    page.get_by_role("button", name="Use this sketch").click()
    page.wait_for_function("before => document.querySelector('#source img')?.src != before", arg=before)
    page.locator("#source img").wait_for(state="visible")
    drawn = visitor.picture("#source img")
    assert drawn.size == (512, 512)
    assert len(drawn.getcolors(100_000)) > 1 and drawn.getpixel((5, 5)) == (255, 255, 255)


def test_nothing_is_wider_than_the_screen(visit):
    page = visit(apart=True, color_scheme="dark").page
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function("width => innerWidth == width", arg=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


SAMPLE = sample_edits(1, seed=1)[0]


@pytest.fixture
def client(app, tmp_path):
    client = Client(app.url, verbose=False, download_files=str(tmp_path), analytics_enabled=False)
    yield client
    client.close()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.png"
    SAMPLE.source.save(path)
    return path


@pytest.fixture
def trap():
    """A server on this machine that nobody should be sent to, and the paths that it was asked for."""
    asked = []

    class Trap(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def call(app, name, data):
    """A raw call of an endpoint: all that it says."""
    request = urllib.request.Request(
        f"{app.url}/gradio_api/call/{name}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    event = json.loads(urllib.request.urlopen(request).read())["event_id"]
    return urllib.request.urlopen(f"{app.url}/gradio_api/call/{name}/{event}").read().decode()


def status(address, method="GET", body=None, headers={}):
    try:
        answer = urllib.request.urlopen(urllib.request.Request(address, body, headers, method=method))
        return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_client_edits_by_the_documented_call(client, source):
    job = client.submit(
        image=handle_file(source),
        instruction=SAMPLE.instruction,
        designer="shapes",
        steps=4,
        seed=3,
        candidates=2,
        api_name="/edit",
    )
    pictures, blueprint, said = job.result(timeout=120)
    assert blueprint == design_edit(SAMPLE.source, SAMPLE.instruction)
    images = [Image.open(picture["image"]) for picture in pictures]
    assert [image.size for image in images] == [(64, 64), (64, 64)]
    facts = json.loads(images[1].text["parameters"])
    assert facts["seed"] == 4 and facts["prompt"] == SAMPLE.instruction and facts["blueprint"] == blueprint
    assert "4 steps" in said and "seed 3" in said

    again = client.predict(
        image=handle_file(source),
        instruction=SAMPLE.instruction,
        blueprint=blueprint,
        designer="none",
        steps=4,
        seed=4,
        api_name="/edit",
    )
    # The same seed, blueprint and steps: the same picture, but for rounding in a batch of another size.
    one, other = (
        list(image.convert("RGB").get_flattened_data()) for image in (images[1], Image.open(again[0][0]["image"]))
    )
    assert max(abs(a - b) for one_pixel, other_pixel in zip(one, other) for a, b in zip(one_pixel, other_pixel)) <= 2


def test_a_client_designs(client, source):
    blueprint = client.predict(
        image=handle_file(source), instruction=SAMPLE.instruction, designer="shapes", api_name="/design"
    )
    assert blueprint == design_edit(SAMPLE.source, SAMPLE.instruction)


def test_a_client_learns_in_words_what_is_wrong(client, source, tmp_path):
    (tmp_path / "broken.png").write_bytes(source.read_bytes()[:200])
    for wrong, words in (
        ({"image": handle_file(tmp_path / "broken.png")}, "The PNG picture cannot be read: it is broken"),
        ({"image": handle_file(source), "instruction": " "}, "`instruction` holds no text"),
        ({"image": handle_file(source), "steps": 100_000}, "greater than maximum value 2000"),
        ({"image": handle_file(source), "instruction": "Make it nicer."}, "plain edits of its world only"),
        ({"image": handle_file(source), "designer": "everybody"}, "not in the list of choices"),
    ):
        with pytest.raises(AppError, match=words):
            client.predict(**{"instruction": SAMPLE.instruction, "designer": "shapes", "api_name": "/edit"} | wrong)


def test_who_asks_too_often_is_told_to_wait(client, source, app):
    picture = handle_file(source)
    ask = {"image": picture, "instruction": SAMPLE.instruction, "designer": "none", "api_name": "/design"}
    for _ in range(12):
        client.predict(**ask)
    with pytest.raises(AppError, match=r"12 designs within a minute: try again in \d+ s"):
        client.predict(**ask)


def test_the_parts_of_the_page_are_no_endpoints(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/edit", "/design"}


@pytest.mark.parametrize(
    "named",
    ["/etc/passwd", "{folder}/log", "{trap}/picture.png", "file:///etc/passwd", "data:image/png;base64,aGVsbG8="],
)
@pytest.mark.parametrize("place", [0, 1])
def test_no_file_or_address_is_read_that_a_client_names(app, trap, named, place):
    trap, asked = trap
    named = named.format(folder=app.folder, trap=trap)
    for file in (
        {"path": named, "meta": {"_type": "gradio.FileData"}},
        {"path": named, "url": named, "meta": {"_type": "gradio.FileData"}},
        {"url": named, "meta": {"_type": "gradio.FileData"}},
        {"path": named},
        named,
    ):
        data = [None, "Remove all.", "none", "like the picture"]
        data[place] = file
        said = call(app, "design", data)
        assert "event: complete" not in said
        assert not any(secret in said for secret in ("root:", "Running on"))
    assert asked == []


def test_no_component_fetches_from_addresses(monkeypatch):
    monkeypatch.setattr(
        processing_utils, "async_ssrf_protected_download", processing_utils.async_ssrf_protected_download
    )
    close_downloads()
    for component in (gr.Image(), gr.Textbox()):
        fetching = component.async_move_resource_to_block_cache("https://huggingface.co/favicon.ico")
        with ThreadPoolExecutor() as other, pytest.raises(gr.Error, match="not fetched from addresses"):
            other.submit(asyncio.run, fetching).result()  # in this thread the browser's loop runs


@pytest.mark.parametrize(
    "route",
    [
        "file={trap}/x.png",
        "file=http%3A%2F%2F127.0.0.1/x.png",
        "file=//127.0.0.1/x.png",
        "proxy={trap}/x.png",
        "monitoring",
        "deep_link?session_hash=x",
        "vibe-code",
    ],
)
def test_routes_that_fetch_or_tell_are_closed(app, trap, route):
    trap, asked = trap
    assert status(f"{app.url}/gradio_api/{route.format(trap=trap)}")[0] == 404
    assert asked == []


@pytest.mark.parametrize("path", ["/etc/passwd", "{folder}/log", "../../../../etc/passwd", "{app}"])
def test_files_of_the_machine_are_not_sent(app, path):
    code, said = status(f"{app.url}/gradio_api/file={path.format(folder=app.folder, app=diffusers_dim.__file__)}")
    assert code in (403, 404) and "root:" not in said and "Gradio" not in said


def test_requests_that_are_too_long_are_refused_while_they_are_read(app):
    address = f"{app.url}/gradio_api/call/edit"
    headers = {"Content-Type": "application/json"}
    code, words = status(address, "POST", b" " * (MAX_REQUEST_BYTES + 1), headers)
    assert code == 413 and "at most 1,048,576 bytes" in words

    # Without a length in advance.
    connection = http.client.HTTPConnection(app.url.partition("//")[2], timeout=60)
    connection.putrequest("POST", "/gradio_api/call/edit")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    part = b" " * 65536
    for _ in range(64):
        connection.send(b"%X\r\n%s\r\n" % (len(part), part))
    connection.send(b"0\r\n\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def test_a_file_that_is_too_long_is_refused(app):
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + b"x" * (17 * 1024**2)
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    assert status(f"{app.url}/gradio_api/upload", "POST", body + b"\r\n--b--\r\n", headers)[0] == 413


def test_the_browser_is_told_to_load_nothing_from_elsewhere(app):
    headers = urllib.request.urlopen(app.url).headers
    assert headers["Content-Security-Policy"].startswith("default-src 'self'")
    assert headers["X-Content-Type-Options"] == "nosniff"
