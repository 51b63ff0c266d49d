import json
import re
import sys
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image

from diffusers_dim.evaluation import report as report_module
from diffusers_dim.evaluation.benchmark import LEFT_OUT, Case, CaseScore, Figure, Scores
from diffusers_dim.evaluation.report import write_comparison, write_report
from diffusers_dim.files import save_image


RUN = {"benchmark": "imgedit", "model": "/models/tiny-edit", "steps": 30, "seed": 233, "designer": ""}
# What must come out of the report as it is, and be no markup.
HOSTILE = "<b>a|b</b> *c* `d` $e_1$ [f](g) # 50% & https://h.i \\ {j}~k^\nl"


def make_run(folder, values, prompt="Add a cat.", kind="edit", **kwargs):
    """Cases, pictures of one colour each and scores, from values by group."""
    cases, scores = [], []
    for group, of_group in values.items():
        for value in of_group:
            number = len(cases)
            color = (10 * number, 255 - 10 * number, 100)
            files = (f"{number:05}.png",) if kind == "edit" else (f"{number:05}/0.png", f"{number:05}/1.png")
            for file in files:
                (folder / "pictures" / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), color).save(folder / "pictures" / file)
            source = folder / "source.png" if kind == "edit" else None
            cases.append(Case(f"case {number}", prompt, group, files, source))
            reason = "the judge would not" if value is None else ""
            parts = {} if value is None else {"Compliance": value}
            scores.append(CaseScore(f"case {number}", group, value, parts, reason))
    Image.new("RGB", (32, 32), "white").save(folder / "source.png")
    return cases, make_scores(scores, **kwargs)


def make_scores(cases, judge="gpt-4.1", run=RUN, benchmark="imgedit", **kwargs):
    groups = dict.fromkeys(case.group for case in cases)
    figures = {"overall": figure(cases), **{group: figure([c for c in cases if c.group == group]) for group in groups}}
    return Scores(benchmark, run, figures, cases, judge, **kwargs)


def figure(cases):
    values = [case.score for case in cases if case.score is not None]
    if not values:
        return Figure(None, 0, len(cases))
    mean = round(sum(values) / len(values), 2)
    return Figure(mean, len(values), len(cases), mean - 0.25, mean + 0.25)


