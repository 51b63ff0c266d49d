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
"""The data engine: steps, order, repairs, drops, kills, budgets."""

import json
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import threading
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
from rule_judge import Ask, RuleJudge, data_files, edit_steps, pair, picture

from diffusers_dim.data import load_training_data
from diffusers_dim.data.engine.engine import REPAIR_PROMPT, WINDOW, Budget, DataEngine, EngineSummary, Prices
from diffusers_dim.data.engine.filters import Tiny
from diffusers_dim.data.engine.records import EngineSample
from diffusers_dim.data.engine.store import EDIT_COLUMNS
from diffusers_dim.designers import Conversation, DesignError, Draft, FunctionDesigner


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "set"


def read_rows(folder):
    return [row for path in sorted(folder.glob("data-*.parquet")) for row in pq.read_table(path).to_pylist()]


def read_dropped(folder):
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def make(folder, samples, judge=None, steps=None, **kwargs):
    judge = judge or RuleJudge()
    return DataEngine(steps or edit_steps(), judge, folder, **kwargs).run(samples, progress=False)


def say(**by_instruction):
    """A rule that answers "edit_N" in its own way, one answer after another while there are some."""
    left = {name.replace("_", " "): list(answers) for name, answers in by_instruction.items()}
    lock = threading.Lock()

    def rule(conversation):
        with lock:
            answers = left.get(conversation.instruction)
            return answers.pop(0) if answers else None

    return rule


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class TestRows:
    def test_have_what_each_step_found(self, folder):
        summary = make(folder, [pair(0), pair(1)])
        row = read_rows(folder)[1]
        assert list(row) == list(EDIT_COLUMNS)
        assert row["instruction"] == "edit 1"
        assert row["assessment"] == "assess: edit 1"
        assert row["better_instruction"] == "optimise: edit 1"
        assert row["prompt"] == "imagine: edit 1"
        assert (row["id"], row["source"], row["key"]) == ("sample-1", pair(1).source, pair(1).key)
        assert (summary.samples, summary.kept, summary.calls, summary.asked) == (2, 2, 6, 6)
        assert (summary.prompt_tokens, summary.tokens) == (600, 60)

    @pytest.mark.parametrize("concurrency", [1, 16])
    def test_are_the_same_in_order_whatever_the_concurrency(self, folder, tmp_path, concurrency):
        def slow_at_random(conversation):
            time.sleep(random.uniform(0, 0.004))

        samples = [pair(number) for number in range(50)]
        make(folder, samples, RuleJudge(concurrency, rule=slow_at_random), concurrency=concurrency, shard_size=20)
        make(tmp_path / "other", samples, shard_size=20)
        assert [row["id"] for row in read_rows(folder)] == [sample.id for sample in samples]
        assert data_files(folder) == data_files(tmp_path / "other")
        assert len(data_files(folder)) == 4

    def test_of_single_pictures_have_the_columns_of_captions(self, folder):
        sample = EngineSample("a", picture((1, 2, 3)), image_path="a.png")
        make(folder, [sample], steps=[Ask("caption", "prompt")])
        assert read_rows(folder) == [
            {"id": "a", "image_path": "a.png", "target": sample.target, "prompt": "caption: ", "key": sample.key}
        ]

    def test_given_samples_are_left_as_they_were(self, folder):
        sample = pair(0)
        make(folder, [sample])
        assert sample.columns == {}
        assert "pictures" not in vars(sample)

    def test_texts_that_are_not_unicode_are_kept_as_far_as_they_are(self, folder):
        judge = RuleJudge(rule=lambda conversation: Draft("half a pair: \ud800"))
        make(folder, [pair(0, id="\udfff-id", instruction="\ud800")], judge)
        assert read_rows(folder)[0]["prompt"] == "half a pair: ?"
        assert read_rows(folder)[0]["id"] == "?-id"

    def test_are_read_by_datasets(self, folder, tmp_path):
        datasets = pytest.importorskip("datasets")
        make(folder, [pair(number) for number in range(3)], shard_size=2)
        files = sorted(map(str, folder.glob("data-*.parquet")))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows.column_names == list(EDIT_COLUMNS)
        assert rows["id"] == ["sample-0", "sample-1", "sample-2"]

    def test_are_trained_from(self, folder, tmp_path):
        pytest.importorskip("datasets")
        make(folder, [pair(number) for number in range(3)], shard_size=2)
        data = load_training_data("edit", dataset_name=str(folder), cache_dir=str(tmp_path / "cache"))
        sample = data[2]
        assert (len(data), sample["id"], sample["prompt"]) == (3, "sample-2", "imagine: edit 2")
        assert sample["source"].getpixel((0, 0)) == (2, 0, 0)
        assert sample["target"].getpixel((0, 0)) == (2, 0, 255)


