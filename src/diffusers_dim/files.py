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
"""Reads jsonl files and picture files, and writes files as a whole, for all that has to."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image, PngImagePlugin

from .image_processor import DIMImageProcessor


# How the names of files begin that are being written.
UNFINISHED = ".unfinished-"
# What PIL was seen to raise for broken files, RuntimeError by its AVIF reader and struct.error for EXIF.
READ_ERRORS = (OSError, ValueError, SyntaxError, RuntimeError, struct.error, Image.DecompressionBombError)
_PROCESSOR = DIMImageProcessor()


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
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else ", and is the file's last: perhaps it was cut off"
        raise ValueError(f"{where} is not JSON: {error}{cut}.") from error
    if missing := [name for name in fields if not isinstance(row, dict) or name not in row]:
        has = f", and has {sorted(row)}" if isinstance(row, dict) else ""
        raise ValueError(f"{where} lacks {missing}: a line needs {fields}{has}.")
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object.")
    return row


def read_jsonl(path: str | Path, fields: Iterable[str]) -> dict[int, dict[str, Any]]:
    """The objects of a jsonl file by their lines' numbers, from 1, as [`iterate_jsonl`] reads them."""
    return {line.number: line.row for line in iterate_jsonl(path, fields)}


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """
    A path beside `path` to write to: it takes `path`'s place when the block ends well, and is removed when it fails.
    What a killed process leaves begins with `UNFINISHED`.
    """
    # A name of its own: of a killed run some processes may live on for a while.
    aside = path.with_name(f"{UNFINISHED}{os.getpid()}-{path.name}")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed process has left half-written in a folder; not in those below, which may be others'."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        leftover.unlink(missing_ok=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file as a whole or not at all; half a surrogate pair is written as its JSON escape."""
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(f"{line}\n" for line in lines)


def write_between(path: Path, begin: str, end: str, text: str) -> None:
    """
    Puts a text between two marks of a page, each on a line of its own; all else stays.

    Raises:
        ValueError: If the marks are not there once each, in this order.
    """
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found or page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"{path} has to hold the lines {begin} and {end} once each.")
    write_lines(path, [f"{before}{begin}\n{text}\n{end}{after}".removesuffix("\n")])


def read_picture(path: str | Path | bytes) -> Image.Image:
    """
    A whole picture, from a path or a file's bytes, in RGB as a person sees it, see [`DIMImageProcessor.to_rgb`].

    Raises:
        ValueError: If there is none that PIL reads to its end, or it is too large or too long; the file is named.
    """
    try:
        with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as image:
            return _PROCESSOR.to_rgb(image)[0]
    except READ_ERRORS as error:
        name = f"A file of {len(path)} bytes" if isinstance(path, bytes) else path
        raise ValueError(f"{name} cannot be read as a picture ({error}).") from error


@dataclass(frozen=True)
class PictureFile:
    """
    A picture by its file, for those who pass it on without looking into it, see [`open_picture`].

    Args:
        data (`bytes`): The file.
        media_type (`str`): Such as "image/png".
        size (`tuple[int, int]`): Width and height in pixels.
    """

    data: bytes = field(repr=False)
    media_type: str
    size: tuple[int, int]

    def decode(self) -> Image.Image:
        """The picture, see [`read_picture`]."""
        return read_picture(self.data)


def open_picture(path: str | Path | bytes) -> PictureFile | Image.Image:
    """
    A file that everybody reads alike as it is, without decoding it: a whole PNG, JPEG or WebP of one frame in RGB or
    grey, without transparency or rotation. Of any other one the picture, see [`read_picture`].

    Raises:
        ValueError: If there is none, as [`read_picture`] says.
    """
    try:
        data = path if isinstance(path, bytes) else Path(path).read_bytes()
        with Image.open(io.BytesIO(data), formats=list(_IS_PLAIN)) as image:
            kind, size = image.format, image.size
            is_plain = image.mode in ("RGB", "L") and not image.has_transparency_data
            if is_plain and not getattr(image, "is_animated", False) and _IS_PLAIN.get(kind, _never)(image, data):
                return PictureFile(data, Image.MIME[kind], size)
    except READ_ERRORS:
        pass  # told in the words of the whole reading
    return read_picture(path)


def _never(image: Image.Image, data: bytes) -> bool:
    return False


def _is_upright(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _is_plain_png(image: Image.Image, data: bytes) -> bool:
    """Whether a PNG is whole, by its checksums, and nothing in it says that it is rotated."""
    if any(name in image.info for name in ("exif", "XML:com.adobe.xmp", "Raw profile type exif")):
        return False
    place, name, view = 8, b"", memoryview(data)
    while name != b"IEND":
        length = int.from_bytes(view[place : place + 4], "big")
        end = place + 8 + length
        behind, name = name == b"IDAT", bytes(view[place + 4 : place + 8])
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big") or end + 4 > len(data):
            return False
        if behind and name not in (b"IDAT", b"IEND"):  # PIL has not read it yet
            return False
        place = end + 4
    return True


# Whether a file is there to its end and not rotated, by its format.
_IS_PLAIN: dict[str, Callable[[Image.Image, bytes], bool]] = {
    "PNG": _is_plain_png,
    "JPEG": lambda image, data: data.endswith(b"\xff\xd9") and _is_upright(image),
    "WEBP": lambda image, data: len(data) >= 8 + int.from_bytes(data[4:8], "little") and _is_upright(image),
}


def save_image(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Saves a picture; a PNG carries what it was made with as JSON in its text chunk "parameters"."""
    kind, options = Image.registered_extensions()[path.suffix.lower()], {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("parameters", json.dumps(settings, ensure_ascii=False))
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    path.write_bytes(encoded.getvalue())
