import json
import subprocess
import sys

import pytest
from PIL import Image
from script_runs import EXAMPLES, load_script

from diffusers_dim.tiny.world import DESIGN_EDIT_KINDS


def run(*options):
    command = [sys.executable, str(EXAMPLES / "reproduce_claim.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch):
    """Runs the script in this process, which spares its imports."""
    monkeypatch.syspath_prepend(EXAMPLES)
    script = load_script("reproduce_claim")

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["reproduce_claim.py", *map(str, options)])
        script.main()

    return call


@pytest.fixture
def measured(tmp_path):
    """A work folder with what was measured of two painters of one seed: 3 and 8 of 10 edits succeed."""
    folder = tmp_path / "claim" / "measured"
    folder.mkdir(parents=True)
    for arm, designer, successes in (("instruction", "none", 3), ("blueprint", "truth", 8)):
        succeeded = {kind: [2 * i < successes, 2 * i + 1 < successes] for i, kind in enumerate(DESIGN_EDIT_KINDS)}
        facts = {"arm": arm, "seed": 0, "designer": designer, "edits": 10, "steps": 1, "seconds": 60.0}
        (folder / f"{arm}.json").write_text(json.dumps({**facts, "succeeded": succeeded}))
    return folder.parent


def test_page_and_plot_tell_what_was_measured_and_what_was_not(measured, tmp_path, run_here):
    page = tmp_path / "claim.md"
    page.write_text("before\n<!-- claim:begin -->\nold\n<!-- claim:end -->\nafter\n")
    run_here("--work_dir", measured, "--only", "report", "--docs", tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| relation | 100.0% | 100.0% | +0.0 (+0.0 to +0.0) |" in text
    assert "| superlative | 50.0% | 100.0% | +50.0 (" in text and "| +50.0 (+20.0 to +80.0) |" in text
    assert "| **all** | 30.0% (" in text and "| truth | 80.0% (" in text
    assert "| 5% of words mistaken | unmeasured |" in text
    with Image.open(tmp_path / "claim.png") as plot:
        assert min(plot.size) > 300


@pytest.mark.slow
def test_a_painter_is_trained_and_measured_once(tmp_path, run_here, capsys):
    options = ["--work_dir", tmp_path, "--arms", "instruction", "--seeds", "4"]
    options += ["--edits", "64", "--steps", "1", "--held_out", "5", "--mixed_precision", "no"]
    done = run(*options)
    assert done.returncode == 0, done.stderr
    (facts,) = json.loads((tmp_path / "claim.json").read_text())
    assert (facts["arm"], facts["seed"], facts["designer"], facts["edits"]) == ("instruction", 4, "none", 5)
    assert [len(successes) for successes in facts["succeeded"].values()] == [1] * len(DESIGN_EDIT_KINDS)
    painter = tmp_path / "instruction-4" / "transformer" / "config.json"
    made = painter.stat().st_mtime_ns
    run_here(*options)
    assert "instruction, seed 4" not in capsys.readouterr().out
    assert painter.stat().st_mtime_ns == made


def test_a_start_that_is_no_pipeline_is_told(tmp_path, run_here, capsys):
    with pytest.raises(SystemExit) as exit:
        run_here("--start", tmp_path, "--work_dir", tmp_path / "claim")
    assert exit.value.code == 2 and "is no pipeline's folder" in capsys.readouterr().err