VALUES = {"add": [4.0, 1.0, 3.0], "style": [5.0, 2.0, None]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of two judges, with its report."""
    folder = tmp_path_factory.mktemp("run")
    cases, scores = make_run(folder, VALUES, prompt=HOSTILE)
    another = make_scores([CaseScore(c.key, c.group, 3.0 + n / 4) for n, c in enumerate(scores.cases)], judge="<i>|2")
    write_report(folder, [scores, another], cases, folder / "pictures", {"case 0": "1. Edit Instruction"}, per_group=1)
    return folder


def read_tables(text):
    """The cells of a Markdown page's tables, row by row, as they are shown."""
    html = MarkdownIt("commonmark").enable("table").render(text)
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    return html, [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows
    ]


def write_one(folder, scores, cases, **kwargs):
    return write_report(folder, [scores], cases, folder / "pictures", per_group=1, **kwargs).read_text()


# The page


def test_page_says_judge_settings_and_how_many_cases_have_a_score(written):
    page = (written / "report.md").read_text()
    assert "- **3.00** (2.75 to 3.25), 5 of 6 cases. Judged by gpt-4.1. **Not all cases have a score" in page
    assert "| seed | 233 |" in page
    assert "| style | 3.50 | 3.25 to 3.75 | 2 of 3 |" in page


def test_every_table_of_figures_says_n_of_n(written):
    _, rows = read_tables((written / "report.md").read_text())
    ours = [row for row in rows if row[0].startswith(("add", "style", "overall", "tiny-edit"))]
    assert len(ours) == 3 + 2 * 2
    assert all(any(re.fullmatch(r"\d of \d", cell) for cell in row) for row in ours)


def test_case_without_a_score_is_listed_with_its_reason(written):
    page = (written / "report.md").read_text()
    listed = page.partition("## Cases without a score")[2].partition("##")[0]
    assert "case 5" in listed and "the judge would not" in listed
    assert "case 4" not in listed


def test_published_row_of_the_same_designer_stands_beside_ours(written):
    page = (written / "report.md").read_text()
    assert "DIM-4.6B-Edit, published" in page
    assert re.search(r"\| style \|.* \| 4.79 \|", page)


def test_papers_tables_stand_below_ours_with_their_source(written):
    _, rows = read_tables((written / "report.md").read_text())
    assert ["DIM-4.6B-Edit", "GPT-4o", *"4.09 3.47 2.30 4.00 3.43 3.87 4.92 2.85 4.08 3.67".split()] in [
        row[:-1] for row in rows
    ]
    assert "Read at <https://github.com/showlab/DIM/" in (written / "report.md").read_text()


def test_prompts_and_names_are_no_markup(written):
    page = (written / "report.md").read_text()
    html, rows = read_tables(page)
    assert not re.search(r"<(b|i|code)>", html)
    assert {len(row) for row in rows if "the judge would not" in row} == {5}
    shown = next(row for row in rows if "the judge would not" in row)
    assert shown[3] == " ".join(HOSTILE.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def test_judges_agreement_is_told(written):
    page = (written / "report.md").read_text()
    assert re.search(r"\| gpt-4.1, &lt;i&gt;\\\|2 \| 5 \| 0\.\d\d \|", page)


def test_a_single_judge_agrees_with_nobody(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    assert "Agreement" not in write_one(tmp_path, scores, cases)


def test_figures_that_are_of_no_group_are_told_apart(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    scores.figures["without text"] = Figure(7.125, 1, 1)
    assert "| without text | gpt-4.1 | 7.125 | – | 1 of 1 |" in write_one(tmp_path, scores, cases)


def test_a_groups_further_measures_are_columns_of_a_table(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    scores.figures |= {
        "quality/add": Figure(7.125, 1, 1, 7.0, 7.25),
        "intersection/quality/overall": Figure(None, 0, 1),
    }
    report = write_one(tmp_path, scores, cases)
    assert "| group | quality | intersection/quality |\n" in report
    assert "| add | 7.125 (7.000 to 7.250), 1 of 1 | – |\n| overall | – | –, 0 of 1 |" in report


def test_cases_that_were_left_out_are_counted_and_not_listed(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0, None, None]})
    scores.cases[1:] = [
        CaseScore(cases[1].key, "add", None, reason=LEFT_OUT),
        CaseScore(cases[2].key, "add", None, reason="refused"),
    ]
    report = write_one(tmp_path, scores, cases)
    assert "1 cases were left out by --limit.\n\n| case |" in report
    assert LEFT_OUT not in report.replace("1 cases were left out by --limit.", "")


def test_sheets_call_cases_best_and_worst_only_where_there_are_others(tmp_path):
    assert _labels(tmp_path / "few", [3.0, 1.0]) == ["score 3.00", "score 1.00"]
    assert _labels(tmp_path / "many", [3.0, 1.0, 2.0]) == ["best 3.00", "worst 1.00"]


def _labels(folder, scores):
    """What the rows of the sheet of a group are called, with one best and one worst case."""
    folder.mkdir()
    cases, scores = make_run(folder, {"add": scores})
    return [row.title.partition(",")[0] for row in _sheet_rows(folder, scores, cases, per_group=1)]


def _sheet_rows(folder, scores, cases, **options):
    """The rows of all sheets of a report."""
    drawn = []

    def keep(rows, heading, side):
        drawn.extend(rows)
        return Image.new("RGB", (1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "draw_sheet", keep)
        write_report(folder, [scores], cases, folder / "pictures", {}, **options)
    return drawn


def test_figures_have_the_official_scorers_digits(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    scores.figures["overall"] = Figure(0.77123, 1, 1)
    scores.figures["add"] = Figure(0.75, 1, 1)
    page = write_one(tmp_path, scores, cases)
    assert "**0.77123**" in page and "| add | 0.75 |" in page


def test_report_is_written_where_nothing_was_scored(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [None, None]})
    page = write_one(tmp_path, scores, cases)
    assert "- **–**, 0 of 2 cases." in page
    assert not (tmp_path / "plots" / "histogram.png").exists()


def test_benchmark_that_scores_no_single_case_is_told_as_such(tmp_path):
    cases, scores = make_run(tmp_path, {"art": [1.0, 1.0]}, kind="t2i")
    whole = [CaseScore(case.key, case.group, None) for case in scores.cases]
    figures = {name: Figure(5.5, 2, 2) for name in ("overall", "art")}
    page = write_one(tmp_path, Scores("mjhq", RUN, figures, whole, lower_is_better=True), cases)
    assert "Cases have no scores of their own" in page
    assert "2 of 2 cases. Scored without a judge. Lower is better." in page
    assert (tmp_path / "sheets" / "art.png").is_file()


def test_pictures_without_a_score_stand_side_by_side_above_their_prompts(tmp_path):
    cases, scores = make_run(tmp_path, {"art": [1.0] * 5}, kind="t2i")
    cases = [replace(case, files=case.files[:1]) for case in cases]
    whole = [CaseScore(case.key, case.group, None) for case in scores.cases]
    scores = Scores("mjhq", RUN, {name: Figure(5.5, 5, 5) for name in ("overall", "art")}, whole)
    rows = _sheet_rows(tmp_path, scores, cases, per_group=2)
    assert [row.title for row in rows] == ["", ""]
    assert [[caption for caption, _ in row.pictures] for row in rows] == [
        [case.prompt for case in cases[:2]],
        [case.prompt for case in cases[2:4]],
    ]


# JSON, LaTeX, the model card


def test_json_has_what_the_page_has(written):
    report = json.loads((written / "report.json").read_text())
    assert report["run"] == RUN
    assert report["judges"][0]["figures"]["add"] == {"value": 2.67, "scored": 3, "cases": 3, "low": 2.42, "high": 2.92}
    assert [case["key"] for case in report["judges"][0]["unscored"]] == ["case 5"]
    assert report["agreement"][0]["pairs"] == 5
    assert all((written / path).is_file() for path in [*report["plots"], *report["sheets"].values()])


def test_latex_rows_have_as_many_cells_as_columns(written):
    for table in (written / "report.tex").read_text().split(r"\begin{tabular}")[1:]:
        columns = re.match(r"{(\w+)}", table)[1]
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert len(rows) > 3
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}


def test_latex_is_escaped(written):
    tex = (written / "report.tex").read_text()
    assert r"\textless{}i\textgreater{}|2" in tex
    assert not re.search(r"(?<!\\)[_$#^~]", re.sub(r"^%.*$", "", tex, flags=re.MULTILINE))


def test_model_card_takes_the_metadata(written):
    card = ModelCard(f"---\n{(written / 'model_index.yml').read_text()}---\n")
    first = card.data.eval_results[0]
    assert card.data.model_name == "tiny-edit"
    assert (first.dataset_type, first.metric_value) == ("sysuyy/ImgEdit", 3.0)
    assert first.metric_name == "ImgEdit overall, judged by gpt-4.1"
    assert first.metric_args == {"scored": 5, "cases": 6, "low": 2.75, "high": 3.25}


# Sheets and plots


def colors(path):
    with Image.open(path) as sheet:
        return {color for _, color in sheet.convert("RGB").getcolors(1 << 22)}


def test_sheet_shows_the_best_and_the_worst_of_its_group(written):
    shown = colors(written / "sheets" / "add.png")
    assert {(0, 255, 100), (10, 245, 100)} <= shown
    assert (20, 235, 100) not in shown


def test_best_is_the_lowest_where_lower_is_better(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [4.0, 1.0, 3.0, 2.0]}, lower_is_better=True)
    write_report(tmp_path, [scores], cases, tmp_path / "pictures", per_group=1)
    lower = Image.open(tmp_path / "sheets" / "add.png").convert("RGB")
    highest, lowest = (0, 255, 100), (10, 245, 100)
    assert first_row(lower, lowest) < first_row(lower, highest)


def first_row(sheet, color):
    """The first line of pixels in which a colour is."""
    data = sheet.tobytes()
    return data.index(bytes(color * 8)) // (3 * sheet.width)


def test_blueprint_of_the_pictures_own_parameters_is_shown(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    write_one(tmp_path, scores, cases)
    without = Image.open(tmp_path / "sheets" / "add.png").size
    picture = Image.new("RGB", (32, 32))
    save_image(picture, tmp_path / "pictures" / "00000.png", {"blueprint": "1. Edit Instruction"})
    write_one(tmp_path, scores, cases)
    assert Image.open(tmp_path / "sheets" / "add.png").width > without[0]


def test_prompt_that_was_painted_from_is_no_blueprint(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    write_one(tmp_path, scores, cases)
    before = (tmp_path / "sheets" / "add.png").read_bytes()
    write_one(tmp_path, scores, cases, blueprints={"case 0": "Add a cat."})
    assert (tmp_path / "sheets" / "add.png").read_bytes() == before


def test_all_pictures_of_a_prompt_are_shown(tmp_path):
    cases, scores = make_run(tmp_path, {"colors": [1.0]}, kind="t2i")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "pictures" / "00000" / "1.png")
    write_one(tmp_path, scores, cases)
    assert {(0, 255, 100), (0, 0, 255)} <= colors(tmp_path / "sheets" / "colors.png")


def test_groups_name_files_that_stay_in_the_folder(tmp_path):
    cases, scores = make_run(tmp_path, {"../a b/$c": [1.0]})
    write_one(tmp_path, scores, cases)
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == [".._a_b_c.png"]


def test_the_same_run_gives_the_same_report(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0, 2.0, 3.0]})

    def files():
        write_one(tmp_path, scores, cases)
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    assert files() == files()


# Bad input


def test_scores_of_two_runs_are_refused(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    another = make_scores(scores.cases, run={**RUN, "seed": 1})
    with pytest.raises(ValueError, match="of several"):
        write_report(tmp_path, [scores, another], cases, tmp_path / "pictures")


def test_scores_of_other_cases_are_refused(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"1 are in one of the two alone, such as \['case 1'\]"):
        write_report(tmp_path, [scores], cases[:1], tmp_path / "pictures")


def test_no_scores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one judge"):
        write_report(tmp_path, [], [], tmp_path)


def test_broken_picture_is_named(tmp_path):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    (tmp_path / "pictures" / "00000.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="00000.png"):
        write_one(tmp_path, scores, cases)


def test_missing_matplotlib_is_named_before_anything_is_written(tmp_path, monkeypatch):
    cases, scores = make_run(tmp_path, {"add": [1.0]})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"diffusers-dim\[train\]"):
        write_one(tmp_path, scores, cases)
    assert not (tmp_path / "sheets").exists()


# Comparisons


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    _, a = make_run(folder, {"add": [1.0, 2.0, 3.0], "style": [2.0, 2.0, None]})
    _, b = make_run(folder, {"add": [2.0, 3.0, 3.0], "style": [None, 4.0, 1.0]}, run={**RUN, "designer": "GPT-4o"})
    write_comparison(a, b, folder / "comparison.md")
    return folder


def test_comparison_tells_differences_by_group(compared):
    page = (compared / "comparison.md").read_text()
    assert "| add | 3 of 3 | 2.00 | 2.67 | +0.67 |" in page
    assert "| style | 1 of 3 | 2.00 | 4.00 | +2.00 | – | 1.000 | 1 / 0 / 0 |" in page
    assert "| **overall** | 4 of 6 | 2.00 | 3.33 | +1.33 |" in page


def test_comparison_tells_which_settings_differ(compared):
    page = (compared / "comparison.md").read_text()
    assert "| designer | – | GPT-4o |" in page
    assert "seed |" not in page


def test_comparison_lists_cases_of_one_run_alone(compared):
    page = (compared / "comparison.md").read_text()
    assert "2 cases have a score in one run alone" in page
    assert "| A | case 3 |" in page and "| B | case 5 |" in page


def test_comparison_is_told_as_json_and_drawn(compared):
    found = json.loads((compared / "comparison.json").read_text())
    assert found["groups"]["add"]["value"] == pytest.approx(2 / 3)
    assert found["b"]["designer"] == "GPT-4o"
    assert Image.open(compared / "comparison.png").size == (960, round(120 * (1.4 + 0.42 * 3)))


def test_comparison_without_a_shared_case_is_refused(tmp_path):
    _, a = make_run(tmp_path, {"add": [1.0, None]})
    _, b = make_run(tmp_path, {"add": [None, 1.0]})
    with pytest.raises(ValueError, match="no case has a score in both"):
        write_comparison(a, b, tmp_path / "comparison.md")


def test_comparison_of_another_name_is_refused(tmp_path):
    _, scores = make_run(tmp_path, {"add": [1.0]})
    with pytest.raises(ValueError, match=r"end in \.md.*comparison.png"):
        write_comparison(scores, scores, tmp_path / "comparison.png")
