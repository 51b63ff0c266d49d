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
"""A designer that reads ready blueprints from a jsonl file."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from ..files import read_jsonl, read_picture
from .designer import Conversation, Designer, DesignError, Draft, OnText


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Row:
    line: int
    path: Path | None
    text: str


@dataclass
class _Group:
    """Rows of one instruction: one without a picture, those whose pictures were looked at, and the others."""

    plain: _Row | None = None
    seen: dict[bytes, _Row] = field(default_factory=dict)
    unseen: list[_Row] = field(default_factory=list)  # the last one is looked at next


def _digest(image: Image.Image) -> bytes:
    return hashlib.sha256(str(image.size).encode() + image.tobytes()).digest()


class ReplayDesigner(Designer):
    r"""
    Gives the blueprints of a jsonl file, such as DIM-Edit's or one that `diffusers-dim design` wrote.

    A line holds the blueprint as `blueprint`, else as `prompt`; where there are both, the prompt is the instruction
    unless there is an `instruction`. It is for that instruction of the picture `image_path`; without an instruction
    for any of that picture, without a picture for that instruction of any. Pictures are compared by their pixels, and
    looked at when they are needed, in the file's order.

    Args:
        jsonl (`str` or `Path`): The file.
        image_dir (`str` or `Path`, *optional*): What paths of pictures are relative to; the file's folder by default.
        on_failure (`"error"` or `"instruction"`, defaults to `"error"`): See [`Designer`].

    Raises:
        ValueError:
            If the file holds no line, or one that is not as said; also, by a design, if there are two blueprints for
            the same.
    """

    def __init__(
        self,
        jsonl: str | Path,
        image_dir: str | Path | None = None,
        on_failure: Literal["error", "instruction"] = "error",
    ):
        super().__init__(on_failure=on_failure)
        self.jsonl = Path(jsonl)
        root = self.jsonl.parent if image_dir is None else Path(image_dir)
        self._groups: dict[str | None, _Group] = defaultdict(_Group)
        found: dict[tuple[str | None, Path | None], _Row] = {}
        for line, fields in read_jsonl(jsonl, ()).items():
            text, prompt = fields.get("blueprint"), fields.get("prompt")
            instruction = fields.get("instruction")
            if text is None:
                text = prompt
            elif instruction is None:
                instruction = prompt
            path = fields.get("image_path")
            for name, value in (("blueprint", text), ("instruction", instruction), ("image_path", path)):
                if not (isinstance(value, str) and value.strip()) and (value is not None or name == "blueprint"):
                    raise ValueError(f"{jsonl}, line {line}: the {name} has to be a text, but is {value!r}.")
            if instruction is None and path is None:
                raise ValueError(f"{jsonl}, line {line} has neither an `instruction` nor an `image_path`.")
            instruction = None if instruction is None else instruction.strip()
            row = _Row(line, None if path is None else root / path, text)
            first = found.setdefault((instruction, row.path), row)
            self._check_same(first, row)
            if first is not row:
                continue
            if path is None:
                self._groups[instruction].plain = row
            else:
                self._groups[instruction].unseen.append(row)
        for group in self._groups.values():
            group.unseen.reverse()

    def __repr__(self) -> str:
        return f"ReplayDesigner({str(self.jsonl)!r})"

    def write(
        self, conversations: Sequence[Conversation], on_text: OnText
    ) -> Iterator[tuple[int, Draft | DesignError]]:
        for index, conversation in enumerate(conversations):
            text = self._find(conversation.picture, conversation.instruction.strip())
            if text is None:
                of = "" if conversation.image is None else " of this picture"
                message = f"{self.jsonl} holds no blueprint for {conversation.instruction!r}{of}."
                yield index, DesignError(message)
            else:
                on_text(index, text)
                yield index, Draft(text)

    def _find(self, image: Image.Image | None, instruction: str) -> str | None:
        """The text for just this, else for the picture, else for the instruction."""
        if image is not None:
            digest = _digest(image)
            for name in (instruction, None):
                group = self._groups.get(name)
                while group is not None and digest not in group.seen and group.unseen:
                    self._look_at(group, group.unseen.pop())
                if group is not None and digest in group.seen:
                    return group.seen[digest].text
        group = self._groups.get(instruction)
        return None if group is None or group.plain is None else group.plain.text

    def _look_at(self, group: _Group, row: _Row) -> None:
        try:
            digest = _digest(read_picture(row.path))
        except ValueError as error:
            logger.warning("%s, line %d is left out: %s", self.jsonl, row.line, error)
            return
        self._check_same(group.seen.setdefault(digest, row), row)

    def _check_same(self, first: _Row, row: _Row) -> None:
        if first.text != row.text:
            raise ValueError(f"{self.jsonl}, lines {first.line} and {row.line}: two blueprints for the same.")
