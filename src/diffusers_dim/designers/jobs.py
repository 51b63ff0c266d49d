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
"""Blueprints for the lines of a jsonl file, in a run that can be stopped and goes on."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from PIL import Image
from tqdm.auto import tqdm

from ..files import read_jsonl, read_picture, write_lines
from .designer import Designer


@dataclass
class JobSummary:
    """
    What became of a job.

    Args:
        rows (`int`): Lines that have a blueprint now.
        kept (`int`): Of these, such as had it before.
        done (`int`): Blueprints that were written now, those of the next three counts among them.
        repaired (`int`): Such as were asked for twice.
        cached (`int`): Such as came from the designer's cache.
        fallbacks (`int`): Plain instructions that stand for a blueprint.
        failed (`int`): What there is no blueprint for.
        tokens (`int`): What the model wrote now.
        seconds (`float`): The run's time.
    """

    rows: int = 0
    kept: int = 0
    done: int = 0
    repaired: int = 0
    cached: int = 0
    fallbacks: int = 0
    failed: int = 0
    tokens: int = 0
    seconds: float = 0.0


def _key(row: dict[str, Any]) -> str:
    """What tells tasks apart."""
    return json.dumps([row["id"], row["image_path"], row["instruction"]])


def _open(path: Path, mode: str) -> TextIO:
    # Half a surrogate pair, which UTF-8 has no form for, is written as its JSON escape.
    return cast(TextIO, open(path, mode, encoding="utf-8", errors="backslashreplace"))


def _write(lines: TextIO, row: dict[str, Any]) -> None:
    lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    lines.flush()


class DesignJob:
    r"""
    Designs edits for a jsonl file's lines, which hold `image_path` and the instruction as `instruction`, else as
    `prompt`. What is written is in the form of training data: the line's fields with the blueprint as `prompt`, the
    `instruction`, and the line's number as `id` if there was none. A `blueprint` of before is left out.

    While it runs, blueprints are added to `NAME.unfinished.jsonl` as they are done, and failures to
    `NAME.failures.jsonl`; at the end `output` holds all blueprints in the input's order. What is in either file
    already is not asked for again; failures are.

    Args:
        jsonl (`str` or `Path`): The input.
        output (`str` or `Path`): The jsonl to write.
        image_dir (`str` or `Path`, *optional*): What paths of pictures are relative to; the input's folder by default.

    Attributes:
        left (`list[dict]`): The lines, as they are to be written, that have no blueprint yet.

    Raises:
        ValueError:
            If a line of the input is not as said, or a file of blueprints is there that is not of this input; the line
            is named.
    """

    def __init__(self, jsonl: str | Path, output: str | Path, image_dir: str | Path | None = None):
        self.output = Path(output)
        if self.output.resolve() == Path(jsonl).resolve():
            raise ValueError(f"{output} is the input itself: choose another output.")
        self.unfinished = self.output.with_suffix(".unfinished.jsonl")
        self.failures = self.output.with_suffix(".failures.jsonl")
        self.image_dir = Path(jsonl).parent if image_dir is None else Path(image_dir)
        self.rows = []
        for number, fields in read_jsonl(jsonl, ("image_path",)).items():
            told = "prompt" if fields.get("instruction") is None else "instruction"
            for name in ("image_path", told):
                text = fields.get(name)
                if not (isinstance(text, str) and text.strip()):
                    raise ValueError(
                        f"{jsonl}, line {number}: `{name}` has to be a text that is not empty, but is {text!r}."
                    )
            row = {"id": number, **fields, "instruction": fields[told]}
            self.rows.append({name: value for name, value in row.items() if name not in ("prompt", "blueprint")})
        left = {_key(row): row for row in self.rows}
        self.finished: dict[str, str] = {}
        for path in (self.output, self.unfinished):
            if path == self.unfinished:
                self._drop_torn_line()
            if not path.exists() or path.stat().st_size == 0:
                continue
            for number, row in read_jsonl(path, ("id", "image_path", "prompt", "instruction")).items():
                key = _key(row)
                if key not in left and key not in self.finished:
                    raise ValueError(f"{path}, line {number} is of no line of {jsonl}: choose another --output.")
                left.pop(key, None)
                self.finished[key] = row["prompt"]
        self.left = list(left.values())

    def _drop_torn_line(self) -> None:
        """Cuts off what a killed run has written of a line."""
        if self.unfinished.exists():
            with open(self.unfinished, "rb+") as lines:
                lines.truncate(lines.read().rfind(b"\n") + 1)

    def run(self, designer: Designer, chunk_size: int, progress: bool = False) -> JobSummary:
        """
        Designs what is left, and writes the files.

        Args:
            designer ([`Designer`]): Who does; not used if nothing is left.
            chunk_size (`int`): How many pictures are open, and given to the designer, at a time.
            progress (`bool`, defaults to `False`): Whether to show a bar.
        """
        start = time.perf_counter()
        summary = JobSummary(kept=len(self.rows) - len(self.left))
        with (
            ThreadPoolExecutor() as readers,
            _open(self.unfinished, "a") as done,
            _open(self.failures, "w") as failed,
            tqdm(total=len(self.rows), initial=summary.kept, desc="Designs", disable=not progress) as bar,
        ):
            for first in range(0, len(self.left), chunk_size):
                chunk = self.left[first : first + chunk_size]
                readable, images = [], []
                for row, picture in zip(chunk, readers.map(self._read, chunk)):
                    if isinstance(picture, Image.Image):
                        readable.append(row)
                        images.append(picture)
                    else:
                        summary.failed += 1
                        _write(failed, {**row, "error": str(picture)})
                        bar.update()
                for design in designer.design_each(images, [row["instruction"] for row in readable]):
                    row = readable[design.index]
                    summary.tokens += design.tokens
                    if design.blueprint is None:
                        summary.failed += 1
                        _write(failed, {**row, "error": str(design.error)})
                    else:
                        blueprint = str(design.blueprint)
                        _write(done, {**row, "prompt": blueprint})
                        self.finished[_key(row)] = blueprint
                        summary.done += 1
                        summary.cached += design.cached
                        summary.fallbacks += design.error is not None
                        summary.repaired += design.repaired and design.error is None
                    bar.set_postfix(repaired=summary.repaired, failed=summary.failed, refresh=False)
                    bar.update()
        summary.rows = self._finish()
        if not summary.failed:
            self.failures.unlink()
        summary.seconds = time.perf_counter() - start
        return summary

    def _read(self, row: dict[str, Any]) -> Image.Image | ValueError:
        try:
            return read_picture(self.image_dir / row["image_path"])
        except ValueError as error:
            return error

    def _finish(self) -> int:
        """Writes all blueprints in the input's order, as a whole or not at all, and says how many."""
        rows = [{**row, "prompt": self.finished[_key(row)]} for row in self.rows if _key(row) in self.finished]
        write_lines(self.output, (json.dumps(row, ensure_ascii=False) for row in rows))
        self.unfinished.unlink(missing_ok=True)
        return len(rows)
