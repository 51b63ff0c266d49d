"""The edit training as a user runs it, on the golden models."""

import json
import os
import signal
import time

import pytest
import torch
from script_runs import read_losses, run_script, spawn_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusers_dim import DIMEditPipeline
from diffusers_dim.tiny import sample_edits


SCRIPT = "train_dim_edit"
TRAINED = ("connector", "transformer")


def options(model, edits, output, *more):
    fixed = ["--pretrained_model_name_or_path", model, "--jsonl", edits, "--output_dir", output, "--resolution", 64]
    fixed += ["--train_batch_size", 2, "--max_train_steps", 6, "--checkpointing_steps", 1]
    fixed += ["--learning_rate", 1e-3, "--lr_warmup_steps", 0, "--use_ema", "--num_inference_steps", 2]
    return [*fixed, *more]


def weights(path):
    pipe = DIMEditPipeline.from_pretrained(path)
    return {f"{name}.{key}": value for name in TRAINED for key, value in getattr(pipe, name).state_dict().items()}


@pytest.fixture(scope="module")
def unbroken(edit_folder, edits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    source, target = (edits.parent / "images" / f"000000_{name}.png" for name in ("source", "target"))
    validation = ["--validation_prompt", "remove it", "--validation_image", source, "--validation_target", target]
    validation += ["--validation_steps", 4]
    validation += ["--validation_blueprint", "1. Edit Instruction: remove it", "--validation_shapes", 6]
    validation += ["--report_to", "tensorboard"]
    run_script(SCRIPT, *options(edit_folder, edits, output, "--checkpoints_total_limit", 2, *validation))
    return output


def test_result_is_a_pipeline_that_edits_and_has_learned(unbroken, edit_folder):
    pipe = DIMEditPipeline.from_pretrained(unbroken)
    before = DIMEditPipeline.from_pretrained(edit_folder)
    edit = sample_edits(1, seed=1)[0]
    assert pipe(edit.source, edit.instruction, num_inference_steps=2).images[0].size == (64, 64)
    for name, learns in {"connector": True, "transformer": True, "text_encoder": False, "vae": False}.items():
        old = getattr(before, name).state_dict()
        changed = [key for key, value in getattr(pipe, name).state_dict().items() if not torch.equal(value, old[key])]
        assert bool(changed) == learns, name


def test_checkpoints_are_limited(unbroken):
    assert sorted(path.name for path in unbroken.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_curves_sheets_scores_and_a_card_are_left(unbroken):
    assert len(read_losses(unbroken)) == 6
    assert sorted(path.name for path in (unbroken / "validation").iterdir()) == ["4.png", "6.png"]
    scores = [json.loads(line) for line in (unbroken / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in scores] == [4, 6]
    assert all(0 <= line["success"] <= 1 for line in scores)
    assert "library_name: diffusers" in (unbroken / "README.md").read_text()
    assert (unbroken / "losses.png").exists()


def test_tensorboard_shows_curves_scores_and_sheets(unbroken):
    events = EventAccumulator(str(unbroken / "logs" / "diffusers-dim")).Reload()
    tags = events.Tags()
    assert {"loss", "lr", "grad_norm", "samples_per_second", "memory_gb", "validation/success"} <= set(tags["scalars"])
    assert any(tag.startswith("loss/0.") for tag in tags["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("validation")] == [4, 6]


def test_killed_run_resumes_to_the_losses_and_weights_of_the_unbroken_one(unbroken, edit_folder, edits, tmp_path):
    output = tmp_path / "killed"
    process = spawn_script(SCRIPT, *options(edit_folder, edits, output, "--resume_from_checkpoint", "latest"))
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "model_index.json").exists()

    run_script(SCRIPT, *options(edit_folder, edits, output, "--resume_from_checkpoint", "latest"))
    assert read_losses(output) == pytest.approx(read_losses(unbroken), rel=1e-6)
    resumed, expected = weights(output), weights(unbroken)
    for key in expected:
        torch.testing.assert_close(resumed[key], expected[key], rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_train_as_one_batch(unbroken, edit_folder, edits, tmp_path):
    more = ["--train_batch_size", 1, "--gradient_accumulation_steps", 2]
    run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "run", *more))
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(unbroken), rel=1e-5)


def test_checkpointed_gradients_train_alike(unbroken, edit_folder, edits, tmp_path):
    run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "run", "--gradient_checkpointing", "--offload_ema"))
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(unbroken), rel=1e-5)