class TestAsking:
    def test_has_as_many_conversations_in_flight_as_allowed_but_no_more(self, folder):
        judge = RuleJudge(16, seconds=0.1)
        make(folder, (pair(number) for number in range(64)), judge, concurrency=16)
        assert judge.most_at_once == 16

    def test_a_slow_answer_holds_up_no_other_sample_and_no_step_of_one(self, folder):
        def first_is_slow(conversation):
            if conversation.turns[0] == "assess: edit 0":
                wait_until(lambda: len(judge.asked) == 1 + (WINDOW * 4 - 1) * 3)

        judge = RuleJudge(rule=first_is_slow)
        make(folder, [pair(number) for number in range(WINDOW * 4)], judge, concurrency=4)
        assert len(read_rows(folder)) == WINDOW * 4

    def test_a_judge_of_less_concurrency_is_called_as_often_as_needed(self, folder):
        judge = RuleJudge(3, seconds=0.005)
        make(folder, [pair(number) for number in range(40)], judge, concurrency=12)
        assert 3 < judge.most_at_once <= 12

    def test_a_judge_that_says_nothing_of_concurrency_is_called_by_one_thread(self, folder):
        judge = RuleJudge(1, seconds=0.001)
        make(folder, [pair(number) for number in range(20)], judge)
        assert judge.most_at_once == 1
        assert len(judge.asked) == 60

    def test_any_designer_is_a_judge(self, folder):
        make(folder, [pair(0)], FunctionDesigner(lambda image, instruction: f"do {instruction}"))
        assert read_rows(folder)[0]["prompt"] == "do edit 0"

    def test_the_same_content_under_two_names_is_asked_once_and_kept_twice(self, folder):
        judge = RuleJudge(seconds=0.002)
        samples = [pair(0), pair(0, id="again"), *(pair(number) for number in range(1, 60)), pair(0, id="late")]
        make(folder, samples, judge)
        assert max(Counter(judge.asked).values()) == 1
        assert [row["id"] for row in read_rows(folder)] == [sample.id for sample in samples]

    def test_how_many_samples_are_in_memory_is_bounded(self, folder):
        taken, taken_meanwhile = [], []

        def first_is_slow(conversation):
            if conversation.instruction == "edit 0":
                wait_until(lambda: len(taken) == WINDOW * 4)
                time.sleep(0.1)
                taken_meanwhile.append(len(taken))

        samples = (pair(number) for number in range(100))
        judge = RuleJudge(rule=first_is_slow)
        make(folder, samples, judge, [Ask("caption", "prompt")], filters=[lambda s: taken.append(s.id)], concurrency=4)
        # The first one holds up the rows of all others.
        assert taken_meanwhile == [WINDOW * 4]
        assert len(read_rows(folder)) == 100


