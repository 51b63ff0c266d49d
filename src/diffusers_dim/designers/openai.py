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
"""The designer behind a chat-completions server: OpenAI, Azure OpenAI, vLLM, SGLang, llama.cpp, Ollama."""

import asyncio
import base64
import email.utils
import io
import json
import logging
import math
import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from PIL import Image

from ..files import PictureFile
from .designer import Conversation, Designer, DesignError, Draft, OnText


if TYPE_CHECKING:
    from ssl import SSLContext

    from httpx2 import Response
    from openai import APIError, AsyncOpenAI

T = TypeVar("T")

logger = logging.getLogger(__name__)

# The wait before a second try, in seconds; it doubles five times at most. A longer Retry-After counts instead.
BACKOFF_SECONDS = 0.5
# A server that asks for a longer wait is not asked again.
LONGEST_WAIT_SECONDS = 120.0
# The longest wait for a connection: the time limit of a whole answer is far too long to find out that a host is away.
CONNECT_SECONDS = 10.0
# How long to wait for the end of a stream that has said that it is done, so that its connection can be used again.
END_SECONDS = 0.1
# How many threads prepare pictures, at most: enough for hundreds a second.
ENCODERS = 8

# OpenAI's newer models know only `max_completion_tokens`, other servers often only `max_tokens`.
_NEW_LIMIT_HOSTS = (".openai.com", ".openai.azure.com")


