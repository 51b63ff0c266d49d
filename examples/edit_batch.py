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
Edits many pictures, with a process for each GPU.

    accelerate launch examples/edit_batch.py --pretrained_model_name_or_path EDIT_MODEL \
        --jsonl edits.jsonl --output_dir outputs/edits --batch_size 4

A line of the jsonl file has `id`, `image_path` and `prompt`, as DIM-Edit was released, and may have a `blueprint`,
which the painter then reads in the prompt's place; a Parquet file's rows are read as lines, too. The edit of line 12
becomes `000012.png`, which carries what it was made with as JSON in its text chunk "parameters"; `results.jsonl` lists
all at the end. A run that was stopped goes on when it is started again, and gives what an unbroken one would; so does
one of more or fewer processes.
"""

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from PIL import ExifTags, Image

from diffusers_dim import DIMEditPipeline
from diffusers_dim.batches import make_batches  # noqa: F401 batch_edit_ray.py has it here
from diffusers_dim.devices import resolve_dtype
from diffusers_dim.evaluation import generation
from diffusers_dim.evaluation.generation import save_whole  # noqa: F401 batch_edit_ray.py has it here
from diffusers_dim.files import read_jsonl, remove_leftovers, write_lines
from diffusers_dim.image_processor import MAX_ASPECT_RATIO


FIELDS = ("id", "image_path", "prompt")
MAX_IMAGES_PER_PROMPT = 1000


@dataclass
class Edit:
    """A line of the jsonl file, and the width and height in pixels at which a person sees its source."""

    where: str
    line: int
    fields: dict[str, Any]
    path: Path
    width: int
    height: int


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained_model_name_or_path", required=True, help="A DIMEditPipeline folder or repository."
    )
    model.add_argument("--revision", help="Revision of the repository.")
    model.add_argument("--variant", help="Variant of the weights, such as bf16.")
    model.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Of all weights; bfloat16 by default where the device has it.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--jsonl",
        required=True,
        help="Edits, one a line: id, image_path, prompt, perhaps blueprint; or a .parquet file of such columns.",
    )
    data.add_argument("--image_root", help="What image paths are relative to; the jsonl's own folder by default.")
    data.add_argument("--output_dir", default="dim-edits", help="Edited pictures, and at the end results.jsonl.")
    call = parser.add_argument_group("edits")
    call.add_argument("--seed", type=int, default=0, help="Noise follows from it and the line's number alone.")
    call.add_argument("--num_inference_steps", type=int, default=30)
    call.add_argument("--guidance_scale", type=float, help="The checkpoint's own by default; off at 1.")
    call.add_argument("--num_images_per_prompt", type=int, default=1, help="Pictures a line.")
    call.add_argument("--height", type=int, help="In pixels, with --width; by default as each source's shape asks.")
    call.add_argument("--width", type=int, help="In pixels, with --height.")
    call.add_argument("--max_sequence_length", type=int, default=8192, help="The last condition tokens that are kept.")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--batch_size", type=int, default=1, help="Lines a device and call; those of one size go together."
    )
    run.add_argument("--compile", action="store_true", help="Compile the transformer's blocks.")
    run.add_argument("--enable_model_cpu_offload", action="store_true", help="Keep one model at a time on the device.")
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program over options that make no sense, and reads the edits."""
    for name in "num_inference_steps num_images_per_prompt max_sequence_length batch_size".split():
        if getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, but is {getattr(args, name)}.")
    if args.num_images_per_prompt > MAX_IMAGES_PER_PROMPT:
        parser.error(
            f"--num_images_per_prompt has to be at most {MAX_IMAGES_PER_PROMPT}, but is {args.num_images_per_prompt}."
        )
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed has to lie in [0, 2**32), but is {args.seed}.")
    if (args.height is None) != (args.width is None):
        parser.error(f"Give both --height and --width or neither, not {args.height} and {args.width}.")
    if not Path(args.jsonl).is_file():
        parser.error(f"{args.jsonl} is not a file.")
    try:
        args.edits = read_edits(args.jsonl, args.image_root)
    except ValueError as error:
        parser.error(str(error))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Edit many pictures, with a process for each GPU.")
    args = parser.parse_args(arguments)
    check_args(parser, args)
    return args


@contextmanager
def unreadable_pictures_named(where: str, path: Path) -> Iterator[None]:
    """Says which line a picture is of that PIL cannot read."""
    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: {path} cannot be read as a picture ({error}).") from error


def read_edits(jsonl: str | Path, image_root: str | Path | None = None) -> list[Edit]:
    """
    Reads and checks every line, and the size of each source.

    Raises:
        ValueError: If the file holds no line, or a line is no JSON object, lacks a field or names no picture; the line
            is named.
    """
    root = Path(image_root) if image_root is not None else Path(jsonl).parent
    rows = []
    lines = read_parquet(jsonl) if Path(jsonl).suffix == ".parquet" else read_jsonl(jsonl, FIELDS)
    for number, fields in lines.items():
        where = f"{jsonl}, line {number}"
        for name in ("image_path", "prompt", "blueprint"):
            text = fields.get(name)
            if not (isinstance(text, str) and text.strip()) and not (name == "blueprint" and text is None):
                raise ValueError(f"{where}: `{name}` has to be a text that is not empty, but is {text!r}.")
        rows.append((where, number, fields, root / fields["image_path"]))
    # In threads, since PIL decodes a whole PNG to learn how it lies.
    with ThreadPoolExecutor() as readers:
        sizes = list(readers.map(lambda row: read_size(row[0], row[3]), rows))
    return [Edit(*row, *size) for row, size in zip(rows, sizes, strict=True)]


