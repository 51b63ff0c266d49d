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
"""
The data engine on a Ray cluster: judges in Ray actors or Ray Data's LLM processors, samples from Ray Data, the ledger
with the driver.
"""

import copy
import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...designers import Conversation, Designer, DesignError, Draft
from ...designers.designer import OnText
from ...designers.openai import encode_data_url
from ..records import Kind
from ..released import iter_samples
from .engine import DataEngine, EngineSummary, Estimate, _draw, _Flow, _Job, _plain
from .filters import Filter
from .records import EngineSample, Step
from .store import Answer, Ledger


try:
    import pyarrow
    import ray
    import ray.data
    from ray.exceptions import RayActorError, RayTaskError
except ImportError as error:
    raise ImportError("Clusters are used by Ray: `pip install 'diffusers-dim[ray]'`.") from error

TRIES = 3  # how many workers may die at a conversation, and in a row at one worker's place with no answer between


class _Worker:
    """A judge in a process of its own, which Ray places where there is room."""

    def __init__(self, make_judge: Callable[[], Designer]):
        self.judge = make_judge()
        takes_many = getattr(self.judge, "concurrency", 1) > 1
        self._turn: AbstractContextManager[Any] = nullcontext() if takes_many else threading.Lock()

    def facts(self) -> tuple[dict[str, Any], int, int]:
        return self.judge.settings, self.judge.max_new_tokens, self.judge.max_file_pixels

    def write(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Draft | DesignError]]:
        with self._turn:
            yield from self.judge.write(conversations, lambda index, text: None)


