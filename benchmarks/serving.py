"""What a server by `examples/serve.py` does under load, with the embedded model.

    python benchmarks/serving.py

"hostile" sends requests from many clients at once, of which a tenth are hostile: too long, bombs, broken, of wrong
types, too slow, or gone before their answer. Each good picture is compared with the pipeline's own. "batching" times
the same good requests before a server that paints them one by one and before one that paints them together. The server
is a process of its own; clients are OpenAI's. Results go to `benchmarks/results/serving.json`, and
`benchmarks/report.py` makes the table of `docs/serving.md` of them.
"""

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import run_presets
from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.tiny import sample_edits
from measure import Unmeasured, measure


EXAMPLE = Path(__file__).parents[1] / "examples" / "serve.py"
START_SECONDS = 300  # until a server is ready
BODY_SECONDS = 2.0  # that a body may take before the hostile run's server
TOLERANCE = 1  # levels of 256 by which a batch may round otherwise than one alone


@dataclass(frozen=True)
class ServingBench:
    """
    What is run.

    Args:
        requests (`int`): Of a round of the hostile run.
        rounds (`int`): Of it, after each of which the server's memory is looked at; the first is a warm-up.
        clients (`int`): That ask at once.
        hostile_every (`int`): Which of its requests are hostile: every tenth.
        hostile_steps (`int`): Denoising steps of the hostile run's good requests.
        edits (`int`): Different ones among them.
        batched (`int`): Requests of a run that is timed.
        steps (`int`): Their denoising steps.
        batch_size (`int`): Pictures a call, at most.
        runs (`int`): Of which the median is taken.
    """

    requests: int
    rounds: int
    clients: int
    hostile_every: int
    hostile_steps: int
    edits: int
    batched: int
    steps: int
    batch_size: int
    runs: int

    device = torch.device("cpu")


SERVING_PRESETS = {
    "full": ServingBench(200, 3, 16, 10, 2, 20, 32, 8, 8, 5),
    # For tests of the script: each kind of hostile request once.
    "small": ServingBench(40, 1, 8, 4, 1, 4, 4, 1, 4, 1),
}


class Server:
    """A server's process."""

    def __init__(self, port: int, process: subprocess.Popen):
        self.port, self.process = port, process

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def count(self, name: str, **labels: str) -> float:
        """The sum of a metric's values with these labels."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        found = re.findall(rf"^{name}(?:{{(.*)}})? (.*)$", self.get("/metrics"), re.MULTILINE)
        return sum(float(value) for given, value in found if wanted <= set(given.split(",")))

    @property
    def resident_bytes(self) -> int:
        """Its memory, where Linux tells it."""
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            raise Unmeasured("this system does not tell a process's memory as Linux does")
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024


@contextmanager
def serve(*options: object) -> Iterator[Server]:
    """
    A server at work, ended by SIGTERM.

    Raises:
        RuntimeError: If it does not come to work, or ends with an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLE), "--port", str(port), *map(str, options)]
    with tempfile.TemporaryFile("w+") as log:
        server = Server(port, subprocess.Popen(command, stdout=log, stderr=log))
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                try:
                    server.get("/ready")
                    break
                except (OSError, http.client.HTTPException):
                    if server.process.poll() is not None or time.monotonic() > end:
                        log.seek(0)
                        raise RuntimeError(f"The server did not start: {log.read()[-500:]}") from None
                    time.sleep(0.1)
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                code = server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()
                code = server.process.wait()
    if code:
        raise RuntimeError(f"The server ended with exit code {code}.")


# Hostile requests. Each gives the status and the words that came back, or "gone" if it left before.


def encode_form(parts: dict[str, bytes], file: bytes) -> tuple[bytes, str]:
    """A multipart body and its type."""
    boundary = "dim-boundary"
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in parts.items()
    )
    body += f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'.encode()
    return body + file + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def png_bomb(side: int = 30_000) -> bytes:
    """A PNG of a few hundred kilobytes whose pixels would take gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def send(port: int, body: bytes, content_type: str) -> tuple[str, str]:
    """The status and the words of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/v1/images/edits", body, {"Content-Type": content_type})
        return read_answer(connection.getresponse())
    finally:
        connection.close()


def read_answer(answer: http.client.HTTPResponse) -> tuple[str, str]:
    text = answer.read()
    return str(answer.status), json.loads(text)["error"]["message"] if answer.status >= 400 else ""


