# Copyright 2026 The diffusers-dim authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The command line: `diffusers-dim edit`, `generate`, `convert`, `design` and `demo`, with those of the other `*_cli.py`.

torch and the models are imported inside the functions that need them, so that `--help` answers at once.
"""

import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__
from .cli_common import (
    DESIGNER_OPTIONS,
    GrowingText,
    check_writable,
    choose_options,
    errors_in_one_line,
    load_designer,
    load_pipeline,
    run_designs,
    show_progress_on_terminals_only,
)
from .data_cli import data_app
from .devices import resolve_device, resolve_dtype
from .eval_cli import eval_app
from .hub_cli import card, code, push


if TYPE_CHECKING:
    from PIL import Image


app = typer.Typer(
    help="Draw-In-Mind: edit pictures by instruction, and paint them from text.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
for _command in (push, card, code):
    app.command()(_command)

# Options that `edit` and `generate` share
PromptOption = Annotated[str, typer.Option(help="What to do, or to paint, in words.")]
OutputOption = Annotated[Path, typer.Option(help="Picture file to write.")]
NegativePromptOption = Annotated[str | None, typer.Option(help="What to keep away from.", show_default="nothing")]
HeightOption = Annotated[int | None, typer.Option(min=1, help="Pixels; with --width.", show_default="by the model")]
WidthOption = Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.", show_default="by the model")]
StepsOption = Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale; off at 1.", show_default="the model's own")
]
NumImagesOption = Annotated[int, typer.Option(min=1, help="How many, with seeds that count up from --seed.")]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, help="Of the noise.", show_default="random, and printed")
]
DeviceOption = Annotated[str, typer.Option(help="Such as cpu, cuda or cuda:1; auto takes an accelerator if there is.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of the model; auto is bfloat16 on an accelerator that has it, else float32."),
]
OffloadOption = Annotated[
    Literal["none", "model", "sequential", "group"],
    typer.Option(help="Keep components (model), layers (sequential) or groups of layers in CPU memory till needed."),
]
DesignerOption = Annotated[
    Literal["default", "self", "none"],
    typer.Option(help="Who words what is painted: the model's default, its own vision-language model, or nobody."),
]
VaeTilingOption = Annotated[bool, typer.Option("--vae-tiling", help="Decode large pictures in tiles.")]


def print_version(wanted: bool) -> None:
    """Prints the package's version and ends."""
    if wanted:
        typer.echo(f"diffusers-dim {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def read_image(path: Path) -> "Image.Image":
    """
    Reads a whole picture file.

    Raises:
        ValueError: If there is no such file, or it is no picture that PIL reads to its end.
    """
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"--image {path}: {'is a folder, not a picture' if path.is_dir() else 'no such file'}.")
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image {path}: cannot be read as a picture ({error}).") from error
    return image


def check_output(path: Path) -> None:
    """Raises a `ValueError` if a picture could not be saved there, before anything is computed."""
    from PIL import Image

    check_writable(path, f"a picture file, such as {path / 'edited.png'}")
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--output {path}: its name has to end in a picture format, such as .png, .jpg or .webp.")


def read_text_option(value: str, name: str) -> str:
    """
    A text option's value, or for `@FILE` that file's text.

    Raises:
        ValueError: If the file is not there or not UTF-8, or the text is empty.
    """
    text = value
    if value.startswith("@"):
        try:
            text = Path(value[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} {value}: cannot be read as a text file ({error}).") from error
    if not text.strip():
        raise ValueError(f"{name} {value}: holds no text.")
    return text.strip()


def paint(
    kind: Literal["edit", "t2i"],
    output: Path,
    model: str,
    seed: int | None,
    num_images: int,
    device: str,
    dtype: str,
    offload: str,
    vae_tiling: bool,
    designer: str,
    **inputs: Any,
) -> None:
    """Loads a pipeline, calls it with `inputs`, and saves and reports what it paints: the body of two commands."""
    check_output(output)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)

    import torch

    from .files import save_image

    pipe = load_pipeline(kind, model, torch_device, torch_dtype, offload, vae_tiling)
    if designer != "default":
        pipe.designer = None if designer == "none" else designer
    seed = secrets.randbelow(2**32) if seed is None else seed
    if sys.stderr.isatty():
        growing = GrowingText(err=True)
        inputs["callback_on_design"] = lambda pipe, index, text: growing.show(text)
    start = time.perf_counter()
    # On the CPU, so that a seed gives the same noise on every device.
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(num_images)]
    painted: Any = pipe(generator=generators, num_images_per_prompt=num_images, **inputs)
    images, blueprint = painted.images, (painted.blueprints or [None])[0]
    seconds = time.perf_counter() - start

    given = {name: value for name, value in inputs.items() if isinstance(value, str)}
    settings = {
        **({} if blueprint is None else {"blueprint": str(blueprint)}),
        "num_inference_steps": pipe.num_timesteps,
        "guidance_scale": pipe.guidance_scale,
        "model": Path(model).name if Path(model).exists() else model,
        "version": __version__,
    }
    paths = [output]
    if num_images > 1:
        paths = [output.with_stem(f"{output.stem}-{i + 1}") for i in range(num_images)]
    for i, (image, path) in enumerate(zip(images, paths, strict=True)):
        size = {"width": image.width, "height": image.height}
        save_image(image, path, {**given, **settings, **size, "seed": seed + i})
    seeds = f"seed {seed}" if num_images == 1 else f"seeds {seed} to {seed + num_images - 1}"
    typer.echo(
        f"{images[0].width}x{images[0].height}, {pipe.num_timesteps} steps, guidance {pipe.guidance_scale:g}, {seeds},"
        f" {seconds:.1f} s on {torch_device} in {str(torch_dtype).removeprefix('torch.')}:"
        f" {', '.join(map(str, paths))}"
    )


