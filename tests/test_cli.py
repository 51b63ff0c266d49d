import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import assert_refused
from PIL import Image
from typer.testing import CliRunner

from diffusers_dim.cli import app


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.png"
    Image.linear_gradient("L").convert("RGB").resize((96, 64)).save(path)
    return path


def run(*arguments):
    """Runs the command line; `result.output` is stdout and stderr together."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["edit", "generate", "convert", "demo"])
def test_help_names_the_command(command):
    assert command in run("--help").stdout
    assert "--output" in run(command, "--help").stdout


def test_help_imports_no_torch():
    code = "import sys; from diffusers_dim.cli import app\ntry: app(['edit', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'diffusers', 'transformers', 'PIL', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version():
    from diffusers_dim import __version__

    assert run("--version").stdout == f"diffusers-dim {__version__}\n"


def test_edit_writes_a_picture_and_says_how(edit_folder, source, tmp_path):
    output = tmp_path / "out.png"
    result = run(
        *("edit", "--image", source, "--prompt", "Make it blue.", "--model", edit_folder, "--output", output),
        *("--steps", 2, "--seed", 7, "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    edited = Image.open(output)
    assert f"{edited.width}x{edited.height}, 2 steps, guidance 7.5, seed 7, " in result.stdout
    assert result.stdout.endswith(f" s on cpu in float32: {output}\n")
    assert result.stdout.count("\n") == 1


def test_png_holds_the_settings(edit_folder, source, tmp_path):
    output = tmp_path / "out.png"
    run(
        *("edit", "--image", source, "--prompt", "Färbe es blau.", "--model", edit_folder, "--output", output),
        *("--steps", 2, "--seed", 7, "--guidance-scale", 2.5, "--height", 64, "--width", 32, "--device", "cpu"),
    )
    edited = Image.open(output)
    settings = json.loads(edited.text["parameters"])
    assert edited.size == (32, 64)
    assert settings["prompt"] == "Färbe es blau."
    assert (settings["seed"], settings["guidance_scale"], settings["num_inference_steps"]) == (7, 2.5, 2)


def test_printed_seed_makes_the_picture_again(edit_folder, source, tmp_path):
    common = ("edit", "--image", source, "--prompt", "Blue.", "--model", edit_folder, "--steps", 2, "--device", "cpu")
    first = run(*common, "--output", tmp_path / "first.png")
    seed = first.stdout.split("seed ")[1].split(",")[0]
    run(*common, "--output", tmp_path / "second.png", "--seed", seed)
    assert Image.open(tmp_path / "first.png").tobytes() == Image.open(tmp_path / "second.png").tobytes()


def test_several_images_are_those_of_counted_seeds(edit_folder, source, tmp_path):
    common = ("edit", "--image", source, "--prompt", "Blue.", "--model", edit_folder, "--steps", 2, "--device", "cpu")
    result = run(*common, "--output", tmp_path / "out.png", "--seed", 3, "--num-images", 2)
    run(*common, "--output", tmp_path / "alone.png", "--seed", 4)
    assert "seeds 3 to 4" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.png", "out-1.png", "out-2.png"]
    assert json.loads(Image.open(tmp_path / "out-2.png").text["parameters"])["seed"] == 4
    pair = zip(Image.open(tmp_path / "out-2.png").tobytes(), Image.open(tmp_path / "alone.png").tobytes())
    assert max(abs(a - b) for a, b in pair) <= 1  # a batch may round otherwise


def test_blueprint_from_a_file_is_painted(edit_folder, source, tmp_path):
    (tmp_path / "plan.txt").write_text("1. Edit Instruction: blue.\n", encoding="utf-8")
    common = ("edit", "--image", source, "--model", edit_folder, "--steps", 2, "--seed", 1, "--device", "cpu")
    by_file = ("--prompt", "Red.", "--blueprint", f"@{tmp_path / 'plan.txt'}", "--output", tmp_path / "file.png")
    assert run(*common, *by_file).exit_code == 0
    assert run(*common, "--prompt", "1. Edit Instruction: blue.", "--output", tmp_path / "text.png").exit_code == 0
    assert Image.open(tmp_path / "file.png").tobytes() == Image.open(tmp_path / "text.png").tobytes()


def test_generate_paints_from_text(t2i_folder, tmp_path):
    output = tmp_path / "out.jpg"
    result = run(
        *("generate", "--prompt", "A bowl.", "--model", t2i_folder, "--output", output),
        *("--steps", 2, "--seed", 1, "--device", "cpu", "--vae-tiling"),
    )
    assert result.exit_code == 0, result.output
    assert Image.open(output).format == "JPEG"


def test_convert_makes_a_folder_that_edit_takes(golden_edit, source, tmp_path):
    result = run(
        *("convert", "--checkpoint", golden_edit.path / "model.safetensors", "--output", tmp_path / "model"),
        *("--text-encoder", golden_edit.path / "qwen", "--vae", golden_edit.path / "vae_base"),
        *("--transformer-config", golden_edit.path / "transformer_config.json", "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    assert "DIMEditPipeline, bfloat16" in result.stdout
    assert str(tmp_path / "model") in result.stdout
    edited = run(
        *("edit", "--image", source, "--prompt", "Blue.", "--model", tmp_path / "model"),
        *("--output", tmp_path / "out.png", "--steps", 1, "--device", "cpu", "--designer", "none"),
    )
    assert edited.exit_code == 0, edited.output


def test_convert_refuses_a_full_folder(golden_edit, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    result = run(
        *("convert", "--checkpoint", golden_edit.path / "model.safetensors", "--output", tmp_path),
        *("--text-encoder", golden_edit.path / "qwen", "--vae", golden_edit.path / "vae_base"),
    )
    assert_refused(result, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_convert_refuses_a_missing_checkpoint(golden_edit, tmp_path):
    result = run(
        *("convert", "--checkpoint", tmp_path / "none.safetensors", "--output", tmp_path / "out"),
        *("--text-encoder", golden_edit.path / "qwen", "--vae", golden_edit.path / "vae_base"),
    )
    assert_refused(result, "none.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--image", "none.png", ["none.png", "no such file"]),
        ("--image", ".", ["folder"]),
        ("--image", "text.png", ["text.png", "cannot be read as a picture"]),
        ("--image", "cut.png", ["cut.png", "cannot be read as a picture"]),
        ("--output", ".", ["folder"]),
        ("--output", "none/out.png", ["no folder"]),
        ("--output", "out.txt", ["out.txt", ".png"]),
        ("--model", "text.png", ["text.png", "model_index.json"]),
        ("--model", "broken", ["broken", "names no pipeline class"]),
        ("--model", "a/b/c", ["a/b/c", "Hub"]),
        ("--model", "owner/unknown", ["owner/unknown", "Hub"]),
        ("--prompt", " ", ["prompt"]),
        ("--blueprint", "@none.txt", ["none.txt"]),
        ("--blueprint", " ", ["--blueprint"]),
        ("--height", "64", ["height", "width"]),
        ("--device", "toaster", ["toaster"]),
        ("--device", "cuda:99", ["cuda:99"]),
        ("--offload", "model", ["--offload model", "CPU"]),
    ],
)
def test_bad_input_gets_one_line(edit_folder, source, tmp_path, monkeypatch, option, value, words):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    Path("cut.png").write_bytes(source.read_bytes()[:200])
    Path("broken").mkdir()
    Path("broken/model_index.json").write_text("[]")
    options = {
        "--image": source,
        "--prompt": "Blue.",
        "--model": edit_folder,
        "--output": "out.png",
        "--steps": 1,
        "--device": "cpu",
        option: value,
    }
    result = run("edit", *(word for pair in options.items() for word in pair))
    assert_refused(result, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cut.png", "text.png"]


def test_size_that_the_model_cannot_paint(edit_folder, source, tmp_path):
    result = run(
        *("edit", "--image", source, "--prompt", "Blue.", "--model", edit_folder, "--output", tmp_path / "out.png"),
        *("--height", 63, "--width", 64, "--device", "cpu"),
    )
    assert_refused(result, "63", "64")


def test_model_of_the_other_kind(edit_folder, t2i_folder, source, tmp_path):
    common = ("--prompt", "Blue.", "--output", tmp_path / "out.png", "--device", "cpu")
    assert_refused(run("edit", "--image", source, "--model", t2i_folder, *common), "DIMEditPipeline", "generate")
    assert_refused(run("generate", "--model", edit_folder, *common), "DIMPipeline", "diffusers-dim edit")


def test_usage_error_names_the_option(source):
    result = run("edit", "--image", source)
    assert result.exit_code == 2
    assert "--prompt" in result.stderr


def test_edit_by_default_uses_the_embedded_model(tmp_path):
    from diffusers_dim.tiny import sample_edits

    sample = sample_edits(1, seed=0)[0]
    sample.source.save(tmp_path / "source.png")
    result = run(
        *("edit", "--image", tmp_path / "source.png", "--prompt", sample.instruction, "--device", "cpu"),
        *("--output", tmp_path / "out.png", "--steps", 2),
    )
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out.png").size == sample.source.size


def test_demo_draws_one_sheet(tmp_path):
    result = run("demo", "--output", tmp_path / "demo.png", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "demo.png") in result.stdout
    width, height = Image.open(tmp_path / "demo.png").size
    assert width > 3 * 256 and height > 2 * 256


def test_demo_refuses_a_folder_as_output(tmp_path):
    assert_refused(run("demo", "--output", tmp_path), "folder")