def encode_data_url(image: Image.Image | PictureFile, max_pixels: int) -> str:
    """A file as it is in a data URL; an RGB picture as a JPEG, shrunk to that area if it is larger."""
    if isinstance(image, PictureFile):
        return f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    # A PNG of a photograph is more than twice as large, and takes over ten times as long to write.
    data = io.BytesIO()
    image.save(data, format="JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


@dataclass(frozen=True)
class _Prepared(Conversation):
    """A conversation with what is sent of it: JSON but for the last brace."""

    body: bytes = b""


class _CallersError(Exception):
    """What a caller's `on_text` raised. Not that itself, which the event loop might take for its own."""

    def __init__(self, error: BaseException):
        self.error = error


class _Session:
    """
    An event loop in a thread of its own, and in it a client and threads that prepare pictures, for calls that overlap.
    In a loop alone a time limit holds for a whole request, and those under way are cancelled at once.
    """

    def __init__(self, make_client: "Callable[[SSLContext], AsyncOpenAI]", tls_context: "SSLContext"):
        self.tls_context = tls_context
        self.client = make_client(tls_context)
        self.encoders = ThreadPoolExecutor(min(ENCODERS, os.cpu_count() or 1))
        self.users = 0
        self.loop = asyncio.new_event_loop()
        self._left = asyncio.Event()
        self.thread = threading.Thread(target=self._run, name="OpenAIDesigner", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._wait())

    async def _wait(self) -> None:
        async with self.client:
            await self._left.wait()

    def begin(self, work: Coroutine[Any, Any, None], put: Callable[[Any], Any]) -> Callable[[], Any]:
        """Has the loop do some work, with `put(task)` at its end. Returns what cancels it."""
        begun: list[asyncio.Task[None]] = []

        def begin() -> None:
            begun.append(self.loop.create_task(work))
            begun[0].add_done_callback(put)

        self.loop.call_soon_threadsafe(begin)
        return lambda: self.loop.call_soon_threadsafe(lambda: begun[0].cancel())

    def end(self) -> None:
        self.encoders.shutdown()
        self.loop.call_soon_threadsafe(self._left.set)
        if self.thread is not threading.current_thread():  # garbage may be collected in any thread
            self.thread.join()


class _Sessions:
    """
    Has one session as long as calls overlap, and none between them. Made anew where it is copied, pickled or forked:
    threads, locks and connections are not taken along.
    """

    def __init__(self) -> None:
        self._start()

    def __reduce__(self) -> tuple[type["_Sessions"], tuple[()]]:
        return type(self), ()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()  # garbage that holds a call may be collected anywhere, also in here
        self._session: _Session | None = None
        # Each takes 20 ms to make. Of one session at a time: a connection sets it up anew, while another may read it.
        self._tls_contexts: list[SSLContext] = []

    def enter(self, make_client: "Callable[[SSLContext], AsyncOpenAI]") -> _Session:
        import httpx2

        if self._process != os.getpid():
            self._start()
        with self._lock:
            while True:
                if self._session is None:
                    tls_context = self._tls_contexts.pop() if self._tls_contexts else httpx2.create_ssl_context()
                    self._session = _Session(make_client, tls_context)
                session = self._session
                session.users += 1
                if session is self._session:
                    return session

    def leave(self, session: _Session) -> None:
        with self._lock:
            session.users -= 1
            if session.users:
                return
            self._session = None
        session.end()
        self._tls_contexts.append(session.tls_context)


class OpenAIDesigner(Designer):
    r"""
    A model behind a chat-completions server writes the blueprints. Needs `pip install 'diffusers-dim[openai]'`.

    Each picture is sent as a JPEG of quality 95 with full colour resolution, before the text of its turn; those of
    the data engine and of benchmarks as their own files, where they are PNG, JPEG or WebP. Answers are streamed. A
    request is repeated, with exponential back-off or after the server's `Retry-After`, at HTTP 408, 409, 429 and 5xx,
    at a broken connection, at the time limit and at an answer that is no valid JSON. An empty answer and a refusal are
    asked for once more, as a blueprint that lacks parts is, and then a [`DesignError`] with the model's words. A
    server that nobody can reach, refuses the key or lacks the model ends the whole run.

    Caches and the data engine keep answers by the model's name and what is sent with it, not by the server's address:
    the same model at another port or host is not asked anew. Another model under the same name needs another cache,
    and the engine another folder.

    It may be called from several threads at once; calls that overlap share connections. Nothing is left running
    between calls, so there is nothing to close.

    Args:
        model (`str`): The model's name at the server; at Azure OpenAI the deployment's.
        base_url (`str`, *optional*):
            The server's address up to `/chat/completions`: `http://localhost:8000/v1` for vLLM,
            `https://NAME.openai.azure.com/openai/v1/` for Azure OpenAI. By default the environment variable
            `OPENAI_BASE_URL`, else OpenAI's own.
        api_key (`str`, *optional*):
            By default the environment variable `OPENAI_API_KEY`. Servers other than OpenAI's may need none.
        concurrency (`int`, defaults to 8): How many requests of one call run at once.
        timeout (`float`, defaults to 120.0): Seconds that one request may take in total, until its last word.
        max_retries (`int`, defaults to 5):
            How often a request is repeated. HTTP 429 does not count while the server answers others: so it is asked
            as fast as it allows, however many requests run at once.
        temperature (`float`, *optional*, defaults to 0.0): `None` to send none: OpenAI's reasoning models refuse it.
        seed (`int`, *optional*, defaults to 0): `None` to send none.
        max_image_pixels (`int`, defaults to 1024 * 1024): Larger pictures are shrunk to this area first.
        kwargs: `on_failure`, `max_new_tokens`, `cache` and `prompt` of [`Designer`]. The limit is sent as
            `max_completion_tokens` to OpenAI and Azure OpenAI, as `max_tokens` to all others.

    Raises:
        ImportError: Without the `openai` package.
        ValueError: If an argument makes no sense, or there is no key for OpenAI's own server. While designing: if the
            server refuses the key or has no such model.
        ConnectionError: While designing, if the server cannot be reached.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        max_retries: int = 5,
        temperature: float | None = 0.0,
        seed: int | None = 0,
        max_image_pixels: int = 1024 * 1024,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        try:
            import openai  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "OpenAIDesigner needs the openai package: pip install 'diffusers-dim[openai]'"
            ) from error
        if not model:
            raise ValueError("`model` is empty: give the name by which the server knows the model.")
        for name, value in (("concurrency", concurrency), ("max_image_pixels", max_image_pixels)):
            if value < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {value}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` has to be more than 0 seconds, but is {timeout}.")
        if max_retries < 0:
            raise ValueError(f"`max_retries` has to be at least 0, but is {max_retries}.")

        url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        # Neither a password nor a query, which may hold a key, is for errors and caches.
        self.base_url = re.sub(r"//.*@", "//", url).partition("?")[0].rstrip("/")
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"`base_url` has to look like 'http://localhost:8000/v1', but is {self.base_url!r}.")
        self._address, self._query = url.partition("?")[0], dict(parse_qsl(parts.query))
        self.host = parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"

        key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not key and parts.hostname == "api.openai.com":
            raise ValueError("OpenAI needs a key: set the environment variable OPENAI_API_KEY, or give `api_key`.")
        # The client's own errors at such a key would show it.
        if not (key.isascii() and key.isprintable()):
            raise ValueError("`api_key` has to be plain ASCII without line breaks, but is not.")
        self._api_key = key or "EMPTY"
        self._secrets = [secret for secret in (key, parts.password, parts.query) if secret]

        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.temperature = temperature
        self.seed = seed
        self.max_image_pixels = max_image_pixels
        self._count_tokens = True
        self._answers = 0  # how many there were so far
        self._sessions = _Sessions()

    def __repr__(self) -> str:
        return f"OpenAIDesigner(model={self.model!r}, host={self.host!r})"

    @property
    def settings(self) -> dict[str, Any]:
        names = ("model", "temperature", "seed", "max_image_pixels")
        return super().settings | {name: getattr(self, name) for name in names}

    @property
    def max_file_pixels(self) -> int:
        return self.max_image_pixels

    def prepare(self, conversation: Conversation) -> Conversation:
        conversation = super().prepare(conversation)
        # Without the pictures, which are in the body and would be held twice.
        told = (conversation.turns, None, conversation.instruction)
        return _Prepared(*told, body=self._body(conversation))

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        answers: SimpleQueue[tuple[int, Draft | DesignError] | asyncio.Task[None]] = SimpleQueue()
        session = self._sessions.enter(self._make_client)
        process = os.getpid()
        cancel = session.begin(self._ask_all(session, conversations, on_text, answers.put), answers.put)
        answer: tuple[int, Draft | DesignError] | asyncio.Task[None] | None = None
        try:
            while isinstance(answer := answers.get(), tuple):
                yield answer
            try:
                answer.result()
            except _CallersError as error:
                raise error.error from None
        finally:
            # At the interpreter's end the thread stands still, and in a forked process it is not.
            if not sys.is_finalizing() and process == os.getpid():
                cancel()
                if session.thread is not threading.current_thread():  # garbage may be collected in any thread
                    while not isinstance(answer, asyncio.Task):
                        answer = answers.get()
                    _ = answer.cancelled() or answer.exception()  # else it is told on stderr
                self._sessions.leave(session)

    def _make_client(self, tls_context: "SSLContext") -> "AsyncOpenAI":
        import httpx2
        import openai

        return openai.AsyncOpenAI(
            base_url=self._address,
            api_key=self._api_key,
            default_query=self._query,
            timeout=openai.Timeout(None, connect=min(CONNECT_SECONDS, self.timeout / 2)),
            # Its own retries end where the answer begins, so they are done here.
            max_retries=0,
            # `concurrency` is the limit: a wait for a connection would be taken for the server's.
            http_client=openai.DefaultAsyncHttpxClient(verify=tls_context, limits=httpx2.Limits()),
        )

    async def _ask_all(
        self, session: _Session, conversations: Sequence[Conversation], on_text: OnText, put: Callable[..., None]
    ) -> None:
        waiting = iter(enumerate(conversations))

        def tell(index: int, text: str) -> None:
            try:
                on_text(index, text)
            except BaseException as error:  # also a KeyboardInterrupt
                raise _CallersError(error) from None

        async def work() -> None:
            for index, conversation in waiting:
                # Not in the loop's own threads, where looking up a host would have to wait until all are prepared.
                if isinstance(conversation, _Prepared):
                    body = conversation.body
                else:
                    body = await session.loop.run_in_executor(session.encoders, self._body, conversation)
                put((index, await self._answer(session.client, body, conversation, partial(tell, index))))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(conversations))):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _answer(
        self, client: "AsyncOpenAI", body: bytes, conversation: Conversation, tell: Callable[[str], Any]
    ) -> Draft | DesignError:
        """The answer to one conversation, asked until there is one."""
        import httpx2
        import openai
        from openai.types.chat import ChatCompletion

        # As client.chat.completions.with_streaming_response.create() does with a dict, but that would look through
        # megabytes of pictures for what has to be escaped.
        options: Any = {"headers": {"X-Stainless-Raw-Response": "stream"}}
        ask = partial(client.post, "/chat/completions", cast_to=ChatCompletion, options=options)
        reached = False
        asked = failed = 0
        answers = self._answers
        while True:
            pause = BACKOFF_SECONDS * 2 ** min(asked, 5) * random.uniform(0.5, 1)
            failure: APIError | None = None
            status: int | None = None
            counted = self._count_tokens
            usage = b', "stream_options": {"include_usage": true}}' if counted else b"}"
            try:
                async with asyncio.timeout(self.timeout):
                    answering: Any = await ask(content=body + usage)
                    reached = True
                    try:
                        answer = await self._read(answering.http_response, tell, again=len(conversation.turns) > 1)
                    finally:
                        await answering.close()
                if answer is not None:
                    self._answers += 1
                    return answer
                problem = "its answer broke off, or was no stream."
            except TimeoutError:
                reached, problem = True, f"there was no whole answer within {self.timeout:g} seconds (`timeout`)."
            except (json.JSONDecodeError, UnicodeDecodeError):
                problem = "its answer is not valid JSON."
            except httpx2.HTTPError as error:
                problem = f"its answer broke off: {error}."
            except openai.APIError as error:
                failure = error
            # Outside of `except`, so that the client's error, which may hold the key, is not in the trace.
            if failure is not None:
                status, words = _status(failure), self._words(failure)
                reached |= status is not None
                problem = words if status is None else f"HTTP {status}: {words}"
                if counted and "stream_options" in words:
                    self._count_tokens, pause = False, 0.0
                elif failure.code == "insufficient_quota" or not (status in (None, 408, 409, 429) or status >= 500):
                    refused = await self._refused(client, status, failure)
                    if isinstance(refused, DesignError):
                        return refused
                    raise refused
                pause = max(pause, _retry_after(failure))
            asked, failed = asked + 1, failed + 1
            if status == 429 and self._answers != answers:  # a server that answers others meanwhile sets the pace
                answers, failed = self._answers, 0
            if failed > self.max_retries or pause > LONGEST_WAIT_SECONDS:
                break
            logger.info("%s failed: %s Asking again in %.1f seconds.", self.host, problem, pause)
            await asyncio.sleep(pause)
        if not reached:
            raise ConnectionError(
                f"{self.host} cannot be reached: {problem} Check `base_url` ({self.base_url}) and that the"
                " server runs."
            )
        times = f"asked {asked} times"
        if pause > LONGEST_WAIT_SECONDS:
            times += f", and wants {pause:.0f} seconds of rest"
        return DesignError(f"{self.host} gave no answer, {times}: {problem} Start anew when it is well again.")

    def _request(self, conversation: Conversation) -> dict[str, Any]:
        """The body of a request, but for `stream_options`."""
        messages: list[dict[str, Any]] = [
            {"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(conversation.turns)
        ]
        if conversation.images:
            pictures = [
                {"type": "image_url", "image_url": {"url": encode_data_url(image, self.max_image_pixels)}}
                for image in conversation.images
            ]
            text = {"type": "text", "text": messages[0]["content"]}
            messages[0]["content"] = [text, *pictures] if conversation.text_first else [*pictures, text]

        new = f".{self.host.partition(':')[0]}".endswith(_NEW_LIMIT_HOSTS)
        request = {"model": self.model, "messages": messages, "stream": True}
        request["max_completion_tokens" if new else "max_tokens"] = self.max_new_tokens
        options = {"temperature": self.temperature, "seed": self.seed}
        return request | {name: value for name, value in options.items() if value is not None}

    def _body(self, conversation: Conversation) -> bytes:
        """The same as JSON, but for the last brace."""
        request = self._request(conversation)
        content, mark, urls = request["messages"][0]["content"], uuid.uuid4().hex, []
        for part in content if isinstance(content, list) else ():
            if part["type"] == "image_url":
                urls.append(part["image_url"]["url"])
                part["image_url"]["url"] = mark
        # Data URLs have nothing to be escaped; to look for it would take as long as all else.
        pieces = json.dumps(request).removesuffix("}").split(mark)
        return "".join(part for pair in zip(pieces, [*urls, ""]) for part in pair).encode()

    async def _read(self, response: "Response", tell: Callable[[str], Any], again: bool) -> Draft | DesignError | None:
        """An answer as it comes in; `None` if it ends without a reason: then it was cut, which may look whole."""
        import httpx2
        import openai

        thoughts, text, refusal, reason, tokens, prompt_tokens = "", "", "", None, 0, 0
        # The client's own objects take six times as long: over 8,000 tokens a second would need more than a core.
        lines = _lines(response)
        async for line in lines:
            if not line.startswith(b"data:"):  # a comment, or the empty line after an event
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                with suppress(TimeoutError, httpx2.HTTPError):
                    async with asyncio.timeout(END_SECONDS):
                        async for _ in lines:
                            pass
                break
            event = json.loads(data)
            if isinstance(event, dict) and event.get("error"):
                raise openai.APIError(str(event["error"]), response.request, body=event["error"])
            usage = _get(event, "usage", dict)
            tokens = _get(usage, "completion_tokens", int) or tokens
            prompt_tokens = _get(usage, "prompt_tokens", int) or prompt_tokens
            for choice in (_get(event, "choices", list) or [])[:1]:
                reason = _get(choice, "finish_reason", str) or reason
                delta = _get(choice, "delta", dict)
                thought = _get(delta, "reasoning_content", str) or _get(delta, "reasoning", str) or ""
                word = _get(delta, "content", str) or ""
                thoughts, text = thoughts + thought, text + word
                refusal += _get(delta, "refusal", str) or ""
                if thought or word:
                    tell(_join(thoughts, text))
        if reason is None:
            return None
        if reason == "content_filter":
            return DesignError(
                f"{self.host} withheld the answer by its content filter. Use another picture, instruction"
                f" or model. The answer so far: {text or refusal!r}",
                text or refusal,
            )
        finished = reason != "length"
        # A second try is the base's, which asks in other words; the words of a refusal must not pass for an answer.
        if again and finished and not (thoughts or text).strip():
            said = f"refused: {refusal!r}" if refusal else "wrote nothing."
            return DesignError(f"Asked twice, {self.model!r} {said} Try another instruction or model.", refusal)
        return Draft(_join(thoughts, text), tokens, finished, prompt_tokens)

    async def _refused(self, client: "AsyncOpenAI", status: int | None, failure: "APIError") -> Exception:
        """What an answer that says no means: for this picture a `DesignError`, for all of them a `ValueError`."""
        words = self._words(failure)
        if status in (401, 403):
            # OpenAI's own words show the key's ends.
            return ValueError(
                f"{self.host} does not accept the key for {self.model!r} (HTTP {status}). Check the environment"
                " variable OPENAI_API_KEY or `api_key`, and what the key is allowed to do."
            )
        if failure.code == "insufficient_quota":
            return ValueError(f"{self.host} wants to be paid first (HTTP {status}): {words} Check the key's account.")
        if status == 404 or failure.code == "model_not_found" or failure.param == "model":
            models = await self._served(client)
            has = f"It has: {', '.join(models)}." if models else f"Check `model` and `base_url` ({self.base_url})."
            return ValueError(f"{self.host} has no model {self.model!r} (HTTP {status}): {words} {has}")
        if status in (400, 413, 422):
            for name in ("temperature", "seed"):
                if getattr(self, name) is not None and (failure.param == name or re.search(rf"\b{name}\b", words)):
                    return ValueError(f"{self.model!r} takes no {name}: {words} Give `{name}=None`.")
            return DesignError(
                f"{self.host} refused the request (HTTP {status}): {words} If the picture or the answer is too large"
                " for the model, lower `max_image_pixels` or `max_new_tokens`."
            )
        return ValueError(
            f"{self.host} refused the request (HTTP {status}): {words} Check `base_url` ({self.base_url})."
        )

    async def _served(self, client: "AsyncOpenAI") -> list[str]:
        """The names of the server's models, if it tells."""
        import openai

        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                page = await client.models.list()
        except (openai.OpenAIError, TimeoutError, ValueError):
            return []
        return [model.id for model in (getattr(page, "data", None) or [])[:20]]

    def _words(self, failure: "APIError") -> str:
        """What the server said, without secrets and shortened: some send back all that they were sent."""
        words = failure.body.get("message") if isinstance(failure.body, dict) else None
        if failure.body is None and failure.__cause__ is not None:
            words = f"{failure.message.rstrip('.')}: {failure.__cause__}"
        words = " ".join(str(words or failure.message).split())
        for secret in self._secrets:
            words = words.replace(secret, "***")
        words = words if len(words) <= 500 else f"{words[:500]}..."
        return words if words.endswith((".", "!", "?")) else f"{words}."


async def _lines(response: "Response") -> AsyncIterator[bytes]:
    """The lines of an answer as they come in. Only line feeds end them: the client's own would split texts, too."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _get(values: Any, name: str, kind: type[T]) -> T | None:
    """What a server says by that name, `None` if it does not, or says something of another kind."""
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, kind) else None


def _join(thoughts: str, text: str) -> str:
    """Thoughts that come beside the answer, as models write them that have no such field."""
    if not thoughts:
        return text
    return f"<think>{thoughts}</think>\n{text}" if text else f"<think>{thoughts}"


def _status(failure: "APIError") -> int | None:
    """The HTTP status, also of an error in the middle of a stream; `None` if the server said nothing."""
    status = getattr(failure, "status_code", None)
    if status is None and failure.body is not None:
        status = int(failure.code) if (failure.code or "").isdecimal() else 500
    return status


def _retry_after(failure: "APIError") -> float:
    """The seconds that a server asks to wait, 0 if it does not say."""
    value = failure.response.headers.get("retry-after", "") if hasattr(failure, "response") else ""
    try:
        return float(value)
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return 0.0 if date is None else email.utils.mktime_tz(date) - time.time()