class RayJudge(Designer):
    r"""
    A judge whose answers come from Ray actors, each with a judge of its own. Everything else sees one judge, with the
    settings of theirs: what was answered without Ray is not asked again.

    An actor that dies is replaced by a new one, which Ray starts where there is room. What it had answered is kept,
    the rest is asked again.

    Args:
        make_judge (`Callable`):
            Makes the judge, called in each actor: keys that it reads there and models that it loads stay there.
        workers (`int`, defaults to 2): How many actors.
        concurrency (`int`, defaults to 8):
            How many conversations each has at once. For a local model its batch size serves well.
        num_cpus, num_gpus (`float`, defaults to 0): What each takes of the cluster; a judge that waits for a server,
            nothing.

    Raises:
        ValueError: If an argument makes no sense, the cluster has no room for the workers, or `make_judge` fails.
    """

    def __init__(
        self,
        make_judge: Callable[[], Designer],
        workers: int = 2,
        concurrency: int = 8,
        num_cpus: float = 0,
        num_gpus: float = 0,
    ):
        for name, value in (("workers", workers), ("concurrency", concurrency)):
            if value < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {value}.")
        needs = {"CPU": workers * num_cpus, "GPU": workers * num_gpus}
        if min(needs.values()) < 0:
            raise ValueError(f"`num_cpus` and `num_gpus` have to be at least 0, but are {num_cpus} and {num_gpus}.")
        if not ray.is_initialized():
            ray.init()
        has = ray.cluster_resources()
        for unit, need in needs.items():
            if need > has.get(unit, 0):  # else Ray waits for them for ever
                raise ValueError(f"{workers} workers need {need:g} {unit}s, but the cluster has {has.get(unit, 0):g}.")
        self.concurrency = workers * concurrency
        self._worker = ray.remote(_Worker).options(
            num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=concurrency, max_restarts=0
        )
        self._make_judge = make_judge
        self._lock = threading.Lock()
        self._deaths = 0  # with no answer between
        self._workers = [self._worker.remote(make_judge) for _ in range(workers)]
        self._load = [0] * workers  # conversations that each has
        try:
            self._settings, max_new_tokens, self.max_file_pixels = ray.get(self._workers[0].facts.remote())
        except RayActorError as error:
            self.close()
            why = str(error).strip().splitlines()[-1]  # of the worker's whole traceback
            raise ValueError(f"A worker could not start its judge: {why}") from error
        super().__init__(max_new_tokens=max_new_tokens)

    @property
    def settings(self) -> dict[str, Any]:
        return self._settings

    def __enter__(self) -> "RayJudge":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors."""
        for worker in self._workers:
            ray.kill(worker)

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        tries: Counter[int] = Counter()
        # By the stream of a call's answers, the worker's place, the worker, and what it was asked.
        calls: dict[Any, tuple[int, Any, list[int]]] = {}
        self._send(range(len(conversations)), conversations, calls)
        try:
            while calls:
                [stream], _ = ray.wait(list(calls), num_returns=1)
                place, worker, asked = calls[stream]
                try:
                    answered, draft = ray.get(next(stream))
                except StopIteration:
                    self._free(calls.pop(stream))
                    continue
                except RayTaskError as error:
                    raise error.cause from None  # as the judge raised it, without the worker's own traceback
                except RayActorError as error:
                    left = self._free(calls.pop(stream))
                    self._replace(place, worker, error)
                    tries.update(left)
                    for index in left:
                        if tries[index] == TRIES:
                            yield index, DesignError(f"{TRIES} workers died at it: {error}")
                    self._send([index for index in left if tries[index] < TRIES], conversations, calls)
                    continue
                with self._lock:
                    self._load[place] -= 1
                    self._deaths = 0
                index = asked[answered]
                asked[answered] = -1
                if isinstance(draft, Draft):
                    on_text(index, draft.text)
                yield index, draft
        finally:
            for call in calls.values():
                self._free(call)

    def _send(
        self,
        indices: Iterable[int],
        conversations: Sequence[Conversation],
        calls: dict[Any, tuple[int, Any, list[int]]],
    ) -> None:
        """Asks the workers that have the least to do."""
        parts: dict[int, list[int]] = {}
        with self._lock:
            for index in indices:
                place = min(range(len(self._load)), key=self._load.__getitem__)
                self._load[place] += 1
                parts.setdefault(place, []).append(index)
            workers = list(self._workers)
        for place, part in parts.items():
            stream = workers[place].write.remote([conversations[index] for index in part])
            calls[stream] = (place, workers[place], part)

    def _free(self, call: tuple[int, Any, list[int]]) -> list[int]:
        """Notes that a call has ended, and gives what it left unanswered."""
        left = [index for index in call[2] if index >= 0]
        with self._lock:
            self._load[call[0]] -= len(left)
        return left

    def _replace(self, place: int, worker: Any, error: RayActorError) -> None:
        with self._lock:
            if self._workers[place] is not worker:  # another of its calls has found out before
                return
            self._deaths += 1
            if self._deaths > TRIES * len(self._workers):
                raise ValueError(f"Workers die one after another without an answer: {error}") from error
            self._workers[place] = self._worker.remote(self._make_judge)


class RaySamples:
    """
    The samples in the rows of a Ray dataset, in order, as often as they are gone through.

    Args:
        dataset (`ray.data.Dataset`): Streamed by Ray Data, read and mapped wherever there is room; set to keep order.
        mapping, kind, image_root: As in [`~diffusers_dim.data.released.iter_samples`].
    """

    def __init__(
        self,
        dataset: "ray.data.Dataset",
        mapping: str | Mapping[str, str] | None = None,
        kind: Kind = "edit",
        image_root: str | os.PathLike[str] | None = None,
    ):
        self.dataset, self.mapping, self.kind = dataset, mapping, kind
        self.image_root = None if image_root is None else Path(image_root)
        dataset.context.execution_options.preserve_order = True  # so that a rerun makes the same files

    def __iter__(self) -> Iterator[EngineSample]:
        rows = self.dataset.iter_rows()
        return iter_samples(rows, self.mapping, kind=self.kind, image_root=self.image_root)


def run_on_ray(
    samples: "Iterable[EngineSample] | ray.data.Dataset",
    steps: Sequence[Step],
    make_judge: Callable[[], Designer],
    output_dir: str | os.PathLike[str],
    filters: Sequence[Filter] = (),
    checks: Sequence[Filter] = (),
    workers: int = 2,
    concurrency: int = 8,
    num_cpus: float = 0,
    num_gpus: float = 0,
    mapping: str | Mapping[str, str] | None = None,
    kind: Kind = "edit",
    image_root: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> EngineSummary:
    r"""
    Runs a [`DataEngine`] with its judges in Ray actors, and gives the set that it gives without Ray. Each answer is
    in the ledger, a file with the driver, as soon as it comes back: a driver that was killed is started again in the
    same way and asks for nothing that came back. Filters and checks, which may have a memory, are run by the driver.

    Ray is started on this machine, or found by `RAY_ADDRESS`, if `ray.init` was not called before. For Ray Data's LLM
    batch processors see [`RayLLMEngine`].

    Args:
        samples (`Iterable[EngineSample]` or `ray.data.Dataset`):
            The samples; or rows, which Ray Data streams to the driver, read and mapped wherever there is room. Workers
            have to leave it some CPUs.
        steps, output_dir, filters, checks: As in [`DataEngine`].
        make_judge, workers, concurrency, num_cpus, num_gpus: As in [`RayJudge`].
        mapping, kind, image_root: How samples are read in rows, as in [`~diffusers_dim.data.released.iter_samples`].
        progress (`bool`, defaults to `True`): Whether to show a bar.
        options: `budget`, `prices` and `shard_size` of [`DataEngine`].

    Raises:
        ValueError: As by [`DataEngine`] and [`RayJudge`].
        Exception: What the judge raises for all that it is asked. What was finished stays.
    """
    given = RaySamples(samples, mapping, kind, image_root) if isinstance(samples, ray.data.Dataset) else samples
    with RayJudge(make_judge, workers, concurrency, num_cpus, num_gpus) as judge:
        engine = DataEngine(steps, judge, output_dir, filters, checks, concurrency=workers * concurrency, **options)
        return engine.run(given, progress)


class RayLLMJudge(Designer):
    r"""
    A judge behind one of Ray Data's LLM batch processors (`ray.data.llm`): vLLM engines on a cluster, or a
    chat-completions server. Sampling is greedy by default, pictures are sent as [`OpenAIDesigner`] sends them.

    A processor lives as long as the dataset that it is run over, so that each [`~Designer.write`] loads vLLM anew:
    ask for many at a time, as [`RayLLMEngine`] does for each step. vLLM that stays loaded is `vllm serve` or
    `ray.serve.llm`, with [`OpenAIDesigner`] as the judge.

        config = vLLMEngineProcessorConfig(
            model_source="Qwen/Qwen2.5-VL-7B-Instruct",
            engine_kwargs={"max_model_len": 16384},
            prepare_multimodal_stage=True,
            concurrency=4,  # engines, with a GPU each
        )
        RayLLMEngine([step() for step in EDIT_STEPS], RayLLMJudge(config), "dim_edit").run(samples)

    vLLM itself, which needs a GPU and `pip install 'ray[llm]'`, was not run with this. Tested are processors of HTTP
    requests, the stages before vLLM that run without it, and the reading of rows as Ray 2.60 has them of vLLM.

    Args:
        config (`ray.data.llm.vLLMEngineProcessorConfig` or `ray.data.llm.HttpRequestProcessorConfig`):
            The model and the machines that it takes, or the address of a server, up to and with `/chat/completions`.
            For vLLM `prepare_multimodal_stage` has to be on, and `should_continue_on_error` is. A server that is busy
            is asked again `max_retries` times, which is 0 by default, and then ends the run. Answers come back, and
            are kept, by batches of `batch_size`.
        model (`str`, *optional*): The model's name at the server; vLLM's is `model_source`.
        temperature (`float`, *optional*, defaults to 0.0): `None` to send none.
        seed (`int`, *optional*, defaults to 0): `None` to send none.
        max_image_pixels (`int`, defaults to 1024 * 1024): Larger pictures are shrunk to this area first.
        kwargs: `on_failure`, `max_new_tokens`, `cache` and `prompt` of [`Designer`].

    Raises:
        ValueError: If an argument makes no sense.
        RuntimeError: While writing, if the processor fails as a whole, as for a server that is away.
    """

    def __init__(
        self,
        config: Any,
        model: str | None = None,
        temperature: float | None = 0.0,
        seed: int | None = 0,
        max_image_pixels: int = 1024 * 1024,
        **kwargs: Any,
    ):
        from ray.data.llm import HttpRequestProcessorConfig, vLLMEngineProcessorConfig

        super().__init__(**kwargs)
        if max_image_pixels < 1:
            raise ValueError(f"`max_image_pixels` has to be at least 1, but is {max_image_pixels}.")
        self.on_server = isinstance(config, HttpRequestProcessorConfig)
        if isinstance(config, vLLMEngineProcessorConfig):
            stage = config.prepare_multimodal_stage
            if not (stage if isinstance(stage, bool) else dict(stage).get("enabled", True)):
                raise ValueError("`config` leaves out pictures: give it `prepare_multimodal_stage=True`.")
            model = config.model_source
            config = config.model_copy(update={"should_continue_on_error": True})  # at a prompt too long, say
        elif self.on_server:
            if not model:
                raise ValueError("`model` is missing: give the name by which the server knows the model.")
        else:
            raise ValueError(f"`config` has to be one of vLLM or of HTTP requests, but is a {type(config).__name__}.")
        self.config, self.model = config, model
        self.temperature, self.seed, self.max_image_pixels = temperature, seed, max_image_pixels
        self.max_file_pixels = max_image_pixels

    @property
    def settings(self) -> dict[str, Any]:
        names = ("model", "temperature", "seed", "max_image_pixels")
        return super().settings | {name: getattr(self, name) for name in names}

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        rows = (self.row(str(index), conversation) for index, conversation in enumerate(conversations))
        for batch in self.answer(rows):
            for key, draft in batch:
                if isinstance(draft, Draft):
                    on_text(int(key), draft.text)
                yield int(key), draft

    def row(self, key: str, conversation: Conversation) -> dict[str, str]:
        """A conversation as a row for [`~RayLLMJudge.answer`]: what it is known by, and its messages as JSON."""
        messages, pictures = conversation.messages(), iter(conversation.images)
        messages[0]["content"] = [
            part
            if part["type"] == "text"
            else {"type": "image_url", "image_url": {"url": encode_data_url(next(pictures), self.max_image_pixels)}}
            for part in messages[0]["content"]
        ]
        return {"key": key, "messages": json.dumps(messages)}

    def answer(self, rows: Iterable[dict[str, str]]) -> Iterator[list[tuple[str, Draft | DesignError]]]:
        """
        Runs the processor over rows, which are in Ray's object store meanwhile, and gives the answers by batches as
        they come back, with their rows' keys, in any order.
        """
        from ray.data.llm import build_processor

        given, blocks = iter(rows), []
        while block := list(islice(given, self.config.batch_size)):
            blocks.append(ray.put(pyarrow.Table.from_pylist(block)))
        if not blocks:
            return
        ask, read = self._form()
        dataset = build_processor(self.config, ask, read)(ray.data.from_arrow_refs(blocks))
        dataset.context.enable_progress_bars = False
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
                yield _read_batch(batch)
        except RayTaskError as error:
            # What happened is in the worker's trace alone, there with all that was asked.
            told = re.sub(r"base64,[\w+/=]+", "base64,...", str(error))
            raise RuntimeError(f"The processor failed: {told}") from None

    def _form(self) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]:
        """
        What makes rows as the processor takes them, and answers of those that it gives. Ray pickles such functions as
        they are, so that its workers need not import this package with PyTorch.

        Rows hold what Arrow has no type for, so that Ray Data pickles them, too: of Arrow's types, parts of messages
        would all have the same fields, by which chat templates tell pictures from text.
        """
        limit, as_it_is = self.max_new_tokens, {"untyped": object()}
        sampling = {"max_tokens": limit, "temperature": self.temperature, "seed": self.seed}
        sampling = {name: value for name, value in sampling.items() if value is not None}

        def ask_vllm(row: dict[str, Any]) -> dict[str, Any]:
            return {"messages": json.loads(row["messages"]), "sampling_params": sampling, **as_it_is}

        def read_vllm(row: dict[str, Any]) -> dict[str, Any]:
            tokens = row["num_generated_tokens"]
            return {
                "key": row["key"],
                "text": row["generated_text"],
                "tokens": tokens,
                "prompt_tokens": row["num_input_tokens"],
                "finished": tokens < limit,  # Ray does not pass on why it ended
                "error": "",
            }

        if not self.on_server:
            return ask_vllm, read_vllm
        request = {"model": self.model, **sampling}

        def ask_server(row: dict[str, Any]) -> dict[str, Any]:
            return {"payload": {**request, "messages": json.loads(row["messages"])}, "messages": "", **as_it_is}

        def read_server(row: dict[str, Any]) -> dict[str, Any]:
            response = row["http_response"]
            choice, usage = (response.get("choices") or [{}])[0], response.get("usage") or {}
            said, reason = choice.get("message"), choice.get("finish_reason")
            withheld = "its content filter withheld the answer." if reason == "content_filter" else ""
            return {
                "key": row["key"],
                "text": (said or {}).get("content") or "",
                "tokens": usage.get("completion_tokens") or 0,
                "prompt_tokens": usage.get("prompt_tokens") or 0,
                "finished": reason != "length",
                "error": withheld if said else f"no answer, but {response.get('error') or response}"[:500],
            }

        return ask_server, read_server


# Columns of answers; the last one is Ray's own of what vLLM failed at.
_ANSWER = ("key", "text", "tokens", "prompt_tokens", "finished", "error", "__inference_error__")


def _read_batch(batch: "pyarrow.Table") -> list[tuple[str, Draft | DesignError]]:
    answers: list[tuple[str, Draft | DesignError]] = []
    # Rows that vLLM failed at come with all that it was given.
    for row in batch.select([name for name in _ANSWER if name in batch.column_names]).to_pylist():
        error = row.get("__inference_error__") or row.get("error")
        if error:
            answers.append((row["key"], DesignError(f"The judge failed: {error}")))
        else:
            answers.append((row["key"], Draft(row["text"], row["tokens"], row["finished"], row["prompt_tokens"])))
    return answers


class _Waiting(_Flow):
    """Takes samples as far as the ledger goes. Those that lack an answer are left unfinished."""

    def _want(self, job: _Job) -> None:
        job.end("unfinished")


class _Told(Designer):
    """Says once more what a judge failed at, by what it was asked."""

    def __init__(self, judge: RayLLMJudge, errors: dict[int, DesignError]):
        super().__init__(max_new_tokens=judge.max_new_tokens)
        self.judge, self.errors, self.max_file_pixels = judge, errors, judge.max_file_pixels

    @property
    def settings(self) -> dict[str, Any]:
        return self.judge.settings

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        unknown = DesignError("The judge gave neither an answer nor a reason.")
        for index, conversation in enumerate(conversations):
            yield index, self.errors.get(_hash(self.judge.row("", conversation)), unknown)


class RayLLMEngine(DataEngine):
    r"""
    A [`DataEngine`] for a judge that is to be asked for many at once. It goes through the samples in passes: each
    asks, in one run of the processor, for the next answer of all samples that lack one, first tries and second ones.
    Three steps take three passes, or a few more where answers had to be asked for again. The set is the one that a
    [`DataEngine`] makes of these answers, and the ledger is kept alike: batches are in it as they come back, and a run
    that was killed is started again in the same way and asks for nothing that came back.

    While a pass runs, Ray's object store holds the pictures of its samples, as files; where they are more than its
    memory, it puts them on the driver's disk.

    Args:
        steps, output_dir, filters, checks, prices, shard_size: As in [`DataEngine`].
        judge ([`RayLLMJudge`]): Who answers.
        budget ([`Budget`], *optional*):
            Of calls or seconds: what a pass takes in tokens or money is not known before. A pass is broken off when
            the seconds are used up, and what is under way then is lost.

    Raises:
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        judge: RayLLMJudge,
        output_dir: str | os.PathLike[str],
        filters: Sequence[Filter] = (),
        checks: Sequence[Filter] = (),
        **options: Any,
    ):
        super().__init__(steps, judge, output_dir, filters, checks, **options)
        self._batches = judge
        if (self.budget.money, self.budget.tokens) != (None, None):
            raise ValueError("A run in passes keeps a budget of calls or seconds, but not of money or tokens.")

    def run(self, samples: Iterable[EngineSample], progress: bool = True) -> EngineSummary:
        """[`DataEngine.run`] of samples that can be gone through again and again, as a list and [`RaySamples`] can."""
        _check_lasting(samples)
        return super().run(samples, progress)

    def _run(
        self, ledger: Ledger, settings: dict[str, Any], samples: Iterable[EngineSample], progress: bool
    ) -> EngineSummary:
        engine = copy.copy(self)
        answered, engine.judge = self._ask_all(ledger, samples, progress)
        summary = super(RayLLMEngine, engine)._run(ledger, settings, samples, progress)
        summary.asked += answered
        self._write_summary(summary, settings)
        return summary

    def estimate(self, samples: Iterable[EngineSample], count: int = 20) -> Estimate:
        """[`DataEngine.estimate`], also of such samples; the seconds are with the loading of vLLM."""
        _check_lasting(samples)
        engine = copy.copy(self)
        if count > 0:
            with self._open() as ledger:
                _, engine.judge = self._ask_all(ledger, _draw(samples, count)[0], progress=False)
        return super(RayLLMEngine, engine).estimate(samples, count)

    def _ask_all(self, ledger: Ledger, samples: Iterable[EngineSample], progress: bool) -> tuple[int, _Told]:
        """Has all answers put into the ledger that can be had. Returns their number, and who tells of the others."""
        answered, failed, told = 0, set[str](), _Told(self._batches, {})
        limit = self.budget.seconds
        while True:
            flow = _Waiting(self, ledger, samples, 0)
            asked: dict[str, tuple[str, int]] = {}  # by key, the step and the row's hash
            came, last = 0, time.monotonic()
            with tqdm(desc="Answers", disable=not progress) as bar:
                for batch in self._batches.answer(self._rows(flow, asked, failed)):
                    bar.total = came + len(asked)
                    came += len(batch)
                    seconds, last = (time.monotonic() - last) / len(batch), time.monotonic()
                    for key, draft in batch:
                        step, row_hash = asked.pop(key)
                        if isinstance(draft, DesignError):
                            failed.add(key)
                            told.errors[row_hash] = draft
                            continue
                        answered += 1
                        # What it means is read by who comes to it next.
                        answer = Answer(
                            step=step,
                            text=_plain(draft.text),
                            finished=draft.finished,
                            tokens=draft.tokens,
                            prompt_tokens=draft.prompt_tokens,
                            seconds=seconds,
                            money=flow.meter.price(draft),
                        )
                        ledger.put(key, answer)
                    bar.update(len(batch))
                    if flow.meter.seconds() >= (math.inf if limit is None else limit):
                        break
            flow.meter.tell()
            failed.update(asked)
            if not came:
                return answered, told

    def _rows(self, flow: _Waiting, asked: dict[str, tuple[str, int]], failed: set[str]) -> Iterator[dict[str, str]]:
        """Rows of all conversations whose answers are not there, but for those that failed in this run."""

        def prepare(job: _Job) -> tuple[int, dict[str, str]] | None:
            try:
                conversation = self.steps[job.step].conversation(job.sample)
                conversation = self._batches.prepare(conversation)
            except ValueError:  # of a picture that cannot be read; the engine itself drops it later
                return None
            conversation = replace(conversation, turns=conversation.turns + job.turns)
            row = self._batches.row(job.key, conversation)
            return _hash(row), row

        room = None if self.budget.calls is None else self.budget.calls - flow.meter.spent["calls"] - len(failed)
        seen = set(failed)
        waiting = islice(_once(flow, seen), room if room is None else max(0, room))
        with ThreadPoolExecutor() as pool:
            # A few at a time, since decoded pictures are large.
            while jobs := list(islice(waiting, 64)):
                for job, prepared in zip(jobs, pool.map(prepare, jobs), strict=True):
                    if prepared is None:
                        failed.add(job.key)
                    else:
                        row_hash, row = prepared
                        asked[job.key] = (self.steps[job.step].name, row_hash)
                        yield row


def _hash(row: dict[str, str]) -> int:
    """Of all that is asked, pictures too."""
    return hash(row["messages"])


def _once(flow: _Waiting, seen: set[str]) -> Iterator[_Job]:
    """Of those that wait for the same answer, one."""
    for job in flow:
        if job.state == "unfinished" and job.key not in seen:
            seen.add(job.key)
            yield job


def _check_lasting(samples: Iterable[EngineSample]) -> None:
    if iter(samples) is samples:
        raise ValueError("`samples` are gone through several times: give a list, say, but no generator.")
