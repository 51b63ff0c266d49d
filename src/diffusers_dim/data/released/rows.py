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
"""Lines of jsonl files one by one, and the files that they name."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec


class Line(NamedTuple):
    """An object of a jsonl file, its line's number from 1 and where in the file it begins, in bytes."""

    number: int
    offset: int
    row: dict[str, Any]


def iterate_jsonl(path: str | Path, fields: Iterable[str]) -> Iterator[Line]:
    """
    The objects of a jsonl file as they come, so that a file of any length can be read; empty lines are passed over.

    Raises:
        ValueError: If the file holds no line, or a line is no JSON object or lacks one of `fields`; the line is named.
    """
    fields = list(fields)
    offset, empty = 0, True
    with open(path, "rb") as lines:  # as bytes, so that a line that is not UTF-8 is named
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield Line(number, offset, _read_line(line, f"{path}, line {number}", fields))
                empty = False
            offset += len(line)
    if empty:
        raise ValueError(f"{path} holds no samples.")


def _read_line(line: bytes, where: str, fields: list[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        cut = "" if line.endswith(b"\n") else ", and is the file's last: perhaps it was cut off"
        raise ValueError(f"{where} is not JSON: {error}{cut}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object.")
    if missing := [name for name in fields if name not in row]:
        raise ValueError(f"{where} lacks {missing}: a line needs {fields}, and has {sorted(row)}.")
    return row


def path_inside(root: Path, path: str, where: str = "The data") -> Path:
    """
    A path below a root, absolute, by its words alone: the user's own links below the root may lead elsewhere.

    Raises:
        ValueError: If the path leads out of the root.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where}: {path!r} is no path of a picture.")
    base = os.path.abspath(root)
    full = os.path.normpath(os.path.join(base, path))
    if "\0" in path or not full.startswith(os.path.join(base, "")):
        raise ValueError(f"{where}: the path {path!r} leads out of {root}.")
    return Path(full)


def read_file(value: Any, root: Path | None, where: str) -> bytes:
    """
    A picture's file, not decoded, from a path, an address, bytes, or a dict of either as `datasets` has it.

    Raises:
        ValueError: If the value is neither, or its path leads out of the root.
        OSError: If the file cannot be read.
    """
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{where}: a picture has to be a path or bytes, but is {type(value).__name__}.")
    if "://" in value:  # in an archive or on a server: `datasets` gives undecoded pictures as fsspec's addresses
        with fsspec.open(value, "rb") as file:
            return file.read()
    return (Path(value) if root is None else path_inside(root, value, where)).read_bytes()
