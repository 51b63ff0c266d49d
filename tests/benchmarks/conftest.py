"""The scripts of `benchmarks/`, importable and run at tiny size, and pipelines of the golden models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_dim import DIMEditPipeline, DIMPipeline


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench  # noqa: E402


@pytest.fixture(scope="session", params=["edit", "t2i"])
def golden_pipe(request) -> DIMPipeline:
    """Each golden pipeline in turn; not to be changed."""
    pipeline_class = {"edit": DIMEditPipeline, "t2i": DIMPipeline}[request.param]
    pipe = pipeline_class.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def results(tmp_path_factory) -> Path:
    """
    Results of the tiny preset, under the names that the report looks for as well, and of the embedded model's
    approximations at six steps; not to be changed.
    """
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--preset", "tiny", "--runs", "1", "--results", str(folder)]
    command = [sys.executable, str(BENCHMARKS / "bench.py"), *arguments]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    tiny = (folder / "tiny.json").read_text()
    for name in ("cpu", "full"):
        (folder / f"{name}.json").write_text(tiny)
    arguments = ["approximate", "--preset", "embedded", "--runs", "1", "--steps", "6", "--edits", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["bench.py", *arguments, "--results", str(folder)])
        bench.main()
    return folder


@pytest.fixture(scope="session")
def tiny(results) -> dict:
    """The tiny preset's JSON."""
    return json.loads((results / "tiny.json").read_text())
