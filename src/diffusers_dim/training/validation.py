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
"""What a model paints while it is trained: sheets of pictures, and the picture world's success."""

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from ..evaluation.shapes import evaluate_shapes
from ..evaluation.sheets import SheetRow, draw_sheet
from ..pipelines import DIMEditPipeline, DIMPipeline, DIMPipelineOutput
from ..tiny import sample_edits


SHAPES_SEED = 2_000_000_029  # of edits that no training of ours draws


def paint_validation(pipe: DIMPipeline, args: argparse.Namespace) -> list[SheetRow]:
    """
    Paints the validation prompts at the training's square resolution, each from the noise of `args.seed`, as rows of
    source | blueprint | edit | target, or of one picture for text-to-image.
    """
    call: dict[str, Any] = {
        "height": args.resolution,
        "width": args.resolution,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length,
    }
    rows = []
    for index, prompt in enumerate(args.validation_prompt or []):
        call["generator"] = torch.Generator().manual_seed(args.seed)
        if not isinstance(pipe, DIMEditPipeline):
            picture = cast(DIMPipelineOutput, pipe(prompt, **call)).images[0]
            rows.append(SheetRow(prompt, [("", cast(Image.Image, picture))]))
            continue
        # A designer is no part of what is trained: without blueprints edits go by the prompts themselves.
        blueprint = args.validation_blueprint[index] if args.validation_blueprint else prompt
        source = pipe.image_processor.to_rgb(Image.open(args.validation_image[index]))[0]
        output = cast(DIMPipelineOutput, pipe(source, prompt, blueprint=blueprint, **call))
        seen = pipe.image_processor.resize_and_crop(source, args.resolution, args.resolution)
        pictures: list[tuple[str, Image.Image | str]] = [("source", seen)]
        if output.blueprints[0] != prompt:
            pictures.append(("blueprint", str(output.blueprints[0])))
        pictures.append(("edit", cast(Image.Image, output.images[0])))
        if args.validation_target:
            target = pipe.image_processor.to_rgb(Image.open(args.validation_target[index]))[0]
            pictures.append(("target", pipe.image_processor.resize_and_crop(target, args.resolution, args.resolution)))
        rows.append(SheetRow(prompt, pictures))
    return rows


def wants_validation(args: argparse.Namespace) -> bool:
    """Whether there is anything to paint or score while training."""
    return bool(args.validation_prompt or getattr(args, "validation_shapes", 0))


def log_validation(pipe: DIMPipeline, args: argparse.Namespace, accelerator: Accelerator, step: int) -> Path | None:
    r"""
    Paints and scores, on one process, and hands the result to all trackers.

    Args:
        pipe ([`DIMEditPipeline`] or [`DIMPipeline`]): With the weights to look at, on its device.
        args (`argparse.Namespace`): The options of [`add_validation_arguments`].
        accelerator (`Accelerator`): Its trackers receive the sheet and the scores.
        step (`int`): Optimizer steps done.

    Returns:
        `Path` of the sheet, `validation/{step}.png` in the output folder, or `None` where no prompt was given. Scores
        of the picture world are lines of `validation.jsonl`.
    """
    pipe.set_progress_bar_config(disable=True)
    output_dir = Path(args.output_dir)
    path = None
    rows = paint_validation(pipe, args)
    if getattr(args, "validation_shapes", 0):
        samples = sample_edits(args.validation_shapes, SHAPES_SEED, size=args.resolution)
        edited: list[Image.Image] = []
        report = evaluate_shapes(
            pipe,
            samples,
            keep=edited,
            blueprints=args.validation_shapes_prompt == "blueprint",
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
        )
        scores = {"success": report.overall, **{f"success/{kind}": part for kind, part in report.by_kind().items()}}
        accelerator.log({f"validation/{name}": value for name, value in scores.items()}, step=step)
        with open(output_dir / "validation.jsonl", "a") as lines:
            lines.write(json.dumps({"step": step, "edits": len(samples), **scores}) + "\n")
        for sample, edit in zip(samples[:4], edited):
            shown: list[tuple[str, Image.Image | str]] = [("source", sample.source)]
            if args.validation_shapes_prompt == "blueprint":
                shown.append(("blueprint", sample.blueprint))
            rows.append(SheetRow(sample.instruction, [*shown, ("edit", edit), ("target", sample.target)]))
    if rows:
        sheet = draw_sheet(rows, heading=f"Step {step}")
        path = output_dir / "validation" / f"{step}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
            if tracker.name == "wandb":
                import wandb

                tracker.log({"validation": wandb.Image(sheet)}, step=step)
    return path