@app.command()
@errors_in_one_line()
def edit(
    image: Annotated[Path, typer.Option(help="The picture to edit.")],
    prompt: PromptOption,
    model: Annotated[
        str | None,
        typer.Option(help="Diffusers folder or Hub repository id.", show_default="the embedded model of shapes"),
    ] = None,
    output: OutputOption = Path("edited.png"),
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    steps: StepsOption = 30,
    guidance_scale: GuidanceOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    negative_prompt: NegativePromptOption = None,
    blueprint: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|@FILE", help="The edit's design, painted from in the prompt's place.", show_default="none"
        ),
    ] = None,
    designer: DesignerOption = "default",
    num_images: NumImagesOption = 1,
    offload: OffloadOption = "none",
    vae_tiling: VaeTilingOption = False,
) -> None:
    """Edit a picture as a prompt says."""
    from .tiny import TINY_SHAPES

    paint(
        "edit",
        output,
        TINY_SHAPES if model is None else model,
        seed,
        num_images,
        device,
        dtype,
        offload,
        vae_tiling,
        designer,
        image=read_image(image),
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        blueprint=None if blueprint is None else read_text_option(blueprint, "--blueprint"),
    )


@app.command()
@errors_in_one_line()
def generate(
    prompt: PromptOption,
    model: Annotated[str, typer.Option(help="Diffusers folder or Hub repository id.")],
    output: OutputOption = Path("generated.png"),
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    steps: StepsOption = 30,
    guidance_scale: GuidanceOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    negative_prompt: NegativePromptOption = None,
    designer: DesignerOption = "default",
    num_images: NumImagesOption = 1,
    offload: OffloadOption = "none",
    vae_tiling: VaeTilingOption = False,
) -> None:
    """Paint a picture from text."""
    paint(
        "t2i",
        output,
        model,
        seed,
        num_images,
        device,
        dtype,
        offload,
        vae_tiling,
        designer,
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )


