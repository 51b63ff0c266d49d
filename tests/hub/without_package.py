"""Run where this package is not installed: loads what it saved and pushed by diffusers alone, and paints."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image


folder = Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
saved = Path(settings["saved"])
source = Image.open(folder / "source.png")
found = {"installed": importlib.util.find_spec("diffusers_dim") is not None}


def load(name, **options):
    pipe = DiffusionPipeline.from_pretrained(name, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, name):
    generator = torch.Generator().manual_seed(1)
    inputs = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
    np.save(folder / f"{name}.npy", pipe(source, settings["instruction"], **inputs).images)


def refusal(name):
    try:
        DiffusionPipeline.from_pretrained(name)
    except ValueError as error:
        return str(error)
    return None


def modules():
    return sorted(name for name in sys.modules if name.startswith("diffusers_modules."))


# Nothing is trusted yet
found["refused_folder"] = refusal(saved / "edit")
found["refused_repository"] = refusal(settings["repo_id"])
found["modules_before"] = modules()

# The ways to name the code
ways = {
    "by_index": {},
    "by_folder": {"custom_pipeline": str(saved / "edit")},
    "by_name": {"custom_pipeline": "pipeline"},
    "by_file": {"custom_pipeline": str(saved / "edit" / "pipeline.py")},
}
found["classes"] = {}
for way, options in ways.items():
    pipe = load(saved / "edit", trust_remote_code=True, **options)
    found["classes"][way] = type(pipe).__name__
found["modules"] = sorted({type(part).__module__ for part in (pipe, *pipe.components.values())})
edit(pipe, "edit")

# Kernels, by Triton's interpreter
code = sys.modules[type(pipe.transformer).__module__]
found["has_triton"] = code.HAS_TRITON
if code.HAS_TRITON:
    inputs = torch.randn(1, 64, 192, generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(2, 1, 1, 192, generator=torch.Generator().manual_seed(1))
    plain = code.layer_norm_modulate(inputs, *vectors)
    with code.set_kernels(True, interpret=True):
        found["uses_kernels"] = code.uses_kernels(inputs)
        found["kernel_difference"] = (code.layer_norm_modulate(inputs, *vectors) - plain).abs().max().item()

# Designers that ask no server
code = sys.modules[type(pipe).__module__]
pipe.designer = code.FunctionDesigner(lambda image, instruction: settings["blueprint"])
design = pipe(source, "Turn it blue.", num_inference_steps=1).blueprints[0]
found["design"] = [type(design).__name__, str(design)]
pipe.designer = None
found["designers"] = [name for name in ("VLMDesigner", "SelfDesigner", "Blueprint") if hasattr(code, name)]

# Saved from here, and loaded again
pipe.save_pretrained(folder / "again")
edit(load(folder / "again", trust_remote_code=True), "again")

# Text to image
pipe = load(saved / "t2i", trust_remote_code=True)
found["classes"]["t2i"] = type(pipe).__name__
inputs = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
np.save(folder / "t2i.npy", pipe(settings["prompt"], generator=torch.Generator().manual_seed(0), **inputs).images)

# From the Hub
edit(load(settings["repo_id"], trust_remote_code=True), "repository")
edit(load(settings["repo_id"], custom_pipeline=settings["repo_id"], trust_remote_code=True), "repository_named")

(folder / "found.json").write_text(json.dumps(found))
