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
"""What all benchmarks share: cases, what was made of them, and the scores that come of it."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..files import write_lines


if TYPE_CHECKING:
    from ..data.engine.records import Step

# The published setting.
SIZE, STEPS, GUIDANCE_SCALE, SEED = 1024, 30, 7.5, 233
LEFT_OUT = "left out by --limit"  # the reason of such cases that they have no score


@dataclass(frozen=True)
class Case:
    """
    What a benchmark asks for once.

    Args:
        key (`str`): Its name in the benchmark, used once.
        prompt (`str`): The instruction, or for text to image the prompt.
        group (`str`): The edit type, tag or category it counts for; one of the benchmark's `groups`.
        files (`tuple[str, ...]`):
            The pictures that are to be made, by their paths in the run's folder of pictures, as the official scorer
            looks for them.
        image (`pathlib.Path`, *optional*): The source picture's file; `None` for text to image.
        fields (`dict`): What else the benchmark says of it; JSON values.
        judged_image (`pathlib.Path`, *optional*): What a judge sees for the source, where that is another file.
    """

    key: str
    prompt: str
    group: str
    files: tuple[str, ...]
    image: Path | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    judged_image: Path | None = None


@dataclass(frozen=True)
class Answers:
    """
    What a judge said of a case.

    Args:
        texts (`dict[str, str]`): Its answers' own words by the questions' names, also of such as are of no use.
        parts (`dict[str, dict[str, float]]`): What was read in them, by question and part; only where all were read.
        reason (`str`, defaults to `""`): Why not, where one was not: a refusal, rubbish, a server that gave up.
    """

    texts: dict[str, str]
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class CaseScore:
    """
    What a case was given.

    Args:
        key, group (`str`): The case's.
        score (`float`, *optional*): `None` where there is none: it then counts for no mean.
        parts (`dict[str, float]`): What the score was made of, by name.
        reason (`str`, defaults to `""`): Why there is no score.
    """

    key: str
    group: str
    score: float | None
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Figure:
    """
    A number of a table.

    Args:
        value (`float`, *optional*): As the official scorer prints it; `None` where nothing was scored.
        scored, cases (`int`): How many of how many cases it is made of.
        low, high (`float`, *optional*): Its 95% interval, by bootstrap over cases; `None` where there is none.
    """

    value: float | None
    scored: int
    cases: int
    low: float | None = None
    high: float | None = None


@dataclass
class Scores:
    """
    A run's scores.

    Args:
        benchmark (`str`): The benchmark's name.
        run (`dict`): What the pictures were made with, as `run.json` says.
        figures (`dict[str, Figure]`): By name: "overall", the groups, and what else the benchmark reports.
        cases (`list[CaseScore]`): Every case of the benchmark, in its order.
        judge (`str`, defaults to `""`): Who scored, where somebody did.
        lower_is_better (`bool`, defaults to `False`): As for distances.
        mean_of_groups (`bool`, defaults to `True`):
            Whether the overall score is the mean over the groups' means, else over all cases; comparisons do the same.
    """

    benchmark: str
    run: dict[str, Any]
    figures: dict[str, Figure]
    cases: list[CaseScore]
    judge: str = ""
    lower_is_better: bool = False
    mean_of_groups: bool = True

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of its cases in the benchmark's order; such as there is no figure of come last."""
        groups = dict.fromkeys(case.group for case in self.cases)
        return tuple(dict.fromkeys((*(name for name in self.figures if name in groups), *groups)))

    def save(self, path: Path) -> None:
        """Writes them as JSON."""
        write_lines(path, [json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)])

    @classmethod
    def load(cls, path: Path) -> "Scores":
        """
        Reads what [`save`] wrote.

        Raises:
            ValueError: If the file is not of that kind.
        """
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            figures = {name: Figure(**figure) for name, figure in read.pop("figures").items()}
            cases = [CaseScore(**case) for case in read.pop("cases")]
            return cls(figures=figures, cases=cases, **read)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no scores of a run: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    The object in a JSON file.

    Raises:
        ValueError: If the file cannot be read, holds something else, or a key comes twice in an object of it.
    """
    try:
        # The last of two of one name would win without a word.
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} has to be a JSON object, but is {str(found)[:80]}.")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the keys {sorted(name for name, count in counts.items() if count > 1)} come twice.")
    return found


def refuse(where: Any, problems: Sequence[str]) -> None:
    """
    Says what is wrong, if anything is.

    Raises:
        ValueError: If there are problems: the first ten of them, and how many there are.
    """
    if problems:
        more = "" if len(problems) <= 10 else f"\nand {len(problems) - 10} more"
        some = "\n".join(problems[:10])
        raise ValueError(f"{where}: {len(problems)} problem{'s'[: len(problems) != 1]}:\n{some}{more}")


class Benchmark(ABC):
    """
    A benchmark over the data in a folder, in the layout in which it was released.

    Attributes:
        name (`str`): As on the command line.
        title (`str`): As in tables.
        kind (`str`): "edit" or "t2i".
        groups (`tuple[str, ...]`): In the order of the official table.
        best (`float`): The best score a case can have.

    Args:
        data (`str` or `Path`): The folder.

    Raises:
        ValueError: If something is missing in it or not as it has to be; all of it is listed.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    kind: ClassVar[Literal["edit", "t2i"]]
    groups: ClassVar[tuple[str, ...]]
    best: ClassVar[float]

    def __init__(self, data: str | Path):
        self.data = Path(data)
        self.cases: list[Case] = self.read_cases()

    @abstractmethod
    def read_cases(self) -> list[Case]:
        """Every case, checked."""

    def prepare(self, pictures: Path) -> None:  # noqa: B027
        """
        Writes what the official scorer wants beside the pictures, into their folder; called before cases are painted
        or judged, as often as one likes. Where sources lie inside the data, cases name their files only after it.
        """

    def questions(self) -> Sequence["Step"]:
        """What a judge is asked about each case's edit, each a column "scores" by part; none without a judge."""
        return ()

    @abstractmethod
    def score(self, run: dict[str, Any], pictures: Path, answers: dict[str, Answers] | None, judge: str) -> Scores:
        """
        The scores of a finished run.

        Args:
            run (`dict`): What `run.json` says.
            pictures (`Path`): The folder of pictures, all of them there.
            answers (`dict[str, Answers]`, *optional*): What the judge answered by the cases' keys, where one is asked.
            judge (`str`): Its name.
        """

    def export(self, folder: Path, scores: Scores, answers: dict[str, Answers] | None) -> None:  # noqa: B027
        """Writes the judge's answers into `folder` in the official scorer's own form."""
