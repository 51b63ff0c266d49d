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
"""
ImgEdit's Basic benchmark (https://huggingface.co/papers/2505.20275), scored as PKU-YuanGroup/ImgEdit does it in
Benchmark/Basic.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.engine.records import EngineSample, Step
from ..designers import Conversation
from ..files import write_lines
from .benchmark import Answers, Benchmark, Case, CaseScore, Figure, Scores, read_json, refuse
from .judging import without_thoughts
from .statistics import mean_interval, mean_of_means_interval


# The cases and the judge's prompts: as in the repository, and as in the Benchmark.tar of sysuyy/ImgEdit on the Hub.
FILES = (("basic_edit.json", "prompts.json"), ("singleturn.json", "judge_prompt.json"))
# Where sources may lie, by the cases' ids, beside these files.
SOURCE_FOLDERS = ("", "original_images", "singleturn", "Benchmark/singleturn")
FIELDS = ("id", "prompt", "edit_type")
INSTRUCTION = "<edit_prompt>"
RESULTS = "result.json"

_SAFE_KEY = re.compile(r"(?!\.)[\w. -]+")


class ImgEditQuestion(Step):
    """
    The question about an edit, with its edit type's prompt. Column: `scores`, by the names that the judge gives them.

    Args:
        prompts (`Mapping[str, str]`): The official prompts by edit type, with `<edit_prompt>` in them.
    """

    name = "score"
    version = 2  # the first one showed JPEGs made of the files

    def __init__(self, prompts: Mapping[str, str]):
        self.prompts = prompts
        self._digest = hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"prompts": self._digest}

    def depends_on(self, sample: EngineSample) -> Any:
        return sample.columns["edit_type"]

    def conversation(self, sample: EngineSample) -> Conversation:
        prompt = self.prompts[sample.columns["edit_type"]].replace(INSTRUCTION, sample.instruction)
        source, edit = sample.shown
        return Conversation((prompt,), source, sample.instruction, others=(edit,), text_first=True)

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        return {"scores": read_scores(without_thoughts(text))}


def read_scores(text: str) -> dict[str, int]:
    """
    The scores of a judge's answer by their names, as the official scorer finds them: in each line that has, without
    blanks around it, ": " just once, and behind it nothing but digits. Whatever the number is, it counts; a name that
    comes again counts again, with its place in brackets.

    Raises:
        ValueError: If there are none, or one that the official scorer would break off at.
    """
    scores: dict[str, int] = {}
    for line in text.splitlines():
        name, *rest = line.strip().split(": ")
        if len(rest) == 1 and rest[0].isdigit():
            free, place = name, 1
            while free in scores:
                place += 1
                free = f"{name} ({place})"
            try:
                scores[free] = int(rest[0])
            except ValueError as error:  # a digit such as a raised 2, or far too many of them
                raise ValueError(f"{rest[0][:80]!r} is no number.") from error
    if not scores:
        raise ValueError('there is no line such as "Name: 3", with a whole number and nothing behind it.')
    try:
        _mean(list(scores.values()))
    except OverflowError as error:
        raise ValueError("its scores are too large.") from error
    return scores


def _mean(values: Sequence[float]) -> float:
    # Plain Python and not NumPy, so that the last digit is that of the official scorer also at ties.
    return round(sum(values) / len(values), 2)


class ImgEdit(Benchmark):
    """
    ImgEdit's Basic benchmark: 737 edits of nine types.

    Args:
        data (`str` or `Path`):
            A folder with `basic_edit.json`, `prompts.json` and the sources, beside them or in `original_images`; or
            with those of the released `Benchmark.tar`, which has them as `singleturn.json` and `judge_prompt.json`.
    """

    name = "imgedit"
    title = "ImgEdit"
    kind = "edit"
    groups = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")
    best = 5.0

    def read_cases(self) -> list[Case]:
        path = self._find(0)
        rows, problems = {}, []
        for key, row in read_json(path).items():
            if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in FIELDS):
                problems.append(f"{key!r}: has to have {', '.join(FIELDS)} as texts, but is {str(row)[:200]}")
                continue
            if not _SAFE_KEY.fullmatch(key):
                problems.append(f"{key!r}: the key has to be letters, digits, blanks, dots, - and _")
            if row["edit_type"] not in self.groups:
                problems.append(f"{key!r}: edit_type {row['edit_type']!r} is none of {', '.join(self.groups)}")
            if not row["prompt"].strip():
                problems.append(f"{key!r}: there is no instruction")
            source = PurePosixPath(row["id"])
            if source.is_absolute() or ".." in source.parts:
                problems.append(f"{key!r}: the id {row['id']!r} leads out of the folder")
            rows[key] = row
        roots = [path.parent / folder for folder in SOURCE_FOLDERS]
        lacking = [[row["id"] for row in rows.values() if not (root / row["id"]).is_file()] for root in roots]
        absent, root = min(zip(lacking, roots), key=lambda pair: len(pair[0]))
        refuse(path, [*problems, *(f"there is no source {root / source}" for source in absent)])
        if not rows:
            raise ValueError(f"{path} holds no cases.")
        return [
            Case(key, row["prompt"], row["edit_type"], (f"{key}.png",), root / row["id"]) for key, row in rows.items()
        ]

    def _find(self, place: int) -> Path:
        """The file of cases (0) or prompts (1)."""
        for names in FILES:
            for folder in SOURCE_FOLDERS:
                if (path := self.data / folder / names[0]).is_file():
                    return path.with_name(names[place])
        raise ValueError(f"{self.data} holds no {FILES[0][0]}: see Benchmark/Basic in PKU-YuanGroup/ImgEdit.")

    def questions(self) -> Sequence[Step]:
        path = self._find(1)
        if not path.is_file():
            raise ValueError(f"{self.data} lacks the judge's prompts: put {path.name} into it.")
        prompts = read_json(path)
        types = [group for group in self.groups if any(case.group == group for case in self.cases)]
        refuse(
            path,
            [
                f"there is no prompt for {group!r} with {INSTRUCTION} in it"
                for group in types
                if INSTRUCTION not in str(prompts.get(group))
            ],
        )
        return (ImgEditQuestion({group: prompts[group] for group in types}),)

    def score(self, run: dict[str, Any], pictures: Path, answers: dict[str, Answers] | None, judge: str) -> Scores:
        """
        See [`Benchmark.score`]. A case's score is the mean of the judge's, a type's the mean over its cases, and
        "overall" the mean over the types that the data have, each rounded to two digits; it is `None` where a type has
        no score. The official code prints no overall score, and leaves the rounding of it open.

        Raises:
            ValueError: If no judge was asked.
        """
        if answers is None:
            raise ValueError("ImgEdit is scored by a judge, but none was asked.")
        scores = [_score_case(case, answers.get(case.key)) for case in self.cases]
        counts, points = dict.fromkeys(self.groups, 0), {group: list[float]() for group in self.groups}
        for score in scores:
            counts[score.group] += 1
            if score.score is not None:
                points[score.group].append(score.score)
        figures = {
            group: Figure(_mean(points[group]) if points[group] else None, len(points[group]), counts[group])
            for group in self.groups
            if counts[group]
        }
        means = [figure.value for figure in figures.values() if figure.value is not None]
        whole = Figure(None, sum(map(len, points.values())), len(scores))
        if len(means) == len(figures):
            low, high = mean_of_means_interval(points)
            whole = Figure(_mean(means), whole.scored, whole.cases, low, high)
        for group, figure in figures.items():
            low, high = mean_interval(points[group])
            figures[group] = Figure(figure.value, figure.scored, figure.cases, low, high)
        return Scores(self.name, run, {"overall": whole, **figures}, scores, judge)

    def export(self, folder: Path, scores: Scores, answers: dict[str, Answers] | None) -> None:
        """
        Writes `result.json`, of which the official `step1_get_avgscore.py` and `step2_typescore.py` make the same
        scores: the judge's answers by the keys of the cases that have a score.
        """
        scored = [case.key for case in scores.cases if case.score is not None]
        texts = {key: (answers or {})[key].texts[ImgEditQuestion.name] for key in scored}
        folder.mkdir(parents=True, exist_ok=True)
        write_lines(folder / RESULTS, [json.dumps(texts, indent=4)])


def _score_case(case: Case, answer: Answers | None) -> CaseScore:
    parts = {} if answer is None else answer.parts.get(ImgEditQuestion.name, {})
    if not parts:
        reason = "the judge was not asked" if answer is None else answer.reason or "an answer is missing"
        return CaseScore(case.key, case.group, None, reason=reason)
    return CaseScore(case.key, case.group, _mean(list(parts.values())), parts)