class TestBadAnswers:
    def test_are_asked_for_once_more_with_what_is_wrong(self, folder):
        judge = RuleJudge(rule=say(edit_0=[Draft("rubbish", 1, True, 1)]))
        summary = make(folder, [pair(0)], judge)
        again = ("assess: edit 0", "rubbish", REPAIR_PROMPT.replace("{problem}", "there is no sense in it."))
        assert judge.asked[:2] == [again[:1], again]
        assert (summary.kept, summary.calls) == (1, 4)

    def test_that_were_cut_off_are_asked_for_once_more(self, folder):
        judge = RuleJudge(rule=say(edit_0=[Draft("<think>long", finished=False)]))
        make(folder, [pair(0)], judge)
        assert judge.asked[1][1:] == ("...", REPAIR_PROMPT.replace("{problem}", judge_words(judge)))

    def test_that_stay_bad_drop_the_sample_for_good(self, folder):
        judge = RuleJudge(rule=say(edit_1=[None, Draft("rubbish"), Draft("rubbish")]))
        summary = make(folder, [pair(0), pair(1)], judge)
        assert read_dropped(folder) == [
            {
                "id": "sample-1",
                "image_path": "1.png",
                "stage": "optimise",
                "reason": "unreadable answer",
                "details": "there is no sense in it. It wrote: 'rubbish'",
            }
        ]
        assert (summary.kept, summary.dropped, summary.calls) == (1, {"optimise": {"unreadable answer": 1}}, 6)
        again = make(folder, iter([pair(0), pair(1)]), judge)
        assert (again.asked, again.dropped) == (0, summary.dropped)

    def test_the_first_one_is_not_paid_again_after_a_failure_of_the_second(self, folder):
        judge = RuleJudge(rule=say(edit_0=[Draft("rubbish"), DesignError("Asked twice, refused.")]))
        summary = make(folder, [pair(0)], judge)
        assert summary.dropped == {"assess": {"judge failed": 1}}
        make(folder, [pair(0)], judge)
        assert [len(turns) for turns in judge.asked] == [1, 3, 3, 1, 1]

    def test_a_refusal_is_listed_and_asked_again_by_the_next_run(self, folder):
        judge = RuleJudge(rule=say(edit_1=[DesignError("The server refused: too tired.")]))
        samples = [pair(number) for number in range(3)]
        summary = make(folder, samples, judge)
        assert (summary.kept, summary.failed, summary.calls) == (2, 1, 7)
        assert read_dropped(folder)[0]["details"] == "The server refused: too tired."
        summary = make(folder, samples, judge)
        assert (summary.kept, summary.failed, summary.asked, summary.calls) == (3, 0, 3, 10)
        assert [row["id"] for row in read_rows(folder)] == ["sample-0", "sample-1", "sample-2"]
        assert read_dropped(folder) == []

    def test_a_judge_that_forgets_some_is_said_to_have_failed(self, folder):
        class Forgetful(RuleJudge):
            def write(self, conversations, on_text):
                yield from list(super().write(conversations, on_text))[1:]

        summary = make(folder, [pair(0)], Forgetful(1))
        assert summary.dropped == {"assess": {"judge failed": 1}}

    def test_an_answer_is_kept_even_if_its_reading_has_a_fault(self, folder):
        class Faulty(Ask):
            def read(self, text, sample):
                raise ZeroDivisionError

        judge = RuleJudge()
        with pytest.raises(ZeroDivisionError):
            make(folder, [pair(0)], judge, [Faulty("assess", "assessment")])
        summary = make(folder, [pair(0)], judge, [Ask("assess", "assessment")])
        assert (summary.kept, summary.asked, len(judge.asked)) == (1, 0, 1)


def judge_words(judge):
    return f"it was cut off after {judge.max_new_tokens} tokens; be brief."


class TestDrops:
    def test_of_all_stages_are_listed_with_reason_and_details(self, folder):
        judge = RuleJudge(rule=say(edit_1=[Draft("misfits")]))
        samples = [pair(number) for number in range(4)]

        def short(sample):
            return "too long: 17 of 3 tokens" if sample.columns["prompt"].endswith("2") else None

        def refused(sample):
            return "identical" if sample.id == "sample-3" else None

        summary = make(folder, samples, judge, filters=[Tiny(8), refused], checks=[short])
        assert [(row["id"], row["stage"], row["reason"], row["details"]) for row in read_dropped(folder)] == [
            ("sample-1", "assess", "misfit", '{"assessment": "misfits"}'),
            ("sample-2", "check", "too long", "17 of 3 tokens"),
            ("sample-3", "filter", "identical", ""),
        ]
        assert summary.dropped == {
            "assess": {"misfit": 1},
            "check": {"too long": 1},
            "filter": {"identical": 1},
        }
        assert (summary.samples, summary.kept, summary.calls) == (4, 1, 3 + 1 + 3)

    def test_a_picture_that_nothing_filters_but_nobody_can_read_is_dropped(self, folder):
        summary = make(folder, [pair(0, target=b"no picture"), pair(1)])
        assert (summary.kept, summary.dropped, summary.calls) == (1, {"assess": {"unreadable": 1}}, 3)
        assert "cannot be read as a picture" in read_dropped(folder)[0]["details"]

    def test_filters_remember_nothing_of_an_earlier_run(self, folder):
        class Unique:
            def __init__(self):
                self.seen = set()

            def __call__(self, sample):
                known = sample.key in self.seen
                self.seen.add(sample.key)
                return "known" if known else None

        engine = DataEngine(edit_steps(), RuleJudge(), folder, filters=[Unique()])
        samples = [pair(0), pair(1), pair(0, id="again")]
        assert engine.run(samples, progress=False).kept == 2
        assert engine.run(samples, progress=False).kept == 2


