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
"""The data engine on a real local Ray: the same sets, workers that die, drivers that are killed."""

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rule_judge import RuleJudge, data_files, edit_steps, pair

from diffusers_dim.data.engine.engine import Budget, DataEngine, Prices
from diffusers_dim.data.engine.filters import Identical, NearDuplicate
from diffusers_dim.data.engine.store import Ledger
from diffusers_dim.designers import DesignError, Draft


ray = pytest.importorskip("ray")
from diffusers_dim.data.engine import ray as engine_ray  # noqa: E402
from diffusers_dim.data.engine.ray import RayJudge, RaySamples, run_on_ray  # noqa: E402


WORKERS, CONCURRENCY = 2, 4


def noise(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((32, 32)).save(file, "PNG")
    return file.getvalue()


def noisy_pair(number, **fields):
    return pair(number, **{"source": noise(number), "target": noise(1000 + number), **fields})


def answer(conversation):
    """Of instructions with these words, in their way; all others as `RuleJudge` does."""
    word, *rest = conversation.instruction.split()
    if (word == "unclear" and len(conversation.turns) == 1) or word == "rubbish":
        return Draft("rubbish", 1, True, 1)
    if word == "refused":
        return DesignError("refused")
    if word == "misfit":
        return Draft("misfits", 2, True, 2)
    if word == "slow":
        time.sleep(0.2)
    if word == "raise":
        raise ConnectionError("the server is gone")
    if word == "die" or (word == "die-once" and not os.path.exists(rest[0])):
        Path(rest[0]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return None


def start_ray():
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        logging_level="ERROR",
        log_to_driver=False,
    )


def killed_samples():
    return [pair(number) for number in range(60)]


def drive(folder, log):
    """A driver to be killed."""
    start_ray()
    make_judge = partial(RuleJudge, seconds=0.02, log=log)
    run_on_ray(killed_samples(), edit_steps(), make_judge, folder, progress=False, workers=1, concurrency=CONCURRENCY)


@pytest.fixture(scope="module")
def worker_path():
    """Where workers import from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield


@pytest.fixture(scope="module")
def killed(worker_path, tmp_path_factory):
    """The folder of a driver that was killed in the midst: its set, and its judge's log."""
    folder = tmp_path_factory.mktemp("killed")
    log = folder / "log"
    # Forked before Ray is started here, so that it need not import all anew.
    process = multiprocessing.get_context("fork").Process(target=drive, args=(folder / "set", log))
    process.start()
    deadline = time.monotonic() + 100
    while not log.exists() or len(log.read_text().splitlines()) < 40:
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    return folder


@pytest.fixture(scope="module")
def cluster(killed):
    """Ray on two CPUs."""
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("judge") / "log"


@pytest.fixture(scope="module")
def judge(cluster, log):
    """Two workers for all tests, since each start imports the package."""
    with RayJudge(partial(RuleJudge, log=log, rule=answer), WORKERS, CONCURRENCY) as judge:
        yield judge


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def make(folder, samples, judge, **options):
    options = {"concurrency": WORKERS * CONCURRENCY, **options}
    return DataEngine(edit_steps(), judge, folder, **options).run(samples, progress=False)


def contents(folder):
    """Files of a set, and its summary but for times."""
    summary = json.loads((folder / "summary.json").read_text())
    return data_files(folder), {name: value for name, value in summary.items() if name != "seconds"}


def reasons(folder):
    return [json.loads(line)["reason"] for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_a_killed_driver_loses_nothing_that_came_back(killed):
    with Ledger(killed / "set" / "ledger.sqlite") as ledger:
        kept = ledger.totals()["calls"]
    assert 40 - CONCURRENCY <= kept < 180

    second = RuleJudge()
    summary = make(killed / "set", killed_samples(), second)
    assert (summary.kept, summary.calls, summary.asked) == (60, 180, 180 - kept)
    before = set((killed / "log").read_text().splitlines())
    again = before & {turns[0] for turns in second.asked}
    # Only what was under way when the driver was killed is asked again.
    assert len(again) <= CONCURRENCY


def test_a_set_is_the_one_of_a_run_without_ray(judge, folder, tmp_path):
    samples = [noisy_pair(number) for number in range(12)]
    for number, word in enumerate(("unclear", "rubbish", "refused", "misfit"), start=2):
        samples[number].instruction = f"{word} {number}"
    samples += [noisy_pair(5, id="the same again"), noisy_pair(20, target=noise(20))]
    options = {"filters": [Identical(), NearDuplicate(4)], "shard_size": 5, "prices": Prices(1e6, 2e6)}
    summary = make(folder, samples, judge, **options)
    make(tmp_path / "other", samples, RuleJudge(rule=answer), **options)
    assert contents(folder) == contents(tmp_path / "other")
    assert summary.kept == 9
    assert sorted(summary.dropped) == ["assess", "filter"]


def test_rows_of_a_ray_dataset_are_samples_in_order(judge, folder, tmp_path):
    from ray.data import DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    samples = [pair(number, image_path="", image_path_target="") for number in range(20)]
    columns = ("id", "source", "target", "instruction")
    rows = [{name: getattr(sample, name) for name in columns} for sample in samples]
    dataset = from_items(rows, override_num_blocks=5).map(lambda row: {**row, "more": 1})
    given = RaySamples(dataset, {name: name for name in columns})
    summary = make(folder, given, judge, shard_size=8)
    make(tmp_path / "other", samples, RuleJudge(), shard_size=8)
    assert summary.kept == 20
    assert data_files(folder) == data_files(tmp_path / "other")
    assert make(folder, given, judge, shard_size=8).asked == 0


def test_nothing_is_asked_that_was_answered_without_ray(judge, folder):
    samples = [pair(number) for number in range(6)]
    make(folder, samples[:4], RuleJudge())
    assert make(folder, samples, judge).asked == 6


def test_a_budget_stops_a_run_that_a_later_one_goes_on_with(judge, folder):
    samples = [pair(number) for number in range(10)]
    summary = make(folder, samples, judge, budget=Budget(calls=12))
    assert (summary.stopped, summary.calls) == ("calls: 12", 12)
    assert make(folder, samples, judge).asked == 18


def test_what_the_judge_raises_is_raised_as_it_was(judge, folder):
    with pytest.raises(ConnectionError, match="^the server is gone$"):
        make(folder, [pair(0, instruction="raise")], judge)
    assert judge._load == [0, 0]


def test_a_judge_in_workers_designs_too(judge):
    told = []
    texts = judge.rewrite([f"paint {number}" for number in range(10)], lambda index, text: told.append(index))
    assert all(f"paint {number}" in text for number, text in enumerate(texts))
    assert sorted(told) == list(range(10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "`workers` has to be at least 1, but is 0"),
        ({"concurrency": 0}, "`concurrency` has to be at least 1, but is 0"),
        ({"num_gpus": -1}, "`num_cpus` and `num_gpus` have to be at least 0, but are 0 and -1"),
        ({"workers": 3, "num_cpus": 1}, "3 workers need 3 CPUs, but the cluster has 2"),
        ({"num_gpus": 0.5}, "2 workers need 1 GPUs, but the cluster has 0"),
    ],
)
def test_arguments_that_make_no_sense_are_named(cluster, folder, options, message):
    with pytest.raises(ValueError, match=message):
        run_on_ray([pair(0)], edit_steps(), RuleJudge, folder, **options)


@pytest.mark.slow
def test_a_worker_that_cannot_start_its_judge_is_an_error(cluster):
    with pytest.raises(ValueError, match="A worker could not start its judge: .*unexpected keyword"):
        RayJudge(partial(RuleJudge, wrong=1), workers=1)


def test_a_worker_that_dies_is_replaced_and_its_samples_are_finished(judge, folder, log, tmp_path):
    samples = [pair(number, instruction=f"replaced {number}") for number in range(10)]
    samples[3].instruction = f"die-once {tmp_path / 'died'}"
    summary = make(folder, samples, judge)
    assert (tmp_path / "died").exists()
    assert (summary.kept, summary.dropped) == (10, {})
    asked = Counter(line for line in log.read_text().splitlines() if ": replaced" in line)
    # What the worker was at when it died may have been asked twice.
    assert len(asked) == 27 and asked.total() <= 27 + CONCURRENCY


@pytest.mark.slow
def test_a_sample_at_which_workers_die_is_dropped_and_asked_again_by_the_next_run(
    judge, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(engine_ray, "TRIES", 1)
    samples = [pair(number, instruction=f"dropped {number}") for number in range(2)]
    samples[0].instruction = f"die {tmp_path / 'died'}"
    summary = make(folder, samples, judge, concurrency=1)
    assert summary.dropped == {"assess": {"judge failed": 1}}
    assert "1 workers died at it" in (folder / "dropped.jsonl").read_text()
    assert make(folder, samples, RuleJudge()).asked == 3
