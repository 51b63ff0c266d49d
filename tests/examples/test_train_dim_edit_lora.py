"""The LoRA training as a user runs it, on the golden edit model."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from script_runs import EXAMPLES, read_losses, run_script, spawn_script

from diffusers_dim import DIMEditPipeline, training
from diffusers_dim.tiny import sample_edits


SCRIPT = "train_dim_edit_lora"
WEIGHTS = "pytorch_lora_weights.safetensors"


def options(model, edits, output, *more):
    fixed = ["--pretrained_model_name_or_path", model, "--jsonl", edits, "--output_dir", output, "--resolution", 64]
    fixed += ["--train_batch_size", 2, "--max_train_steps", 6, "--checkpointing_steps", 1]
    fixed += ["--learning_rate", 1e-2, "--lr_warmup_steps", 0, "--num_inference_steps", 2, "--train_connector"]
    return [*fixed, *more]


def paint(pipe):
    edit = sample_edits(1, seed=1)[0]
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 2, "generator": generator, "output_type": "latent"}
    return pipe(edit.source, edit.instruction, **call).images


@pytest.fixture(scope="module")
def unbroken(edit_folder, edits, tmp_path_factory):
    """A run with dropout, moving average and validation; its folder, and what the trained model painted at the end."""
    output = tmp_path_factory.mktemp("run") / "unbroken"
    painted = []

    def log_validation(pipe, *rest):
        painted.append(paint(pipe))
        return training.validation.log_validation(pipe, *rest)

    source = edits.parent / "images" / "000000_source.png"
    more = ["--lora_dropout", 0.2, "--use_ema", "--ema_decay", 0.5, "--checkpoints_total_limit", 2]
    more += ["--validation_prompt", "remove it", "--validation_image", source, "--validation_steps", 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "log_validation", log_validation)
        run_script(SCRIPT, *options(edit_folder, edits, output, *more))
    return output, painted[-1]


@pytest.fixture(scope="module")
def plain(edit_folder, edits, tmp_path_factory):
    """A run without dropout, to compare others with."""
    output = tmp_path_factory.mktemp("run") / "plain"
    run_script(SCRIPT, *options(edit_folder, edits, output))
    return output


def test_folder_holds_a_small_lora_with_its_card_and_no_model(unbroken):
    output, _ = unbroken
    assert (output / WEIGHTS).stat().st_size < 100_000
    assert "load_lora_weights" in (output / "README.md").read_text()
    assert len(read_losses(output)) == 6
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["4.png", "6.png"]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert [path.name for path in output.rglob("*.safetensors") if path.stat().st_size > 100_000] == []
    assert not list(output.rglob("model*"))


def test_loaded_lora_edits_as_the_trained_model_did_and_not_as_the_base(unbroken, edit_folder):
    output, expected = unbroken
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    base = paint(pipe)
    pipe.load_lora_weights(output)
    assert pipe.get_list_adapters() == {"transformer": ["default_0"], "connector": ["default_0"]}
    edited = paint(pipe)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(edited, base, atol=1e-2)
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe), base)


def test_moving_average_is_saved_and_weights_are_resumed_from(unbroken):
    output, _ = unbroken
    average, last = load_file(output / WEIGHTS), load_file(output / "checkpoint-6" / WEIGHTS)
    assert average.keys() == last.keys()
    assert not any(torch.equal(average[key], last[key]) for key in average)


def test_killed_run_resumes_to_the_losses_and_weights_of_the_unbroken_one(unbroken, edit_folder, edits, tmp_path):
    output = tmp_path / "killed"
    more = ["--lora_dropout", 0.2, "--use_ema", "--ema_decay", 0.5, "--resume_from_checkpoint", "latest"]
    process = spawn_script(SCRIPT, *options(edit_folder, edits, output, *more))
    deadline = time.monotonic() + 240
    while not (output / "checkpoint-2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / WEIGHTS).exists()

    run_script(SCRIPT, *options(edit_folder, edits, output, *more))
    expected, _ = unbroken
    assert read_losses(output) == pytest.approx(read_losses(expected), rel=1e-6)
    resumed, expected = load_file(output / WEIGHTS), load_file(expected / WEIGHTS)
    assert resumed.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(resumed[key], expected[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "more",
    [
        ["--train_batch_size", 1, "--gradient_accumulation_steps", 2],
        ["--gradient_checkpointing"],
        ["--use_ema", "--offload_ema"],
    ],
    ids=["accumulated", "checkpointed", "averaged"],
)
def test_ways_to_train_that_give_the_same_losses(plain, edit_folder, edits, tmp_path, more):
    run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "run", *more))
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain), rel=1e-4)


@pytest.mark.parametrize("more", [[], ["--use_dora"]], ids=["LoRA", "DoRA"])
def test_compiled_blocks_give_the_same_losses(edit_folder, edits, tmp_path, monkeypatch, more):
    # The graphs are what LoRA could break; the default backend takes minutes to compile them on a CPU.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    one_shape = ["--max_train_steps", 2, "--max_train_samples", 1, "--train_batch_size", 1]
    given = options(edit_folder, edits, tmp_path / "eager", *one_shape, *more)
    run_script(SCRIPT, *given)
    run_script(SCRIPT, *given, "--output_dir", tmp_path / "compiled", "--compile")
    assert read_losses(tmp_path / "compiled") == pytest.approx(read_losses(tmp_path / "eager"), rel=1e-4)


def test_precomputed_conditions_give_the_same_losses_and_weights(plain, edit_folder, edits, tmp_path):
    model = ["--pretrained_model_name_or_path", edit_folder]
    data = ["--kind", "edit", "--jsonl", edits, "--resolution", 64, "--output_dir", tmp_path / "conditions"]
    run_script("precompute_conditions", *model, *data)
    given = options(edit_folder, edits, tmp_path / "run", "--precomputed_conditions", tmp_path / "conditions")
    del given[given.index("--jsonl") : given.index("--jsonl") + 2]
    run_script(SCRIPT, *given)
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain), rel=1e-5)
    weights, expected = load_file(tmp_path / "run" / WEIGHTS), load_file(plain / WEIGHTS)
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one(plain, edit_folder, edits, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = map(str, options(edit_folder, edits, tmp_path / "run", "--train_batch_size", 1))
    process = subprocess.run(
        [*launch, str(EXAMPLES / f"{SCRIPT}.py"), *given],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain), rel=1e-4)
    weights, expected = load_file(tmp_path / "run" / WEIGHTS), load_file(plain / WEIGHTS)
    for key in expected:
        torch.testing.assert_close(weights[key], expected[key], rtol=1e-2, atol=1e-4)


def test_dora_of_the_transformer_alone_learns_magnitudes(edit_folder, edits, tmp_path):
    output = tmp_path / "dora"
    given = options(edit_folder, edits, output, "--use_dora", "--lora_layers", "to_q, to_v,conv_point")
    given.remove("--train_connector")
    run_script(SCRIPT, *given)
    weights = load_file(output / WEIGHTS)
    assert {key.split(".")[0] for key in weights} == {"transformer"}
    assert {key.split(".lora_")[0].split(".")[-1] for key in weights} == {"to_q", "to_v", "conv_point"}
    pipe = DIMEditPipeline.from_pretrained(edit_folder)
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    magnitude = weights["transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"]
    assert not torch.allclose(magnitude, layer.weight.norm(dim=1), rtol=1e-3)
    base = paint(pipe)
    pipe.load_lora_weights(output)
    assert pipe.transformer.peft_config["default_0"].use_dora
    assert not torch.allclose(paint(pipe), base, atol=1e-2)


def test_frozen_weights_take_the_mixed_precisions_dtype_and_the_lora_stays_float32(
    plain, edit_folder, edits, tmp_path, monkeypatch, caplog
):
    dtypes = {}

    class RecordedModel(training.DIMTrainingModel):
        def __init__(self, *args):
            super().__init__(*args)
            for parameter in self.parameters():
                dtypes.setdefault(parameter.requires_grad, set()).add(parameter.dtype)

    monkeypatch.setattr(training, "DIMTrainingModel", RecordedModel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    more = ("--mixed_precision", "bf16", "--max_train_steps", 2)  # few: many a processor has to emulate bfloat16
    run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "run", *more))
    assert "This processor has no bfloat16: --mixed_precision no trains" in caplog.text
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    assert {tensor.dtype for tensor in load_file(tmp_path / "run" / WEIGHTS).values()} == {torch.float32}
    assert read_losses(tmp_path / "run") == pytest.approx(read_losses(plain)[:2], rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rank", "0"], "--rank has to be at least 1"),
        (["--lora_alpha", "0"], "--lora_alpha has to be above 0"),
        (["--lora_dropout", "1"], "--lora_dropout has to lie in [0, 1)"),
        (["--max_grad_norm", "0"], "--max_grad_norm has to be above 0"),
    ],
)
def test_bad_options_are_named_before_anything_loads(edit_folder, edits, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as exit:
        run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "bad", *more))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_layers", "to_q,to_x"], r"such as \['attn1.to_q', .*, not \['to_x'\]"),
        (["--lora_layers", "to_out"], r"not \['to_out'\]"),
        (["--pretrained_model_name_or_path", "T2I"], "holds a DIMPipeline, but this script trains from a DIMEdit"),
    ],
)
def test_bad_layers_and_models_are_told_before_weights_load(
    edit_folder, t2i_folder, edits, tmp_path, monkeypatch, more, message
):
    monkeypatch.setattr(DIMEditPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("weights were read"))
    more = [str(t2i_folder) if option == "T2I" else option for option in more]
    with pytest.raises(ValueError, match=message):
        run_script(SCRIPT, *options(edit_folder, edits, tmp_path / "bad", *more))


def test_folder_of_another_run_is_refused(unbroken, edit_folder, edits, capsys):
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *options(edit_folder, edits, unbroken[0]))
    assert "holds another run" in capsys.readouterr().err


def test_finished_folder_without_checkpoints_is_refused(unbroken, edit_folder, edits, tmp_path, capsys):
    (tmp_path / WEIGHTS).write_bytes((unbroken[0] / WEIGHTS).read_bytes())
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *options(edit_folder, edits, tmp_path))
    assert "holds another run" in capsys.readouterr().err


def test_resumed_run_of_another_rank_is_refused(unbroken, edit_folder, edits, capsys):
    more = ["--lora_dropout", 0.2, "--rank", 8, "--resume_from_checkpoint", "latest"]
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *options(edit_folder, edits, unbroken[0], *more))
    assert "go on as it began, but --rank was 4, now 8." in capsys.readouterr().err