class TestGoingOn:
    def test_a_finished_run_returns_at_once(self, folder):
        samples = [pair(number) for number in range(5)]
        summary = make(folder, samples)
        files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if "data" in path.name}
        judge = RuleJudge()
        again = make(folder, samples, judge)
        assert again == EngineSummary(**vars(summary) | {"asked": 0})
        assert judge.asked == []
        assert files == {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if "data" in path.name}

    def test_more_samples_ask_only_for_what_is_new(self, folder):
        make(folder, [pair(number) for number in range(5)], shard_size=2)
        judge = RuleJudge()
        summary = make(folder, [pair(number) for number in range(8)], judge, shard_size=2)
        assert (summary.kept, len(judge.asked), len(read_rows(folder))) == (8, 9, 8)

    def test_fewer_samples_leave_no_rows_of_the_others(self, folder):
        make(folder, [pair(number) for number in range(8)], shard_size=2)
        summary = make(folder, [pair(number) for number in range(3)], shard_size=2)
        assert (summary.kept, summary.asked) == (3, 0)
        assert [row["id"] for row in read_rows(folder)] == ["sample-0", "sample-1", "sample-2"]

    def test_lost_files_are_made_anew_without_asking(self, folder):
        samples = [pair(number) for number in range(5)]
        make(folder, samples, shard_size=2)
        files = data_files(folder)
        (folder / "data-00001.parquet").unlink()
        assert make(folder, samples, shard_size=2).asked == 0
        assert data_files(folder) == files

    def test_other_settings_of_a_step_ask_anew_from_there_if_the_answers_differ(self, folder):
        samples = [pair(number) for number in range(4)]
        make(folder, samples)
        judge = RuleJudge()
        make(folder, samples, judge, edit_steps(version=2))
        assert Counter(turns[0].partition(":")[0] for turns in judge.asked) == {"optimise": 4}
        # Back again is for nothing.
        assert make(folder, samples, judge).asked == 0

    def test_another_judge_is_asked_for_all(self, folder):
        samples = [pair(number) for number in range(4)]
        make(folder, samples)
        assert make(folder, samples, RuleJudge(model="other")).asked == 12

    def test_files_of_other_settings_are_gone_before_the_first_question(self, folder):
        make(folder, [pair(number) for number in range(4)], shard_size=1)
        files = []

        def look(conversation):
            files.extend(data_files(folder))
            return DesignError("no")

        make(folder, [pair(0)], RuleJudge(rule=look), edit_steps(version=2), shard_size=1)
        assert files == []

    def test_a_changed_filter_is_heeded(self, folder):
        samples = [pair(number) for number in range(4)]
        assert make(folder, samples, filters=[Tiny(8)]).kept == 4
        assert make(folder, samples, filters=[Tiny(9)]).kept == 0
        assert read_rows(folder) == []

    def test_a_judge_that_breaks_down_loses_nothing(self, folder):
        def breaks(conversation):
            if conversation.instruction == "edit 9":
                raise ConnectionError("The server cannot be reached.")

        samples = [pair(number) for number in range(20)]
        with pytest.raises(ConnectionError, match="cannot be reached"):
            make(folder, samples, RuleJudge(rule=breaks))
        with sqlite3.connect(folder / "ledger.sqlite") as connection:
            kept = connection.execute("SELECT count(*) FROM answers").fetchone()[0]
        assert kept >= 9
        judge = RuleJudge()
        assert make(folder, samples, judge).kept == 20
        assert len(judge.asked) == 60 - kept

    def test_samples_that_break_off_lose_nothing(self, folder):
        def samples():
            yield from (pair(number) for number in range(10))
            raise ValueError("data.jsonl, line 11 is not JSON.")

        judge = RuleJudge()
        with pytest.raises(ValueError, match="line 11"):
            make(folder, samples(), judge)
        summary = make(folder, [pair(number) for number in range(10)], judge)
        assert (summary.kept, len(judge.asked)) == (10, 30)

    def test_ctrl_c_waits_for_what_is_paid_for(self, folder, request):
        asked = threading.Event()
        # A shell has its background jobs ignore it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

        def rule(conversation):
            asked.set()
            time.sleep(1.0)

        def interrupt():
            asked.wait(10)
            time.sleep(0.05)  # while the engine waits for answers
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        judge = RuleJudge(rule=rule)
        with pytest.raises(KeyboardInterrupt):
            make(folder, [pair(number) for number in range(4)], judge, concurrency=4)
        thread.join()
        assert len(judge.asked) == 4
        judge = RuleJudge()
        assert make(folder, [pair(number) for number in range(4)], judge).kept == 4
        assert len(judge.asked) == 8

    def test_nothing_is_lost_doubled_or_paid_twice_by_twenty_kills(self, folder, tmp_path):
        count, concurrency, kills = 150, 4, 20
        log = tmp_path / "log"
        log.touch()
        samples = [pair(number) for number in range(count)]

        def go():
            judge = RuleJudge(concurrency, 0.005, log)
            make(folder, (pair(number) for number in range(count)), judge, concurrency=concurrency, shard_size=10)
            os._exit(0)

        generator = random.Random(7)
        fork = multiprocessing.get_context("fork")
        for _ in range(kills):
            size = log.stat().st_size
            kept = read_kept(folder)
            process = fork.Process(target=go)
            process.start()
            answers = generator.randrange(16)
            wait_until(lambda: log.read_bytes()[size:].count(b"\n") >= answers or not process.is_alive())  # noqa: B023
            time.sleep(generator.uniform(0.0, 0.005 if answers else 0.1))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert not kept & set(log.read_text()[size:].splitlines())
        killed_at = len(read_kept(folder))
        assert 0 < killed_at < 3 * count

        size = log.stat().st_size
        summary = make(folder, samples, RuleJudge(concurrency, 0, log), concurrency=concurrency, shard_size=10)
        assert summary.asked == len(log.read_text()[size:].splitlines()) == 3 * count - killed_at
        answered = Counter(log.read_text().splitlines())
        assert len(answered) == 3 * count
        assert answered.total() - len(answered) <= kills * concurrency
        make(tmp_path / "other", samples, shard_size=10)
        assert data_files(folder) == data_files(tmp_path / "other")
        assert not list(folder.glob(".*.aside"))