def test_text_to_image_model_becomes_an_editor(t2i_folder, edits, tmp_path):
    run_script(SCRIPT, *options(t2i_folder, edits, tmp_path / "run", "--max_train_steps", 2))
    pipe = DIMEditPipeline.from_pretrained(tmp_path / "run")
    channels = pipe.vae.config.latent_channels
    assert pipe.transformer.config.in_channels == 2 * channels
    assert pipe.transformer.patch_embed.proj.weight[:, channels:].abs().sum() > 0
    edit = sample_edits(1, seed=1)[0]
    assert pipe(edit.source, edit.instruction, num_inference_steps=2).images[0].size == (64, 64)


def test_pictures_keep_their_shapes_in_buckets(edit_folder, edits, tmp_path):
    rows = []
    for index, edit in enumerate(sample_edits(8, seed=2)):
        size = (64, 64) if index % 2 else (96, 48)
        edit.source.resize(size).save(tmp_path / f"{index}_source.png")
        edit.target.resize(size).save(tmp_path / f"{index}_target.png")
        row = {"image_path": f"{index}_source.png", "image_path_target": f"{index}_target.png"}
        rows.append(json.dumps({"id": str(index), "prompt": edit.instruction, **row}))
    (tmp_path / "edits.jsonl").write_text("\n".join(rows))
    more = ["--aspect_ratio_bucketing", "--group_by_length"]
    run_script(SCRIPT, *options(edit_folder, tmp_path / "edits.jsonl", tmp_path / "run", *more))
    assert len(read_losses(tmp_path / "run")) == 6


def test_unreadable_pictures_are_left_out_and_listed(edit_folder, edits, tmp_path):
    lines = [json.loads(line) for line in edits.read_text().splitlines()]
    lines[3]["image_path"] = "missing.png"
    (edits.parent / "some_missing.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_script(SCRIPT, *options(edit_folder, edits.parent / "some_missing.jsonl", tmp_path / "run"))
    listed = [line for path in (tmp_path / "run").glob("skipped*.jsonl") for line in path.read_text().splitlines()]
    assert [json.loads(line)["id"] for line in listed] == ["shapes-000003"]
    assert len(read_losses(tmp_path / "run")) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning_rate", "0"], "--learning_rate has to be above 0"),
        (["--train_batch_size", "0"], "--train_batch_size has to be at least 1"),
        (["--conditioning_dropout_prob", "1.5"], "has to lie in [0, 1]"),
        (["--validation_prompt", "a"], "Got 0 --validation_image for 1 --validation_prompt"),
        (["--jsonl", "missing.jsonl"], "missing.jsonl is not a file"),
        (["--dataset_name", "some"], "Give one of --jsonl, --dataset_name, --train_data_dir"),
        (["--num_train_epochs", "1"], "either --max_train_steps or --num_train_epochs"),
        (["--use_8bit_adam", "--optimizer", "came"], "--use_8bit_adam goes with --optimizer adamw"),
        (["--push_to_hub"], "needs a login"),
    ],
)
def test_bad_options_are_named_before_anything_loads(edit_folder, edits, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(SystemExit) as exit:
        run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "bad", *more))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_folder_of_another_run_is_refused(unbroken, edit_folder, edits, capsys):
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *options(edit_folder, edits, unbroken))
    assert "holds another run" in capsys.readouterr().err


def test_resumed_run_with_another_order_is_refused(unbroken, edit_folder, edits, capsys):
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *options(edit_folder, edits, unbroken, "--resume_from_checkpoint", "latest", "--seed", 7))
    assert "--seed was 0, now 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_batch_size", "13"], "--train_batch_size"),
        (["--pretrained_model_name_or_path", "SANA"], "holds a SanaPipeline, but this script trains from"),
    ],
)
def test_bad_data_and_models_are_told_before_weights_load(
    edit_folder, sana_folder, edits, tmp_path, monkeypatch, more, message
):
    monkeypatch.setattr(DIMEditPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    more = [str(sana_folder) if option == "SANA" else option for option in more]
    with pytest.raises(ValueError, match=message):
        run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "bad", *more))