def read_parquet(path: str | Path) -> dict[int, dict[str, Any]]:
    """The rows by their numbers from 1, without columns that are neither text nor number, such as pictures."""
    import pyarrow
    from pyarrow import parquet, types

    plain = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    try:
        schema = parquet.read_schema(path)
        columns = [field.name for field in schema if any(is_plain(field.type) for is_plain in plain)]
        rows = parquet.read_table(path, columns=columns).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    if missing := [name for name in FIELDS if name not in columns]:
        raise ValueError(f"{path} lacks the columns {missing} of text or numbers: it has {columns}.")
    if not rows:
        raise ValueError(f"{path} holds no samples.")
    return dict(enumerate(rows, start=1))


def read_size(where: str, path: Path) -> tuple[int, int]:
    """Width and height in pixels at which a person sees a picture."""
    with unreadable_pictures_named(where, path), Image.open(path) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # lies on its side
            width, height = height, width
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{where}: {path} of {width}x{height} pixels is beyond {MAX_ASPECT_RATIO}:1.")
    return width, height


def plan_pictures(edit: Edit, args: argparse.Namespace, dtype: torch.dtype) -> dict[Path, dict[str, Any]]:
    """The files that an edit becomes, each with all that determines what it shows."""
    settings = {name: edit.fields.get(name) for name in (*FIELDS, "blueprint")}
    settings["model"] = generation.name_model(args.pretrained_model_name_or_path)
    settings["dtype"] = str(dtype).removeprefix("torch.")
    for name in ("revision variant num_inference_steps guidance_scale height width max_sequence_length").split():
        settings[name] = getattr(args, name)
    pictures = {}
    for index in range(args.num_images_per_prompt):
        suffix = f"-{index + 1}" if args.num_images_per_prompt > 1 else ""
        seed = (args.seed * 1_000_003 + edit.line) * MAX_IMAGES_PER_PROMPT + index
        pictures[Path(args.output_dir) / f"{edit.line:06d}{suffix}.png"] = {**settings, "seed": seed}
    return pictures


def find_finished(pictures: dict[Path, dict[str, Any]]) -> set[Path]:
    """Which pictures an earlier run has made, see [`diffusers_dim.evaluation.generation.find_finished`]."""
    return generation.find_finished(pictures, "this script", "--output_dir")


def read_source(edit: Edit) -> Image.Image:
    with unreadable_pictures_named(edit.where, edit.path):
        image = Image.open(edit.path)
        image.load()
    return image


def load_pipeline(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> DIMEditPipeline:
    pipe = DIMEditPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype
    )
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    if args.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit_batch(
    pipe: DIMEditPipeline,
    batch: list[Edit],
    size: tuple[int, int],
    seeds: list[int],
    args: argparse.Namespace,
) -> list[Image.Image]:
    """Pictures of edits of one size (height, width): all of the first one, then of the next."""
    return pipe(
        [read_source(edit) for edit in batch],
        [edit.fields["prompt"] for edit in batch],
        blueprint=[edit.fields.get("blueprint") or None for edit in batch],
        height=size[0],
        width=size[1],
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        num_images_per_prompt=args.num_images_per_prompt,
        # On the CPU, so that a seed gives the same noise on every device.
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        max_sequence_length=args.max_sequence_length,
    ).images


def write_results(args: argparse.Namespace, plans: dict[int, dict[Path, dict[str, Any]]]) -> Path:
    """Lists what became of each line."""
    path = Path(args.output_dir) / "results.jsonl"
    rows = (
        {"outputs": [file.name for file in plan], "seeds": [made["seed"] for made in plan.values()]}
        for plan in (plans[edit.line] for edit in args.edits)
    )
    write_lines(path, (json.dumps({**edit.fields, **row}, ensure_ascii=False) for edit, row in zip(args.edits, rows)))
    return path


def main(args: argparse.Namespace) -> None:
    # 1. Processes, and what is left to do
    state = generation.start_processes()
    if args.enable_model_cpu_offload and state.device.type == "cpu":
        raise ValueError("--enable_model_cpu_offload needs an accelerator, but the device is the CPU.")
    dtype = resolve_dtype(args.dtype, state.device)
    plans = {edit.line: plan_pictures(edit, args, dtype) for edit in args.edits}
    pictures = {path: settings for plan in plans.values() for path, settings in plan.items()}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        remove_leftovers(Path(args.output_dir))
    # One process looks for all: the others might already see what a fast one has made.
    found = [find_finished(pictures) if state.is_main_process else None]
    finished = broadcast_object_list(found)[0]
    if finished:
        state.print(f"{len(finished)} of {len(pictures)} pictures are already there.")

    # 2. Edit
    def size_of(pipe: DIMEditPipeline, edit: Edit) -> tuple[int, int]:
        return (args.height, args.width) if args.height else pipe.image_processor.get_default_height_width(edit)

    def paint(
        pipe: DIMEditPipeline, size: tuple[int, int], batch: list[Edit], settings: list[dict[str, Any]]
    ) -> list[tuple[Image.Image, dict[str, Any]]]:
        images = edit_batch(pipe, batch, size, [made["seed"] for made in settings], args)
        return list(zip(images, settings, strict=True))

    planned = [(edit, plans[edit.line]) for edit in args.edits]
    load = partial(load_pipeline, args, state.device, dtype)
    generation.paint_planned(state, planned, load, size_of, paint, args.batch_size, finished, unit="Edits")

    # 3. What became of each line
    state.wait_for_everyone()
    if state.is_main_process:
        path = write_results(args, plans)
        print(f"{len(pictures)} pictures of {len(args.edits)} edits: {path}")
    state.destroy_process_group()


if __name__ == "__main__":
    main(parse_args())
