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
"""The data engine on a Ray cluster: judges in Ray actors, samples from Ray Data, the ledger with the driver."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...designers import Conversation, Designer, DesignError, Draft
from ...designers.designer import OnText
from ..records import Kind
from ..released import iter_samples
from .engine import DataEngine, EngineSummary
from .filters import Filter
from .records import EngineSample, Step


try:
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

    def facts(self) -> tuple[dict[str, Any], int]:
        return self.judge.settings, self.judge.max_new_tokens

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
            self._settings, max_new_tokens = ray.get(self._workers[0].facts.remote())
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

    Ray is started on this machine, or found by `RAY_ADDRESS`, if `ray.init` was not called before.

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
