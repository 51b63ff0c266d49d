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
"""Runs samples through filters and a judge's steps into a folder of Parquet, so that no paid answer is ever lost."""

import copy
import hashlib
import heapq
import json
import os
import random
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tqdm.auto import tqdm

from ...designers import Conversation, Designer, DesignError, Draft
from ...designers.designer import ask_again, describe_cut
from ...files import remove_leftovers, write_lines
from .filters import Filter
from .records import EngineSample, Step, answer_key, repair_key
from .store import CAPTION_COLUMNS, EDIT_COLUMNS, Answer, Ledger, Shard


REPAIR_PROMPT = """\
That is not usable: {problem}

Answer once more, in exactly the form that was asked for, and write nothing else."""

# How many samples may be under way, for each conversation in flight: the rest waits for those before it in order.
WINDOW = 4
# How many threads decode and look at the samples that come next.
READERS = 2
# How many conversations are made ready before there is a place for them.
PREPARED = 4

FILTER, CHECK = "filter", "check"  # stages that are no step
JUDGE_FAILED, UNREADABLE_ANSWER = "judge failed", "unreadable answer"  # reasons; the first one is not final


@dataclass(frozen=True)
class Prices:
    """
    What a judge costs, in any unit of money.

    Args:
        per_million_prompt_tokens (`float`): For a million tokens that it reads.
        per_million_tokens (`float`): For a million tokens that it writes.

    Raises:
        ValueError: If one is below 0.
    """

    per_million_prompt_tokens: float
    per_million_tokens: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"`{name}` has to be at least 0, but is {value}.")

    def money(self, prompt_tokens: int, tokens: int) -> float:
        """The price of a call."""
        return (prompt_tokens * self.per_million_prompt_tokens + tokens * self.per_million_tokens) / 1e6


@dataclass(frozen=True)
class Budget:
    """
    How much a folder may take, over all runs on it. No call is begun that would exceed it, where a call is taken to
    need as much as the dearest one of its step did so far. A step's first call, of which nothing is known, is made
    alone.

    Args:
        money (`float`, *optional*): In the unit of the prices.
        calls (`int`, *optional*): Answers that the judge is asked for, second tries too.
        tokens (`int`, *optional*): Read and written.
        seconds (`float`, *optional*): Of runs. Calls that are under way then are waited for.

    Raises:
        ValueError: If one is below 0.
    """

    money: float | None = None
    calls: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise ValueError(f"A budget's `{name}` has to be at least 0, but is {value}.")


@dataclass
class EngineSummary:
    """
    What became of a folder's samples, and what that took over all runs on it.

    Args:
        samples (`int`): Samples gone through; the sum of the next three.
        kept (`int`): Rows of the Parquet files.
        dropped (`dict[str, dict[str, int]]`): How many were not kept, by stage and reason.
        unfinished (`int`): Samples that the budget was not enough for. More may not have been looked at.
        calls (`int`): How often the judge was asked.
        prompt_tokens, tokens (`int`): What it read and wrote.
        money (`float`): What that cost.
        seconds (`float`): How long all runs took.
        asked (`int`): Of the calls, those of this run.
        stopped (`str`, *optional*): The budget that was used up, if one was.
    """

    samples: int = 0
    kept: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    unfinished: int = 0
    calls: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    money: float = 0.0
    seconds: float = 0.0
    asked: int = 0
    stopped: str | None = None

    @property
    def failed(self) -> int:
        """Samples that the judge failed at; the next run asks again for them."""
        return sum(reasons.get(JUDGE_FAILED, 0) for reasons in self.dropped.values())

    @classmethod
    def load(cls, path: Path) -> "EngineSummary":
        """What a run's `summary.json` says."""
        facts = json.loads(path.read_text(encoding="utf-8"))
        del facts["settings"]
        return cls(**facts)


