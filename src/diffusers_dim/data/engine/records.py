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
"""What the data engine works on, and what a step of it is."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ...designers import Conversation
from ...files import PictureFile, open_picture, read_picture
from .pictures import change_mask, reduce_picture


@dataclass
class EngineSample:
    """
    One pair of pictures with an instruction, or for captions one picture.

    Args:
        id (`str`): Its name in the set.
        target (`bytes`): The edited picture's file, or the picture to be captioned.
        source (`bytes`, *optional*): The source picture's file; `None` for captions.
        instruction (`str`, defaults to `""`): As it was given.
        image_path (`str`, defaults to `""`): The source's path or key in its set.
        image_path_target (`str`, defaults to `""`): The target's.
        columns (`dict`): What steps have found so far, by column; JSON values.
    """

    id: str
    target: bytes
    source: bytes | None = None
    instruction: str = ""
    image_path: str = ""
    image_path_target: str = ""
    columns: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """What the sample is by its content, whatever its name: sha256 over both files and the instruction."""
        return content_key([self.source or b"", self.target], self.instruction)

    @property
    def files(self) -> tuple[bytes | Path, ...]:
        """The files of source and target, or of the picture alone."""
        return (self.target,) if self.source is None else (self.source, self.target)

    @property
    def shown(self) -> tuple[Image.Image | PictureFile, ...]:
        """What a judge is shown: the files as they are where everybody reads them alike, see [`open_picture`]."""
        return tuple(map(open_picture, self.files))

    @cached_property
    def pictures(self) -> tuple[Image.Image, ...]:
        """Source and target, or the picture alone, in RGB."""
        return tuple(map(read_picture, self.files))

    @cached_property
    def reduced(self) -> tuple[Image.Image, ...]:
        """The same made small, see [`reduce_picture`]."""
        return tuple(map(reduce_picture, self.pictures))

    @cached_property
    def changed(self) -> Image.Image:
        """The [`change_mask`] of source and target."""
        source, target = self.pictures
        return change_mask(source, target, reduced=self.reduced)

    def forget_pictures(self) -> None:
        """Frees what was decoded, which is far larger than the files."""
        for name in ("pictures", "reduced", "changed"):
            self.__dict__.pop(name, None)


class Step(ABC):
    """
    A question to a judge about each sample, whose answer makes columns.

    Attributes:
        name (`str`): Of the step: "assess", "optimise", "imagine" or "caption".
        version (`int`): Counted up when prompt or reading change, so that kept answers are not taken for new ones.
    """

    name: str
    version: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What the answer depends on besides sample and judge; JSON values."""
        return {"step": self.name, "version": self.version}

    @abstractmethod
    def conversation(self, sample: EngineSample) -> Conversation:
        """What the judge is asked. It may read `sample.columns` of earlier steps."""

    @abstractmethod
    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        """
        The columns of an answer, JSON values.

        Raises:
            ValueError: If it is not one. The judge is asked once more with the error's words.
        """

    def drop_reason(self, sample: EngineSample, columns: dict[str, Any]) -> str | None:
        """Why the sample goes to the ledger of what was dropped, `None` if it goes on."""
        return None

    def depends_on(self, sample: EngineSample) -> Any:
        """What of `sample.columns` the conversation reads, so that a change of it asks anew; JSON value."""
        return None


def content_key(files: Iterable[bytes], instruction: str) -> str:
    """By what a sample is known: sha256 over its pictures' files and the instruction."""
    digest = hashlib.sha256()
    for part in (*files, instruction.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def answer_key(step: Step, judge_settings: dict[str, Any], sample: EngineSample) -> str:
    """By what a judge's answer is kept: the sample's content, the step and the judge, with all their settings."""
    facts = [sample.key, step.settings, judge_settings, step.depends_on(sample)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def repair_key(key: str) -> str:
    """By what the second answer is kept, asked for where the first one, of that key, was of no use."""
    return f"{key}-2"
