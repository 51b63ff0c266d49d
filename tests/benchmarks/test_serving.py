"""The server's measurements: a smaller hostile run, and what the page says of the large one."""

import json

import pytest

import report
import serving


pytest.importorskip("fastapi")
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A hostile run of the small preset under the name that the report looks for."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        options = ["hostile", "--preset", "small", "--name", report.SERVING, "--results", str(folder)]
        patch.setattr("sys.argv", ["serving.py", *options])
        serving.main()
    return folder


@pytest.fixture(scope="module")
def sections(results):
    return json.loads((results / f"{report.SERVING}.json").read_text())


class TestHostileRun:
    def test_every_good_request_is_answered_right(self, sections):
        (found,) = sections["hostile"]["results"]["rounds"]
        assert (found["right"], found["wrong"]) == (30, 0)

    def test_every_hostile_one_is_refused_in_words(self, sections):
        (found,) = sections["hostile"]["results"]["rounds"]
        assert found["hostile"] == {kind: {status: 1} for kind, (status, _) in serving.HOSTILE.items()}
        assert (found["hostile_as_expected"], found["hostile_otherwise"]) == (10, 0)

    def test_none_is_lost(self, sections):
        found = sections["hostile"]["results"]
        counts = found["answered_by_status"]
        assert sum(count for status, count in counts.items() if status != "429") == 40
        assert (counts["200"], counts["499"]) == (30, 2)
        assert found["health"] == "ok"


def test_pictures_that_differ_are_wrong():
    good, other = serving.make_good(2, 1)
    assert serving.is_right(good.expected.copy(), good.expected)
    assert not serving.is_right(other.expected, good.expected)
    assert not serving.is_right(good.expected.resize((8, 8)), good.expected)


def test_the_report_holds_what_was_measured_and_no_more(results):
    text = report.serving_report(results)
    assert "| 1 | 30 of 30 | 10 of 10 |" in text
    assert f"({report.UNMEASURED})" in text  # batching


def test_the_report_of_no_results_is_unmeasured(tmp_path):
    assert report.UNMEASURED in report.serving_report(tmp_path)


def test_the_page_holds_the_report_of_the_committed_results():
    block = report.SERVING_PAGE.read_text().split(report.SERVING_BEGIN)[1].split(report.SERVING_END)[0]
    assert block.strip() == report.serving_report()
