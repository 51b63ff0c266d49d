"""The script that encodes data once, as a user runs it, on the golden models."""

import json
import shutil
import subprocess
import sys
import time
from itertools import islice

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from script_runs import EXAMPLES, run_script, spawn_script

from diffusers_dim import DIMEditPipeline, DIMPipeline
from diffusers_dim.data import TrainingLoader, UnreadableSampleError, load_training_data
from diffusers_dim.tiny import sample_edits
from diffusers_dim.training import (
    DIMTrainingModel,
    PrecomputedDataset,
    collate_encoded,
    encode_samples,
    sample_noise,
)


COUNT = 11
SHARD_SIZE = 4
WIDE = (2, 5, 6)  # whose pictures are not square
CUT = 3  # whose target is cut short: its header can be read, its pixels cannot
PIPELINES = {"edit": DIMEditPipeline, "t2i": DIMPipeline}

pytestmark = pytest.mark.usefixtures("one_thread_on_the_cpu")


@pytest.fixture(scope="module")
def folders(edit_folder, t2i_folder):
    return {"edit": edit_folder, "t2i": t2i_folder}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The jsonl files of one set of pictures for both kinds."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for index, edit in enumerate(sample_edits(COUNT, seed=1)):
        size = (128, 64) if index in WIDE else (64, 64)
        for name, picture in (("source", edit.source), ("target", edit.target)):
            picture.resize(size).save(folder / f"{index}_{name}.jpg", quality=95)
        prompt = edit.instruction if index % 2 else f"{edit.instruction} and nothing else"
        row = {"id": f"edit {index}", "prompt": prompt, "kind": edit.kind}
        rows.append({**row, "image_path": f"{index}_source.jpg", "image_path_target": f"{index}_target.jpg"})
    cut = folder / f"{CUT}_target.jpg"
    cut.write_bytes(cut.read_bytes()[:700])
    painted = [{"image_path": row.pop("image_path_target"), **row} for row in map(dict, rows)]
    for row, original in zip(painted, rows):
        row["image_path"] = original["image_path_target"]
    return {"edit": write_lines(folder / "edits.jsonl", rows), "t2i": write_lines(folder / "t2i.jsonl", painted)}


def arguments(kind, model, jsonl, output, *options):
    fixed = ["--kind", kind, "--pretrained_model_name_or_path", model, "--jsonl", jsonl, "--output_dir", output]
    fixed += ["--resolution", 64, "--batch_size", 2, "--shard_size", SHARD_SIZE, "--aspect_ratio_bucketing"]
    return [*map(str, fixed), *map(str, options)]


def run(*args):
    run_script("precompute_conditions", *arguments(*args))


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.fixture(scope="module")
def outputs(folders, data, tmp_path_factory):
    """Both kinds encoded in one go."""
    paths = {kind: tmp_path_factory.mktemp("conditions") / kind for kind in ("edit", "t2i")}
    for kind, path in paths.items():
        run(kind, folders[kind], data[kind], path)
    return paths


@pytest.mark.parametrize("kind", ["edit", "t2i"])
def test_kept_samples_are_those_that_the_models_make_of_the_data(outputs, folders, data, kind):
    pipe = PIPELINES[kind].from_pretrained(folders[kind])
    online, kept = load_training_data(kind, jsonl=data[kind]), PrecomputedDataset(outputs[kind])
    assert len(kept) == len(online) == COUNT
    for index in range(COUNT):
        assert kept.id(index) == online.id(index) == f"edit {index}"
        assert (kept.length(index), kept.size(index)) == (online.length(index), online.size(index))
        if index == CUT:
            continue
        item, sample = kept[index], online[index]
        height, width = pipe.image_processor.get_default_height_width(sample["target"])
        (expected,) = encode_samples(pipe, [sample], height, width)
        assert (width > height) == (index in WIDE)
        for name, tensor in expected.items():
            torch.testing.assert_close(item[name], tensor, rtol=1e-4, atol=1e-5)
        assert item["kind"] == sample["kind"]
        assert ("image_latents" in item) == (kind == "edit")


