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
"""The server's script: its options, and Ray Serve with two replicas."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import EXAMPLES, load_script

from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.designers import SelfDesigner
from diffusers_dim.designers.replay import ReplayDesigner
from diffusers_dim.tiny import sample_edits


pytest.importorskip("fastapi")
START_SECONDS = 600


@pytest.fixture(scope="module")
def script():
    return load_script("serve")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--port", "70000"], "--port has to lie in"),
            (["--num_replicas", "0"], "--num_replicas has to be at least 1"),
            (["--max_batch_size", "0"], "`max_batch_size` has to be at least 1, but is 0"),
            (["--designer", "openai"], "--designer openai: needs --designer_model"),
            (["--designer", "replay"], "--designer replay: needs --blueprints"),
            (["--designer", "none", "--designer_model", "m"], "--designer none: takes none of --model"),
            (["--designer", "replay", "--blueprints", "b", "--designer_model", "m"], "--model: is nothing for"),
        ],
    )
    def test_that_make_no_sense_are_refused(self, script, capsys, options, words):
        with pytest.raises(SystemExit):
            script.parse_args(options)
        assert words in capsys.readouterr().err

    def test_are_the_apps_settings(self, script, monkeypatch):
        monkeypatch.setenv("DIM_API_KEY", "secret")
        args = script.parse_args(["--max_queue", "3", "--body_seconds", "1.5", "--fetch_urls"])
        assert (args.settings.max_queue, args.settings.body_seconds, args.settings.fetch_urls) == (3, 1.5, True)
        assert (args.settings.model_name, args.settings.api_key, args.host) == ("TINY_SHAPES", "secret", "127.0.0.1")
        assert args.model == TINY_SHAPES

    def test_name_a_folder_by_its_last_part(self, script):
        assert script.parse_args(["--model", TINY_SHAPES]).settings.model_name == "shapes"

    def test_put_a_designer_in(self, script, edits):
        options = ["--designer", "replay", "--blueprints", str(edits), "--device", "cpu"]
        app = script.build_app(script.parse_args(options))
        designer = app.state.server.painter.pipe.designer
        assert isinstance(designer, ReplayDesigner)
        assert designer.on_failure == "instruction"

    def test_let_the_model_design(self, script):
        app = script.build_app(script.parse_args(["--designer", "self", "--on_failure", "error", "--device", "cpu"]))
        designer = app.state.server.painter.pipe.designer
        assert isinstance(designer, SelfDesigner)
        assert designer.on_failure == "error"


@pytest.fixture(scope="class")
def ray_server(tmp_path_factory):
    """Two replicas: their address and the process that holds them."""
    pytest.importorskip("ray.serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num_replicas", "2", "--num_cpus_per_replica", "0.5", "--num_inference_steps", "2"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    log_path = tmp_path_factory.mktemp("ray") / "log.txt"
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(EXAMPLES / "serve.py"), "--port", str(port), *options],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            end = time.monotonic() + START_SECONDS
            while "2 replicas of TINY_SHAPES" not in log_path.read_text():
                assert process.poll() is None and time.monotonic() < end, log_path.read_text()[-2000:]
                time.sleep(0.2)
            yield port, process
        finally:
            process.kill()
            process.wait()


class TestRayServe:
    def ask(self, port, row, sample):
        openai = pytest.importorskip("openai")
        data = io.BytesIO()
        sample.source.save(data, "PNG")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused")
        answer = client.images.edit(
            image=("source.png", data.getvalue()), prompt=sample.instruction, extra_body={"seed": row}
        )
        return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))

    def test_both_replicas_paint_the_pipelines_own_pictures(self, ray_server):
        port, _ = ray_server
        samples, painted = sample_edits(4, seed=0), {}
        with ThreadPoolExecutor(8) as clients:
            for _ in range(20):
                images = list(clients.map(lambda row: self.ask(port, row, samples[row]), range(len(samples))))
                for _ in range(10):
                    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
                    born, count = (
                        float(re.search(rf"^{name} (.*)$", text, re.MULTILINE)[1])
                        for name in ("process_start_time_seconds", "dim_pictures_total")
                    )
                    painted[born] = count
                if len(painted) == 2 and min(painted.values()):
                    break
        assert len(painted) == 2 and min(painted.values())
        pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
        pipe.set_progress_bar_config(disable=True)
        for row, (sample, image) in enumerate(zip(samples, images, strict=True)):
            generator = torch.Generator("cpu").manual_seed(row)
            (expected,) = pipe(sample.source, sample.instruction, num_inference_steps=2, generator=generator).images
            assert np.abs(np.asarray(image, np.int16) - np.asarray(expected, np.int16)).max() <= 1

    def test_ends_with_exit_code_0_at_sigterm(self, ray_server):
        _, process = ray_server
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
