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
"""Measures what judging a benchmark's edits takes beyond the judge's own time.

    python benchmarks/judging.py
    python benchmarks/judging.py --preset small

A judge's server in a process of its own takes as long for each answer as a real one. What is timed is `judge_cases`
over a miniature of ImgEdit with PNG files of the published size, and beside it a plain asyncio client, which reads the
same files, sends them and keeps nothing. Imports do not count: one case is judged before. Both are compared with the
judge's time: the number of cases by that of places, rounded up, times the seconds of an answer. The result goes to
`benchmarks/results/judging.json` (of another preset to `judging_PRESET.json`).
"""

import asyncio
import base64
import copy
import io
import json
import math
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import run_presets
from diffusers_dim import OpenAIDesigner
from diffusers_dim.evaluation.imgedit import ImgEdit
from diffusers_dim.evaluation.judging import judge_cases


ANSWER = "Brief reasoning: done as asked.\nPrompt Compliance: 4\nVisual Naturalness: 4\nPhysical Integrity: 5"


@dataclass(frozen=True)
class JudgingBench:
    """
    What is run.

    Args:
        cases (`int`): Edits to be judged; ImgEdit has 737.
        pictures (`int`): How many pairs of pictures they share; every case is asked about by its own words.
        size (`int`): Side of the pictures, in pixels.
        concurrency (`int`): Requests at once.
        answer_seconds (`float`): How long an answer takes.
        runs (`int`): Of which the median is taken.
    """

    cases: int
    pictures: int
    size: int
    concurrency: int
    answer_seconds: float
    runs: int

    device = torch.device("cpu")

    @property
    def judge_seconds(self) -> float:
        """The least that so many answers take at so many at once."""
        return math.ceil(self.cases / self.concurrency) * self.answer_seconds


JUDGING_PRESETS = {
    "full": JudgingBench(737, 32, 1024, 32, 2.5, 3),
    # For tests of the script.
    "small": JudgingBench(20, 3, 64, 8, 0.05, 2),
}


class JudgeProtocol(asyncio.Protocol):
    """One connection of an HTTP server that reads whole requests and answers each after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.missing = 0  # bytes of the body under way
        self.head = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        while data:
            if not self.missing:
                self.head += data
                head, end, data = self.head.partition(b"\r\n\r\n")
                if not end:
                    return
                self.head = b""
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                self.missing = int(lengths[0].split(b":")[1])
            taken = min(self.missing, len(data))
            self.missing, data = self.missing - taken, data[taken:]
            if not self.missing:
                asyncio.get_running_loop().call_later(self.seconds, self.answer)

    def answer(self) -> None:
        frame = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "judge"}
        choice = {"index": 0, "delta": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1500, "completion_tokens": 40, "total_tokens": 1540}
        events = [{**frame, "choices": [choice]}, {**frame, "choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: {len(text)}\r\n\r\n"
        if not self.transport.is_closing():
            self.transport.write((head + text).encode())


async def serve(seconds: float, listening: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: JudgeProtocol(seconds), sock=listening)
    await server.serve_forever()


@contextmanager
def judge_apart(seconds: float) -> Iterator[str]:
    """The address of such a server in a process of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        # Forked, since another process would first import all of this anew.
        target = multiprocessing.get_context("fork").Process
        process = target(target=lambda: asyncio.run(serve(seconds, listening)), daemon=True)
        process.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            process.terminate()
            process.join()


def write_data(bench: JudgingBench, folder: Path) -> tuple[ImgEdit, Path]:
    """A miniature of ImgEdit, and a folder with an edit of each case. Cases share pictures by links."""
    data, edits = folder / "data", folder / "edits"
    data.mkdir(parents=True)
    edits.mkdir()
    shared = folder / "shared"
    shared.mkdir()
    for number in range(bench.pictures):
        for name, data_ in zip(("source", "edit"), make_pair(number, bench.size)):
            (shared / f"{name}-{number}.png").write_bytes(data_)
    cases = {}
    for number in range(bench.cases):
        key, group = str(number), ImgEdit.groups[number % len(ImgEdit.groups)]
        cases[key] = {"id": f"{key}.png", "prompt": f"Paint square number {number}.", "edit_type": group}
        os.link(shared / f"source-{number % bench.pictures}.png", data / f"{key}.png")
        os.link(shared / f"edit-{number % bench.pictures}.png", edits / f"{key}.png")
    (data / "basic_edit.json").write_text(json.dumps(cases))
    prompt = "Rate the edit <edit_prompt> in three lines such as Prompt Compliance: 3. " + 30 * "Look closely. "
    (data / "prompts.json").write_text(json.dumps(dict.fromkeys(ImgEdit.groups, prompt)))
    return ImgEdit(data), edits


