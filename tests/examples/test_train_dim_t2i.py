"""The text-to-image training as a user runs it, on the golden models."""

import json
import os
import signal
import time

import pytest
import torch
from script_runs import read_losses, run_script, spawn_script

from diffusers_dim import DIMEditPipeline, DIMPipeline
from diffusers_dim.tiny import sample_scenes


SCRIPT = "train_dim_t2i"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An image folder with captions, as `datasets` reads it."""
    folder = tmp_path_factory.mktemp("pictures")
    with open(folder / "metadata.jsonl", "w") as lines:
        for index, (picture, caption) in enumerate(sample_scenes(8, seed=1)):
            picture.save(folder / f"{index}.png")
            lines.write(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    return folder


@pytest.fixture(scope="module")
def start(sana_folder, golden_t2i):
    return ["--pretrained_model_name_or_path", sana_folder, "--text_encoder_name_or_path", golden_t2i.path / "qwen"]


def options(pictures, output, *more):
    fixed = ["--train_data_dir", pictures, "--output_dir", output, "--resolution", 64]
    fixed += ["--train_batch_size", 2, "--max_train_steps", 4, "--checkpointing_steps", 1, "--num_inference_steps", 2]
    fixed += ["--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--max_sequence_length", 80]
    return [*fixed, *more]


@pytest.fixture(scope="module")
def unbroken(start, pictures, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    run_script(SCRIPT, *start, *options(pictures, output, "--validation_prompt", "a red circle"))
    return output


def test_result_paints_text(unbroken):
    pipe = DIMPipeline.from_pretrained(unbroken)
    assert pipe.connector.config.max_sequence_length == 80
    assert pipe("a red circle", height=64, width=64, num_inference_steps=2).images[0].size == (64, 64)
    assert (unbroken / "validation" / "4.png").exists()


def test_killed_run_resumes_to_the_losses_of_the_unbroken_one(unbroken, start, pictures, tmp_path):
    output = tmp_path / "killed"
    again = options(pictures, output, "--resume_from_checkpoint", "latest")
    process = spawn_script(SCRIPT, *start, *again)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-1").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "model_index.json").exists()
    run_script(SCRIPT, *start, *again)
    assert read_losses(output) == pytest.approx(read_losses(unbroken), rel=1e-6)


def test_pipeline_is_trained_on_with_a_longer_null_condition(t2i_folder, pictures, tmp_path):
    before = DIMPipeline.from_pretrained(t2i_folder).connector.null_condition
    more = ["--pretrained_model_name_or_path", t2i_folder, "--max_train_steps", 1]
    more += ["--max_sequence_length", len(before) + 8, "--conditioning_dropout_prob", 0]
    run_script(SCRIPT, *options(pictures, tmp_path / "run"), *more)
    after = DIMPipeline.from_pretrained(tmp_path / "run").connector.null_condition
    assert len(after) == len(before) + 8
    assert torch.equal(after[: len(before)], before)  # nothing was dropped, so none of it learned


def test_result_is_where_edit_training_starts(unbroken, edits, tmp_path):
    edit = ["--pretrained_model_name_or_path", unbroken, "--jsonl", edits, "--resolution", 64, "--max_train_steps", 1]
    run_script("train_dim_edit", *edit, "--output_dir", tmp_path / "edit", "--train_batch_size", 2)
    assert DIMEditPipeline.from_pretrained(tmp_path / "edit").connector.config.max_sequence_length == 80


def test_sana_without_a_vision_language_model_is_refused(sana_folder, pictures, tmp_path):
    with pytest.raises(ValueError, match="give --text_encoder_name_or_path"):
        run_script(SCRIPT, "--pretrained_model_name_or_path", sana_folder, *options(pictures, tmp_path / "bad"))


def test_editor_is_refused(edit_folder, pictures, tmp_path):
    with pytest.raises(ValueError, match="holds a DIMEditPipeline, but this script trains from a DIMPipeline or Sana"):
        run_script(SCRIPT, "--pretrained_model_name_or_path", edit_folder, *options(pictures, tmp_path / "bad"))
