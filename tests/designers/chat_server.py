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
"""A small chat-completions server with faults to order. It designs at once, and the same for the same instruction."""

import json
import re
import ssl
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffusers_dim.designers.blueprint import Blueprint


REFUSAL = "I'm sorry, I can't help with that."


def blueprint_for(instruction: str) -> Blueprint:
    """What the server designs."""
    return Blueprint(
        f"Do this: {instruction}.",
        "A red square is on the left, a blue disc on the right.",
        "The square is flat and red; the disc is flat and blue.",
        "The square on the left changes.",
        f"After the edit ({instruction}) the picture is as asked for, all else as before.",
    )


@dataclass
class Reply:
    """
    What the server does in place of an answer.

    Args:
        status (`int`): Of HTTP. With 200 the rest tells how the answer differs from a good one.
        error (`dict`): The `error` of the body; with status 200 it comes in the middle of the stream.
        headers (`dict`): Further headers.
        delta (`dict`, *optional*): In place of the answer's text, such as `{"refusal": "No."}`.
        finish_reason (`str`): Why the answer ends.
        fault (`str`): "drop" closes the connection without a word, "cut" in the middle of the answer, "end" ends the
            answer there as if it were whole, "drip" goes on for ever with comments, "json" breaks the JSON, "odd"
            sends events of no known form before the answer, "open" says that it is done and leaves the stream open,
            "leave" closes the connection after it without having said so.
    """

    status: int = 200
    error: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    delta: dict[str, str] | None = None
    finish_reason: str = "stop"
    fault: str = ""


class ChatServer(ThreadingHTTPServer):
    """
    Attributes:
        replies (`dict[str, list[Reply]]`): By instruction, "" for any: what its next requests get, in order.
        requests (`list[dict]`): The requests so far: "body", "headers", "path", "instruction" and "time".
        answered (`Counter`): How many good answers each instruction got.
        most_at_once (`int`): How many requests were under way together, at most.
        allowed_at_once (`int`): How many may be; HTTP 429 for those above.
        connections (`int`): How many were opened.
        seconds (`float`): How long an answer takes.
        seconds_a_part (`float`): How long each part of a stream takes, besides.
        usage (`bool`): Whether it counts tokens for those who ask for it.
        models (`list[str]`): Which it has; other names give HTTP 404. Empty: any.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: dict[str, list[Reply]] = {}
        self.requests: list[dict[str, Any]] = []
        self.answered: Counter[str] = Counter()
        self.most_at_once = self.at_once = self.connections = 0
        self.allowed_at_once = 10_000
        self.seconds = self.seconds_a_part = 0.0
        self.usage = True
        self.models: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    @property
    def url(self) -> str:
        return f"http://{self.host}/v1"

    def handle_error(self, request, client_address):
        # Clients that hang up are part of the tests, also such as do not trust it.
        if not isinstance(sys.exception(), (ConnectionError, ssl.SSLError)):
            super().handle_error(request, client_address)


@contextmanager
def serve(server: ChatServer | None = None) -> Iterator[ChatServer]:
    """A server that answers; a plain one by default."""
    server = server or ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: ChatServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in self.server.models]
        self._json(200, {"object": "list", "data": models})

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # the client hung up
            return
        body = json.loads(data)
        first = body["messages"][0]["content"]
        text = first if isinstance(first, str) else first[-1]["text"]
        found = re.search(r"^(?:Instruction|Prompt): (.*)$", text, re.MULTILINE)
        instruction = found[1] if found else text
        server = self.server
        with server.lock:
            server.requests.append(
                {
                    "body": body,
                    "headers": self.headers,
                    "path": self.path,
                    "instruction": instruction,
                    "time": time.monotonic(),
                }
            )
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            waiting = server.replies.get(instruction) or server.replies.get("") or [Reply()]
            crowded = server.at_once > server.allowed_at_once
            reply = Reply(429, {"message": "Too many."}) if crowded else waiting.pop(0)
        try:
            whole = self._answer(body, instruction, reply)
        finally:
            with server.lock:
                server.at_once -= 1
        # Not before this request is counted as done: its client may send the next at once.
        if whole:
            self._chunk("data: [DONE]\n\n")
            if reply.fault == "open":
                server.closing.wait(10)
            self._chunk("")
            self.close_connection = reply.fault == "leave"

    def _answer(self, body: dict[str, Any], instruction: str, reply: Reply) -> bool:
        """Sends an answer, and tells whether its stream is still to be ended."""
        server = self.server
        if server.models and body["model"] not in server.models:
            error = {"message": f"The model `{body['model']}` does not exist", "code": "model_not_found"}
            return self._json(404, {"error": error})
        if reply.status != 200:
            return self._json(reply.status, {"error": reply.error}, reply.headers)
        if reply.fault == "drop":
            self.close_connection = True
            return False
        time.sleep(server.seconds)
        delta = {"content": str(blueprint_for(instruction))} if reply.delta is None else reply.delta
        count = sum(len(text.split()) for text in delta.values())
        usage = {"prompt_tokens": 7, "completion_tokens": count, "total_tokens": 7 + count} if server.usage else None
        if not body.get("stream"):
            message = {"role": "assistant", "content": None, **delta}
            choice = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
            return self._json(200, {**self._frame(body, "chat.completion"), "choices": [choice], "usage": usage})

        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        frame = self._frame(body, "chat.completion.chunk")
        if reply.fault == "odd":
            odd = {"choices": [{"delta": {"content": ["A"], "reasoning": 1}}], "usage": {"completion_tokens": "many"}}
            for event in (None, [], {}, {"choices": [None], "usage": 3}, {"choices": {}}, {"error": None}, odd):
                self._event(event)
        deltas = [{"role": "assistant", "content": ""}]
        for name, text in delta.items():
            deltas += [{name: text[start : start + 100]} for start in range(0, len(text), 100)]
        for place, part in enumerate(deltas):
            time.sleep(server.seconds_a_part)
            self._event({**frame, "choices": [{"index": 0, "delta": part, "finish_reason": None}]})
            if place == 1 and (reply.error or reply.fault not in ("", "odd", "open", "leave")):
                return self._spoil(reply)
        self._event({**frame, "choices": [{"index": 0, "delta": {}, "finish_reason": reply.finish_reason}]})
        if body.get("stream_options", {}).get("include_usage") and usage:
            self._event({**frame, "choices": [], "usage": usage})
        if reply.delta is None:
            with server.lock:
                server.answered[instruction] += 1
        return True

    def _spoil(self, reply: Reply) -> bool:
        if reply.error:
            self._event({"error": reply.error})
        elif reply.fault == "json":
            self._chunk('data: {"choices": [{"index": 0, "delta": {"conte\n\n')
        elif reply.fault == "drip":
            while not self.server.closing.wait(0.02):
                self._chunk(": still here\n\n")
        if reply.fault == "cut":
            self.close_connection = True
        else:
            self._chunk("")
        return False

    @staticmethod
    def _frame(body: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": body["model"]}

    def _event(self, event: Any) -> None:
        self._chunk(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):X}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, body: dict[str, Any], headers: dict[str, str] = {}) -> bool:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        return False
