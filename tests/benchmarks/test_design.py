"""The designer that sees a picture once, against designing and encoding apart."""

import json
from pathlib import Path

import pytest

import design
import report


@pytest.fixture(scope="module")
def design_results(tmp_path_factory) -> Path:
    """Results of the tiny preset under the name that the report looks for."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["design.py", "--preset", "tiny", "--name", "cpu", "--results", str(folder)])
        design.main()
    return folder


def test_all_variants_and_parts_are_timed(design_results):
    entry = json.loads((design_results / "design_cpu.json").read_text())["design"]
    results = entry["results"]
    assert set(results["variants"]) == {"separate", "shared", "shared, static cache"}
    assert all(timing["median_seconds"] > 0 for timing in [*results["variants"].values(), *results["parts"].values()])
    assert results["variants"]["separate"]["times_faster_than_separate"] == 1.0
    assert "design.py --preset tiny" in entry["command"] and results["new_tokens"] == 4


def test_the_report_holds_the_medians(design_results):
    lines = report.design_report(design_results).splitlines()
    (line,) = (line for line in lines if line.startswith("| the picture seen once |"))
    timing = json.loads((design_results / "design_cpu.json").read_text())["design"]["results"]["variants"]["shared"]
    assert [cell.strip() for cell in line.split("|")[2:6]] == [
        report.seconds(timing["median_seconds"]),
        f"{timing['times_faster_than_separate']:.2f}",
        "unmeasured",
        "unmeasured",
    ]


def test_speed_page_holds_the_report_of_the_committed_results():
    block = report.SPEED_PAGE.read_text().split(report.DESIGN_BEGIN)[1].split(report.DESIGN_END)[0]
    assert block.strip() == report.design_report()
