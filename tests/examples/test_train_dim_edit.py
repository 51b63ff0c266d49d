"""The training script as a user runs it, on the golden model."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffusers_dim import DIMEditPipeline
from diffusers_dim.tiny import sample_edits


SCRIPT = Path(__file__).parents[2] / "examples" / "train_dim_edit.py"


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    with open(folder / "edits.jsonl", "w") as lines:
        for index, edit in enumerate(sample_edits(12, seed=1)):
            edit.source.save(folder / f"{index}_source.png")
            edit.target.save(folder / f"{index}_target.png")
            row = {"image_path": f"{index}_source.png", "image_path_target": f"{index}_target.png"}
            lines.write(json.dumps({"id": str(index), "prompt": edit.instruction, **row}) + "\n")
    return folder / "edits.jsonl"


def command(model, edits, output, *options):
    fixed = ["--pretrained_model_name_or_path", model, "--jsonl", edits, "--output_dir", output, "--resolution", 64]
    fixed += ["--train_batch_size", 2, "--max_train_steps", 8]
    fixed += ["--checkpointing_steps", 1, "--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--use_ema"]
    return [sys.executable, str(SCRIPT), *map(str, fixed), *map(str, options)]


def run(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=300)


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(edit_folder, edits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    picture = edits.parent / "0_source.png"
    validation = ["--validation_image", picture, "--validation_prompt", "remove it", "--validation_steps", 4]
    result = run(edit_folder, edits, output, "--checkpoints_total_limit", 2, *validation)
    assert result.returncode == 0, result.stderr[-2000:]
    return output


def test_result_is_a_pipeline_that_edits_and_has_learned(unbroken, edit_folder, edits):
    pipe = DIMEditPipeline.from_pretrained(unbroken)
    before = DIMEditPipeline.from_pretrained(edit_folder)
    edit = sample_edits(1, seed=1)[0]
    image = pipe(edit.source, edit.instruction, num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    for name in ("connector", "transformer"):
        pairs = zip(getattr(pipe, name).parameters(), getattr(before, name).parameters())
        assert any(not torch.equal(after, old) for after, old in pairs)
    for name in ("text_encoder", "vae"):
        pairs = zip(getattr(pipe, name).parameters(), getattr(before, name).parameters())
        assert all(torch.equal(after, old) for after, old in pairs)


def test_checkpoints_are_limited_and_validation_pictures_kept(unbroken):
    assert sorted(path.name for path in unbroken.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-8"]
    assert sorted(path.name for path in (unbroken / "validation").iterdir()) == ["4.png", "8.png"]
    assert len(losses(unbroken)) == 8


def test_killed_run_resumes_to_the_losses_and_weights_of_the_unbroken_one(unbroken, edit_folder, edits, tmp_path):
    output = tmp_path / "killed"
    process = subprocess.Popen(
        command(edit_folder, edits, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "model_index.json").exists()

    result = run(edit_folder, edits, output, "--resume_from_checkpoint", "latest")
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(output) == losses(unbroken)
    resumed, expected = (DIMEditPipeline.from_pretrained(path) for path in (output, unbroken))
    for name in ("connector", "transformer"):
        for one, other in zip(getattr(resumed, name).parameters(), getattr(expected, name).parameters()):
            assert torch.equal(one, other)


def test_cached_latents_give_the_same_losses(unbroken, edit_folder, edits, tmp_path):
    result = run(edit_folder, edits, tmp_path / "cached", "--cache_latents")
    assert result.returncode == 0, result.stderr[-2000:]
    assert losses(tmp_path / "cached") == pytest.approx(losses(unbroken), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--learning_rate", "0"], "--learning_rate has to be above 0"),
        (["--train_batch_size", "0"], "--train_batch_size has to be at least 1"),
        (["--conditioning_dropout_prob", "1.5"], "has to lie in [0, 1]"),
        (["--validation_prompt", "a"], "one instruction a picture"),
        (["--jsonl", "missing.jsonl"], "missing.jsonl is not a file"),
    ],
)
def test_bad_options_are_named_before_anything_loads(edit_folder, edits, tmp_path, options, message):
    result = run(edit_folder, edits, tmp_path / "bad", *options)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "bad").exists()


def test_folder_of_another_run_is_refused(unbroken, edit_folder, edits):
    result = run(edit_folder, edits, unbroken)
    assert result.returncode == 2
    assert "holds checkpoints of another run" in result.stderr
