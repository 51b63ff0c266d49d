"""The batch script as a user runs it, on the embedded model."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runs import run_on_terminal
from PIL import Image

from diffusers_dim import TINY_SHAPES, DIMEditPipeline
from diffusers_dim.tiny import sample_edits


SCRIPT = Path(__file__).parents[2] / "examples" / "edit_batch.py"
STEPS = 4
WIDE = (2, 5)  # lines whose sources are not square

pytestmark = pytest.mark.usefixtures("one_thread_on_the_cpu")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("edit_batch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edits")
    rows = []
    for line, edit in enumerate(sample_edits(7, seed=1), start=1):
        source = edit.source.resize((128, 64)) if line in WIDE else edit.source
        source.save(folder / f"{line}.png")
        rows.append({"id": f"edit {line}", "image_path": f"{line}.png", "prompt": edit.instruction})
        if line == 3:
            rows[-1]["blueprint"] = str(edit.blueprint)
    return write_lines(folder / "edits.jsonl", rows)


def arguments(edits, output, *options):
    fixed = ["--pretrained_model_name_or_path", TINY_SHAPES, "--jsonl", edits, "--output_dir", output]
    return [*map(str, fixed), "--num_inference_steps", str(STEPS), *map(str, options)]


def run(script, *args):
    script.main(script.parse_args(arguments(*args)))


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


def results(output):
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(script, edits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "unbroken"
    run(script, edits, output)
    return output


@pytest.fixture(scope="module")
def batched(script, edits, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "batched"
    run(script, edits, output, "--batch_size", 3, "--num_images_per_prompt", 2)
    return output


@pytest.fixture(scope="module")
def pipe():
    pipe = DIMEditPipeline.from_pretrained(TINY_SHAPES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_alone(pipe, edits, row, index=0):
    return pipe(
        Image.open(edits.parent / row["image_path"]),
        row.get("blueprint") or row["prompt"],
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(row["seeds"][index]),
    ).images[0]


def test_each_line_becomes_the_pipelines_edit_of_it(unbroken, edits, pipe):
    rows = results(unbroken)
    given = [json.loads(line) for line in edits.read_text().splitlines()]
    assert [{name: row[name] for name in line} for row, line in zip(rows, given, strict=True)] == given
    for number, row in enumerate(rows, start=1):
        assert row["outputs"] == [f"{number:06d}.png"]
        assert np.array_equal(Image.open(unbroken / row["outputs"][0]), edit_alone(pipe, edits, row))
    assert sorted(contents(unbroken)) == [f"{line:06d}.png" for line in range(1, 8)] + ["results.jsonl"]


def test_pictures_carry_what_they_were_made_with(unbroken, edits):
    found = json.loads(Image.open(unbroken / "000003.png").info["parameters"])
    line = json.loads(edits.read_text().splitlines()[2])
    assert {name: found[name] for name in line} == line
    assert (found["model"], found["num_inference_steps"], found["seed"]) == ("shapes", STEPS, 3000)


def test_two_processes_give_the_files_of_one(unbroken, edits, tmp_path):
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--dynamo_backend", "no"]
    command += [str(SCRIPT), *arguments(edits, tmp_path / "two")]
    result = run_on_terminal(command)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "4/4" in result.stderr  # of the seven
    assert contents(tmp_path / "two") == contents(unbroken)


def test_killed_run_goes_on_and_keeps_what_it_had(script, unbroken, edits, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *arguments(edits, output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "000002.png").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("0*.png")}
    assert 2 <= len(kept) < 7
    assert not (output / "results.jsonl").exists()

    run(script, edits, output)
    assert contents(output) == contents(unbroken)
    assert all((output / name).stat().st_mtime_ns == written for name, written in kept.items())


def test_batches_hold_one_size_and_give_what_lines_alone_do(batched, edits, pipe):
    for number, row in enumerate(results(batched), start=1):
        assert row["outputs"] == [f"{number:06d}-1.png", f"{number:06d}-2.png"]
        for index, name in enumerate(row["outputs"]):
            image, expected = Image.open(batched / name), edit_alone(pipe, edits, row, index)
            assert image.size == expected.size
            assert (image.width > image.height) == (number in WIDE)
            assert np.abs(np.asarray(image, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_every_picture_has_noise_of_its_own(batched):
    seeds = [seed for row in results(batched) for seed in row["seeds"]]
    assert len(set(seeds)) == len(seeds) == 14


def test_half_a_batch_is_completed_as_it_was(script, batched, edits, tmp_path):
    output = tmp_path / "half"
    shutil.copytree(batched, output)
    for name in ("000003-2.png", "000004-1.png", "results.jsonl"):
        (output / name).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    (output / ".unfinished-1-000003-2.png").write_bytes(b"half a picture of a killed run")
    run(script, edits, output, "--batch_size", 3, "--num_images_per_prompt", 2)
    assert contents(output) == contents(batched)
    assert all((output / name).stat().st_mtime_ns == written for name, written in before.items())


def test_finished_run_loads_no_model(script, unbroken, edits, tmp_path):
    output, empty = tmp_path / "again", tmp_path / "shapes"
    shutil.copytree(unbroken, output)
    (output / "results.jsonl").unlink()
    empty.mkdir()
    run(script, edits, output, "--pretrained_model_name_or_path", empty)
    assert contents(output) == contents(unbroken)


def test_added_lines_are_all_that_is_edited(script, unbroken, edits, tmp_path):
    output = tmp_path / "more"
    shutil.copytree(unbroken, output)
    written = (output / "000001.png").stat().st_mtime_ns
    first = json.loads(edits.read_text().splitlines()[0])
    more = write_lines(tmp_path / "more.jsonl", [*edits.read_text().splitlines(), {**first, "id": "new"}])
    run(script, more, output, "--image_root", edits.parent)
    assert [row["id"] for row in results(output)][-1] == "new"
    assert (output / "000008.png").exists() and (output / "000001.png").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "seed 1000, now 1000004000"),
        (["--guidance_scale", "3"], "guidance_scale None, now 3.0"),
    ],
)
def test_folder_of_another_run_is_refused(script, unbroken, edits, options, message):
    before = contents(unbroken)
    with pytest.raises(ValueError, match="000001.png is another run's") as error:
        run(script, edits, unbroken, *options)
    assert message in str(error.value)
    assert contents(unbroken) == before


def test_foreign_picture_in_the_folder_is_refused(script, edits, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "000004.png")
    with pytest.raises(ValueError, match="000004.png is no result of this script"):
        run(script, edits, tmp_path)


def test_source_on_its_side_is_edited_upright(script, edits, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(edits.parent / "2.png").convert("RGB").save(tmp_path / "side.jpg", exif=exif)
    row = {"id": 1, "image_path": "side.jpg", "prompt": "remove the red circle"}
    run(script, write_lines(tmp_path / "side.jsonl", [row]), tmp_path / "out")
    image = Image.open(tmp_path / "out" / "000001.png")
    assert image.height > image.width


def test_picture_cut_short_is_named_and_earlier_edits_are_kept(script, edits, tmp_path):
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    rows = [{"id": name, "image_path": f"{name}.jpg", "prompt": "remove it"} for name in ("whole", "cut")]
    lines = write_lines(tmp_path / "edits.jsonl", rows)
    with pytest.raises(ValueError, match=r"edits.jsonl, line 2: .*cut.jpg cannot be read as a picture"):
        run(script, lines, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["000001.png"]


GOOD = {"id": 1, "image_path": "1.png", "prompt": "make it blue"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 lacks ['id', 'image_path', 'prompt']: a line needs ['id', 'image_path', 'prompt']"),
        ({"id": 1, "image_path": "1.png"}, "line 2 lacks ['prompt']"),
        ({**GOOD, "prompt": " "}, "line 2: `prompt` has to be a text that is not empty, but is ' '"),
        ({**GOOD, "blueprint": 7}, "line 2: `blueprint` has to be a text that is not empty, but is 7"),
        ({**GOOD, "image_path": "missing.png"}, "line 2: {folder}/missing.png cannot be read as a picture"),
        ({**GOOD, "image_path": "edits.jsonl"}, "line 2: {folder}/edits.jsonl cannot be read as a picture"),
        ({**GOOD, "image_path": "thin.png"}, "thin.png of 201x1 pixels is beyond 200:1"),
    ],
)
def test_bad_lines_are_named_before_the_model_is_loaded(script, edits, tmp_path, capsys, line, message):
    Image.new("RGB", (201, 1)).save(edits.parent / "thin.png")
    lines = write_lines(tmp_path / "bad.jsonl", [GOOD, line])
    options = ["--image_root", edits.parent, "--pretrained_model_name_or_path", "no/model"]
    with pytest.raises(SystemExit) as error:
        run(script, lines, tmp_path / "out", *options)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert f"error: {lines}, line 2" in printed
    assert message.format(folder=edits.parent) in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "--batch_size has to be at least 1, but is 0"),
        (["--num_images_per_prompt", "1001"], "--num_images_per_prompt has to be at most 1000, but is 1001"),
        (["--seed", "-1"], "--seed has to lie in [0, 2**32), but is -1"),
        (["--height", "64"], "Give both --height and --width or neither, not 64 and None"),
        (["--jsonl", "missing.jsonl"], "missing.jsonl is not a file"),
    ],
)
def test_bad_options_are_named(script, edits, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        run(script, edits, tmp_path / "out", *options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_file_without_lines_is_refused(script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(script, write_lines(tmp_path / "none.jsonl", [""]), tmp_path / "out")
    assert "none.jsonl holds no samples" in capsys.readouterr().err


def test_offload_without_an_accelerator_is_refused(script, edits, tmp_path):
    with pytest.raises(ValueError, match="needs an accelerator, but the device is the CPU"):
        run(script, edits, tmp_path / "out", "--enable_model_cpu_offload")