@dataclass(frozen=True)
class Estimate:
    """
    What a whole set would take, by some of its samples.

    Args:
        samples (`int`): Of the set.
        drawn (`int`): How many of them were run.
        kept (`int`): Rows that are to be expected.
        dropped (`dict[str, dict[str, int]]`): How many of the drawn ones are not kept, by stage and reason.
        calls, prompt_tokens, tokens (`int`), money (`float`):
            To be expected for the whole set; the drawn ones, which are paid for now, are among it.
        seconds (`float`): The judge's time for the whole set.
    """

    samples: int
    drawn: int
    kept: int
    dropped: dict[str, dict[str, int]]
    calls: int
    prompt_tokens: int
    tokens: int
    money: float
    seconds: float


@dataclass(eq=False)
class _Job:
    """A sample on its way. `state` is "" until it is "kept", "dropped" or "unfinished"."""

    place: int
    sample: EngineSample
    step: int = 0
    key: str = ""  # of the answer that comes next
    turns: tuple[str, ...] = ()  # the unusable answer, and what was said to it
    prepared: "Future[Conversation] | None" = None
    answers: dict[str, Answer] = field(default_factory=dict)
    state: str = ""
    stage: str = ""
    reason: str = ""
    details: str = ""

    def end(self, state: str, stage: str = "", reason: str = "", details: str = "") -> None:
        self.state, self.stage, self.reason, self.details = state, stage, reason, details
        self.sample.forget_pictures()


class _Meter:
    """What was spent, beside what may be."""

    def __init__(self, ledger: Ledger, budget: Budget, prices: Prices | None):
        self.ledger, self.budget, self.prices = ledger, budget, prices
        self.spent = ledger.totals()
        self.largest = ledger.largest()
        self.asked = 0
        self._before, self._start, self._told = self.spent["seconds"], time.monotonic(), 0.0

    def price(self, draft: Draft) -> float:
        return 0.0 if self.prices is None else self.prices.money(draft.prompt_tokens, draft.tokens)

    def seconds(self) -> float:
        """Of all runs so far. The ledger is told about once a second."""
        seconds = self._before + time.monotonic() - self._start
        if seconds - self._told > 1:
            self.tell()
        return seconds

    def tell(self) -> None:
        self._told = self._before + time.monotonic() - self._start
        self.ledger.set_fact("seconds", self._told)

    def add(self, step: str, answer: Answer | None) -> None:
        """Counts a call; `None` if it gave no answer."""
        self.asked += 1
        self.spent["calls"] += 1
        if answer is None:
            return
        tokens = answer.tokens + answer.prompt_tokens
        if not tokens and (self.budget.tokens, self.budget.money) != (None, None):
            raise ValueError(
                "The judge does not count its tokens, so that a budget of tokens or money cannot be kept: give one of"
                " calls or seconds."
            )
        for name in ("tokens", "prompt_tokens", "money"):
            self.spent[name] += getattr(answer, name)
        largest = self.largest.setdefault(step, {"tokens": 0, "money": 0.0})
        largest["tokens"] = max(largest["tokens"], tokens)
        largest["money"] = max(largest["money"], answer.money)

    def exceeded(self, step: str, pending: Counter[str]) -> str | None:
        """Which part of the budget one more call might exceed, with the calls that are under way."""
        budget, count = self.budget, pending.total() + 1
        if budget.calls is not None and self.spent["calls"] + count > budget.calls:
            return f"calls: {budget.calls}"
        spent = {"tokens": self.spent["tokens"] + self.spent["prompt_tokens"], "money": self.spent["money"]}
        counts = pending + Counter([step])  # without those of which none is under way
        for unit in ("tokens", "money"):
            limit = getattr(budget, unit)
            if limit is None:
                continue
            unknown = any(name not in self.largest for name in counts)
            cost = sum(number * self.largest[name][unit] for name, number in counts.items() if name in self.largest)
            # A probe of unknown cost goes alone.
            if spent[unit] >= limit or spent[unit] + cost > limit or (unknown and count > 1):
                return f"{unit}: {limit}"
        return None


