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
"""What the data engine keeps on disk: a ledger of answers and of what was dropped, and shards of rows."""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO


BUSY_SECONDS = 60.0  # how long another process may hold the ledger
SYNC_SECONDS = 1.0  # between the moments at which the ledger is safe from a power cut, too
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 256, 32 * 1024 * 1024  # of a shard, whichever is reached first

DROPPED = ("id", "image_path", "stage", "reason", "details")
# The columns of rows, with which are the bytes of a picture's file.
EDIT_COLUMNS: dict[str, type] = {
    **{name: str for name in ("id", "image_path", "image_path_target")},
    **{name: bytes for name in ("source", "target")},
    **{name: str for name in ("prompt", "instruction", "better_instruction", "assessment", "assessment_reason")},
    **{name: str for name in ("edit_type", "key")},
}
CAPTION_COLUMNS: dict[str, type] = {"id": str, "image_path": str, "target": bytes, "prompt": str, "key": str}

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, step TEXT, text TEXT, columns TEXT, reason TEXT,
    finished INTEGER, tokens INTEGER, prompt_tokens INTEGER, seconds REAL, money REAL);
CREATE TABLE IF NOT EXISTS lost (step TEXT, reason TEXT, tokens INTEGER, prompt_tokens INTEGER, seconds REAL,
    money REAL);
CREATE TABLE IF NOT EXISTS dropped (place INTEGER PRIMARY KEY, key TEXT, id TEXT, image_path TEXT, stage TEXT,
    reason TEXT, details TEXT);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT);
