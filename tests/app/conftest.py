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
"""The app as a user starts it, and browsers that visit it."""

import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image


sys.path.append(str(Path(__file__).parents[1] / "designers"))  # the chat server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
APP = Path(__file__).parents[2] / "examples" / "app.py"
# Generous: a machine may have more to do.
SECONDS = 60


class App:
    """A running app, and the chat completions server that it may ask."""

    def __init__(self, process, url, chat, folder):
        self.process, self.url, self.chat, self.folder = process, url, chat, folder

    def log(self):
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    from chat_server import serve

    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serve() as chat, open(folder / "log", "w") as log:
        options = [
            "--port",
            port,
            "--designer",
            "openai",
            "--designer_model",
            "writer",
            "--per_minute",
            12,
            "--max_steps",
            2000,
        ]
        options += ["--designer_base_url", chat.url]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "a-secret"}
        process = subprocess.Popen(
            [sys.executable, str(APP), *map(str, options)],
            cwd=folder,
            env=os.environ | environment | {"TMPDIR": str(folder)},
            stdout=log,
            stderr=log,
        )
        app = App(process, f"http://127.0.0.1:{port}", chat, folder)
        deadline = time.monotonic() + 2 * SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(app.url, timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        assert process.poll() is None, app.log()
        yield app
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0
    assert "a-secret" not in app.log()
    assert not list(folder.glob("diffusers-dim-app-*"))  # what people uploaded is gone


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser):
    """What pages have in common that are opened one after the other: the app's scripts are loaded once."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


class Visitor:
    """A person at the app."""

    def __init__(self, context, app):
        self.app, self.foreign, self.errors = app, [], []
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * SECONDS)
        self.page.on("request", self._look)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(app.url)
        self.page.wait_for_selector("#edit")
        self.page.wait_for_selector("#source img")

    def _look(self, request):
        if not request.url.startswith((self.app.url, "data:", "blob:")):
            self.foreign.append(request.url)

    def close(self):
        self.page.close()
        assert not self.foreign and not self.errors, (self.foreign, self.errors)

    def choose_designer(self, name):
        self.page.locator("#designer label", has_text=name).click()

    def choose_steps(self, steps):
        page = self.page
        if not page.get_by_label("Seed").is_visible():
            page.locator("#settings button").first.click()
        page.get_by_label("number input for Steps").fill(str(steps))
        page.get_by_label("number input for Steps").press("Tab")

    def upload(self, path):
        page = self.page
        before = page.locator("#source img").get_attribute("src")
        page.get_by_label("Remove Image").click()
        page.locator("#source input[type=file]").set_input_files(path)
        page.wait_for_function(
            "before => { const image = document.querySelector('#source img');"
            " return image && image.src && image.src != before; }",
            arg=before,
        )

    def say(self, instruction):
        self.page.locator("#instruction textarea").fill(instruction)

    @property
    def blueprint(self):
        return self.page.locator("#blueprint textarea").input_value()

    @property
    def note(self):
        return self.page.locator("#note .said").inner_text()

    def wait_for_note(self, words):
        self.page.wait_for_function(
            "words => document.querySelector('#note .said').innerText.includes(words)", arg=words
        )

    def wait_until_free(self):
        """Until the buttons can be pressed again."""
        self.page.wait_for_function("() => !document.querySelector('#edit').disabled")

    def press(self, name):
        """A button, and the wait for all that follows; gives the picture that is shown then."""
        self.page.click(f"#{name}")
        self.page.wait_for_function("() => document.querySelector('#edit').disabled")
        self.wait_until_free()
        self.page.wait_for_selector("#result a[data-testid=download-link]")
        return self.picture("#result a[data-testid=download-link]", "href")

    def picture(self, selector, attribute="src"):
        address = self.page.locator(selector).get_attribute(attribute)
        return Image.open(io.BytesIO(urllib.request.urlopen(address).read())).convert("RGB")

    def toast(self):
        """The words of the newest message, which is then closed."""
        toast = self.page.locator(".toast-body").first
        toast.wait_for()
        words = toast.inner_text()
        toast.locator(".toast-close").click()
        return words


@pytest.fixture
def visit(browser, context, app):
    """Opens the app for a person; `apart` with a browser of their own, and options of it."""
    visitors, contexts = [], []

    def visit(apart=False, **options):
        used = context
        if apart:
            used = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
            contexts.append(used)
        visitors.append(Visitor(used, app))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        visitor.close()
    for used in contexts:
        used.close()
