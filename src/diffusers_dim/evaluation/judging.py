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
"""Has a judge look at a run's edits, by the data engine, so that no answer is paid for twice."""

import re
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.engine.engine import Budget, DataEngine, Prices
from ..data.engine.records import EngineSample, Step, answer_key, content_key, repair_key
from ..data.engine.store import Answer, Ledger
from ..designers import Designer
from ..designers.blueprint import strip_thoughts
from ..files import read_jsonl
from .benchmark import Answers, Benchmark, Case
from .generation import check_pictures


NOT_JUDGED = "the budget was used up before it was judged"
_THOUGHTS = re.compile(r"[<◁]/?(?:seed:)?(?:think|thought|reasoning)", re.IGNORECASE)


def without_thoughts(text: str) -> str:
    """A judge's answer as official scorers are to read it: without thoughts, and else as it is to the letter."""
    return strip_thoughts(text) if _THOUGHTS.search(text) else text


class CaseSample(EngineSample):
    """
    A case as the data engine takes it. Its pictures stay in their files until they are asked about, and rows hold
    their paths alone. Columns: `edit_type`, the case's group.

    Args:
        case ([`Case`]): The case.
        pictures (`Path`): The folder of pictures.
    """

    def __init__(self, case: Case, pictures: Path):
        source = case.judged_image or case.image
        self.paths = (*(() if source is None else (source,)), pictures / case.files[0])
        super().__init__(
            id=case.key,
            target=b"",
            source=None if source is None else b"",
            instruction=case.prompt,
            image_path="" if source is None else str(source),
            image_path_target=str(self.paths[-1]),
            columns={"edit_type": case.group},
        )

    @cached_property
    def key(self) -> str:
        """As [`EngineSample.key`], of the files where they lie."""
        return content_key((path.read_bytes() for path in self.paths), self.instruction)

    @property
    def files(self) -> tuple[Path, ...]:
        """As [`EngineSample.files`], where they lie."""
        return self.paths


class _Samples(Sequence[CaseSample]):
    """Samples that know their keys once they were gone through, so that files are read for them just once."""

    def __init__(self, samples: list[CaseSample]):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Any) -> Any:
        sample = self.samples[place]
        sample.key  # noqa: B018 it stays in it, also in the engine's copy
        return sample


def judge_cases(
    benchmark: Benchmark,
    pictures: str | Path,
    judge: Designer,
    output: str | Path,
    concurrency: int | None = None,
    only_present: bool = False,
    budget: Budget | None = None,
    prices: Prices | None = None,
    progress: bool = True,
) -> dict[str, Answers]:
    """
    Asks a judge the benchmark's questions about each case. A case whose judge refuses, or gives twice what cannot be
    read, has no parts but a reason; the judge's failures are asked again by the next call. What was answered is in
    `output` at once, and is not asked again by any later call.

    Args:
        benchmark ([`Benchmark`]): Whose cases and questions.
        pictures (`str` or `Path`): The run's folder of pictures.
        judge ([`Designer`]): Who answers.
        output (`str` or `Path`): This judge's folder for this run, a [`DataEngine`]'s; made if it is not there.
        concurrency (`int`, *optional*): How many cases are asked about at once; as many as the judge takes by default.
        only_present (`bool`, defaults to `False`): Whether to judge what there is where pictures are missing.
        budget ([`Budget`], *optional*): At which to stop. The cases that are left have a reason.
        prices ([`Prices`], *optional*): By which money is counted.
        progress (`bool`, defaults to `True`): Whether to show a bar.

    Returns:
        `dict[str, Answers]`: By all cases' keys, in their order.

    Raises:
        ValueError: If the benchmark asks nothing, or pictures are missing.
        Exception: What the judge raises for all that it is asked, see [`DataEngine.run`].
    """
    pictures, steps = Path(pictures), benchmark.questions()
    if not steps:
        raise ValueError(f"{benchmark.title} is scored without a judge.")
    missing = check_pictures(benchmark.cases, pictures, only_present)
    samples = {case.key: CaseSample(case, pictures) for case in benchmark.cases if case.key not in missing}
    if concurrency is None:
        concurrency = getattr(judge, "concurrency", 8)
    engine = DataEngine(steps, judge, output, concurrency=concurrency, budget=budget, prices=prices)
    engine.run(_Samples(list(samples.values())), progress=progress)

    dropped = {}
    if engine.dropped_path.stat().st_size:
        dropped = {row["id"]: row for row in read_jsonl(engine.dropped_path, ("id",)).values()}
    answers = {}
    with Ledger(engine.output_dir / "ledger.sqlite") as ledger:
        for case in benchmark.cases:
            if case.key in missing:
                answers[case.key] = Answers({}, reason="there is no picture")
                continue
            found = _find_answers(ledger, steps, judge, samples[case.key])
            texts = {name: without_thoughts(answer.text) for name, answer in found.items()}
            parts = {name: answer.columns["scores"] for name, answer in found.items() if answer.columns is not None}
            row, reason = dropped.get(case.key), ""
            if row is not None:
                details = row["details"].partition(" It wrote: ")[0]  # that is among the texts
                reason = ": ".join(filter(None, (row["stage"], row["reason"], details)))
            elif len(parts) < len(steps):
                reason = NOT_JUDGED
            answers[case.key] = Answers(texts, {} if reason else parts, reason)
    return answers


def _find_answers(ledger: Ledger, steps: Sequence[Step], judge: Designer, sample: CaseSample) -> dict[str, Answer]:
    """The last answer to each question that was asked, by its name."""
    sample, found = copy(sample), {}
    sample.columns = dict(sample.columns)
    for step in steps:
        key = answer_key(step, judge.settings, sample)
        answer = ledger.get(repair_key(key)) or ledger.get(key)
        if answer is None:
            break
        found[step.name] = answer
        sample.columns.update(answer.columns or {})
    return found