def send_file(file: bytes, port: int, source: bytes) -> tuple[str, str]:
    return send(port, *encode_form({"prompt": b"Make it blue."}, file))


def send_broken(port: int, source: bytes) -> tuple[str, str]:
    broken = bytearray(source)
    broken[len(broken) // 2] ^= 255
    return send_file(bytes(broken), port, source)


def send_cut(port: int, source: bytes) -> tuple[str, str]:
    return send_file(source[: len(source) // 2], port, source)


def send_json(port: int, source: bytes) -> tuple[str, str]:
    return send(port, json.dumps({"prompt": "x", "image": "/etc/passwd"}).encode(), "application/json")


def send_long_prompt(port: int, source: bytes) -> tuple[str, str]:
    return send(port, *encode_form({"prompt": b"x" * 100_000}, source))


def open_raw(port: int, body: bytes, content_type: str, sent: int) -> socket.socket:
    """A connection over which a request's first bytes have been sent."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=120)
    head = f"POST /v1/images/edits HTTP/1.1\r\nHost: here\r\nContent-Type: {content_type}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
    return connection


def send_slowly(port: int, source: bytes) -> tuple[str, str]:
    body, content_type = encode_form({"prompt": b"x"}, source)
    with open_raw(port, body, content_type, 100) as connection:
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return read_answer(answer)


def leave_early(port: int, source: bytes) -> tuple[str, str]:
    body, content_type = encode_form({"prompt": b"x"}, source)
    open_raw(port, body, content_type, 100).close()
    return "gone", ""


def leave_late(port: int, source: bytes) -> tuple[str, str]:
    body, content_type = encode_form({"prompt": b"x", "num_inference_steps": b"100"}, source)
    open_raw(port, body, content_type, len(body)).close()
    return "gone", ""


HOSTILE: dict[str, tuple[str, Callable[[int, bytes], tuple[str, str]]]] = {
    "request of 20 MB": ("413", partial(send_file, bytes(20_000_000))),
    "PNG bomb": ("413", partial(send_file, png_bomb())),
    "PNG with a wrong byte": ("422", send_broken),
    "PNG cut short": ("422", send_cut),
    "GIF": ("415", partial(send_file, b"GIF89a" + bytes(100))),
    "JSON with a path": ("415", send_json),
    "prompt of 100,000 characters": ("400", send_long_prompt),
    "slow body": ("408", send_slowly),
    "gone while sending": ("gone", leave_early),
    "gone while waiting": ("gone", leave_late),
}


@dataclass(frozen=True)
class GoodRequest:
    """An edit, and what the pipeline itself makes of it."""

    source: bytes
    instruction: str
    seed: int
    expected: Image.Image


def make_good(count: int, steps: int) -> list[GoodRequest]:
    """Edits of the picture world, painted here one by one."""
    pipe: Any = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    requests = []
    for seed, sample in enumerate(sample_edits(count, seed=0)):
        data = io.BytesIO()
        sample.source.save(data, "PNG")
        generator = torch.Generator("cpu").manual_seed(seed)
        made = pipe(sample.source, sample.instruction, num_inference_steps=steps, generator=generator)
        requests.append(GoodRequest(data.getvalue(), sample.instruction, seed, made.images[0]))
    return requests


def ask(client: Any, request: GoodRequest, steps: int) -> Image.Image:
    """What a server makes of an edit, asked for as any client of OpenAI's does."""
    answer = client.images.edit(
        image=("source.png", request.source),
        prompt=request.instruction,
        extra_body={"seed": request.seed, "num_inference_steps": steps},
    )
    return Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json)))


def is_right(image: Image.Image, expected: Image.Image) -> bool:
    """Whether a picture is the expected one up to rounding."""
    if image.size != expected.size:
        return False
    return np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(expected, np.int16)).max() <= TOLERANCE


def connect(server: Server) -> Any:
    try:
        import openai
    except ImportError as error:
        raise Unmeasured(f"openai cannot be imported: {error}") from error
    # As patient as it takes: a full queue is no failure.
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=100, timeout=300)