class DataEngine:
    r"""
    Makes a set: each sample goes through the filters, is asked about step by step, and is checked; what is left is a
    row of a Parquet file in `output_dir`, what is not a line of `dropped.jsonl` with stage, reason and details.

    Rows are in the samples' order, file `data-00000.parquet` with those of the first `shard_size` samples. Each answer
    of the judge is kept in `ledger.sqlite` as it comes. A run that was stopped or killed is started again in the same
    way: it asks for nothing that was answered, and what it then makes is as if it had not been stopped. What the judge
    failed at (refusals, a server that gave up) is asked again by the next run. Other steps or another judge ask only
    for what depends on them, and the Parquet files are made anew.

    Args:
        steps (`Sequence[Step]`): What is asked, in order. Each may read what those before it found.
        judge ([`Designer`]):
            Who answers. One with an attribute `concurrency`, as [`OpenAIDesigner`] has it, is called from several
            threads at once; any other one is called by one thread after another.
        output_dir (`str` or `os.PathLike`): The set's folder; made if it is not there. One run uses it at a time.
        filters (`Sequence[Callable]`):
            Called with each sample, in order, before anything is asked; they return `None` or why it is dropped, as
            "reason: details". Each run uses copies, so that what they remember does not outlast it.
        checks (`Sequence[Callable]`): The same, called with what the steps found in `sample.columns`.
        concurrency (`int`, defaults to 8): How many conversations may be in flight at once.
        budget ([`Budget`], *optional*): At which a run stops; a later one with a larger budget goes on.
        prices ([`Prices`], *optional*): By which money is counted.
        shard_size (`int`, defaults to 1000): How many samples a Parquet file is for.

    Raises:
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        judge: Designer,
        output_dir: str | os.PathLike[str],
        filters: Sequence[Filter] = (),
        checks: Sequence[Filter] = (),
        concurrency: int = 8,
        budget: Budget | None = None,
        prices: Prices | None = None,
        shard_size: int = 1000,
    ):
        names = [step.name for step in steps]
        if not names or len(set(names)) < len(names) or {FILTER, CHECK} & set(names):
            raise ValueError(f"`steps` have to be one or more of different names, but are {names}.")
        for name, value in (("concurrency", concurrency), ("shard_size", shard_size)):
            if value < 1:
                raise ValueError(f"`{name}` has to be at least 1, but is {value}.")
        if budget is not None and budget.money is not None and prices is None:
            raise ValueError("A budget of money needs `prices`, which are not given.")
        self.steps = list(steps)
        self.judge = judge
        self.output_dir = Path(output_dir)
        self.dropped_path = self.output_dir / "dropped.jsonl"
        self.summary_path = self.output_dir / "summary.json"
        self.filters = list(filters)
        self.checks = list(checks)
        self.concurrency = concurrency
        self.budget = budget or Budget()
        self.prices = prices
        self.shard_size = shard_size

    @property
    def settings(self) -> dict[str, Any]:
        """What the set depends on besides the samples; JSON values, nothing secret."""
        return {
            "steps": [step.settings for step in self.steps],
            "judge": self.judge.settings,
            "filters": [_describe(item) for item in self.filters],
            "checks": [_describe(item) for item in self.checks],
            "shard_size": self.shard_size,
        }

    def run(self, samples: Iterable[EngineSample], progress: bool = True) -> EngineSummary:
        """
        Makes the set, or what is left of it.

        Args:
            samples (`Iterable[EngineSample]`):
                Of any number; some are in memory at a time. All are pairs, or all single pictures. If it can be gone
                through twice, as a list can and a generator cannot, a finished folder is only compared with it.
            progress (`bool`, defaults to `True`): Whether to show a bar.

        Raises:
            OSError: If the folder is full or cannot be written. What was finished stays.
            ValueError: If the folder is in use by another run, or the samples make no sense.
            Exception: What the judge raises for all that it is asked. What was finished stays.
        """
        settings = self.settings
        with self._open() as ledger:
            summary = self._finished(ledger, settings, samples)
            if summary is not None:
                return summary
            if ledger.get_fact("settings") != settings:
                # Files of other settings are not to be taken for these, should this run be killed in their midst.
                for path in (*self.output_dir.glob("data-*.parquet"), self.dropped_path, self.summary_path):
                    path.unlink(missing_ok=True)
                ledger.set_dropped(0, None, ())
                ledger.set_fact("reached", 0)
                ledger.set_fact("settings", settings)
            ledger.set_fact("finished", None)
            return self._run(ledger, settings, samples, progress)

    def _run(
        self, ledger: Ledger, settings: dict[str, Any], samples: Iterable[EngineSample], progress: bool
    ) -> EngineSummary:
        flow = _Flow(self, ledger, samples, ledger.get_fact("reached") or 0)
        summary = EngineSummary()
        total = len(samples) if isinstance(samples, Sized) else None
        jobs = iter(flow)
        job = next(jobs, None)
        columns = CAPTION_COLUMNS if job is not None and job.sample.source is None else EDIT_COLUMNS
        number = 0
        with tqdm(total=total, desc="Samples", disable=not progress) as bar:
            while job is not None:
                start, stop = number * self.shard_size, (number + 1) * self.shard_size
                dropped = []
                with Shard(self.output_dir / f"data-{number:05}.parquet", columns) as shard:
                    while job is not None and job.place < stop:
                        summary.samples += 1
                        if job.state == "kept":
                            summary.kept += 1
                            shard.write(_row(job.sample))
                        elif job.state == "dropped":
                            _count(summary.dropped, job)
                            told = (job.sample.key, job.sample.id, job.sample.image_path)
                            dropped.append((job.place, *told, job.stage, job.reason, job.details))
                        else:
                            summary.unfinished += 1
                        money = {"money": f"{flow.meter.spent['money']:.2f}"} if self.prices else {}
                        bar.set_postfix(kept=summary.kept, calls=flow.meter.spent["calls"], **money, refresh=False)
                        bar.update()
                        job = next(jobs, None)
                    shard.finish()
                ledger.set_dropped(start, stop, dropped)
                ledger.set_fact("reached", max(flow.reached, summary.samples))
                number += 1
        flow.meter.tell()
        for name, value in ledger.totals().items():
            setattr(summary, name, value)
        summary.asked, summary.stopped = flow.meter.asked, flow.stopped
        if summary.stopped is None:
            for path in self.output_dir.glob("data-*.parquet"):
                if int(path.stem.removeprefix("data-")) >= number:  # of more samples that were given before
                    path.unlink()
            ledger.set_dropped(number * self.shard_size, None, ())
        write_lines(self.dropped_path, (json.dumps(row, ensure_ascii=False) for row in ledger.dropped()))
        self._write_summary(summary, settings)
        if summary.stopped is None and not summary.failed:
            shards = len(list(self.output_dir.glob("data-*.parquet")))
            ledger.set_fact("finished", {**asdict(summary), "digest": flow.digest.hexdigest(), "shards": shards})
        return summary

    def estimate(self, samples: Iterable[EngineSample], count: int = 20) -> Estimate:
        """
        Says what a run would take, by running some samples. What is asked for that is kept in the ledger, so that the
        run does not ask for it again; no rows are written.

        Args:
            samples (`Iterable[EngineSample]`):
                The whole set. Of a sequence only those that are needed are looked at; else all are gone through.
            count (`int`, defaults to 20): How many to run, drawn evenly. Duplicates of those not drawn are not seen.

        Raises:
            OSError: If the folder is full or cannot be written.
            ValueError: If `count` is below 1, there are no samples, or the budget is not enough; else as in `run`.
        """
        if count < 1:
            raise ValueError(f"`count` has to be at least 1, but is {count}.")
        drawn, total = _draw(samples, count)
        if not drawn:
            raise ValueError("There are no samples to estimate by.")
        answers: dict[str, Answer] = {}
        dropped: dict[str, dict[str, int]] = {}
        kept = settled = 0
        with self._open() as ledger:
            flow = _Flow(self, ledger, drawn, 0)
            for job in flow:
                if job.state != "unfinished":
                    settled += 1
                    kept += job.state == "kept"
                    answers |= job.answers
                if job.state == "dropped":
                    _count(dropped, job)
            flow.meter.tell()
        if not settled:
            raise ValueError(f"The budget ({flow.stopped}) is used up before one sample is finished: raise it.")
        failed = sum(reasons.get(JUDGE_FAILED, 0) for reasons in dropped.values())
        share = total / settled

        def expected(name: str) -> float:
            return share * sum(getattr(answer, name) for answer in answers.values())

        return Estimate(
            samples=total,
            drawn=settled,
            kept=round(share * kept),
            dropped=dropped,
            calls=round(share * (len(answers) + failed)),
            prompt_tokens=round(expected("prompt_tokens")),
            tokens=round(expected("tokens")),
            money=expected("money"),
            seconds=expected("seconds") / (min(self.concurrency, total) if flow.takes_many else 1),
        )

    @contextmanager
    def _open(self) -> Iterator[Ledger]:
        """The folder's ledger, while no other run has the folder."""
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            # A lock of SQLite's own goes with the process, however that ends.
            lock = sqlite3.connect(self.output_dir / ".lock", timeout=0, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise OSError(f"{self.output_dir} cannot be written to: {error}. Choose another `output_dir`.") from error
        try:
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise OSError(f"{self.output_dir} cannot be written to: {error}.") from error
                raise ValueError(
                    f"{self.output_dir} is in use by another run: wait for it, or choose another `output_dir`."
                ) from error
            remove_leftovers(self.output_dir)
            for aside in self.output_dir.glob(".*.aside"):  # of a run that was killed, too
                aside.unlink()
            with Ledger(self.output_dir / "ledger.sqlite") as ledger:
                yield ledger
        finally:
            lock.close()

    def _write_summary(self, summary: EngineSummary, settings: dict[str, Any]) -> None:
        facts = json.dumps({**asdict(summary), "settings": settings}, indent=2, ensure_ascii=False)
        write_lines(self.summary_path, [facts])

    def _finished(
        self, ledger: Ledger, settings: dict[str, Any], samples: Iterable[EngineSample]
    ) -> EngineSummary | None:
        """The summary of a run before, if it finished this very set and its files are there."""
        finished = ledger.get_fact("finished")
        if (
            finished is None
            or ledger.get_fact("settings") != settings
            # What cannot be told from its description may be another now.
            or not all(is_dataclass(item) for item in (*self.filters, *self.checks))
            or finished.pop("shards") != len(list(self.output_dir.glob("data-*.parquet")))
            or not (self.dropped_path.exists() and self.summary_path.exists())
            or iter(samples) is samples
        ):
            return None
        digest = hashlib.sha256()
        for sample in samples:
            _digest(digest, sample)
        if digest.hexdigest() != finished.pop("digest"):
            return None
        return EngineSummary(**finished | {"asked": 0})


class _Flow:
    """
    Samples on their way, given back in order once each is kept, dropped or given up. One thread runs it; the threads
    of calls only ask, keep the answers and report.
    """

    def __init__(self, engine: DataEngine, ledger: Ledger, samples: Iterable[EngineSample], reached: int):
        self.steps, self.judge, self.concurrency = engine.steps, engine.judge, engine.concurrency
        self.filters, self.checks = copy.deepcopy((engine.filters, engine.checks))
        self.judge_settings = self.judge.settings
        # A judge that takes many at once says how many.
        many = getattr(self.judge, "concurrency", 1)
        self.takes_many = many > 1
        self.width = min(self.concurrency, many) if self.takes_many else self.concurrency
        self.ledger = ledger
        self.meter = _Meter(ledger, engine.budget, engine.prices)
        self.source: Iterator[EngineSample] = iter(samples)
        # What remembers nothing is called ahead and in threads, in which pictures are decoded.
        self.filters_ahead = list(takewhile(_is_frozen, self.filters))
        self.coming: deque[tuple[EngineSample, Future[str | None]]] = deque()
        self.reached = reached  # how many samples a run before has gone through
        self.taken = 0
        self.exhausted = False
        self.is_pair: bool | None = None
        self.digest = hashlib.sha256()
        self.stopped: str | None = None
        self.window: deque[_Job] = deque()
        self.ready: list[tuple[int, _Job]] = []  # the first in order first, so that samples are finished soon
        self.wanted: dict[str, list[_Job]] = {}  # by the answer they wait for
        self.pending: Counter[str] = Counter()  # conversations in flight, by step
        self.calls: dict[Future[None], set[_Job]] = {}
        self.results: SimpleQueue[tuple[_Job, Answer | ValueError] | Future[None]] = SimpleQueue()

    def __iter__(self) -> Iterator[_Job]:
        # Leaving it waits for the calls under way, also after an error or Ctrl-C: they are paid for.
        calls = ThreadPoolExecutor(self.concurrency if self.takes_many else 1)
        with calls as pool, ThreadPoolExecutor(READERS) as readers:
            while True:
                limit = self.meter.budget.seconds
                if limit is not None and self.meter.seconds() >= limit and self.stopped is None:
                    self._stop(f"seconds: {limit}")
                took = self._take(readers)
                self._call(pool, filling=took)
                # What comes next is made ready while there is no place for it.
                for _, job in heapq.nsmallest(PREPARED, self.ready):
                    if job.prepared is None:
                        job.prepared = readers.submit(self._prepare, job)
                if self.calls and not took:
                    self._handle(self.results.get())
                while not self.results.empty():
                    self._handle(self.results.get())
                self.meter.seconds()
                while self.window and self.window[0].state:
                    yield self.window.popleft()
                if self.exhausted and not self.window:
                    return

    def _take(self, readers: ThreadPoolExecutor) -> bool:
        """Takes in the next sample, if there is one and room for it."""
        # After the budget's end as far as a run before came, so that what that had finished stays.
        self.exhausted |= self.stopped is not None and self.taken >= self.reached
        full = len(self.window) >= WINDOW * self.concurrency or len(self.ready) >= self.concurrency
        if self.exhausted or full:
            return False
        while len(self.coming) <= READERS and (given := next(self.source, None)) is not None:
            sample = copy.copy(given)
            sample.columns = dict(given.columns)
            for name in ("id", "instruction", "image_path", "image_path_target"):
                setattr(sample, name, _plain(str(getattr(sample, name))))
            self.coming.append((sample, readers.submit(_look_at, sample, self.filters_ahead)))
        if not self.coming:
            self.exhausted = True
            return False
        sample, looking = self.coming.popleft()
        why = looking.result()
        _digest(self.digest, sample)
        job = _Job(self.taken, sample)
        self.taken += 1
        self.window.append(job)
        if self.is_pair not in (None, sample.source is not None):
            raise ValueError(
                f"Sample {sample.id!r} is {'no' if self.is_pair else 'a'} pair of pictures, unlike others."
            )
        self.is_pair = sample.source is not None
        why = why or _find_reason(sample, self.filters[len(self.filters_ahead) :])
        if not self._dropped(job, FILTER, why):
            self._advance(job)
        return True

    def _dropped(self, job: _Job, stage: str, why: str | None) -> bool:
        if why:
            reason, _, details = why.partition(": ")
            job.end("dropped", stage, reason, details)
        return bool(why)

    def _advance(self, job: _Job) -> None:
        """Takes a sample as far as the answers go that are there."""
        while not job.state:
            if job.step == len(self.steps):
                if not self._dropped(job, CHECK, _find_reason(job.sample, self.checks)):
                    job.end("kept")
                return
            step = self.steps[job.step]
            job.key = job.key or answer_key(step, self.judge_settings, job.sample)
            answer = self.ledger.get(job.key)
            if answer is None:
                self._want(job)
                return
            job.answers[job.key] = answer
            columns, problem = answer.columns, answer.reason
            if columns is None and not problem:  # its reading was broken off
                columns, problem = self._read(step, job.sample, answer.text, answer.finished)
            if columns is None:
                if job.turns:
                    job.end("dropped", step.name, UNREADABLE_ANSWER, f"{problem} It wrote: {answer.text!r}")
                else:
                    job.turns = ask_again(answer.text, REPAIR_PROMPT, problem)
                    job.key = repair_key(job.key)
                continue
            job.sample.columns.update(columns)
            why = step.drop_reason(job.sample, columns)
            if self._dropped(job, step.name, why) and not job.details:
                job.details = json.dumps(columns, ensure_ascii=False)
            job.step, job.key, job.turns = job.step + 1, "", ()

    def _read(self, step: Step, sample: EngineSample, text: str, finished: bool) -> tuple[dict[str, Any] | None, str]:
        """An answer's columns, or what is wrong with it."""
        columns, problem = None, ""
        try:
            columns = step.read(text, sample)
        except ValueError as error:
            problem = str(error) or "it is not in the form that was asked for."
        if finished:
            return columns, problem
        return None, describe_cut(self.judge.max_new_tokens, problem)

    def _want(self, job: _Job) -> None:
        if self.stopped is not None:
            job.end("unfinished")
        elif job.key in self.wanted:  # asked for already, for the same content under another name
            self.wanted[job.key].append(job)
        else:
            self.wanted[job.key] = [job]
            heapq.heappush(self.ready, (job.place, job))

    def _call(self, pool: ThreadPoolExecutor, filling: bool) -> None:
        """
        Calls the judge for what is ready: one that takes many as soon as a place is free, any other one for as many
        at once as there are.
        """
        while self.ready:
            free = self.concurrency - self.pending.total() if self.takes_many or not self.calls else 0
            size = min(free, self.width, len(self.ready))
            if size <= 0 or (filling and not self.takes_many and size < min(free, self.width)):
                return
            jobs: list[_Job] = []
            while len(jobs) < size:
                step = self.steps[self.ready[0][1].step].name
                exceeded = self.meter.exceeded(step, self.pending)
                if exceeded is not None:
                    if not self.pending.total():
                        self._stop(exceeded)
                    break  # what is under way may cost less than it may
                jobs.append(heapq.heappop(self.ready)[1])
                self.pending[step] += 1
            if not jobs:
                return
            call = pool.submit(self._ask, jobs)
            self.calls[call] = set(jobs)
            call.add_done_callback(self.results.put)

    def _prepare(self, job: _Job) -> Conversation:
        conversation = self.steps[job.step].conversation(job.sample)
        return self.judge.prepare(replace(conversation, turns=conversation.turns + job.turns))

    def _ask(self, jobs: list[_Job]) -> None:
        """Has the judge answer, in a thread of its own. Each answer is in the ledger before it is reported."""
        conversations, asked = [], []
        for job in jobs:
            try:
                prepared, job.prepared = job.prepared, None
                conversations.append(self._prepare(job) if prepared is None else prepared.result())
            except ValueError as error:
                self.results.put((job, error))
                continue
            asked.append(job)
        if not asked:
            return
        start = last = time.monotonic()
        for place, draft in self.judge.write(conversations, _ignore):
            job, step, now = asked[place], self.steps[asked[place].step], time.monotonic()
            # Of several calls at once, each answer takes its own time; else they take turns.
            seconds, last = now - (start if self.takes_many else last), now
            if isinstance(draft, DesignError):
                self.ledger.fail(step.name, _plain(str(draft)), seconds)
                self.results.put((job, draft))
                continue
            answer = Answer(
                step=step.name,
                text=_plain(draft.text),
                finished=draft.finished,
                tokens=draft.tokens,
                prompt_tokens=draft.prompt_tokens,
                seconds=seconds,
                money=self.meter.price(draft),
            )
            try:
                columns, reason = self._read(step, job.sample, answer.text, draft.finished)
                answer = replace(answer, columns=columns, reason=reason)
            finally:  # it is paid for, also if the step's reading has a fault
                self.ledger.put(job.key, answer)
            self.results.put((job, answer))

    def _handle(self, result: "tuple[_Job, Answer | ValueError] | Future[None]") -> None:
        if isinstance(result, Future):
            left = self.calls.pop(result)
            result.result()  # raises what the call did
            for job in left:
                self._end(job, DesignError("The judge gave neither an answer nor a reason."))
            return
        job, answer = result
        for jobs in self.calls.values():
            jobs.discard(job)
        self._end(job, answer)

    def _end(self, job: _Job, answer: Answer | ValueError) -> None:
        """Passes on what came of a conversation to all that wait for it."""
        step = self.steps[job.step].name
        self.pending[step] -= 1
        if isinstance(answer, Answer):
            self.meter.add(step, answer)
        elif isinstance(answer, DesignError):
            self.meter.add(step, None)
        for waiting in self.wanted.pop(job.key):
            if isinstance(answer, Answer):
                self._advance(waiting)
            else:
                reason = JUDGE_FAILED if isinstance(answer, DesignError) else "unreadable"
                waiting.end("dropped", step, reason, _plain(str(answer)))

    def _stop(self, why: str) -> None:
        self.stopped = why
        for _, job in self.ready:
            for waiting in self.wanted.pop(job.key):
                waiting.end("unfinished")
        self.ready.clear()


def _look_at(sample: EngineSample, filters: Sequence[Filter]) -> str | None:
    """What can be found out of a sample by itself: its key, and why it is dropped."""
    sample.key  # noqa: B018 it stays in it
    return _find_reason(sample, filters)


def _find_reason(sample: EngineSample, filters: Sequence[Filter]) -> str | None:
    """Why the first of the filters that drops a sample does so, `None` if all let it pass."""
    for item in filters:
        try:
            why = item(sample)
        except ValueError as error:  # of a picture that cannot be read, where nothing drops it before
            why = f"unreadable: {error}"
        if why:
            return why
    return None


def _is_frozen(item: Filter) -> bool:
    return is_dataclass(item) and item.__dataclass_params__.frozen


def _ignore(index: int, text: str) -> None:
    """What becomes of an answer while it grows."""


def _plain(text: str) -> str:
    """Without halves of surrogate pairs, which neither SQLite nor Parquet takes."""
    return text.encode("utf-8", "replace").decode()


def _describe(item: Filter) -> str:
    """A filter's name, with its arguments where it is a dataclass."""
    if is_dataclass(item):
        return repr(item)
    return getattr(item, "__qualname__", type(item).__qualname__)


def _digest(digest: Any, sample: EngineSample) -> None:
    paths = (sample.id, sample.image_path, sample.image_path_target)
    digest.update(json.dumps([*map(str, paths), sample.key, sample.columns], sort_keys=True).encode())


def _row(sample: EngineSample) -> dict[str, Any]:
    names = ("id", "image_path", "image_path_target", "source", "target", "instruction", "key")
    return {**sample.columns, **{name: getattr(sample, name) for name in names}}


def _count(dropped: dict[str, dict[str, int]], job: _Job) -> None:
    reasons = dropped.setdefault(job.stage, {})
    reasons[job.reason] = reasons.get(job.reason, 0) + 1


def _draw(samples: Iterable[EngineSample], count: int) -> tuple[list[EngineSample], int]:
    """Some samples in order, evenly drawn, and how many there are."""
    if isinstance(samples, Sequence):
        total = len(samples)
        count = min(count, total)
        return [samples[place * total // count] for place in range(count)], total
    drawn: list[tuple[int, EngineSample]] = []
    generator, total = random.Random(0), 0
    for total, sample in enumerate(samples, start=1):
        # Each is as likely to be among them as any other, however many there are (reservoir sampling).
        place = total - 1 if total <= count else generator.randrange(total)
        if place < count:
            drawn[place : place + 1] = [(total, sample)]
    return [sample for _, sample in sorted(drawn, key=lambda item: item[0])], total