def make_pair(number: int, size: int) -> list[bytes]:
    """Clouds of colour with a photograph's grain, no two alike, and the same with a square painted in; PNG files."""
    generator = np.random.default_rng(number)
    clouds = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC), np.int16)
    source = np.clip(pixels + generator.integers(-4, 5, (size, size, 1)), 0, 255).astype(np.uint8)
    edit = source.copy()
    edit[size // 4 : size // 2, size // 4 : size // 2] = generator.integers(0, 256, 3)
    files = []
    for picture in (source, edit):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        files.append(file.getvalue())
    return files


async def ask_plainly(bench: JudgingBench, benchmark: ImgEdit, edits: Path, url: str) -> None:
    """The same requests from a connection a place, one after another, with nothing else done."""
    host, _, port = url.removeprefix("http://").partition("/")[0].partition(":")
    prompts = json.loads((benchmark.data / "prompts.json").read_text())
    waiting = iter(benchmark.cases)

    async def work() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for case in waiting:
            files = (case.image.read_bytes(), (edits / case.files[0]).read_bytes())
            urls = [f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in files]
            content: list[dict[str, Any]] = [{"type": "text", "text": prompts[case.group]}]
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            body = json.dumps({"model": "judge", "messages": [{"role": "user", "content": content}]}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode())
            writer.write(body)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(bench.concurrency):
            group.create_task(work())


def bench_judging(bench: JudgingBench) -> dict[str, Any]:
    """Overhead over the judge's time, of `judge_cases` and of the plain client, in turns."""
    with tempfile.TemporaryDirectory() as scratch, judge_apart(bench.answer_seconds) as url:
        benchmark, edits = write_data(bench, Path(scratch))

        def judge(run: int | str, count: int | None = None) -> None:
            some = copy.copy(benchmark)
            some.cases = benchmark.cases[:count]
            client = OpenAIDesigner("judge", base_url=url, concurrency=bench.concurrency)
            answers = judge_cases(some, edits, client, Path(scratch, f"judged-{run}"), progress=False)
            if any(answer.reason for answer in answers.values()):
                raise RuntimeError(f"not all were judged: {next(filter(None, (a.reason for a in answers.values())))}")

        variants: dict[str, Callable[[int], None]] = {
            "judge_cases": judge,
            "plain": lambda run: asyncio.run(ask_plainly(bench, benchmark, edits, url)),
        }
        judge("warm-up", 1)  # imports take a second or two, once
        measured: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu": []} for name in variants}
        for run in range(bench.runs):
            for name in sorted(variants, reverse=bool(run % 2)):
                start, used = time.perf_counter(), cpu_seconds()
                variants[name](run)
                measured[name]["seconds"].append(time.perf_counter() - start)
                measured[name]["cpu"].append(cpu_seconds() - used)
        sizes = [case.image.stat().st_size + (edits / case.files[0]).stat().st_size for case in benchmark.cases]
    results: dict[str, Any] = {"bytes_a_case": statistics.mean(sizes), "judge_seconds": bench.judge_seconds}
    for name, lists in measured.items():
        seconds = statistics.median(lists["seconds"])
        results[name] = {
            "seconds": lists["seconds"],
            "median_seconds": seconds,
            "overhead": seconds / bench.judge_seconds - 1,
            "processor_milliseconds_a_case": 1000 * statistics.median(lists["cpu"]) / bench.cases,
        }
    return results


def cpu_seconds() -> float:
    """What this process has used of processors."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


SECTIONS: dict[str, Callable[[JudgingBench], dict[str, Any]]] = {"judging": bench_judging}


def main() -> None:
    run_presets("judging", __doc__, SECTIONS, JUDGING_PRESETS)


if __name__ == "__main__":
    main()
