"""Measures the data engine: kills and drops, its own time a sample, its memory over many rows, workers on Ray.

    python benchmarks/data_engine.py faults overhead memory
    PYTHONPATH=RAY python benchmarks/data_engine.py ray
    python benchmarks/data_engine.py --preset small

Results go to `benchmarks/results/data_engine.json` (of another preset to `data_engine_PRESET.json`), one entry a
section with the command, versions and machine that it was measured with; `benchmarks/report.py` makes the tables of
`docs/data.md` of them.
"""

import concurrent.futures
import copy
import dataclasses
import importlib.metadata
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from bench import run_presets
from diffusers_dim import OpenAIDesigner
from diffusers_dim.data.engine import EDIT_STEPS, AreasAgree, DataEngine, Length, default_filters
from diffusers_dim.data.engine.filters import NearDuplicate
from diffusers_dim.data.engine.records import EngineSample, answer_key
from diffusers_dim.data.engine.store import Ledger
from diffusers_dim.data.released import read_samples
from diffusers_dim.designers import Blueprint, Conversation, Designer, Draft
from diffusers_dim.files import read_jsonl
from diffusers_dim.tiny.dataset import write_edits
from diffusers_dim.tiny.judge import PROMPTS, JudgeServer, TinyJudge
from measure import Unmeasured, measure, package_versions


PACKAGES = ("pyarrow", "openai", "ray")  # besides those of every benchmark
STATUS = Path("/proc/self/status")  # where Linux tells a process of its memory
CONCURRENCY = 8  # conversations in flight, the default of the engine and of `diffusers-dim data`
BY_CLOCK = 5  # every fifth kill falls between a start and its first question, the others at any question
PLACES = ("top left", "top right", "bottom left", "bottom right")
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 70, 220), "white": (250, 250, 250)}
PLACE_WORDS = re.compile(r"\b(?:left|right|top|bottom)\b")


@dataclass(frozen=True)
class DataBench:
    """
    What is run.

    Args:
        edits (`int`): Of the picture world, with planted faults.
        kills (`int`): Of the command that builds a set of them.
        error_rate (`float`): The share of verdicts and of blueprints in which the judge errs.
        answer_seconds (`float`): How long an answer takes, with planted faults and on Ray.
        samples (`int`): Of a run whose time is taken.
        sizes (`tuple[int, ...]`): Sides of their pictures, in pixels.
        runs (`int`): Of which the median is taken.
        rows (`int`): Over which memory is looked at.
        points (`int`): How often.
        ray_samples (`int`): Of a run on Ray.
    """

    edits: int
    kills: int
    error_rate: float
    answer_seconds: float
    samples: int
    sizes: tuple[int, ...]
    runs: int
    rows: int
    points: int
    ray_samples: int

    device = torch.device("cpu")


DATA_PRESETS = {
    "full": DataBench(2000, 20, 0.05, 0.05, 500, (64, 512), 3, 100_000, 10, 150),
    # For tests of the script.
    "small": DataBench(60, 1, 0.3, 0.005, 20, (64,), 3, 400, 4, 6),
}


