"""The tables of the README and of the pages."""

import numpy as np
import pytest
from PIL import Image

import report


def test_readme_holds_the_summary_of_the_committed_results():
    block = report.README.read_text().split(report.SUMMARY_BEGIN)[1].split(report.SUMMARY_END)[0]
    assert block.strip() == report.summary_report()


def test_speed_page_holds_the_report_of_the_committed_results():
    block = report.SPEED_PAGE.read_text().split(report.BEGIN)[1].split(report.END)[0]
    assert block.strip() == report.make_report()


def test_summary_holds_the_medians_of_what_was_measured_alone(results, tiny):
    lines = [line for line in report.summary_report(results).splitlines() if line.startswith("| edit, CPU")]
    variants = tiny["call"]["results"]["edit"]["variants"]
    assert report.seconds(variants["ours"]["median_seconds"]) in lines[0]
    assert not any("unmeasured" in line for line in lines)


def test_summary_without_results_is_unmeasured(tmp_path):
    assert report.summary_report(tmp_path).splitlines()[2] == "| all | unmeasured | unmeasured | unmeasured |"


def test_speed_pages_plot_is_there():
    assert report.PLOT.exists() == any(report.RESULTS.glob("*.json"))


def test_all_cells_are_unmeasured_without_results(tmp_path):
    text = report.make_report(tmp_path)
    assert "speed.png" not in text
    tables = [block.splitlines()[2:] for block in text.split("\n\n") if block.startswith("|")]
    cells = {cell.strip(" *") for rows in tables for row in rows for cell in row.split("|")[2:-1]}
    assert len(tables) == 5
    assert cells == {"unmeasured", "the same part", ""}


def test_data_page_holds_the_report_of_the_committed_results():
    block = report.DATA_PAGE.read_text().split(report.DATA_BEGIN)[1].split(report.DATA_END)[0]
    assert block.strip() == report.data_report()


def test_all_cells_of_the_data_engine_are_unmeasured_without_results(tmp_path):
    text = report.data_report(tmp_path)
    tables = [block.splitlines()[2:] for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    assert {cell.strip() for rows in tables for row in rows for cell in row.split("|")[2:-1]} == {"unmeasured"}


def test_measured_cells_hold_the_medians(results, tiny):
    lines = report.make_report(results).splitlines()
    (line,) = (line for line in lines if line.startswith("| CPU: edit |"))
    variants = tiny["call"]["results"]["edit"]["variants"]
    stock, ours, faster = (cell.strip() for cell in line.split("|")[2:5])
    assert stock == report.seconds(variants["stock"]["median_seconds"])
    assert ours == report.seconds(variants["ours"]["median_seconds"])
    assert float(faster) == pytest.approx(variants["ours"]["times_faster_than_stock"], abs=0.006)


def test_every_row_has_as_many_cells_as_its_head(results):
    for block in report.make_report(results).split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_every_measured_approximation_has_a_row(results):
    text = report.make_report(results)
    for words in report.APPROXIMATIONS.values():
        assert f"| {words} | unmeasured" not in text


@pytest.mark.parametrize(
    "value, text", [(None, "unmeasured"), (12.345, "12.35 s"), (0.5, "500 ms"), (0.0123, "12.3 ms"), (5e-6, "5 µs")]
)
def test_times_are_written_in_their_unit(value, text):
    assert report.seconds(value) == text


def test_only_what_lies_between_the_markers_changes(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(path, "new")
    assert path.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"


def test_readme_without_markers_is_refused(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("text")
    with pytest.raises(ValueError, match="bench:begin"):
        report.update_readme(path, "new")


def test_plot_is_drawn(results, tmp_path):
    report.draw(results, tmp_path / "speed.png")
    pixels = np.asarray(Image.open(tmp_path / "speed.png").convert("RGB"))
    third = pixels.shape[1] // 3
    for part in range(3):  # a panel each, with more than black on white
        assert (np.ptp(pixels[:, part * third : (part + 1) * third], axis=2) > 60).any()