"""
_CALLS = "(SELECT step, tokens, prompt_tokens, money FROM answers UNION ALL"
_CALLS += " SELECT step, tokens, prompt_tokens, money FROM lost)"


@dataclass(frozen=True)
class Answer:
    """
    A judge's answer, and what it cost.

    Args:
        step (`str`): The step's name.
        text (`str`): All that the judge wrote.
        columns (`dict`, *optional*): What the step read in it, `None` where it could not.
        reason (`str`, defaults to `""`): Why it could not.
        finished (`bool`, defaults to `True`): False where the answer was cut off at the limit of its length.
        tokens (`int`, defaults to 0): How many the judge wrote.
        prompt_tokens (`int`, defaults to 0): How many it was asked with.
        seconds (`float`, defaults to 0.0): How long it took.
        money (`float`, defaults to 0.0): What it cost, in the unit of the prices.
    """

    step: str
    text: str
    columns: dict[str, Any] | None = None
    reason: str = ""
    finished: bool = True
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    money: float = 0.0


_ANSWER = tuple(field.name for field in fields(Answer))


class Ledger:
    """
    A file of every answer that was paid for, and of what was dropped and why. Each answer is kept as soon as it is
    put: no kill of the process loses it, and a power cut at most those of the last second. Threads may share a ledger,
    and processes of one machine its file; a network file system will not do.

    Args:
        path (`str` or `os.PathLike`): The SQLite file; made if it is not there.

    Raises:
        OSError: By any method, if the file cannot be read or written, as on a full disk. What was kept stays.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        with self._clear_errors():
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._start_log()
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} COMMIT;")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        with self._lock, self._clear_errors():
            self._connection.close()

    def get(self, key: str) -> Answer | None:
        """The answer kept under a key, `None` if there is none."""
        rows = self._run(f"SELECT {', '.join(_ANSWER)} FROM answers WHERE key = ?", (key,))
        if not rows:
            return None
        row = dict(zip(_ANSWER, rows[0]))
        return Answer(**row | {"columns": json.loads(row["columns"]), "finished": bool(row["finished"])})

    def put(self, key: str, answer: Answer) -> None:
        """Keeps an answer. If there is one under the key already, that one stays and only the cost is counted."""
        values = dict(zip(_ANSWER, astuple(answer))) | {"columns": json.dumps(answer.columns)}
        marks = ", ".join("?" * (len(_ANSWER) + 1))
        kept = self._run(
            f"INSERT OR IGNORE INTO answers (key, {', '.join(_ANSWER)}) VALUES ({marks}) RETURNING 1",
            (key, *values.values()),
        )
        if not kept:
            self._lose(answer.step, "answered before", answer)

    def fail(self, step: str, reason: str, seconds: float = 0.0) -> None:
        """Counts a call that gave no answer."""
        self._lose(step, reason, Answer(step, "", seconds=seconds))

    def _lose(self, step: str, reason: str, answer: Answer) -> None:
        costs = (answer.tokens, answer.prompt_tokens, answer.seconds, answer.money)
        self._run("INSERT INTO lost VALUES (?, ?, ?, ?, ?, ?)", (step, reason, *costs))

    def drop(self, sample_key: str, id: str, image_path: str, stage: str, reason: str, details: str = "") -> None:
        """
        Lists a sample that was dropped, behind those that are listed.

        Args:
            sample_key (`str`): [`EngineSample.key`].
            id, image_path (`str`): The sample's.
            stage (`str`): "filter", "check" or a step's name.
            reason (`str`): In a few words that many share.
            details (`str`, defaults to `""`): What there is to know of this one.
        """
        values = (sample_key, id, image_path, stage, reason, details)
        self._run(f"INSERT INTO dropped (key, {', '.join(DROPPED)}) VALUES (?, ?, ?, ?, ?, ?)", values)

    def set_dropped(self, start: int, stop: int | None, rows: Iterable[tuple[Any, ...]]) -> None:
        """
        Says anew which of the samples from place `start` up to, not including, `stop` (`None`: all) were dropped.

        Args:
            rows (`Iterable[tuple]`): Of each its place and the arguments of [`~Ledger.drop`].
        """
        with self._lock, self._clear_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.execute(
                    "DELETE FROM dropped WHERE place >= ? AND place < ?", (start, 2**62 if stop is None else stop)
                )
                self._connection.executemany("INSERT INTO dropped VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it
                    self._connection.execute("ROLLBACK")
                raise

    def dropped(self) -> Iterator[dict[str, Any]]:
        """What was dropped, in order: `id`, `image_path`, `stage`, `reason` and `details`."""
        place = -1
        query = f"SELECT place, {', '.join(DROPPED)} FROM dropped WHERE place > ? ORDER BY place LIMIT 1000"
        while rows := self._run(query, (place,)):
            yield from (dict(zip(DROPPED, row[1:])) for row in rows)
            place = rows[-1][0]

    def totals(self) -> dict[str, Any]:
        """What all calls took so far: `calls`, `tokens`, `prompt_tokens`, `money`, and `seconds` of all runs."""
        names = ("calls", "tokens", "prompt_tokens", "money")
        query = (
            f"SELECT count(*), coalesce(sum(tokens), 0), coalesce(sum(prompt_tokens), 0), total(money) FROM {_CALLS}"
        )
        return {**dict(zip(names, self._run(query)[0])), "seconds": self.get_fact("seconds") or 0.0}

    def largest(self) -> dict[str, dict[str, float]]:
        """By step, the `tokens` (read and written) and the `money` of the dearest call."""
        query = f"SELECT step, max(tokens + prompt_tokens), max(money) FROM {_CALLS} GROUP BY step"
        return {step: {"tokens": tokens, "money": money} for step, tokens, money in self._run(query)}

    def get_fact(self, name: str) -> Any:
        """A JSON value kept under a name, `None` if there is none."""
        rows = self._run("SELECT value FROM facts WHERE name = ?", (name,))
        return json.loads(rows[0][0]) if rows else None

    def set_fact(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name."""
        self._run("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def _start_log(self) -> None:
        # While another process does the same, SQLite refuses at once, whatever the time it may wait.
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _run(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._clear_errors():
            rows = self._connection.execute(statement, values).fetchall()
            if time.monotonic() - self._synced > SYNC_SECONDS:
                # Only here SQLite waits for the disk, which takes as long as fifty answers' writing.
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
                self._synced = time.monotonic()
        return rows

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise OSError(
                f"{self.path} cannot be read or written: {error}. What it holds stays: make sure that there is room"
                " and that it may be written, then run again."
            ) from error


class Shard:
    """
    A Parquet file of rows, written aside and renamed as a whole.

    Args:
        path (`Path`): Of the file.
        columns (`dict[str, type]`): Its columns, each `str` or `bytes`; bytes are not compressed.

    Raises:
        ImportError: Without pyarrow.
        OSError: By any method, if there is no room or the folder cannot be written. A file that was there stays.
    """

    def __init__(self, path: Path, columns: dict[str, type]):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError("Parquet is written by pyarrow: `pip install 'diffusers-dim[train]'`.") from error
        self.path = path
        self.columns = columns
        self._aside = path.with_name(f".{path.name}.aside")
        self._arrow = pyarrow
        types: dict[type, Any] = {str: pyarrow.string(), bytes: pyarrow.binary()}
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._writer: Any = None

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *error: Any) -> None:
        """Throws away what was not finished."""
        if self._file is not None:
            for part in (self._writer, self._file):
                with suppress(OSError):  # of a full disk, which is told already
                    part.close()
            self._file = None
            self._aside.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row; what it lacks is empty text, or no picture."""
        row = {name: row.get(name, "" if kind is str else None) for name, kind in self.columns.items()}
        self._rows.append(row)
        self._bytes += sum(len(value) for value in row.values() if value is not None)
        if len(self._rows) >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._write_rows()

    def finish(self) -> None:
        """Puts the file in its place, or removes the one that is there if there are no rows."""
        if self._rows:
            self._write_rows()
        if self._file is None:
            self.path.unlink(missing_ok=True)
            return
        with self._clear_errors():
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._aside, self.path)
        self._file = None

    def _write_rows(self) -> None:
        texts = [name for name, kind in self.columns.items() if kind is str]
        with self._clear_errors():
            if self._file is None:
                self._file = open(self._aside, "wb")
                self._writer = self._arrow.parquet.ParquetWriter(
                    self._file,
                    self._schema,
                    compression={name: "snappy" if name in texts else "none" for name in self.columns},
                    use_dictionary=texts,
                    write_statistics=texts,
                )
            self._writer.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written: {error}. What was finished stays in the ledger: make room, then run"
                " again."
            ) from error
