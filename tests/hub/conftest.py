"""Folders and a repository as they go to the Hub, and what an environment without this package makes of them."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cases import PROMPT, REPO_ID, paint_edit
from hub_server import serve_hub
from PIL import Image

from diffusers_dim import TINY_SHAPES, DIMEditPipeline, DIMPipeline
from diffusers_dim.tiny import sample_edits


@pytest.fixture(scope="session")
def edit():
    return sample_edits(1, seed=1)[0]


@pytest.fixture(scope="session")
def tiny_pipe():
    """The embedded model; not to be changed."""
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def saved(tiny_pipe, t2i_folder, tmp_path_factory) -> Path:
    """A folder that holds the saved embedded model as `edit` and the golden text-to-image model as `t2i`."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_pipe.save_pretrained(folder / "edit")
    DIMPipeline.from_pretrained(t2i_folder).save_pretrained(folder / "t2i")
    return folder


@pytest.fixture(scope="session")
def edit_picture(tiny_pipe, edit) -> np.ndarray:
    return paint_edit(tiny_pipe, edit)


@pytest.fixture(scope="session")
def t2i_picture(saved) -> np.ndarray:
    pipe = DIMPipeline.from_pretrained(saved / "t2i")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(PROMPT, height=32, width=32, num_inference_steps=2, generator=generator, output_type="np").images


@pytest.fixture(scope="session")
def repository(tiny_pipe, tmp_path_factory):
    """The embedded model, pushed by `push_to_hub` to a Hub on this machine; yields what the Hub received."""
    with pytest.MonkeyPatch.context() as patch, serve_hub(patch, "models", REPO_ID) as received:
        tiny_pipe.push_to_hub(REPO_ID)
        patch.undo()  # other tests of this session have their own Hub, or none
        yield received


@pytest.fixture(scope="session")
def elsewhere(saved, repository, edit, tmp_path_factory):
    """What `without_package.py` found, run by the same interpreter and libraries, but where this package is not."""
    folder = tmp_path_factory.mktemp("elsewhere")
    edit.source.save(folder / "source.png")
    assert Image.open(folder / "source.png").mode == "RGB"
    settings = {"saved": str(saved), "repo_id": REPO_ID, "prompt": PROMPT}
    settings |= {"instruction": edit.instruction, "blueprint": str(edit.blueprint)}
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {
        # Packages' folder alone: files that lead to other folders, as that of an editable install, are not read.
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
        "HF_HOME": str(folder / "home"),
        "HF_ENDPOINT": repository["url"],
        "HF_TOKEN": "hf_of_the_environment",
        "TRITON_INTERPRET": "1",
    }
    script = Path(__file__).parent / "without_package.py"
    command = [sys.executable, "-S", "-P", str(script), str(folder)]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    pictures = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    return {**found, "pictures": pictures, "stderr": run.stderr, "folder": folder}