@app.command()
@errors_in_one_line()
def convert(
    checkpoint: Annotated[
        str, typer.Option(help="Safetensors file, folder or Hub repository id of a released model.")
    ],
    text_encoder: Annotated[str, typer.Option(help="Folder or repository of its Qwen2.5-VL.")],
    vae: Annotated[str, typer.Option(help="Folder or repository of its AutoencoderDC.")],
    output: Annotated[Path, typer.Option(help="Folder to write: new or empty.")],
    transformer_config: Annotated[
        Path | None, typer.Option(help="JSON of the painter's arguments that shapes don't tell.", show_default="none")
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the written weights.")] = "float32",
    designer: Annotated[
        Literal["default", "self", "none"],
        typer.Option(help="Who words what is painted, unless told otherwise; by default self for an edit model."),
    ] = "default",
) -> None:
    """Turn a released checkpoint into a diffusers folder, once."""
    from . import convert_released_checkpoint

    show_progress_on_terminals_only()
    converted = convert_released_checkpoint(
        checkpoint, text_encoder, vae, output, transformer_config=transformer_config, dtype=dtype, designer=designer
    )
    typer.echo(
        f"{converted.num_parameters / 1e6:,.1f} million parameters for {converted.pipeline_class}, {dtype}:"
        f" {converted.path}"
    )


@app.command()
@errors_in_one_line()
def design(
    image: Annotated[
        Path | None, typer.Option(help="The picture to design an edit of; with --prompt.", show_default="none")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to do with it, in words.", show_default="none")] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help="Many edits, in the place of --image: `image_path` and `instruction`, else `prompt`, a line.",
            show_default="none",
        ),
    ] = None,
    image_dir: Annotated[
        Path | None, typer.Option(help="What paths of pictures are relative to.", show_default="the jsonl's folder")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Text file to write; with --jsonl a jsonl, the blueprints as `prompt`. A run that was stopped goes"
            " on, and one that failed for some tries these again.",
            show_default="the blueprint is printed",
        ),
    ] = None,
    designer: Annotated[
        Literal["self", "vlm", "openai", "replay"],
        typer.Option(
            help="Who designs: the edit pipeline's own model, another vision-language model, one behind a chat"
            " completions server (its key from OPENAI_API_KEY), or a file of blueprints."
        ),
    ] = "self",
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or Hub repository id of the pipeline (self) or the model (vlm), or a server's model.",
            show_default="none",
        ),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="The server, such as http://localhost:8000/v1.", show_default="OpenAI's")
    ] = None,
    blueprints: Annotated[
        Path | None, typer.Option(help="The jsonl of --designer replay.", show_default="none")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, thoughts too.", show_default="1024")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures at a time, of self and vlm.", show_default="8")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time, of openai.", show_default="8")
    ] = None,
    on_failure: Annotated[
        Literal["error", "instruction"],
        typer.Option(help="What a designer that fails twice leaves: an error, or the instruction as it is."),
    ] = "error",
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps blueprints for any later run.", show_default="none")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Write the blueprint of an edit, or of many."""
    given: dict[str, Any] = {
        "--model": model,
        "--base-url": base_url,
        "--blueprints": blueprints,
        "--max-new-tokens": max_new_tokens,
        "--batch-size": batch_size,
        "--concurrency": concurrency,
        "--cache": cache,
        "--device": device,
        "--dtype": dtype,
    }
    options = choose_options("--designer", designer, given)
    first = DESIGNER_OPTIONS[designer][0]
    if first not in options:
        raise ValueError(f"--designer {designer}: needs {first}.")
    if (jsonl is None) == (image is None):
        raise ValueError("Give --image with --prompt, or --jsonl with --output.")
    if (prompt is None) != (image is None):
        raise ValueError("Give --prompt with --image; the lines of a --jsonl have their own.")
    if output is not None:
        check_writable(output, "a file")

    if jsonl is not None:
        if output is None:
            raise ValueError(f"--jsonl {jsonl}: needs --output, the jsonl to write.")
        from .designers.jobs import DesignJob

        run_designs(DesignJob(jsonl, output, image_dir), designer, on_failure, options)
        return

    if image_dir is not None:
        raise ValueError(f"--image-dir {image_dir}: is for a --jsonl.")
    if not prompt.strip():
        raise ValueError("--prompt: holds no text.")
    picture = read_image(image)

    from .image_processor import DIMImageProcessor

    picture = DIMImageProcessor().to_rgb(picture)[0]
    loaded = load_designer(designer, on_failure, options)
    start = time.perf_counter()
    growing = GrowingText()
    grows = output is None and sys.stdout.isatty()
    tell = (lambda index, text: growing.show(text)) if grows else None
    (made,) = loaded.design_each([picture], [prompt], tell)
    if growing.printed:
        typer.echo()
    if made.blueprint is None:
        typer.echo(f"diffusers-dim: error: {made.error}", err=True)
        raise typer.Exit(1)
    text = str(made.blueprint)
    if output is not None:
        output.write_text(f"{text}\n", encoding="utf-8")
    elif text != growing.printed.strip():
        typer.echo(f"\n{text}" if growing.printed else text)
    typer.echo(
        f"{made.tokens:,} tokens{', repaired' if made.repaired else ''}, {time.perf_counter() - start:.1f} s", err=True
    )


@app.command()
@errors_in_one_line()
def demo(
    output: OutputOption = Path("demo.png"),
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the pictures and of the noise.")] = 1,
    device: DeviceOption = "auto",
) -> None:
    """Edit two small pictures by their blueprints and draw a before/after sheet."""
    check_output(output)
    torch_device = resolve_device(device)

    import torch

    from .designers import FunctionDesigner
    from .evaluation.sheets import SheetRow, draw_sheet
    from .files import save_image
    from .tiny import TINY_SHAPES, sample_edits

    pipe: Any = load_pipeline("edit", TINY_SHAPES, torch_device, torch.float32)
    samples = sample_edits(2, seed, kinds=("recolor", "replace"))
    # The embedded reader is far too small to write: its world says by rule what a designer would.
    by_rule = {sample.instruction: sample.blueprint for sample in samples}
    pipe.designer = FunctionDesigner(lambda image, instruction: by_rule[instruction])
    start = time.perf_counter()
    painted: Any = pipe(
        [sample.source for sample in samples],
        [sample.instruction for sample in samples],
        generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(samples))],
    )
    seconds = time.perf_counter() - start
    rows = [
        SheetRow(
            sample.instruction,
            [("before", sample.source), ("blueprint", design), ("after", image), ("drawn by rule", sample.target)],
        )
        for sample, design, image in zip(samples, painted.blueprints, painted.images, strict=True)
    ]
    save_image(draw_sheet(rows), output, {"seed": seed, "version": __version__})
    typer.echo(f"{len(rows)} edits in {seconds:.1f} s on {torch_device}, seed {seed}: {output}")


if __name__ == "__main__":
    app()