def read_kept(folder):
    """The first turns that are answered in a folder's ledger, as the rule judge repeats them."""
    if not (folder / "ledger.sqlite").exists():
        return set()
    connection = sqlite3.connect(folder / "ledger.sqlite")
    try:
        return {text for (text,) in connection.execute("SELECT text FROM answers")}
    except sqlite3.OperationalError:  # killed before there was a table
        return set()
    finally:
        connection.close()


class TestBudget:
    PRICES = Prices(1000.0, 10_000.0)  # 0.2 a call

    @pytest.mark.parametrize(
        ("budget", "calls"),
        [
            (Budget(calls=7), 7),
            (Budget(calls=0), 0),
            (Budget(tokens=7 * 110), 7),
            (Budget(tokens=8 * 110 - 1), 7),
            (Budget(money=1.4000001), 7),
        ],
    )
    def test_stops_before_the_call_that_would_exceed_it(self, folder, budget, calls):
        judge = RuleJudge(seconds=0.001)
        samples = [pair(number) for number in range(20)]
        summary = make(folder, samples, judge, budget=budget, prices=self.PRICES)
        assert summary.calls == len(judge.asked) == calls
        assert summary.stopped.partition(":")[0] in ("calls", "tokens", "money")
        finished = sum(turns[0].startswith("imagine") for turns in judge.asked)
        assert summary.kept == len(read_rows(folder)) == finished
        assert summary.money == pytest.approx(0.2 * calls)
        assert summary.samples == summary.kept + summary.unfinished

    def test_a_larger_one_goes_on(self, folder):
        judge = RuleJudge()
        samples = [pair(number) for number in range(10)]
        make(folder, samples, judge, budget=Budget(calls=7))
        assert make(folder, samples, judge, budget=Budget(calls=7)).asked == 0
        summary = make(folder, samples, judge, budget=Budget(calls=30))
        assert (summary.kept, summary.asked, summary.calls, summary.stopped) == (10, 23, 30, None)

    def test_of_seconds_stops_and_counts_all_runs(self, folder):
        judge = RuleJudge(1, seconds=0.05)
        samples = [pair(number) for number in range(20)]
        summary = make(folder, samples, judge, budget=Budget(seconds=0.3), concurrency=1)
        assert 1 <= len(judge.asked) < 10
        assert summary.stopped == "seconds: 0.3"
        assert make(folder, samples, judge, budget=Budget(seconds=0.3)).asked == 0

    def test_leaves_what_an_earlier_run_had_finished(self, folder):
        judge = RuleJudge(rule=say(edit_1=[DesignError("tired")]))
        samples = [pair(number) for number in range(10)]
        make(folder, samples, judge, shard_size=4)
        summary = make(folder, samples, judge, shard_size=4, budget=Budget(calls=1))
        assert (summary.kept, summary.unfinished, summary.asked) == (9, 1, 0)
        assert len(read_rows(folder)) == 9

    def test_samples_beyond_are_not_gone_through(self, folder):
        taken = []

        def samples():
            for number in range(1000):
                taken.append(number)
                yield pair(number)

        make(folder, samples(), budget=Budget(calls=3))
        assert len(taken) < 50

    def test_a_judge_that_counts_no_tokens_is_an_error_where_they_matter(self, folder):
        judge = RuleJudge(rule=lambda conversation: Draft("yes"))
        with pytest.raises(ValueError, match="does not count its tokens"):
            make(folder, [pair(0)], judge, budget=Budget(tokens=1000))

    def test_makes_sense_or_is_refused(self, folder):
        with pytest.raises(ValueError, match="`calls` has to be at least 0, but is -1"):
            Budget(calls=-1)
        with pytest.raises(ValueError, match="`per_million_tokens` has to be at least 0"):
            Prices(1.0, float("nan"))
        with pytest.raises(ValueError, match="needs `prices`"):
            DataEngine(edit_steps(), RuleJudge(), folder, budget=Budget(money=1.0))


