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
"""Reads jsonl files and picture files, for all that has to."""

import io
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from .image_processor import DIMImageProcessor


# What PIL was seen to raise for broken files, RuntimeError by its AVIF reader and struct.error for EXIF.
READ_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError)


def read_jsonl(path: str | Path, fields: Iterable[str]) -> dict[int, dict[str, Any]]:
    """
    The objects of a jsonl file by their lines' numbers, from 1; empty lines are passed over.

    Raises:
        ValueError: If the file holds no line, or a line is no JSON object or lacks one of `fields`; the line is named.
    """
    rows = {}
    with open(path, "rb") as lines:  # as bytes, so that a line that is not UTF-8 is named
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}.") from error
            missing = [name for name in fields if not isinstance(row, dict) or name not in row]
            if missing:
                raise ValueError(f"{path}, line {number} lacks {missing}: a line needs {list(fields)}.")
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} is no JSON object.")
            rows[number] = row
    if not rows:
        raise ValueError(f"{path} holds no samples.")
    return rows


def read_picture(path: str | Path | bytes) -> Image.Image:
    """
    A whole picture, from a path or a file's bytes, in RGB as a person sees it, see [`DIMImageProcessor.to_rgb`].

    Raises:
        ValueError: If there is none that PIL reads to its end, or it is too large or too long; the file is named.
    """
    try:
        with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as image:
            return DIMImageProcessor().to_rgb(image)[0]
    except READ_ERRORS as error:
        name = f"A file of {len(path)} bytes" if isinstance(path, bytes) else path
        raise ValueError(f"{name} cannot be read as a picture ({error}).") from error
