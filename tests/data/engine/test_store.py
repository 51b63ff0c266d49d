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
"""The ledger and the shards of the data engine."""

import multiprocessing
import sqlite3
import threading

import pyarrow.parquet as pq
import pytest

from diffusers_dim.data.engine.store import CAPTION_COLUMNS, EDIT_COLUMNS, Answer, Ledger, Shard
from diffusers_dim.files import write_lines


ANSWER = Answer("assess", "fits ☃", {"assessment": "fits", "n": 1}, "", True, 5, 100, 0.25, 0.5)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        yield ledger


def put_many(path, name, count):
    with Ledger(path) as ledger:
        for number in range(count):
            ledger.put(f"{name}-{number}", ANSWER)


class TestLedger:
    def test_gives_back_what_was_put(self, ledger):
        bad = Answer("assess", "...", None, "there is no sense in it.", finished=False)
        ledger.put("a", ANSWER)
        ledger.put("b", bad)
        assert (ledger.get("a"), ledger.get("b"), ledger.get("c")) == (ANSWER, bad, None)

    def test_is_read_by_the_next_process(self, ledger):
        ledger.put("a", ANSWER)
        with Ledger(ledger.path) as other:  # the first one is not closed, as after a kill
            assert other.get("a") == ANSWER

    def test_keeps_the_first_answer_and_counts_the_cost_of_both(self, ledger):
        ledger.put("a", ANSWER)
        ledger.put("a", Answer("assess", "other", tokens=7, prompt_tokens=1, money=2.0))
        assert ledger.get("a") == ANSWER
        assert ledger.totals() == {"calls": 2, "tokens": 12, "prompt_tokens": 101, "money": 2.5, "seconds": 0.0}

    def test_counts_calls_without_an_answer(self, ledger):
        ledger.fail("assess", "The server gave up.", 1.0)
        assert ledger.totals()["calls"] == 1

    def test_knows_the_dearest_call_of_each_step(self, ledger):
        ledger.put("a", ANSWER)
        ledger.put("b", Answer("assess", "", tokens=1, prompt_tokens=1, money=0.75))
        ledger.put("c", Answer("imagine", "", tokens=3))
        assert ledger.largest() == {
            "assess": {"tokens": 105, "money": 0.75},
            "imagine": {"tokens": 3, "money": 0.0},
        }

    def test_lists_what_was_dropped_in_order(self, ledger):
        ledger.drop("key", "s-1", "1.png", "filter", "tiny", "8x8")
        ledger.drop("key", "s-2", "2.png", "assess", "misfit")
        assert list(ledger.dropped()) == [
            {"id": "s-1", "image_path": "1.png", "stage": "filter", "reason": "tiny", "details": "8x8"},
            {"id": "s-2", "image_path": "2.png", "stage": "assess", "reason": "misfit", "details": ""},
        ]

    def test_lists_more_than_it_reads_at_once(self, ledger):
        ledger.set_dropped(0, None, ((n, "key", f"s-{n}", "", "filter", "tiny", "") for n in range(2500)))
        assert [row["id"] for row in ledger.dropped()] == [f"s-{n}" for n in range(2500)]

    def test_says_anew_what_was_dropped_of_a_part(self, ledger):
        ledger.set_dropped(0, None, [(n, "key", f"s-{n}", "", "filter", "tiny", "") for n in range(6)])
        ledger.set_dropped(2, 4, [(3, "key", "s-3", "", "check", "too long", "")])
        assert [row["id"] for row in ledger.dropped()] == ["s-0", "s-1", "s-3", "s-4", "s-5"]
        assert [row["stage"] for row in ledger.dropped()][2] == "check"

    def test_leaves_the_list_as_it_was_if_a_part_cannot_be_said(self, ledger):
        ledger.set_dropped(0, None, [(0, "key", "s-0", "", "filter", "tiny", "")])
        with pytest.raises(OSError, match="UNIQUE"):
            ledger.set_dropped(0, None, [(1, "key", "s-1", "", "filter", "tiny", "")] * 2)
        assert [row["id"] for row in ledger.dropped()] == ["s-0"]

    def test_keeps_facts(self, ledger):
        ledger.set_fact("settings", {"a": [1]})
        ledger.set_fact("settings", {"a": [2]})
        assert ledger.get_fact("settings") == {"a": [2]}
        assert ledger.get_fact("other") is None

    def test_is_shared_by_threads(self, ledger):
        def put(name):
            for number in range(50):
                ledger.put(f"{name}-{number}", ANSWER)
                assert ledger.get(f"{name}-{number}") == ANSWER

        threads = [threading.Thread(target=put, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ledger.totals()["calls"] == 200

    def test_file_is_shared_by_processes_that_open_it_together(self, tmp_path):
        fork = multiprocessing.get_context("fork")
        path = tmp_path / "ledger.sqlite"
        processes = [fork.Process(target=put_many, args=(path, name, 50)) for name in "abcd"]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 4
        with Ledger(path) as ledger:
            assert ledger.totals()["calls"] == 200

    def test_full_disk_is_a_clear_error_and_what_was_kept_stays(self, ledger):
        ledger.put("a", ANSWER)
        pages = ledger._connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OSError, match=r"ledger\.sqlite cannot be read or written: database or disk is full"):
            ledger.put("b", Answer("assess", "x" * 100_000))
        assert ledger.get("a") == ANSWER

    def test_refuses_a_file_that_is_no_ledger(self, tmp_path):
        (tmp_path / "ledger.sqlite").write_text("a poem" * 1000)
        with pytest.raises(OSError, match=r"ledger\.sqlite cannot be read or written: file is not a database"):
            Ledger(tmp_path / "ledger.sqlite")

    def test_is_a_plain_sqlite_file(self, ledger):
        ledger.put("a", ANSWER)
        connection = sqlite3.connect(ledger.path)
        assert connection.execute("SELECT step, text, tokens FROM answers").fetchall() == [("assess", "fits ☃", 5)]
        connection.close()


class TestShard:
    def test_has_the_columns_of_edits_and_empty_texts_for_what_is_not_there(self, tmp_path):
        with Shard(tmp_path / "data-00000.parquet", EDIT_COLUMNS) as shard:
            shard.write({"id": "s", "source": b"\x89", "target": b"\xff", "prompt": "p", "other": 1})
            shard.finish()
        table = pq.read_table(tmp_path / "data-00000.parquet")
        assert table.column_names == list(EDIT_COLUMNS)
        row = table.to_pylist()[0]
        assert (row["source"], row["prompt"], row["edit_type"]) == (b"\x89", "p", "")

    def test_appears_only_when_it_is_finished(self, tmp_path):
        path = tmp_path / "data-00000.parquet"
        with Shard(path, CAPTION_COLUMNS) as shard:
            for _ in range(300):
                shard.write({"id": "s", "target": b"x"})
            assert not path.exists()
            shard.finish()
        assert pq.read_table(path).num_rows == 300

    def test_leaves_the_file_that_was_there_and_nothing_aside_if_it_is_not_finished(self, tmp_path):
        path = tmp_path / "data-00000.parquet"
        path.write_bytes(b"before")
        with pytest.raises(KeyError), Shard(path, CAPTION_COLUMNS) as shard:
            for _ in range(300):
                shard.write({"id": "s", "target": b"x"})
            raise KeyError
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert path.read_bytes() == b"before"

    def test_without_rows_removes_the_file_that_was_there(self, tmp_path):
        path = tmp_path / "data-00000.parquet"
        path.write_bytes(b"before")
        with Shard(path, CAPTION_COLUMNS) as shard:
            shard.finish()
        assert not path.exists()

    def test_row_groups_are_bounded_by_bytes(self, tmp_path):
        path = tmp_path / "data-00000.parquet"
        with Shard(path, CAPTION_COLUMNS) as shard:
            for _ in range(5):
                shard.write({"id": "s", "target": bytes(17 * 1024 * 1024)})
            shard.finish()
        assert pq.ParquetFile(path).metadata.num_row_groups == 3

    def test_unwritable_folder_is_a_clear_error(self, tmp_path):
        (tmp_path / "file").touch()
        with Shard(tmp_path / "file" / "data-00000.parquet", CAPTION_COLUMNS) as shard:
            shard.write({"id": "s"})
            with pytest.raises(OSError, match=r"data-00000\.parquet cannot be written: .*Not a directory.*run again"):
                shard.finish()


def test_lines_are_written_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "dropped.jsonl"
    write_lines(path, ["a", "☃"])

    def broken():
        yield "b"
        raise KeyError

    with pytest.raises(KeyError):
        write_lines(path, broken())
    assert path.read_text() == "a\n☃\n"
