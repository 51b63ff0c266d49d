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
"""Reports of a finished run and comparisons of two, told from files alone: no model is needed."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from PIL import Image

from ..files import read_picture, write_lines, written_aside
from .benchmark import LEFT_OUT, Case, CaseScore, Figure, Scores
from .paper import PAPER, PaperRow, PaperTable, published
from .sheets import FAINT, FRAME, INK, SheetRow, draw_sheet
from .statistics import FLIPS, RESAMPLES, Agreement, Comparison, Difference, agreement, compare


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Plot


class _About(NamedTuple):
    """A benchmark's title, its data set on the Hub or elsewhere, and its metric's name."""

    title: str
    dataset: str
    metric: str


ABOUT = {
    "imgedit": _About("ImgEdit", "sysuyy/ImgEdit", "imgedit"),
    "gedit": _About("GEdit-Bench", "stepfun-ai/GEdit-Bench", "viescore"),
    "geneval": _About("GenEval", "geneval", "geneval"),
    "mjhq": _About("MJHQ-30K", "playgroundai/MJHQ-30K", "fid"),
    "shapes": _About("Shapes", "shapes", "success"),
}
SHEET_SIDE = 448  # pixels of a picture on a sheet; a blueprint of usual length is legible in it
MOST_LETTERS = 400  # of a prompt or reason in a table or on a sheet
COLORS = ("#2f6f9f", "#c2571a", "#4b8b3b", "#7d5ba6")
NOTHING = "–"


def write_report(
    output: Path,
    scores: Sequence[Scores],
    cases: Sequence[Case],
    pictures: Path,
    blueprints: Mapping[str, str] | None = None,
    per_group: int = 3,
) -> Path:
    """
    Writes the report of a run: `report.md`, `report.json`, `report.tex` (the paper's tables with ours, for booktabs),
    `model_index.yml` (metadata for a model card), `sheets/` (of each group the best and worst cases) and `plots/`.

    Args:
        output (`Path`): The run's folder; reports of before are replaced.
        scores (`Sequence[Scores]`): Of one run, one a judge; sheets show best and worst by the first.
        cases (`Sequence[Case]`): The benchmark's.
        pictures (`Path`): The run's folder of pictures; those on sheets are read.
        blueprints (`Mapping[str, str]`, *optional*):
            By the cases' keys. For a case without one the picture's own "parameters" are asked.
        per_group (`int`, defaults to 3):
            How many best and how many worst cases of a group are shown; without scores of cases twice as many, the
            first ones.

    Returns:
        `pathlib.Path`: Of `report.md`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the scores are not of one run and these cases, or a picture cannot be read.
    """
    _check(scores, cases)
    _new_plot(1, 1)
    for folder in ("sheets", "plots"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    run, about = scores[0].run, _about(scores[0])
    sheets = _draw_sheets(output / "sheets", scores[0], cases, pictures, blueprints or {}, per_group)
    plots = {"by group": output / "plots" / "by_group.png"}
    _save_plot(_plot_groups(scores), plots["by group"])
    if any(case.score is not None for judged in scores for case in judged.cases):
        plots["cases"] = output / "plots" / "histogram.png"
        _save_plot(_plot_histogram(scores), plots["cases"])
    pairs = [(a.judge, b.judge, agreement(a, b)) for a, b in itertools.combinations(scores, 2)]
    tables = PAPER.get(scores[0].benchmark, ()) if _is_as_published(scores[0]) else ()
    tables = tables or (PaperTable(about.title, _columns(scores[0]), (), "", ""),)

    def inside(path: Path) -> str:
        return path.relative_to(output).as_posix()

    prompts = {case.key: case.prompt for case in cases}
    sections = [
        [f"# {_markdown(about.title)}: {_markdown(_model(run))}", "", *_summary(scores)],
        ["## Scores", "", *_scores_table(scores)],
        [f"![Scores by group]({inside(plots['by group'])})"],
        [f"![Scores of cases]({inside(plots['cases'])})"] if "cases" in plots else [],
        *([f"## Beside the paper: {_markdown(t.title)}", "", *_paper_table(scores, t)] for t in tables if t.rows),
        _further_tables(scores),
        _agreement_table(pairs),
        [
            "## Settings",
            "",
            *_table(("setting", "value"), [(_markdown(name), _value(run[name])) for name in run], left=2),
        ],
        ["## Cases without a score", "", *_unscored_table(scores, prompts)],
        ["## Sheets"],
        *([f"### {_markdown(group)}", "", f"![{_markdown(group)}]({inside(path)})"] for group, path in sheets.items()),
    ]
    report = {
        "benchmark": scores[0].benchmark,
        "run": run,
        "judges": [
            {
                "judge": judged.judge,
                "figures": {name: asdict(figure) for name, figure in judged.figures.items()},
                "unscored": [asdict(case) for case in _unscored(judged)],
            }
            for judged in scores
        ],
        "agreement": [{"judges": [a, b], **asdict(found)} for a, b, found in pairs],
        "paper": [asdict(table) for table in tables if table.rows],
        "plots": [inside(path) for path in plots.values()],
        "sheets": {group: inside(path) for group, path in sheets.items()},
    }
    write_lines(output / "report.json", [_json(report)])
    write_lines(output / "report.tex", [line for table in tables for line in _latex_table(scores, table)])
    kind = "image-to-image" if any(case.image for case in cases) else "text-to-image"
    write_lines(output / "model_index.yml", [model_index(scores, kind).to_yaml()])
    write_lines(output / "report.md", ["\n\n".join("\n".join(lines) for lines in sections if lines)])
    return output / "report.md"


def write_comparison(a: Scores, b: Scores, path: Path, found: Comparison | None = None) -> Path:
    """
    Writes what run `b` has more than run `a`, see [`compare`], as Markdown, and beside it as JSON and a plot.

    Args:
        a, b ([`Scores`]): Of one benchmark and judge.
        path (`Path`): The Markdown file's, which ends in ".md"; the others' names end in ".json" and ".png".
        found ([`Comparison`], *optional*): Of [`compare`], where it was called already.

    Returns:
        `pathlib.Path`: `path`.

    Raises:
        ImportError: Without matplotlib.
        ValueError: If the name ends otherwise, the runs cannot be compared or share no scored case.
    """
    if path.suffix != ".md":
        raise ValueError(f"A comparison's name has to end in .md, but is {path.name!r}.")
    found = found or compare(a, b)
    if not found.overall.pairs:
        raise ValueError("The runs cannot be compared case by case: no case has a score in both.")
    title, digits = _about(a).title, _digits([a, b])
    differences = {**found.groups, "overall": found.overall}
    _save_plot(_plot_differences(differences, a, b), path.with_suffix(".png"))
    rows = [
        (
            _bold(name) if name == "overall" else _markdown(name),
            f"{one.pairs} of {len(a.cases) if name == 'overall' else sum(c.group == name for c in a.cases)}",
            _rounded(one.a, digits),
            _rounded(one.b, digits),
            _rounded(one.value, digits, "+"),
            _interval(one.low, one.high, digits, "+"),
            NOTHING if one.p is None else _p(one.p),
            f"{one.higher} / {one.equal} / {one.lower}",
        )
        for name, one in differences.items()
    ]
    names = [name for name in {**a.run, **b.run} if a.run.get(name) != b.run.get(name)]
    changed = [(_markdown(name), _value(a.run.get(name)), _value(b.run.get(name))) for name in names]
    alone = [("A", _markdown(key)) for key in found.only_a] + [("B", _markdown(key)) for key in found.only_b]
    sections = [
        [f"# {_markdown(title)}: B beside A"],
        _table(("setting", "A", "B"), changed, left=3) if changed else ["The runs' settings are the same."],
        [_judged(a) + (" Lower is better." if a.lower_is_better else "")],
        _table(("group", "pairs", "A", "B", "B - A", "95% interval", "p", "higher / equal / lower"), rows),
        [
            f"Over the cases that have a score in both runs. Intervals: paired bootstrap, {RESAMPLES:,} resamples. p: "
            f"two-sided, by flipping signs of the pairs' differences, all ways or {FLIPS:,}; not corrected for there "
            f"being {len(found.groups)} groups. Neither says what other seeds would give.",
        ],
        [f"![Differences by group]({path.with_suffix('.png').name})"],
        [
            f"{len(alone)} cases have a score in one run alone and are left out:",
            "",
            *_table(("run", "case"), alone, left=2),
        ]
        if alone
        else ["No case has a score in one run alone."],
    ]
    whole = {"benchmark": a.benchmark, "judge": a.judge, "a": a.run, "b": b.run, **asdict(found)}
    write_lines(path.with_suffix(".json"), [_json(whole)])
    write_lines(path, ["\n\n".join("\n".join(lines) for lines in sections)])
    return path


def model_index(scores: Sequence[Scores], task: str) -> ModelCardData:
    """
    A run's figures as a model card's metadata: its `to_yaml()` is what stands at the card's head.

    Args:
        scores (`Sequence[Scores]`): Of one run, one a judge.
        task (`str`): The Hub's name of it, "image-to-image" or "text-to-image".
    """
    about = _about(scores[0])
    results = [
        EvalResult(
            task_type=task,
            dataset_type=about.dataset,
            dataset_name=about.title,
            metric_type=about.metric,
            metric_name=f"{about.title} {figure_name}" + (f", judged by {judged.judge}" if judged.judge else ""),
            metric_value=figure.value,
            metric_args={
                name: round(value, 4)
                for name, value in asdict(figure).items()
                if name != "value" and value is not None
            },
        )
        for judged in scores
        for figure_name, figure in judged.figures.items()
        if figure.value is not None
    ]
    return ModelCardData(model_name=_model(scores[0].run), eval_results=results)


def _check(scores: Sequence[Scores], cases: Sequence[Case]) -> None:
    if not scores:
        raise ValueError("A report needs the scores of at least one judge.")
    if any((judged.benchmark, judged.run) != (scores[0].benchmark, scores[0].run) for judged in scores):
        raise ValueError("A report is of one run, but the scores are of several; compare runs instead.")
    keys = {case.key for case in cases}
    for judged in scores:
        if differing := keys ^ {case.key for case in judged.cases}:
            raise ValueError(
                f"The scores are not of these cases: {len(differing)} are in one of the two alone, such as "
                f"{sorted(differing)[:5]}."
            )


def _about(scores: Scores) -> _About:
    name = scores.benchmark
    about = ABOUT.get(name, _About(name, name, name))
    if _is_as_published(scores):
        return about
    title = f"{about.title}, Fréchet distance by {scores.run['features']}"
    return about._replace(title=title, metric="frechet-distance")


def _is_as_published(scores: Scores) -> bool:
    """Whether the figures are of the published kind: of MJHQ-30K not, where others than Inception's features count."""
    return "features" not in scores.run


def _published_row(scores: Scores) -> PaperRow | None:
    """What the paper has for Draw-In-Mind with this designer."""
    return published(scores.benchmark, _designer(scores.run)) if _is_as_published(scores) else None


def _model(run: Mapping[str, Any]) -> str:
    """The model's name, of a folder the last part."""
    return Path(str(run.get("model") or "model")).name


def _designer(run: Mapping[str, Any]) -> str:
    """Who designed; "" for nobody."""
    designer = run.get("designer") or ""
    return " ".join(map(str, designer.values())) if isinstance(designer, dict) else str(designer)


def _columns(scores: Scores) -> tuple[str, ...]:
    """The groups that there are figures of, in order, and the overall figure."""
    return (*(group for group in scores.groups if group in scores.figures), "overall")


def _scores_cases(scores: Scores) -> bool:
    """Whether it is cases that are scored, and not all of them together."""
    return any(case.score is not None or case.reason for case in scores.cases)


def _unscored(scores: Scores) -> list[CaseScore]:
    return [case for case in scores.cases if case.score is None] if _scores_cases(scores) else []


def _number(value: float | None) -> str:
    """A figure as the official scorer prints it, with two to five digits behind the point."""
    if value is None:
        return NOTHING
    whole, _, digits = f"{value:.5f}".partition(".")
    return f"{whole}.{digits.rstrip('0'):0<2}"


def _places(scores: Sequence[Scores], names: Iterable[str]) -> int:
    """Digits behind the point that print every one of these figures in full."""
    values = [judged.figures[name].value for name in names for judged in scores]
    return max([2, *(len(_number(value).partition(".")[2]) for value in values)])


def _digits(scores: Sequence[Scores]) -> int:
    """Digits behind the point for all that no official scorer prints: as the figures have, but four at most."""
    return min(4, max(_places([judged], judged.figures) for judged in scores))


def _rounded(value: float | None, digits: int, sign: str = "") -> str:
    return NOTHING if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # no -0.00


def _interval(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    return NOTHING if low is None else f"{_rounded(low, digits, sign)} to {_rounded(high, digits, sign)}"


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "&lt; 0.001"


def _value(value: Any) -> str:
    """A setting's value, escaped."""
    if value is None or value == "":
        return NOTHING
    return _markdown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _short(text: str, letters: int = MOST_LETTERS) -> str:
    text = " ".join(text.split())
    return text if len(text) <= letters else text[: letters - 3].rstrip() + "..."


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)


# Markdown


def _markdown(text: str) -> str:
    """A text in one line that Markdown and HTML leave as it is; colons and at signs would make links."""
    text = re.sub(r"([\\`*_{}\[\]()#!|~$:@])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A Markdown table of escaped cells, of which all but the first `left` of a row are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _bold(text: str) -> str:
    return f"**{text}**"


def _summary(scores: Sequence[Scores]) -> list[str]:
    """The overall figure in a line a judge, and what it is worth."""
    digits, lines = _digits(scores), []
    for judged in scores:
        overall = judged.figures["overall"]
        interval = f" ({_interval(overall.low, overall.high, digits)})" if overall.low is not None else ""
        lines.append(f"- **{_number(overall.value)}**{interval}, {_of(overall)} cases. {_judged(judged)}")
        if overall.scored < overall.cases:
            lines[-1] += " **Not all cases have a score: the figures are of those that have one.**"
        if judged.lower_is_better:
            lines[-1] += " Lower is better."
    if any(judged.figures["overall"].low is not None for judged in scores):
        lines += ["", f"In brackets: 95% intervals by percentile bootstrap over cases, {RESAMPLES:,} resamples."]
        lines[-1] += " They say nothing of other seeds and other judges."
    return lines


def _of(figure: Figure) -> str:
    return f"{figure.scored} of {figure.cases}"


def _judged(scores: Scores) -> str:
    return f"Judged by {_markdown(scores.judge)}." if scores.judge else "Scored without a judge."


def _scores_table(scores: Sequence[Scores]) -> list[str]:
    """Groups and the overall figure, a judge after the other, beside Draw-In-Mind's published row."""
    digits, row = _digits(scores), _published_row(scores[0])
    head = ["group"]
    for judged in scores:
        head += [f"score, {_markdown(judged.judge)}" if len(scores) > 1 else "score", "95% interval", "cases"]
    if row:
        head.append(f"{_markdown(row.model)}, published")
    body, columns = [], _columns(scores[0])
    # As many behind the point in all rows of groups; the overall figure may be printed with more.
    groups = columns[:-1]
    places = {**dict.fromkeys(groups, _places(scores, groups)), "overall": _places(scores, ["overall"])}
    for name in columns:
        cells = [_markdown(name)]
        for judged in scores:
            figure = judged.figures[name]
            cells += [_rounded(figure.value, places[name]), _interval(figure.low, figure.high, digits), _of(figure)]
        if row:
            cells.append(_published(row.figures.get(name)))
        body.append([_bold(cell) if cell != NOTHING else cell for cell in cells] if name == "overall" else cells)
    return _table(head, body)


def _published(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _paper_rows(scores: Sequence[Scores], table: PaperTable) -> Iterable[tuple[bool, list[str]]]:
    """Our rows, each with True, and then the published ones: name, designer, figures, how many cases."""
    columns = table.columns or _columns(scores[0])
    for judged in scores:
        name = _model(judged.run) + (f", judged by {judged.judge}" if judged.judge else "")
        figures = [judged.figures.get(column) for column in columns]
        values = [_number(figure.value) if figure else NOTHING for figure in figures]
        yield True, [name, _designer(judged.run) or NOTHING, *values, _of(judged.figures["overall"])]
    for row in table.rows:
        values = [_published(row.figures.get(column)) for column in columns]
        yield False, [row.model, row.designer or NOTHING, *values, "as published"]


def _paper_table(scores: Sequence[Scores], table: PaperTable) -> list[str]:
    rows = []
    for ours, cells in _paper_rows(scores, table):
        cells = [_markdown(cell) for cell in cells]
        rows.append([_bold(cell) for cell in cells] if ours else cells)
    head = ["model", "designer", *map(_markdown, table.columns), "cases"]
    return [*_table(head, rows, left=2), "", f"{table.note} Read at <{table.source}>."]


def _further_tables(scores: Sequence[Scores]) -> list[str]:
    """
    The figures that are neither of a group nor overall: those such as "quality/subject-add" in a table of groups by
    measures a judge, all others in a list.
    """
    digits, lines = _digits(scores), []
    rows = []
    for judged in scores:
        columns, measures = _columns(judged), dict[str, dict[str, Figure]]()
        for name, figure in judged.figures.items():
            measure, _, group = name.rpartition("/")
            if measure and group in columns:
                measures.setdefault(measure, {})[group] = figure
            elif name not in columns:
                interval = _interval(figure.low, figure.high, digits)
                rows.append((_markdown(name), _markdown(judged.judge), _number(figure.value), interval, _of(figure)))
        if measures:
            body = [
                [_markdown(group), *(_counted(found.get(group), digits) for found in measures.values())]
                for group in columns
            ]
            lines += [f"Judged by {_markdown(judged.judge)}:", ""] if len(scores) > 1 else []
            lines += [*_table(["group", *map(_markdown, measures)], body), ""]
    if rows:
        lines += _table(("figure", "judge", "value", "95% interval", "cases"), rows, left=2)
    return ["## Further figures", "", *lines] if lines else []


def _counted(figure: Figure | None, digits: int) -> str:
    """All of a figure in a cell."""
    if figure is None:
        return NOTHING
    interval = "" if figure.low is None else f" ({_interval(figure.low, figure.high, digits)})"
    return f"{_number(figure.value)}{interval}, {_of(figure)}"


def _agreement_table(pairs: Sequence[tuple[str, str, Agreement]]) -> list[str]:
    if not pairs:
        return []
    head = (
        "judges",
        "pairs",
        "Pearson",
        "Spearman",
        "second - first",
        "mean absolute difference",
        "within half a point",
    )
    rows = [
        (
            f"{_markdown(a)}, {_markdown(b)}",
            str(found.pairs),
            _rounded(found.pearson, 2),
            _rounded(found.spearman, 2),
            _rounded(found.mean_difference, 2),
            _rounded(found.mean_absolute_difference, 2),
            NOTHING if found.within_half_a_point is None else f"{found.within_half_a_point:.0%}",
        )
        for a, b, found in pairs
    ]
    return ["## Agreement of the judges", "", "Over the cases that both scored.", "", *_table(head, rows)]


def _unscored_table(scores: Sequence[Scores], prompts: Mapping[str, str]) -> list[str]:
    left_out = {case.key for judged in scores for case in _unscored(judged) if case.reason == LEFT_OUT}
    told = [f"{len(left_out):,} cases were left out by --limit."] if left_out else []
    rows = [
        [case.key, case.group, judged.judge, _short(prompts[case.key]), _short(case.reason) or "no reason given"]
        for judged in scores
        for case in _unscored(judged)
        if case.reason != LEFT_OUT
    ]
    if not rows and told:
        return told
    if not rows:
        return ["None." if _scores_cases(scores[0]) else "Cases have no scores of their own in this benchmark."]
    head = ("case", "group", "judge", "prompt", "reason")
    told += [""] if told else []
    return [*told, *_table(head, [[_markdown(cell) for cell in row] for row in rows], left=len(head))]


# LaTeX

_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    NOTHING: "--",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def _latex_table(scores: Sequence[Scores], table: PaperTable) -> list[str]:
    """A tabular for the package booktabs, ours in bold above the published rows."""
    columns = table.columns or _columns(scores[0])
    lines: dict[bool, list[str]] = {True: [], False: []}
    for ours, cells in _paper_rows(scores, table):
        cells = [_latex(cell) for cell in cells]
        lines[ours].append(" & ".join(rf"\textbf{{{cell}}}" if ours else cell for cell in cells) + r" \\")
    head = " & ".join(_latex(name.replace("_", " ")) for name in ("model", "designer", *columns, "cases"))
    return [
        f"% {table.title}. {table.note}".rstrip() + (f" Read at {table.source}." if table.source else ""),
        rf"\begin{{tabular}}{{ll{'r' * (len(columns) + 1)}}}",
        r"\toprule",
        head + r" \\",
        r"\midrule",
        *lines[True],
        *([r"\midrule", *lines[False]] if lines[False] else []),
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]


# Sheets


def _draw_sheets(
    folder: Path,
    scores: Scores,
    cases: Sequence[Case],
    pictures: Path,
    blueprints: Mapping[str, str],
    per_group: int,
) -> dict[str, Path]:
    """A sheet a group: its best cases and its worst, or its first ones, as many, where no case has a score."""
    judged, sheets = {case.key: case for case in scores.cases}, {}
    by_case = _scores_cases(scores)
    for group in dict.fromkeys([*scores.groups, *(case.group for case in cases)]):
        members = [case for case in cases if case.group == group]
        ranked = [case for case in members if judged[case.key].score is not None]
        # Of equal scores the first case comes first.
        ranked.sort(key=lambda case: judged[case.key].score, reverse=not scores.lower_is_better)
        if len(ranked) <= 2 * per_group:
            shown = [("score", case) for case in ranked]
        else:
            shown = [("best", case) for case in ranked[:per_group]]
            shown += [("worst", case) for case in ranked[: -per_group - 1 : -1]]
        if not shown:
            painted = (case for case in members if all((pictures / file).exists() for file in case.files))
            shown = [("", case) for case in itertools.islice(painted, 2 * per_group)]
        if not shown:
            continue
        heading = f"{group}: {len(ranked)} of {len(members)} cases scored"
        if not by_case:
            heading = f"{group}: {len(shown)} of {len(members)} cases"
        rows = [_sheet_row(which, case, judged[case.key], pictures, blueprints) for which, case in shown]
        if all(not row.title for row in rows):  # a picture each
            alone = [row.pictures[0] for row in rows]
            rows = [SheetRow("", alone[start : start + per_group]) for start in range(0, len(alone), per_group)]
        sheets[group] = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', group)}.png"
        with written_aside(sheets[group]) as aside:
            draw_sheet(rows, heading, SHEET_SIDE).save(aside, format="PNG")
    return sheets


def _sheet_row(which: str, case: Case, judged: CaseScore, pictures: Path, blueprints: Mapping[str, str]) -> SheetRow:
    """
    Source, what was painted from where that is not the prompt, and what was made; of a case that is one picture and
    has no score this alone, its prompt below it.
    """
    made = [(Path(file).stem, read_picture(pictures / file)) for file in case.files]
    shown: list[tuple[str, Image.Image | str]] = []
    if case.image is not None:
        parts = ", ".join(f"{name} {value:.3g}" for name, value in judged.parts.items())
        made = [(f"edit: {parts}" if parts else "edit", picture) for _, picture in made]
        shown.append(("source", read_picture(case.image)))
    blueprint = blueprints.get(case.key) or _made_from(pictures / case.files[0])
    if blueprint and blueprint != case.prompt:
        shown.append(("blueprint" if case.image else "rewritten prompt", blueprint))
    if not which and not shown and len(made) == 1:
        return SheetRow("", [(_short(case.prompt), made[0][1])])
    title = f"{which} {_rounded(judged.score, 2)}, {case.key}" if which else case.key
    return SheetRow(f"{title}\n{_short(case.prompt)}", [*shown, *made])


def _made_from(picture: Path) -> str | None:
    """What a picture says that it was painted from."""
    with Image.open(picture) as image:
        try:
            return json.loads(image.info.get("parameters", "{}")).get("blueprint")
        except (ValueError, AttributeError):
            return None  # another program's parameters


# Plots


def _new_plot(width: float, height: float) -> "tuple[Plot, Axes]":
    """A plot of that many inches."""
    try:
        from matplotlib.figure import Figure as Plot
    except ImportError as error:
        raise ImportError("Plots need matplotlib: `pip install 'diffusers-dim[train]'`.") from error
    plot = Plot(figsize=(width, height), layout="constrained")
    axes = plot.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FRAME)
    axes.tick_params(colors=INK, length=0)
    return plot, axes


def _save_plot(plot: "Plot", path: Path) -> None:
    with written_aside(path) as aside:
        plot.savefig(aside, format="png", dpi=120)


def _plain(text: str) -> str:
    """Dollars would begin a formula."""
    return _short(text, 60).replace("$", r"\$")


def _plot_groups(scores: Sequence[Scores]) -> "Plot":
    """A point a group and judge with its interval, and Draw-In-Mind's published figures."""
    columns, row = _columns(scores[0]), _published_row(scores[0])
    plot, axes = _new_plot(8, 1.4 + 0.42 * len(columns))
    for nth, judged in enumerate(scores):
        shift = 0.18 * (nth - (len(scores) - 1) / 2)
        label, color = judged.judge or _model(judged.run), COLORS[nth % len(COLORS)]
        for place, name in enumerate(columns):
            figure = judged.figures[name]
            if figure.value is None:
                continue
            if figure.low is not None:
                axes.plot([figure.low, figure.high], [place + shift] * 2, color=color, linewidth=2.5, alpha=0.45)
            axes.plot(figure.value, place + shift, "o", color=color, label=_plain(label))
            label = ""
    if row:
        places = [place for place, name in enumerate(columns) if name in row.figures]
        label = f"{row.model}{f' with {row.designer}' if row.designer else ''}, published"
        axes.plot([row.figures[columns[i]] for i in places], places, "D", mfc="none", color=FAINT, label=label)
    counts = [" / ".join(dict.fromkeys(_of(judged.figures[name]) for judged in scores)) for name in columns]
    _name_rows(axes, [f"{_plain(name)}  ({count})" for name, count in zip(columns, counts)])
    about = _about(scores[0])
    axes.set_title(f"{about.title}: {_plain(_model(scores[0].run))}", color=INK, loc="left")
    axes.set_xlabel("score, lower is better" if scores[0].lower_is_better else "score", color=FAINT)
    if axes.get_legend_handles_labels()[0]:
        plot.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=2)
    return plot


def _name_rows(axes: "Axes", names: Sequence[str]) -> None:
    """Names rows from top to bottom, the last of which is the overall one."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", color=FRAME, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(len(names) - 1.5, color=FRAME)


def _plot_histogram(scores: Sequence[Scores]) -> "Plot":
    """How many cases have which score."""
    plot, axes = _new_plot(8, 3.6)
    values = [[case.score for case in judged.cases if case.score is not None] for judged in scores]
    distinct = np.unique(np.concatenate(values))
    # Scores of few values stand in the middle of their bars, which leave no gaps.
    width = max(float(np.diff(distinct).min()), float(np.ptp(distinct)) / 25) if len(distinct) > 1 else 1.0
    edges = distinct[0] - width / 2 + width * np.arange(round(float(np.ptp(distinct)) / width) + 2)
    colors = [COLORS[i % len(COLORS)] for i in range(len(scores))]
    labels = [_plain(f"{judged.judge or _model(judged.run)}, {len(of)} cases") for judged, of in zip(scores, values)]
    axes.hist(values, bins=edges, color=colors, label=labels, rwidth=0.9)
    if len(distinct) <= 10:
        axes.set_xticks(distinct, [f"{value:.3g}" for value in distinct])
    axes.set_title(f"{_about(scores[0]).title}: scores of cases", color=INK, loc="left")
    axes.set_xlabel("score, lower is better" if scores[0].lower_is_better else "score", color=FAINT)
    axes.set_ylabel("cases", color=FAINT)
    if axes.get_legend_handles_labels()[0]:
        plot.legend(frameon=False, fontsize=9, loc="outside lower right", ncols=2)
    axes.locator_params(axis="y", integer=True)
    return plot


def _plot_differences(differences: Mapping[str, Difference], a: Scores, b: Scores) -> "Plot":
    """A point a group with its interval, filled where the interval leaves out 0."""
    plot, axes = _new_plot(8, 1.4 + 0.42 * len(differences))
    axes.axvline(0, color=FAINT, linewidth=1)
    for place, one in enumerate(differences.values()):
        if one.value is None:
            continue
        known = one.low is not None
        apart = known and (one.low > 1e-9 or one.high < -1e-9)  # a 0 may be off by its last bits
        worse = (one.value > 0) == a.lower_is_better
        color = FAINT if abs(one.value) <= 1e-9 else COLORS[1] if worse else COLORS[2]
        if known:
            axes.plot([one.low, one.high], [place] * 2, color=color, linewidth=2.5, alpha=0.45)
        axes.plot(one.value, place, "o", color=color, mfc=color if apart else "white")
    _name_rows(axes, [f"{_plain(name)}  ({one.pairs})" for name, one in differences.items()])
    axes.set_title(f"{_about(a).title}: B - A", color=INK, loc="left")
    better = ", lower is better" if a.lower_is_better else ""
    axes.set_xlabel(f"difference of means{better}; filled where the 95% interval leaves out 0", color=FAINT)
    return plot
