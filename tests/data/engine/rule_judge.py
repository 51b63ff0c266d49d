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
"""A judge that answers by rule, steps that ask it, and small samples."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_dim.data.engine.records import EngineSample, Step
from diffusers_dim.designers import Conversation, Designer, DesignError, Draft


class RuleJudge(Designer):
    """
    Answers "STEP: INSTRUCTION", or what its rule says.

    Args:
        concurrency (`int`): How many conversations a call answers at once; 1 for a judge that says nothing of it.
        seconds (`float`): How long an answer takes.
        log (`Path`, *optional*): A file to which the first turn of each answered conversation is added.
        rule (`Callable`, *optional*): Called with a conversation; gives a `Draft`, a `DesignError`, or `None`.

    Attributes:
        asked (`list[tuple[str, ...]]`): The turns of all conversations so far.
        most_at_once (`int`): How many were in flight together, at most.
    """

    def __init__(
        self,
        concurrency: int = 4,
        seconds: float = 0.0,
        log: Path | None = None,
        rule: Callable[[Conversation], Draft | DesignError | None] = lambda conversation: None,
        model: str = "rule",
    ):
        super().__init__()
        if concurrency > 1:
            self.concurrency = concurrency
        self.seconds, self.log, self.rule, self.model = seconds, log, rule, model
        self.asked: list[tuple[str, ...]] = []
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "model": self.model}

    def write(self, conversations: Sequence[Conversation], on_text: Any) -> Iterator[tuple[int, Draft | DesignError]]:
        if not hasattr(self, "concurrency"):
            yield from ((place, self._answer(conversation)) for place, conversation in enumerate(conversations))
            return
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._answer, conversation): i for i, conversation in enumerate(conversations)}
            for answer in as_completed(asked):
                yield asked[answer], answer.result()

    def _answer(self, conversation: Conversation) -> Draft | DesignError:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        if self.seconds:
            time.sleep(self.seconds)
        with self._lock:
            self._at_once -= 1
            self.asked.append(conversation.turns)
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as log:
                log.write(f"{conversation.turns[0]}\n".encode())
        said = self.rule(conversation)
        return Draft(conversation.turns[0], tokens=10, prompt_tokens=100) if said is None else said


class Ask(Step):
    """Asks "NAME: INSTRUCTION" and takes for its column whatever is said, but "rubbish"."""

    def __init__(self, name: str, column: str, version: int = 1, reads: str | None = None):
        self.name, self.column, self.version, self.reads = name, column, version, reads

    def conversation(self, sample: EngineSample) -> Conversation:
        source, *others = sample.pictures
        return Conversation((f"{self.name}: {sample.instruction}",), source, sample.instruction, tuple(others))

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        if text == "rubbish":
            raise ValueError("there is no sense in it.")
        return {self.column: text}

    def drop_reason(self, sample: EngineSample, columns: dict[str, Any]) -> str | None:
        return "misfit" if columns[self.column] == "misfits" else None

    def depends_on(self, sample: EngineSample) -> Any:
        return sample.columns[self.reads] if self.reads else None


def edit_steps(version: int = 1) -> list[Ask]:
    """Three that leave the columns of the real ones; `version` is the second's."""
    return [
        Ask("assess", "assessment"),
        Ask("optimise", "better_instruction", version, reads="assessment"),
        Ask("imagine", "prompt", reads="better_instruction"),
    ]


def picture(color: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def pair(number: int, **fields: Any) -> EngineSample:
    """A sample whose instruction "edit NUMBER" is its own."""
    facts = {
        "id": f"sample-{number}",
        "source": picture((number % 256, number // 256 % 256, 0)),
        "target": picture((number % 256, number // 256 % 256, 255)),
        "instruction": f"edit {number}",
        "image_path": f"{number}.png",
        "image_path_target": f"{number}-target.png",
    }
    return EngineSample(**facts | fields)


def data_files(folder: Path) -> dict[str, bytes]:
    """A built set's Parquet files and list of what was dropped."""
    return {
        name: (folder / name).read_bytes()
        for name in sorted(os.listdir(folder))
        if name.endswith(".parquet") or name == "dropped.jsonl"
    }
