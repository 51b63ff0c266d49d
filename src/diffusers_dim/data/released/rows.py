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

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec


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