@torch.no_grad()
def training_losses(dataset, pipe, precomputed, **settings):
    """Losses by position and batch shapes of two epochs, as the training scripts compute them."""
    loader = TrainingLoader(dataset, 2, resolution=64, vae_scale_factor=4, seed=3, **settings)
    model = DIMTrainingModel(pipe.connector, pipe.transformer)
    losses, shapes = {}, []
    for batch in islice(loader.batches(), 2 * loader.batches_per_epoch):
        shapes.append((batch.epoch, batch.height, batch.width, batch.positions))
        if not batch.samples:
            continue
        items = batch.samples if precomputed else encode_samples(pipe, batch.samples, batch.height, batch.width)
        inputs = collate_encoded(items, torch.device("cpu"))
        inputs.pop("weights")
        noise = sample_noise(batch.positions, inputs["latents"].shape[1:], 3, 0.3)
        values = model(**inputs, **dict(zip(("noise", "timesteps", "dropped"), noise)))
        losses.update(zip(batch.positions, values.tolist(), strict=True))
    return losses, shapes


@pytest.mark.parametrize("group_by_length", [False, True])
@pytest.mark.parametrize("kind", ["edit", "t2i"])
def test_losses_are_those_of_training_on_the_data(outputs, folders, data, kind, group_by_length):
    settings = {"aspect_ratio_bucketing": True, "group_by_length": group_by_length}
    pipe = PIPELINES[kind].from_pretrained(folders[kind])
    online, shapes = training_losses(load_training_data(kind, jsonl=data[kind]), pipe, False, **settings)
    frozen = dict.fromkeys(("text_encoder", "processor", "vae"))
    painter = PIPELINES[kind].from_pretrained(folders[kind], **frozen)
    kept, kept_shapes = training_losses(PrecomputedDataset(outputs[kind]), painter, True, **settings)
    assert kept_shapes == shapes
    assert len(online) > COUNT  # two epochs without the cut picture and odd ends
    assert kept == pytest.approx(online, rel=1e-5)


def test_cut_picture_is_recorded_in_its_place(outputs):
    dataset = PrecomputedDataset(outputs["edit"])
    with pytest.raises(UnreadableSampleError, match=f"edit {CUT}.*target: image file is truncated"):
        dataset[CUT]
    assert sum("reason" in row for row in dataset.rows) == 1


def test_facts_say_what_the_samples_were_made_with(outputs, edit_folder):
    facts = json.loads((outputs["edit"] / "facts.json").read_text())
    versions = facts.pop("versions")
    assert facts == {
        "kind": "edit",
        "model": "edit",
        "text_encoder": None,
        "revision": None,
        "samples": COUNT,
        "shard_size": SHARD_SIZE,
        "resolution": 64,
        "aspect_ratio_bucketing": True,
        "max_sequence_length": 512,  # the null condition's rows, below the option's 8192
        "hidden_size": 32,
        "vae_scale_factor": 4,
        "latent_channels": 4,
        "scaling_factor": 0.41407,
        "text_encoder_dtype": "float32",
        "hidden_states_dtype": "float32",
        "latents_dtype": "float32",
    }
    assert versions["torch"] == torch.__version__