def make_sample(number: int, size: int) -> EngineSample:
    """
    A pair of JPEGs: clouds of colour with a photograph's grain, no two alike, and the same with a square painted in.

    Args:
        number (`int`): Which one.
        size (`int`): Side in pixels; 512 gives files of some 90 kB.
    """
    generator = np.random.default_rng(number)
    clouds = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(clouds.resize((size, size), Image.Resampling.BICUBIC), np.int16)
    source = np.clip(pixels + generator.integers(-8, 9, (size, size, 1)), 0, 255).astype(np.uint8)
    target, place, colour = source.copy(), number % len(PLACES), list(COLOURS)[number // len(PLACES) % len(COLOURS)]
    top, left = size // 8 + place // 2 * size // 2, size // 8 + place % 2 * size // 2
    target[top : top + size // 4, left : left + size // 4] = COLOURS[colour]
    files = []
    for picture in (source, target):
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "JPEG", quality=90)
        files.append(data.getvalue())
    instruction = f"Paint a {colour} square in the {PLACES[place]}."
    return EngineSample(str(number), files[1], files[0], instruction, f"{number}_source.jpg", f"{number}_target.jpg")


class QuickJudge(Designer):
    """
    Answers what the engine asks about pairs of [`make_sample`], one conversation after another; a [`JudgeServer`] can
    have it, too.

    Args:
        seconds (`float`, defaults to 0.0): How long an answer takes.
    """

    def __init__(self, seconds: float = 0.0):
        super().__init__()
        self.seconds = seconds

    def prepare(self, conversation: Conversation) -> Conversation:
        """It looks at no picture, so that decoding them for a judge is none of the time measured."""
        return conversation

    def answer(self, text: str, pictures: Sequence[bytes] = ()) -> str:
        """What it writes in answer to a question."""
        step = next(name for name, prompt in PROMPTS.items() if text.endswith(prompt.rpartition("}")[2]))
        instruction, colour, place = re.search(r"Paint a (\w+) square in the (\w+ \w+)\.", text).group(0, 1, 2)
        if step == "assess":
            return f"Verdict: fits\nReason: A {colour} square was painted, as it says.\nEdit type: add"
        if step == "optimise":
            return instruction
        ground = "Soft clouds of many colours fill the whole picture, with the grain of an old photograph."
        blueprint = Blueprint(
            instruction,
            f"{ground} They blend into each other without edges.",
            "Each cloud is round and blurred; none has an outline. The grain is fine, and the same in all of them.",
            f"A part of the {place} receives a {colour} square; all else stays as it is.",
            f"{ground} In the {place} there is a plain {colour} square with sharp edges, flat and evenly filled.",
        )
        return str(blueprint)

    def write(self, conversations: Sequence[Conversation], on_text: Any) -> Iterator[tuple[int, Draft]]:
        for index, conversation in enumerate(conversations):
            if self.seconds:  # even no time would let other processes go first
                time.sleep(self.seconds)
            yield index, Draft(self.answer(conversation.turns[0]))


def run_engine(samples: Iterable[EngineSample], judge: Designer, **options: Any) -> None:
    """Makes a set in a folder that is thrown away, with filters, steps and checks as `diffusers-dim data build`."""
    options = {"filters": default_filters(), "checks": [AreasAgree(), Length()], "concurrency": CONCURRENCY, **options}
    with tempfile.TemporaryDirectory() as folder:
        summary = DataEngine([step() for step in EDIT_STEPS], judge, folder, **options).run(samples, progress=False)
    if summary.kept < summary.samples:
        raise RuntimeError(f"of samples that are all good some were dropped: {summary.dropped}")


def bench_faults(bench: DataBench) -> dict[str, Any]:
    """
    The command `diffusers-dim data build`, killed again and again, on edits with planted faults and a judge that errs.
    The judge's server is in this process, and outlives all kills.
    """
    with tempfile.TemporaryDirectory() as scratch:
        edits, built = Path(scratch, "edits"), Path(scratch, "built")
        write_edits(edits, bench.edits, seed=0, faults=True)
        judge = TinyJudge(edits, bench.error_rate)
        with JudgeServer(judge, seconds=bench.answer_seconds) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            calls = build_with_kills(bench, judge, server.url, edits, built)
            server.shutdown()
        rows = read_jsonl(edits / "edits.jsonl", ("id", "fault")).values()
        results = {"edits": bench.edits, "faults": Counter(row["fault"] or "none" for row in rows)}
        return results | calls | compare_drops(judge, list(rows), *read_built(built))


def build_with_kills(bench: DataBench, judge: TinyJudge, url: str, edits: Path, built: Path) -> dict[str, Any]:
    """
    Runs the command, kills it at random moments, and lets it end.

    Returns:
        `dict`: `kills` with the moment of each; how often the judge was `asked` for how many `questions`; of these
        `repeated`, whose answer the ledger had when the run that asked began, and `cut`, asked again since a kill came
        before the answer; and `ledger_calls`, what the ledger says.

    Raises:
        RuntimeError: If the command fails.
    """
    script = Path(sysconfig.get_path("scripts"), "diffusers-dim")
    command = [str(script), "data", "build", "--input", str(edits), "--output", str(built), "--model", "tiny-judge"]
    samples = list(read_samples(str(edits)))
    asked_of = [row for row in judge.rows if row["fault"] != "identical"]
    total = sum(1 if judge.verdict(row) == "misfits" else len(EDIT_STEPS) for row in asked_of)
    generator = random.Random(0)
    kills: list[dict[str, Any]] = []
    held: set[tuple[str, str]] = set()  # the questions that the ledger has an answer to
    repeated, start_seconds, begin = 0, 0.0, time.monotonic()
    for number in range(bench.kills + 1):
        before, start = judge.asked.copy(), time.monotonic()
        by_clock = number % BY_CLOCK == BY_CLOCK - 1
        wait = generator.uniform(0, start_seconds)  # at imports, or at what is gone through again
        # The first of so many moments drawn evenly from the questions that are left.
        share = 1 - generator.random() ** (1 / max(1, bench.kills - number))
        moment = before.total() + 1 + int(share * (total - len(before)))
        with open(built.with_name("log"), "wb") as log:
            process = subprocess.Popen([*command, "--base-url", url], stdout=log, stderr=log)
        try:
            while process.poll() is None:
                seconds = time.monotonic() - start
                start_seconds = start_seconds or (seconds if judge.asked else 0.0)
                reached = seconds >= wait if by_clock else judge.asked.total() >= moment
                if number < bench.kills and reached:
                    time.sleep(generator.uniform(0, bench.answer_seconds))
                    break
                time.sleep(0.002)
        finally:
            process.kill()
            process.wait()
        now = judge.asked.copy() - before
        repeated += sum(count for question, count in now.items() if question in held)
        if process.returncode != -signal.SIGKILL:
            break
        held = answered(built, samples)
        kills.append({"seconds": time.monotonic() - start, "asked": now.total(), "answers_in_ledger": len(held)})
    if process.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed: {' '.join(built.with_name('log').read_text().split())}")
    with Ledger(built / "ledger.sqlite") as ledger:
        ledger_calls = ledger.totals()["calls"]
    asked, questions = judge.asked.total(), len(judge.asked)
    return {
        "kills": kills,
        "seconds": time.monotonic() - begin,
        "asked": asked,
        "questions": questions,
        "repeated": repeated,
        "cut": asked - questions - repeated,
        "ledger_calls": ledger_calls,
    }


def answered(built: Path, samples: Sequence[EngineSample]) -> set[tuple[str, str]]:
    """The questions, by step and sample's id, to which the ledger of a run that was killed has the answer."""
    found: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ledger.sqlite", "ledger.sqlite-wal"):
            # A copy, so that the next run alone mends what the kill left.
            if (built / name).exists():
                shutil.copy(built / name, folder)
        with Ledger(Path(folder, "ledger.sqlite")) as ledger:
            settings = ledger.get_fact("settings")
            for sample in samples if settings else ():
                sample = dataclasses.replace(sample, columns={})
                for step in (step() for step in EDIT_STEPS):
                    answer = ledger.get(answer_key(step, settings["judge"], sample))
                    if answer is None:
                        break
                    found.add((step.name, sample.id))
                    if answer.columns is None or step.drop_reason(sample, answer.columns):
                        break
                    sample.columns.update(answer.columns)
    return found


def read_built(built: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The ids of a set's rows, and the lines of what was dropped."""
    paths = sorted(built.glob("data-*.parquet"))
    kept = [name for path in paths for name in pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()]
    return kept, [json.loads(line) for line in (built / "dropped.jsonl").read_text().splitlines()]


def compare_drops(
    judge: TinyJudge, rows: list[dict[str, Any]], kept: list[str], dropped: list[dict[str, Any]]
) -> dict[str, Any]:
    """
    What became of the edits, beside what was to be dropped: corrupt files and pairs of one picture, what the judge
    called misfits, and the blueprints that it placed elsewhere.
    """
    ended = Counter([*kept, *(line["id"] for line in dropped)])
    by_stage: dict[str, Counter[str]] = {}
    for line in dropped:
        by_stage.setdefault(line["stage"], Counter())[line["reason"]] += 1
    checked = {line["id"] for line in dropped if line["stage"] == "check"}
    before = {line["id"] for line in dropped} - checked
    misfits = {row["id"] for row in rows if row["fault"] in ("identical", "corrupt")}
    misfits |= {id for id, verdict in judge.said.items() if verdict == "misfits"}
    kinds = ("right", "mistaken, same place", "mistaken, another place")
    blueprints = {kind: {"kept": 0, "dropped": 0} for kind in kinds}
    misplaced = set()
    for row in rows:
        if row["id"] in checked or row["id"] in kept:
            kind = kinds[0] if (said := judge.blueprint(row)) == row["true_blueprint"] else kinds[1]
            if places(said) != places(row["true_blueprint"]):
                kind = kinds[2]
                misplaced.add(row["id"])
            blueprints[kind]["dropped" if row["id"] in checked else "kept"] += 1
    return {
        "kept": len(kept),
        "dropped": by_stage,
        "lost": sum(row["id"] not in ended for row in rows),
        "doubled": sum(count - 1 for count in ended.values()),
        "filters_and_assessment": agreement(misfits, before),
        "all_stages": agreement(misfits | misplaced, before | checked),
        "blueprints": blueprints,
    }


def places(blueprint: str) -> set[str]:
    """The sides of the picture that the fourth part of a blueprint of the picture world names."""
    return set(PLACE_WORDS.findall(Blueprint.parse(blueprint).edit_area_localization))


def agreement(expected: set[str], dropped: set[str]) -> dict[str, Any]:
    """Recall and precision of drops."""
    both = len(expected & dropped)
    return {
        "expected": len(expected),
        "dropped": len(dropped),
        "recall": both / len(expected) if expected else None,
        "precision": both / len(dropped) if dropped else None,
    }


def bench_overhead(bench: DataBench) -> dict[str, Any]:
    """
    The engine's time beside a judge that answers at once, and how much more the client of a server takes. Samples are
    in memory; the set is written to the folder of temporary files.
    """
    results: dict[str, Any] = {"samples": bench.samples}
    with serving_apart(QuickJudge()) as url:
        for size in bench.sizes:
            samples = [make_sample(number, size) for number in range(bench.samples)]
            client = OpenAIDesigner("quick-judge", base_url=url, concurrency=CONCURRENCY)
            results[str(size)] = time_samples(bench, samples, client)
    return results


def time_samples(bench: DataBench, samples: list[EngineSample], client: Designer) -> dict[str, Any]:
    """Milliseconds a sample, of the clock and of the processors, by this process alone."""

    def filter_all(filters: Sequence[Callable[[EngineSample], Any]]) -> None:
        for sample in samples:
            sample = copy.copy(sample)  # what it decodes does not stay
            for item in filters:
                item(sample)

    variants: dict[str, Callable[[], None]] = {
        "engine": lambda: run_engine(samples, QuickJudge()),
        "filters": lambda: filter_all(default_filters()),
        "decoding": lambda: filter_all([lambda sample: sample.pictures]),
        "engine_and_client": lambda: run_engine(samples, client),
    }
    processor_seconds: dict[str, list[float]] = {name: [] for name in variants}

    def timed(name: str) -> None:
        start = time.process_time()
        variants[name]()
        processor_seconds[name].append(time.process_time() - start)

    timings = measure({name: partial(timed, name) for name in variants}, bench.runs, bench.device, variants)
    scale = 1000 / len(samples)
    for name, timing in timings.items():
        if "seconds" in timing:
            timing["processor_seconds"] = processor_seconds[name]
            timing["milliseconds_a_sample"] = scale * timing["median_seconds"]
            timing["processor_milliseconds_a_sample"] = scale * statistics.median(processor_seconds[name])
    size = sum(len(sample.source or b"") + len(sample.target) for sample in samples) / (2 * len(samples))
    return {"bytes_a_picture": size, "variants": timings}


@contextmanager
def serving_apart(judge: Any) -> Iterator[str]:
    """The address of a judge's server in a process of its own, whose time does not count here."""
    with JudgeServer(judge) as server:
        process = multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True)
        process.start()
        try:
            yield server.url
        finally:
            process.terminate()
            process.join()


def bench_memory(bench: DataBench) -> dict[str, Any]:
    """Memory of a process that does nothing but stream samples through the engine."""
    if not STATUS.exists():
        raise Unmeasured("this system does not tell a process's peak memory as Linux does")
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(stream_rows, bench.rows, bench.points).result()


class SharedIndex(NearDuplicate):
    """The filter itself in the place of an engine's copy, so that its index can be looked at."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedIndex":
        return self

    @property
    def nbytes(self) -> int:
        """What it remembers."""
        held = len(self._ids)
        arrays = held * (self._hashes[:, :1].nbytes + self._changes[:1].nbytes) if held else 0
        return arrays + sys.getsizeof(self._ids) + sum(map(sys.getsizeof, self._ids))


def stream_rows(rows: int, points: int) -> dict[str, Any]:
    """
    Streams pairs of 64 px, made one by one, through the engine.

    Returns:
        `dict`: `points`, of each the `rows` so far, this process's `resident_bytes`, its `peak_bytes` ever and the
        `index_bytes` of the filter of near-duplicates among them; and from the first of them to the last the growth
        by 10,000 rows of each, a line fitted by least squares. The first point, of no rows, is left out of the lines.
    """
    index = SharedIndex()
    found: list[dict[str, int]] = []

    def look(number: int) -> None:
        status = STATUS.read_text()
        resident, peak = (int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 for name in ("VmRSS", "VmHWM"))
        found.append({"rows": number, "resident_bytes": resident, "peak_bytes": peak, "index_bytes": index.nbytes})

    def samples() -> Iterator[EngineSample]:
        look(0)
        for number in range(rows):
            yield make_sample(number, 64)
            if (number + 1) * points % rows < points:
                look(number + 1)

    start = time.monotonic()
    run_engine(samples(), QuickJudge(), filters=[*default_filters()[:-1], index])
    growth = {}
    for name in ("resident_bytes", "peak_bytes", "index_bytes"):
        line = statistics.linear_regression(*zip(*((point["rows"], point[name]) for point in found[1:])))
        growth[name] = 10_000 * line.slope
    return {"rows": rows, "seconds": time.monotonic() - start, "points": found, "growth_by_10000_rows": growth}


def bench_ray(bench: DataBench) -> dict[str, Any]:
    """
    One worker against two that answer one conversation after another, as local models do. Ray and the workers are
    started before.
    """
    try:
        import ray

        from diffusers_dim.data.engine.ray import RayJudge
    except ImportError as error:
        raise Unmeasured(f"Ray cannot be imported: {error}") from error
    samples = [make_sample(number, 64) for number in range(bench.ray_samples)]
    ray.init(
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}},
    )
    try:
        with ExitStack() as stack:
            judges = {
                workers: stack.enter_context(RayJudge(partial(QuickJudge, bench.answer_seconds), workers, CONCURRENCY))
                for workers in (1, 2)
            }

            def run(workers: int, samples: list[EngineSample]) -> None:
                run_engine(samples, judges[workers], concurrency=workers * CONCURRENCY)

            timings = measure(
                {f"{workers}": partial(run, workers, samples) for workers in judges},
                bench.runs,
                bench.device,
                {f"{workers}": partial(run, workers, samples[: 2 * CONCURRENCY]) for workers in judges},
            )
    finally:
        ray.shutdown()
    medians = [timing["median_seconds"] for timing in timings.values() if "median_seconds" in timing]
    return {
        "samples": bench.ray_samples,
        "seconds_of_one_judge": len(EDIT_STEPS) * bench.ray_samples * bench.answer_seconds,
        "workers": timings,
        "times_faster": medians[0] / medians[1] if len(medians) == 2 else None,
    }


SECTIONS: dict[str, Callable[[DataBench], dict[str, Any]]] = {
    "faults": bench_faults,
    "overhead": bench_overhead,
    "memory": bench_memory,
    "ray": bench_ray,
}


def main() -> None:
    versions = package_versions() | {name: version for name in PACKAGES if (version := installed(name))}
    run_presets("data_engine", __doc__, SECTIONS, DATA_PRESETS, {"versions": versions})


def installed(name: str) -> str | None:
    """The version of a package, `None` without it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