class TestEstimate:
    def test_extrapolates_calls_and_drops_from_a_sample_that_is_not_paid_twice(self, folder):
        def half_misfit(conversation):
            number = int(conversation.instruction.split()[1])
            return Draft("misfits", 10, True, 100) if number % 10 >= 5 else None

        judge = RuleJudge(seconds=0.005, rule=half_misfit)
        engine = DataEngine(edit_steps(), judge, folder, prices=Prices(1.0, 10.0))
        samples = [pair(number) for number in range(200)]
        estimate = engine.estimate(samples, count=40)
        assert (estimate.samples, estimate.drawn, estimate.kept) == (200, 40, 100)
        assert estimate.dropped == {"assess": {"misfit": 20}}
        assert estimate.calls == 100 * 3 + 100
        assert (estimate.prompt_tokens, estimate.tokens) == (40_000, 4_000)
        assert estimate.money == pytest.approx(400 * 200 / 1e6)
        assert 400 * 0.005 / 8 < estimate.seconds < 400 * 0.5 / 8
        asked = len(judge.asked)
        assert asked == 20 * 3 + 20
        assert not list(folder.glob("data-*"))
        summary = engine.run(samples, progress=False)
        assert summary.calls == len(judge.asked) == estimate.calls
        assert summary.asked == estimate.calls - asked

    def test_draws_from_a_stream_of_unknown_length(self, folder):
        judge = RuleJudge()
        estimate = DataEngine(edit_steps(), judge, folder).estimate((pair(n) for n in range(100)), count=10)
        assert (estimate.samples, estimate.drawn, estimate.calls, len(judge.asked)) == (100, 10, 300, 30)
        numbers = {int(turns[0].split()[-1]) for turns in judge.asked}
        assert max(numbers) > 50

    def test_of_fewer_samples_than_asked_for_is_exact(self, folder):
        estimate = DataEngine(edit_steps(), RuleJudge(), folder).estimate(iter([pair(0), pair(1)]))
        assert (estimate.samples, estimate.drawn, estimate.calls) == (2, 2, 6)

    def test_says_what_is_wrong_with_what_it_is_given(self, folder):
        engine = DataEngine(edit_steps(), RuleJudge(), folder, budget=Budget(calls=2))
        with pytest.raises(ValueError, match="no samples"):
            engine.estimate([])
        with pytest.raises(ValueError, match="`count` has to be at least 1"):
            engine.estimate([pair(0)], count=0)
        with pytest.raises(ValueError, match=r"budget \(calls: 2\) is used up"):
            engine.estimate([pair(0)])


