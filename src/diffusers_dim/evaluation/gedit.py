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
GEdit-Bench (https://huggingface.co/datasets/stepfun-ai/GEdit-Bench), scored as GEdit-Bench/ in stepfun-ai/Step1X-Edit
does: VIEScore (https://huggingface.co/papers/2312.14867) of semantic consistency and of perceptual quality.
"""

import ast
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..data.engine.records import EngineSample, Step
from ..data.records import import_datasets
from ..designers import Conversation
from ..designers.blueprint import strip_thoughts
from ..files import read_picture, written_aside
from .benchmark import Answers, Benchmark, Case, CaseScore, Figure, Scores, refuse
from .statistics import mean_interval, mean_of_means_interval


TEXTS = ("task_type", "key", "instruction", "instruction_language", "Intersection_exist")
PICTURES = ("input_image", "input_image_raw")
PROMPT_FILES = ("vie_prompts.py", "vie_prompts.json")
# What the official scorer joins by line breaks to its two prompts, by the names in its vie_prompts.py.
CONTEXT = "_context_no_delimit"
CONSTANTS = {
    "semantics": (CONTEXT, "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
    "quality": (CONTEXT, "_prompts_0shot_rule_PQ"),
}
JSON_NAMES = {"semantics": "semantic", "quality": "quality"}
INSTRUCTION = "<instruction>"
PARTS = {"semantics": ("success", "overediting"), "quality": ("naturalness", "artifacts")}
MAX_SCORE = 10
MAX_CHARACTERS = 20_000  # of an answer
CSV_COLUMNS = (
    *("source_image", "edited_image", "instruction", "sementics_score", "quality_score"),  # their spelling
    *("intersection_exist", "instruction_language"),
)
# Under which names the official calculate_statistics.py is told to find the CSVs; it knows two backbones.
CSV_MODEL, CSV_BACKBONE = "dim", "gpt4o"

_DELIMITER = "||V^=^V||"
_SAFE_KEY = re.compile(r"(?!\.)[\w.-]+")
_BATCH = 16  # rows, with their pictures


class VIEScoreQuestion(Step):
    """
    One of the two questions about an edit. Column: `scores`, by the parts' names.

    Args:
        name (`"semantics"` or `"quality"`):
            The first is asked with source and edit, the second with the edit alone. The edit is shown at the source's
            size, and text comes before pictures, as to the official GPT backbone.
        prompt (`str`): What is asked, with `<instruction>` in it for semantics.
    """

    version = 2  # the first one showed JPEGs made of the files

    def __init__(self, name: Literal["semantics", "quality"], prompt: str):
        self.name = name
        self.prompt = prompt

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"prompt": self.prompt}

    def conversation(self, sample: EngineSample) -> Conversation:
        source, edit = sample.shown
        if edit.size != source.size:
            edit = sample.pictures[-1].resize(source.size, Image.Resampling.BICUBIC)
        pictures = (source, edit) if self.name == "semantics" else (edit,)
        prompt = self.prompt.replace(INSTRUCTION, sample.instruction)
        return Conversation((prompt,), pictures[0], sample.instruction, others=pictures[1:], text_first=True)

    def read(self, text: str, sample: EngineSample) -> dict[str, Any]:
        scores = read_scores(text)
        names = [*PARTS[self.name], *(f"score {place}" for place in range(3, len(scores) + 1))]
        return {"scores": dict(zip(names, scores))}


def read_scores(text: str) -> list[float]:
    """
    The scores of a judge's answer, found as the official scorer finds them: between two delimiters, or from the first
    brace to the last; without braces a list of two whole numbers or one whole number alone will do.

    It differs where the official scorer breaks off or guesses: what it cannot read it asks once more, and then takes a
    random number; here that is an error. So is a score that is no number from 0 to 10. Thoughts are passed over.

    Raises:
        ValueError: If there are none.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; be brief.")
    text = strip_thoughts(text)
    if text.count(_DELIMITER) == 2:
        text = text.split(_DELIMITER)[1]
    elif "{" in text and "}" in text:
        text = text[text.find("{") : text.rfind("}") + 1]
    else:
        return _checked(_plain_scores(text))
    text = text.strip().replace("\n", "")
    found: Any = None
    for candidate in (text, _mended(text)):
        try:
            found = json.loads(candidate)["score"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        break
    if found is None:
        raise ValueError('it is no JSON object with "score": a list of numbers.')
    return _checked(found if isinstance(found, list) else [found])


def _plain_scores(text: str) -> list[int]:
    listed = text[max(text.find("["), 0) : text.rfind("]") + 1]
    if re.fullmatch(r"\[\d{1,2}, ?\d{1,2}\]", listed, re.ASCII):
        return [int(number) for number in listed[1:-1].split(",")]
    if re.fullmatch(r"\s*\d{1,2}\s*", text, re.ASCII):
        return [int(text)]
    raise ValueError('there is no JSON object with "score" and "reasoning" in it.')


def _mended(text: str) -> str:
    """
    JSON with the quotes that a judge left out: around words before a colon, and around what follows a key up to the
    next comma or brace. A number there becomes a list.
    """

    def mend_value(match: re.Match[str]) -> str:
        value = match[0].strip()
        if re.fullmatch(r"-?\d+(?:\.\d+)?", value):
            return f" [{value}]"
        return f" {value}" if value.lower() in ("true", "false", "null") else f' "{value}"'

    return re.sub(r'(?<=":)[^,}]*+(?=[,}])', mend_value, re.sub(r"\b\w++(?=:)", r'"\g<0>"', text))


def _checked(scores: Sequence[Any]) -> list[float]:
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= MAX_SCORE:
            raise ValueError(f"a score has to be a number from 0 to {MAX_SCORE}, but one is {str(score)[:80]!r}.")
    if not scores:
        raise ValueError("its list of scores is empty.")
    return [float(score) for score in scores]


def read_prompts(data: Path) -> dict[str, str]:
    """
    The official prompts by the questions' names, from a copy of Step1X-Edit's GEdit-Bench/viescore/vie_prompts.py in
    the folder, of which string constants are read and nothing is run; or from a `vie_prompts.json` with "semantic" and
    "quality", each a whole prompt.

    Raises:
        ValueError: If there is neither, or it lacks a prompt; what is missing is named.
    """
    path = next((data / name for name in PROMPT_FILES if (data / name).is_file()), None)
    if path is None:
        raise ValueError(
            f"{data} lacks the judge's prompts: put GEdit-Bench/viescore/vie_prompts.py of stepfun-ai/Step1X-Edit "
            'into it, or a vie_prompts.json with "semantic" and "quality".'
        )
    try:
        text = path.read_text(encoding="utf-8")
        found = _string_constants(text) if path.suffix == ".py" else json.loads(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    wanted = CONSTANTS if path.suffix == ".py" else {name: (key,) for name, key in JSON_NAMES.items()}
    found = found if isinstance(found, dict) else {}
    names = dict.fromkeys(name for group in wanted.values() for name in group)
    if missing := [name for name in names if not isinstance(found.get(name), str)]:
        raise ValueError(f"{path} lacks {', '.join(missing)}, as text.")
    prompts = {name: "\n".join(found[part] for part in parts) for name, parts in wanted.items()}
    if INSTRUCTION not in prompts["semantics"]:
        raise ValueError(f"{path}: the prompt of semantic consistency has no {INSTRUCTION} in it.")
    return prompts


def _string_constants(code: str) -> dict[str, str]:
    """What is assigned to names at the top of a Python file, where that is a string."""
    return {
        statement.targets[0].id: statement.value.value
        for statement in ast.parse(code).body
        if isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    }


class GEdit(Benchmark):
    """
    GEdit-Bench. Edits are made of `input_image_raw`, and a judge sees `input_image` for the source, as in the official
    example; [`~GEdit.prepare`] takes both out of the data.

    Args:
        data (`str` or `Path`):
            A folder with Parquet files as on the Hub, or one that `datasets.save_to_disk` wrote; for judging with
            `vie_prompts.py` in it, see [`read_prompts`].
        language (`"en"` or `"cn"`, defaults to `"en"`): Of the instructions.
    """

    name = "gedit"
    title = "GEdit-Bench"
    kind = "edit"
    groups = (
        *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
        *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
    )
    best = float(MAX_SCORE)

    def __init__(self, data: str | Path, language: Literal["en", "cn"] = "en"):
        if language not in ("en", "cn"):
            raise ValueError(f'`language` has to be "en" or "cn", but is {language!r}.')
        self.language = language
        super().__init__(data)

    def read_cases(self) -> list[Case]:
        cases, problems, keys = [], [], Counter[str]()
        for number, row in enumerate(self._rows(TEXTS, PICTURES)):
            key, group = row["key"], row["task_type"]
            if row["instruction_language"] != self.language:
                continue
            keys[str(key)] += 1
            where = f"row {number} ({key!r})"
            if not isinstance(key, str) or not _SAFE_KEY.fullmatch(key):
                problems.append(f"{where}: the key has to be letters, digits, dots, - and _")
            if group not in self.groups:
                problems.append(f"{where}: task_type {group!r} is none of {', '.join(self.groups)}")
            if not isinstance(row["instruction"], str) or not row["instruction"].strip():
                problems.append(f"{where}: there is no instruction")
            if not isinstance(row["Intersection_exist"], bool):
                problems.append(f"{where}: Intersection_exist is {row['Intersection_exist']!r}, not true or false")
            file = f"fullset/{group}/{self.language}/{key}.png"
            cases.append(Case(key, row["instruction"], group, (file,), fields={name: row[name] for name in TEXTS[3:]}))
        problems += [f"the key {key!r} is there {count} times" for key, count in keys.items() if count > 1]
        refuse(self.data, problems)
        if not cases:
            raise ValueError(f"{self.data} has no row whose instruction_language is {self.language!r}.")
        return cases

    def _rows(self, columns: Sequence[str], needed: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """The data's rows with some columns, pictures as files' bytes; no more than a few are in memory."""
        datasets = import_datasets()
        import pyarrow  # comes with `datasets`
        from pyarrow import parquet

        tables: list[Any] = []
        try:
            tables += map(parquet.ParquetFile, sorted(self.data.rglob("*.parquet")))
            if not tables:
                dataset = datasets.load_from_disk(str(self.data))
                if isinstance(dataset, datasets.DatasetDict):
                    if list(dataset) != ["train"]:
                        raise ValueError(f"{self.data} holds the splits {list(dataset)}, but GEdit-Bench has train.")
                    dataset = dataset["train"]
                tables.append(dataset.with_format("arrow"))
            for table in tables:
                names = table.schema_arrow.names if isinstance(table, parquet.ParquetFile) else table.column_names
                if missing := [name for name in (*columns, *needed) if name not in names]:
                    raise ValueError(f"{self.data} lacks the columns {missing}: it has {names}.")
            for table in tables:
                if isinstance(table, parquet.ParquetFile):
                    batches = table.iter_batches(_BATCH, columns=list(columns))
                else:
                    batches = table.select_columns(list(columns)).iter(_BATCH)
                for batch in batches:
                    yield from batch.to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"{self.data} holds neither Parquet files nor what `datasets.save_to_disk` writes: {error}"
            ) from error

    def prepare(self, pictures: Path) -> None:
        """
        Writes `input_image` as `{key}_SRCIMG.png` beside where the edit goes, and `input_image_raw` into a folder
        `sources` beside that of pictures, where they are not there, and sets the cases' `judged_image` and `image`.

        Raises:
            ValueError: If a picture of the data cannot be read; all such are named.
        """
        paths = {}
        for case in self.cases:
            file = PurePosixPath(case.files[0])
            judged, raw = pictures / file.with_stem(f"{case.key}_SRCIMG"), pictures.parent / "sources" / file
            paths[case.key] = judged, raw
        if not all(path.exists() for pair in paths.values() for path in pair):
            problems = []
            for row in self._rows(("key", "instruction_language", *PICTURES)):
                if row["instruction_language"] != self.language:
                    continue
                for name, path in zip(PICTURES, paths[row["key"]]):
                    try:
                        _write_png(row[name], path)
                    except ValueError as error:
                        problems.append(f"{row['key']}, {name}: {error}")
            refuse(self.data, problems)
        self.cases = [replace(case, image=paths[case.key][1], judged_image=paths[case.key][0]) for case in self.cases]

    def questions(self) -> Sequence[Step]:
        prompts = read_prompts(self.data)
        return tuple(VIEScoreQuestion(name, prompts[name]) for name in ("semantics", "quality"))

    def score(self, run: dict[str, Any], pictures: Path, answers: dict[str, Answers] | None, judge: str) -> Scores:
        """
        See [`Benchmark.score`]. Of a case: the root of the product of the lowest score for semantics and the lowest
        for quality. Figures are means rounded to three digits: "overall" over the groups' means, the groups, the same
        under "semantics/" and "quality/", and all again under "intersection/" for the cases whose `Intersection_exist`
        is true; and "overall without text_change", which the paper prints.

        Raises:
            ValueError: If no judge was asked.
        """
        if answers is None:
            raise ValueError("GEdit-Bench is scored by a judge, but none was asked.")
        scores = [_score_case(case, answers.get(case.key)) for case in self.cases]
        pairs = list(zip(self.cases, scores))
        figures: dict[str, Figure] = {}
        for prefix, chosen in {
            "": scores,
            "intersection/": [score for case, score in pairs if case.fields["Intersection_exist"]],
        }.items():
            for measure in ("", "semantics/", "quality/"):
                figures |= _figures(f"{prefix}{measure}", measure.strip("/"), chosen, self.groups)
        rest = [group for group in self.groups if group != "text_change"]
        figures["overall without text_change"] = _figures("", "", scores, rest)["overall"]
        return Scores(self.name, run, figures, scores, judge)

    def export(self, folder: Path, scores: Scores, answers: dict[str, Answers] | None) -> None:
        """
        Writes the CSVs that the official `calculate_statistics.py` reads, by `--save_path FOLDER --model_name dim
        --backbone gpt4o --language en`, whoever judged. Their paths are relative to the folder of pictures, and a case
        without scores has no row.
        """
        folder = folder / CSV_MODEL / CSV_BACKBONE / "eval_results_new"
        folder.mkdir(parents=True, exist_ok=True)
        rows: dict[str, list[tuple[Any, ...]]] = {group: [] for group in self.groups}
        for case, score in zip(self.cases, scores.cases, strict=True):
            if score.score is None:
                continue
            file = PurePosixPath(case.files[0])
            points = (int(point) if point.is_integer() else point for point in map(score.parts.get, PARTS))
            facts = (case.fields["Intersection_exist"], case.fields["instruction_language"])
            rows[case.group].append((file.with_stem(f"{case.key}_SRCIMG"), file, case.prompt, *points, *facts))
        for name, lines in {**rows, "combined": [row for group in rows.values() for row in group]}.items():
            path = folder / f"{CSV_MODEL}_{name}_gpt_score.csv"
            with written_aside(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file_:
                csv.writer(file_).writerows([CSV_COLUMNS, *lines])


def _write_png(picture: Any, path: Path) -> None:
    """Writes a picture's file as PNG, unless it is there; a PNG file as it is."""
    if path.exists():
        return
    data = picture.get("bytes") if isinstance(picture, dict) else picture
    if not isinstance(data, bytes):
        raise ValueError("there is no picture")
    image = read_picture(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            aside.write_bytes(data)
        else:
            image.save(aside, "PNG")


def _score_case(case: Case, answer: Answers | None) -> CaseScore:
    if answer is None:
        return CaseScore(case.key, case.group, None, reason="the judge was not asked")
    lowest = {name: min(answer.parts[name].values()) for name in PARTS if answer.parts.get(name)}
    if answer.reason or len(lowest) < len(PARTS):
        return CaseScore(case.key, case.group, None, reason=answer.reason or "an answer is missing")
    return CaseScore(case.key, case.group, math.sqrt(lowest["semantics"] * lowest["quality"]), lowest)


def _figures(prefix: str, measure: str, scores: Sequence[CaseScore], groups: Sequence[str]) -> dict[str, Figure]:
    """Means by group, of those that have cases, and over their means; of a part or, without a name, of the score."""
    values: dict[str, list[float]] = {}
    counts = Counter(score.group for score in scores)
    for group in groups:
        if counts[group]:
            scored = [score for score in scores if score.group == group and score.score is not None]
            values[group] = [score.parts[measure] if measure else score.score for score in scored]
    means = {group: float(np.mean(points)) if points else None for group, points in values.items()}
    whole = float(np.mean(list(means.values()))) if means and None not in means.values() else None
    scored_count, count = sum(map(len, values.values())), sum(counts[group] for group in values)
    figures = {
        "overall": Figure(_rounded(whole), scored_count, count, *_unless(whole, mean_of_means_interval(values)))
    }
    for group, points in values.items():
        figures[group] = Figure(_rounded(means[group]), len(points), counts[group], *mean_interval(points))
    return {f"{prefix}{name}": figure for name, figure in figures.items()}


def _unless(value: float | None, interval: tuple[Any, Any]) -> tuple[Any, Any]:
    """No interval where there is no value."""
    return interval if value is not None else (None, None)


def _rounded(value: float | None) -> float | None:
    """As the official script prints it."""
    return None if value is None else float(f"{value:.3f}")