def run_hostile(server: Server, good: Sequence[GoodRequest], bench: ServingBench) -> dict[str, Any]:
    """
    One round.

    Returns:
        `dict`: Of the good, how many were `right` and `wrong`; of the hostile, by their kinds, how often the status
        came that has to (with words, or none for one that left) and what else came.
    """
    client = connect(server)
    kinds = list(HOSTILE)

    def run(number: int) -> tuple[str, str]:
        if number % bench.hostile_every:
            request = good[number % len(good)]
            return "", "right" if is_right(ask(client, request, bench.hostile_steps), request.expected) else "wrong"
        kind = kinds[number // bench.hostile_every % len(kinds)]
        status, words = HOSTILE[kind][1](server.port, good[0].source)
        return kind, status if bool(words) == (status != "gone") else f"{status} without words"

    with ThreadPoolExecutor(bench.clients) as clients:
        outcomes = Counter(clients.map(run, range(bench.requests)))
    hostile = {kind: {HOSTILE[kind][0]: 0} for kind in kinds}
    for (kind, outcome), count in outcomes.items():
        if kind:
            hostile[kind][outcome] = count
    return {
        "right": outcomes["", "right"],
        "wrong": outcomes["", "wrong"],
        "hostile": hostile,
        "hostile_as_expected": sum(
            count for (kind, got), count in outcomes.items() if kind and got == HOSTILE[kind][0]
        ),
        "hostile_otherwise": sum(count for (kind, got), count in outcomes.items() if kind and got != HOSTILE[kind][0]),
    }


def wait_until_idle(server: Server) -> None:
    """Until those that left are noticed, too."""
    end = time.monotonic() + 60
    # The request that asks is open itself.
    while server.count("dim_open_requests") > 1 or server.count("dim_queue_pictures"):
        if time.monotonic() > end:
            raise RuntimeError("The server is not done with its requests after a minute.")
        time.sleep(0.1)


def bench_hostile(bench: ServingBench) -> dict[str, Any]:
    """Rounds of good and hostile requests, and the server's memory after each."""
    good = make_good(bench.edits, bench.hostile_steps)
    rounds = []
    with serve("--body_seconds", BODY_SECONDS, "--max_batch_size", bench.batch_size) as server:
        idle = server.resident_bytes
        for _ in range(bench.rounds):
            start = time.monotonic()
            found = run_hostile(server, good, bench)
            seconds = time.monotonic() - start
            wait_until_idle(server)
            rounds.append({**found, "seconds": seconds, "resident_bytes": server.resident_bytes})
        route = {"route": "/v1/images/edits"}
        answered = {
            status: server.count("dim_requests_total", status=status, **route)
            for status in ("200", "400", "408", "413", "415", "422", "429", "499", "500", "503")
        }
        alive = json.loads(server.get("/health"))["status"]
    return {
        "resident_bytes_before": idle,
        "rounds": rounds,
        "answered_by_status": {status: int(count) for status, count in answered.items() if count},
        "health": alive,
    }


def bench_batching(bench: ServingBench) -> dict[str, Any]:
    """The same requests, painted one by one and together."""
    good = make_good(bench.batched, bench.steps)
    with ExitStack() as stack:
        servers = {
            size: stack.enter_context(serve("--max_batch_size", size, "--max_queue", 2 * bench.batched))
            for size in (1, bench.batch_size)
        }
        clients = {size: connect(server) for size, server in servers.items()}
        threads = stack.enter_context(ThreadPoolExecutor(bench.clients))

        def run(size: int, requests: Sequence[GoodRequest]) -> None:
            images = threads.map(lambda request: ask(clients[size], request, bench.steps), requests)
            if not all(is_right(image, request.expected) for image, request in zip(images, requests, strict=True)):
                raise RuntimeError("A picture is not the pipeline's own.")

        timings = measure(
            {str(size): partial(run, size, good) for size in servers},
            bench.runs,
            bench.device,
            {str(size): partial(run, size, good[: bench.clients]) for size in servers},
        )
        calls = {
            str(size): {name: server.count(f"dim_batch_pictures_{name}") for name in ("count", "sum")}
            for size, server in servers.items()
        }
    for size, timing in timings.items():
        if "median_seconds" in timing:
            timing["pictures_per_second"] = bench.batched / timing["median_seconds"]
            timing["pictures_per_call"] = calls[size]["sum"] / calls[size]["count"]
    medians = [timing["median_seconds"] for timing in timings.values() if "median_seconds" in timing]
    return {
        "max_batch_size": timings,
        "times_faster": medians[0] / medians[1] if len(medians) == 2 else None,
    }


SECTIONS: dict[str, Callable[[ServingBench], dict[str, Any]]] = {"hostile": bench_hostile, "batching": bench_batching}


def main() -> None:
    # The servers' threads, too: they are this process's children.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    run_presets("serving", __doc__, SECTIONS, SERVING_PRESETS)


if __name__ == "__main__":
    main()