class TestFolder:
    def test_has_a_summary_with_settings(self, folder):
        summary = make(folder, [pair(0)], filters=[Tiny(4)])
        told = json.loads((folder / "summary.json").read_text())
        assert {name: told[name] for name in vars(summary)} == vars(summary)
        assert told["settings"]["judge"]["model"] == "rule"
        assert told["settings"]["steps"][2] == {"step": "imagine", "version": 1}
        assert told["settings"]["filters"] == [repr(Tiny(4))]

    def test_in_use_by_another_run_is_an_error(self, folder):
        def second(conversation):
            with pytest.raises(ValueError, match="in use by another run"):
                make(folder, [pair(0)])

        assert make(folder, [pair(0)], RuleJudge(rule=second)).kept == 1

    def test_that_cannot_be_made_is_an_error(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"file/set cannot be written to: .*Choose another"):
            make(tmp_path / "file" / "set", [pair(0)])

    def test_on_a_full_disk_is_a_clear_error_and_what_was_finished_stays(self, folder):
        # A limit on the size of files stands for the disk's end.
        large = [pair(n, target=picture((n, 0, 255)) + os.urandom(400_000)) for n in range(12)]
        judge = RuleJudge()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            with pytest.raises(OSError, match=r"data-00001\.parquet cannot be written: .*File too large.*run again"):
                make(folder, [pair(0), *large], judge, shard_size=3, steps=[Ask("caption", "prompt")], concurrency=2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)


def test_arguments_make_sense_or_are_refused(folder):
    for kwargs, words in (
        ({"steps": []}, "one or more"),
        ({"steps": [Ask("assess", "a"), Ask("assess", "b")]}, "different names"),
        ({"steps": edit_steps(), "concurrency": 0}, "`concurrency` has to be at least 1"),
        ({"steps": edit_steps(), "shard_size": 0}, "`shard_size` has to be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            DataEngine(judge=RuleJudge(), output_dir=folder, **kwargs)


def test_pairs_and_single_pictures_do_not_mix(folder):
    with pytest.raises(ValueError, match="Sample 'a' is no pair"):
        make(folder, [pair(0), EngineSample("a", picture((1, 2, 3)))])


def test_a_place_that_is_free_is_taken_at_once(tmp_path):
    """Of eight places, seven stay taken until a ninth question has come."""
    ninth, asked = threading.Event(), []

    def answer(conversation):
        asked.append(conversation)
        if len(asked) == 9:
            ninth.set()
        if len(asked) > 1:
            assert ninth.wait(20)

    summary = make(tmp_path, [pair(number) for number in range(9)], RuleJudge(8, rule=answer), edit_steps()[:1])
    assert summary.kept == 9


def test_a_judge_that_takes_no_files_is_shown_pictures(tmp_path):
    shown = []

    class Show(Ask):
        def conversation(self, sample):
            return Conversation((f"{self.name}: {sample.instruction}",), sample.shown[0], others=sample.shown[1:])

    def look(conversation):
        shown.append([type(picture).__name__ for picture in conversation.images])

    judge = RuleJudge(rule=look)
    make(tmp_path / "pictures", [pair(0)], judge, [Show("assess", "assessment")])
    judge.max_file_pixels = 8 * 8
    make(tmp_path / "files", [pair(1)], judge, [Show("assess", "assessment")])
    assert shown == [["Image"] * 2, ["PictureFile"] * 2]