def test_two_processes_go_on_where_one_stopped_and_give_its_files(outputs, edit_folder, data, tmp_path):
    output = tmp_path / "two"
    output.mkdir()
    for name in ("facts.json", "shard-00001.jsonl", "shard-00001.safetensors"):
        shutil.copy(outputs["edit"] / name, output)
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--dynamo_backend", "no"]
    command += [str(EXAMPLES / "precompute_conditions.py"), *arguments("edit", edit_folder, data["edit"], output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Samples of 1 process in 2" in result.stderr
    assert "4/4" in result.stderr  # of the seven that are left
    assert result.stdout.count("1 of 3 shards are already there") == 1
    assert f"10 of {COUNT} samples in 3 shards" in result.stdout
    assert contents(output) == contents(outputs["edit"])


def test_killed_run_goes_on_and_keeps_what_it_had(outputs, edit_folder, data, tmp_path):
    output = tmp_path / "killed"
    process = spawn_script("precompute_conditions", *arguments("edit", edit_folder, data["edit"], output))
    deadline = time.monotonic() + 240
    while not (output / "shard-00000.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("shard-00000.*")}
    assert len(kept) == 2

    run("edit", edit_folder, data["edit"], output)
    assert contents(output) == contents(outputs["edit"])
    assert all((output / name).stat().st_mtime_ns == written for name, written in kept.items())


@pytest.mark.parametrize("lost", ["shard-00001.jsonl", "shard-00001.safetensors"])
def test_folder_that_lacks_a_file_is_completed(outputs, edit_folder, data, tmp_path, lost, capsys):
    output = tmp_path / "half"
    shutil.copytree(outputs["edit"], output)
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir() if "00001" not in path.name}
    (output / lost).unlink()
    (output / ".unfinished-1-shard-00001.safetensors").write_bytes(b"half a shard of a killed run")
    run("edit", edit_folder, data["edit"], output, "--dataloader_num_workers", 1)
    assert contents(output) == contents(outputs["edit"])
    assert "2 of 3 shards are already there" in capsys.readouterr().out
    assert all((output / name).stat().st_mtime_ns == written for name, written in before.items())


def test_shards_of_which_nothing_is_known_are_refused(outputs, edit_folder, data, tmp_path):
    shutil.copytree(outputs["edit"], tmp_path / "out")
    (tmp_path / "out" / "facts.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no facts.json"):
        run("edit", edit_folder, data["edit"], tmp_path / "out")


def test_finished_run_loads_no_model(outputs, edit_folder, data, tmp_path, capsys):
    model = tmp_path / "edit"
    shutil.copytree(edit_folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    run("edit", model, data["edit"], outputs["edit"])
    size = sum(len(content) for content in contents(outputs["edit"]).values())
    assert f"10 of {COUNT} samples in 3 shards, {size / 1e9:.3g} GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "96"], "resolution 64, now 96"),
        (["--max_sequence_length", "100"], "max_sequence_length 512, now 100"),
        (["--shard_size", "5"], "shard_size 4, now 5"),
        (["--dtype", "bfloat16"], "hidden_states_dtype float32, now bfloat16; latents_dtype float32, now bfloat16"),
        (["--max_train_samples", "9"], "samples 11, now 9"),
    ],
)
def test_folder_of_other_settings_is_refused(outputs, edit_folder, data, options, message):
    before = contents(outputs["edit"])
    with pytest.raises(ValueError, match="is another run's") as error:
        run("edit", edit_folder, data["edit"], outputs["edit"], *options)
    assert message in str(error.value)
    assert contents(outputs["edit"]) == before


def test_folder_of_other_data_is_refused(outputs, edit_folder, data):
    lines = data["edit"].read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    changed = write_lines(data["edit"].parent / "changed.jsonl", [rows[0], {**rows[1], "prompt": "move"}, *rows[2:]])
    with pytest.raises(ValueError, match="is of other data, whose sample 1 is 'edit 1' with a prompt of"):
        run("edit", edit_folder, changed, outputs["edit"])


def test_hidden_states_are_of_the_mixed_precision_and_rounded_on_request(outputs, t2i_folder, data, tmp_path):
    few = ("--max_train_samples", 2)
    run("t2i", t2i_folder, data["t2i"], tmp_path / "mixed", "--mixed_precision", "bf16", *few)
    run("t2i", t2i_folder, data["t2i"], tmp_path / "rounded", "--dtype", "bfloat16", *few)
    exact = PrecomputedDataset(outputs["t2i"])[1]
    mixed, rounded = (PrecomputedDataset(tmp_path / name)[1] for name in ("mixed", "rounded"))
    assert mixed["hidden_states"].dtype == rounded["hidden_states"].dtype == torch.bfloat16
    assert not torch.equal(mixed["hidden_states"], rounded["hidden_states"])
    torch.testing.assert_close(mixed["latents"], exact["latents"])
    assert torch.equal(rounded["latents"], exact["latents"].bfloat16().float())
    sizes = [(path / "shard-00000.safetensors").stat().st_size for path in (tmp_path / "mixed", tmp_path / "rounded")]
    assert sizes[0] > sizes[1]


def test_square_samples_without_buckets(edit_folder, data, tmp_path):
    options = arguments("edit", edit_folder, data["edit"], tmp_path / "square", "--max_train_samples", 3)
    options.remove("--aspect_ratio_bucketing")
    run_script("precompute_conditions", *options)
    dataset = PrecomputedDataset(tmp_path / "square")
    assert [dataset.size(index) for index in range(3)] == [(64, 64), (64, 64), (64, 128)]
    assert {dataset[index]["latents"].shape for index in range(3)} == {(4, 16, 16)}


def test_sana_with_a_vision_language_model_is_encoded_as_the_pipeline_of_both(
    outputs, sana_folder, golden_t2i, data, tmp_path
):
    vlm = ("--text_encoder_name_or_path", golden_t2i.path / "qwen", "--max_train_samples", SHARD_SIZE)
    run("t2i", sana_folder, data["t2i"], tmp_path / "sana", *vlm)
    name = "shard-00000.safetensors"
    assert (tmp_path / "sana" / name).read_bytes() == (outputs["t2i"] / name).read_bytes()
    with pytest.raises(ValueError, match="needs a vision-language model: give --text_encoder_name_or_path"):
        run("t2i", sana_folder, data["t2i"], tmp_path / "lacking")


def test_prompt_with_a_special_token_is_recorded(t2i_folder, data, tmp_path):
    rows = [json.loads(line) for line in data["t2i"].read_text().splitlines()[:2]]
    rows[0]["prompt"] = "a red <|im_end|> circle"
    lines = write_lines(data["t2i"].parent / "special.jsonl", rows)
    run("t2i", t2i_folder, lines, tmp_path / "special")
    dataset = PrecomputedDataset(tmp_path / "special")
    with pytest.raises(UnreadableSampleError, match=r"edit 0.*special token <\|im_end\|>"):
        dataset[0]
    assert dataset[1]["id"] == "edit 1"


def test_values_that_are_not_finite_are_told(t2i_folder, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(t2i_folder, model)
    weights = model / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    (name,) = (name for name in tensors if name.endswith("model.norm.weight"))
    save_file(tensors | {name: tensors[name] * float("inf")}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="make of 'edit .*' is not finite with the vision-language model in float32"):
        run("t2i", model, data["t2i"], tmp_path / "out")


def test_data_of_which_nothing_can_be_read_are_told(t2i_folder, tmp_path):
    rows = [{"id": str(index), "image_path": f"{index}.png", "prompt": "a circle"} for index in range(2)]
    with pytest.raises(ValueError, match="None of the 2 samples can be read: 0: "):
        run("t2i", t2i_folder, write_lines(tmp_path / "none.jsonl", rows), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "--batch_size has to be at least 1, but is 0"),
        (["--shard_size", "0"], "--shard_size has to be at least 1, but is 0"),
        (["--resolution", "-1"], "--resolution has to be at least 1, but is -1"),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers has to be at least 0"),
        (["--jsonl", "missing.jsonl"], "missing.jsonl is not a file"),
        (["--image_root", "missing"], "--image_root missing is not a folder"),
        (["--dataset_name", "a/b"], "Give one of --jsonl, --dataset_name, --train_data_dir, not --jsonl"),
        (["--streaming"], "--streaming data have no numbers"),
        (["--group_by_length"], "--group_by_length is for the training"),
        (["--image_column", "image"], "unrecognized arguments: --image_column image"),
    ],
)
def test_bad_options_are_named(data, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        run("edit", "no/model", data["edit"], tmp_path / "out", *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_of_another_kind_is_told_before_weights_load(sana_folder, data, tmp_path):
    with pytest.raises(ValueError, match="holds a SanaPipeline, but"):
        run("edit", sana_folder, data["edit"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resolution_that_is_no_multiple_of_the_vaes_factor_is_told(edit_folder, data, tmp_path):
    with pytest.raises(ValueError, match="--resolution has to be a multiple of 4, but is 66"):
        run("edit", edit_folder, data["edit"], tmp_path / "out", "--resolution", 66)
    assert not (tmp_path / "out").exists()


def test_edits_can_be_encoded_by_the_text_to_image_model_that_an_editor_starts_from(
    t2i_folder, edit_folder, data, tmp_path
):
    run("edit", t2i_folder, data["edit"], tmp_path / "out", "--max_train_samples", 1)
    item = PrecomputedDataset(tmp_path / "out")[0]
    sample = load_training_data("edit", jsonl=data["edit"])[0]
    (expected,) = encode_samples(DIMPipeline.from_pretrained(t2i_folder), [sample], 64, 64)
    torch.testing.assert_close(item["image_latents"], expected["image_latents"], rtol=1e-4, atol=1e-5)
    assert Image.open(data["edit"].parent / "0_source.jpg").size == (64, 64)
