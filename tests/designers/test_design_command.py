"""`diffusers-dim design` by real models; the rest of it is tested in tests/test_cli_design.py."""

import pytest
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from diffusers_dim import DIMEditPipeline
from diffusers_dim.cli import app


@pytest.fixture(scope="module")
def writing_pipeline(edit_folder, writing_vlm, tmp_path_factory):
    """An edit pipeline's folder whose text encoder writes a blueprint."""
    folder = tmp_path_factory.mktemp("pipeline") / "writing"
    writer = Qwen2_5_VLForConditionalGeneration.from_pretrained(writing_vlm)
    DIMEditPipeline.from_pretrained(edit_folder, text_encoder=writer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "model"), [("self", "writing_pipeline"), ("vlm", "writing_vlm")])
def test_model_designs(request, tmp_path, written_blueprint, kind, model):
    Image.linear_gradient("L").save(tmp_path / "source.png")
    options = ["--designer", kind, "--model", request.getfixturevalue(model), "--image", tmp_path / "source.png"]
    options += ["--prompt", "Make the ball red.", "--batch-size", 2, "--max-new-tokens", 300, "--device", "cpu"]
    result = CliRunner().invoke(app, ["design", *map(str, options)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{written_blueprint}\n"
