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
The nodes. They only translate: pictures are painted by the package's own pipelines.

torch and the models are imported when a node runs, so that ComfyUI starts as fast as without them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    import torch

    from diffusers_dim import DIMEditPipeline, DIMPipeline

# ComfyUI's own part, which tests and scripts run without.
try:
    import comfy.model_management as model_management
    import comfy.utils as comfy_utils
except ImportError:
    model_management = comfy_utils = None

EMBEDDED = "tiny-shapes"
CATEGORY = "Draw-In-Mind"
MAX_SEED = 2**64 - 1

MODEL = (
    "STRING",
    {
        "default": EMBEDDED,
        "tooltip": f'A folder or Hub repository of a converted model, or "{EMBEDDED}", the one that comes along.',
    },
)
INSTRUCTION = ("STRING", {"multiline": True, "default": "", "tooltip": "What to do, in words."})
SETTINGS = {
    "steps": ("INT", {"default": 30, "min": 1, "max": 1000, "tooltip": "Denoising steps."}),
    "guidance": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "Guidance scale: 0 is the model's own, 1 turns guidance off.",
        },
    ),
    "seed": ("INT", {"default": 0, "min": 0, "max": MAX_SEED, "control_after_generate": True}),
    "width": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 32, "tooltip": "Pixels; 0 with height 0: auto."}),
    "height": ("INT", {"default": 0, "min": 0, "max": 16384, "step": 32, "tooltip": "Pixels; 0 with width 0: auto."}),
    "candidates": (
        "INT",
        {"default": 1, "min": 1, "max": 64, "tooltip": "Pictures of each; seeds count up."},
    ),
}


class DesignerSettings(NamedTuple):
    """
    Who writes blueprints: a wire between nodes, which becomes a designer where a pipeline is at hand.

    Args:
        kind (`str`): "self", "openai" or "none".
        model (`str`): The served model's name, for "openai".
        base_url (`str`): The server's address, for "openai"; OpenAI's own if empty.
        max_new_tokens (`int`): The longest answer.
        on_failure (`str`): "error", or "instruction" to paint from the plain instruction.
    """

    kind: str
    model: str
    base_url: str
    max_new_tokens: int
    on_failure: str

    def make(self, pipe: "DIMPipeline") -> Any:
        """The designer itself, or `None`."""
        from diffusers_dim.designers import OpenAIDesigner, SelfDesigner

        options = {"max_new_tokens": self.max_new_tokens, "on_failure": self.on_failure}
        if self.kind == "none":
            return None
        if self.kind == "self":
            return SelfDesigner(pipe, **options)
        return OpenAIDesigner(self.model, base_url=self.base_url.strip() or None, **options)


@contextmanager
def borrowed(pipe: "DIMPipeline", designer: DesignerSettings | None) -> Iterator[None]:
    """Has a pipeline, which other nodes hold as well, use a designer for one call; its own without one."""
    own = pipe.designer
    try:
        if designer is not None:
            pipe.designer = designer.make(pipe)
        yield
    finally:
        pipe.designer = own
        pipe.maybe_free_model_hooks()  # a call that was interrupted has not come to it


def stop_if_interrupted() -> None:
    """Raises ComfyUI's own exception once somebody has pressed its button."""
    if model_management is not None:
        model_management.throw_exception_if_processing_interrupted()


class Reporter:
    """Moves ComfyUI's progress bar at each step, and stops there and while a designer writes, when asked to."""

    def __init__(self, steps: int):
        self.bar = None if comfy_utils is None else comfy_utils.ProgressBar(steps)

    def on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        stop_if_interrupted()
        if self.bar is not None:
            self.bar.update_absolute(step + 1)
        return tensors

    def on_design(self, pipe: Any, index: int, text: str) -> None:
        stop_if_interrupted()


def to_pictures(image: "torch.Tensor") -> "torch.Tensor":
    """
    ComfyUI's pictures `(batch, height, width, channels)` as the pipelines take them, `(batch, channels, height,
    width)`. Values beyond [0, 1], which other nodes may leave, are cut off as they are when a picture is saved.
    """
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"`image` has to be pictures of shape (batch, height, width, channels), but is of {tuple(image.shape)}."
        )
    return image.movedim(-1, 1).float().clamp(0, 1)


def paint(pipe: "DIMPipeline", count: int, settings: dict[str, Any], **inputs: Any) -> tuple["torch.Tensor", list]:
    """Calls a pipeline for `count` prompts with the nodes' `SETTINGS`: ComfyUI's pictures, and the blueprints."""
    import torch

    reporter = Reporter(settings["steps"])
    total = count * settings["candidates"]
    # On the CPU, so that a seed gives the same noise on every device.
    seeds = [(settings["seed"] + i) % (MAX_SEED + 1) for i in range(total)]
    output = pipe(
        **inputs,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"] or None,
        width=settings["width"] or None,
        height=settings["height"] or None,
        num_images_per_prompt=settings["candidates"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pt",
        callback_on_step_end=reporter.on_step_end,
        callback_on_design=reporter.on_design,
    )
    return output.images.movedim(1, -1).float().cpu(), output.blueprints or []


def join_texts(texts: list[str | None]) -> str:
    """One text as it is, several under numbers; nothing for what was painted from the words as they were given."""
    if len(texts) == 1:
        return str(texts[0] or "")
    return "\n\n".join(f"Picture {i}:\n{text}" for i, text in enumerate(texts, start=1) if text)


class _Load:
    """What the two loaders share."""

    kind: str
    CATEGORY = CATEGORY
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": MODEL,
                "dtype": (["auto", "float32", "bfloat16", "float16"],),
                "device": ("STRING", {"default": "auto", "tooltip": "auto is ComfyUI's own; or cpu, cuda:1, ..."}),
                "offload": (
                    ["none", "model", "sequential", "group"],
                    {"tooltip": "Keep components, layers or groups of layers in CPU memory till they are needed."},
                ),
                "vae_tiling": ("BOOLEAN", {"default": False, "tooltip": "Decode large pictures in tiles."}),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: str, **kwargs: Any) -> str:
        """Another value when a folder's model was written anew, so that it is loaded again."""
        index = Path(model).expanduser() / "model_index.json"
        return str(index.stat().st_mtime_ns) if index.is_file() else ""

    def load(self, model: str, dtype: str, device: str, offload: str, vae_tiling: bool) -> tuple["DIMPipeline"]:
        from diffusers_dim import TINY_SHAPES
        from diffusers_dim.cli_common import load_pipeline
        from diffusers_dim.devices import resolve_device, resolve_dtype

        try:
            if device == "auto" and model_management is not None:
                torch_device = model_management.get_torch_device()
            else:
                torch_device = resolve_device(device)
            folder = TINY_SHAPES if model.strip() == EMBEDDED else model.strip()
            torch_dtype = resolve_dtype(dtype, torch_device)
            return (load_pipeline(self.kind, folder, torch_device, torch_dtype, offload, vae_tiling),)
        except ValueError as error:
            raise ValueError(str(error).replace("--", "")) from error  # an input here, an option there


class DIMLoadEdit(_Load):
    """Loads an edit model."""

    kind = "edit"
    RETURN_TYPES = ("DIM_EDIT_MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Loads a Draw-In-Mind edit model that `diffusers-dim convert` made."


class DIMLoadText2Image(_Load):
    """Loads a text-to-image model."""

    kind = "t2i"
    RETURN_TYPES = ("DIM_T2I_MODEL",)
    RETURN_NAMES = ("model",)
    DESCRIPTION = "Loads a Draw-In-Mind text-to-image model that `diffusers-dim convert` made."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        types = super().INPUT_TYPES()
        types["required"]["model"] = ("STRING", {"default": "", "tooltip": "A folder or Hub repository."})
        return types


class DIMDesigner:
    """Chooses who writes blueprints."""

    CATEGORY = CATEGORY
    FUNCTION = "choose"
    RETURN_TYPES = ("DIM_DESIGNER",)
    RETURN_NAMES = ("designer",)
    DESCRIPTION = (
        "Who writes the blueprint of an edit: the model itself, a server that speaks OpenAI's protocol (its key comes"
        " from the environment variable OPENAI_API_KEY), or nobody."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "kind": (["self", "openai", "none"],),
                "max_new_tokens": ("INT", {"default": 1024, "min": 1, "max": 32768, "tooltip": "The longest answer."}),
                "on_failure": (
                    ["error", "instruction"],
                    {"tooltip": "What to do without a usable blueprint: stop, or paint from the instruction."},
                ),
            },
            "optional": {
                "model": ("STRING", {"default": "gpt-4o", "tooltip": "For openai: the served model."}),
                "base_url": ("STRING", {"default": "", "tooltip": "For openai: the server; OpenAI's own if empty."}),
            },
        }

    def choose(
        self, kind: str, max_new_tokens: int, on_failure: str, model: str = "gpt-4o", base_url: str = ""
    ) -> tuple[DesignerSettings]:
        if kind == "openai" and not model.strip():
            raise ValueError("`model` is empty: name the model that the server is to use.")
        return (DesignerSettings(kind, model.strip(), base_url, max_new_tokens, on_failure),)


class DIMDesign:
    """Writes the blueprint of one edit."""

    CATEGORY = CATEGORY
    FUNCTION = "design"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("blueprint",)
    DESCRIPTION = "Writes the blueprint of an edit, to be read, changed, and painted from."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("DIM_EDIT_MODEL",), "image": ("IMAGE",), "instruction": INSTRUCTION},
            "optional": {"designer": ("DIM_DESIGNER",)},
        }

    def design(
        self,
        model: "DIMEditPipeline",
        image: "torch.Tensor",
        instruction: str,
        designer: DesignerSettings | None = None,
    ) -> tuple[str]:
        pictures = to_pictures(image)
        if len(pictures) != 1:
            raise ValueError(f"`image` is a batch of {len(pictures)} pictures: a blueprint is of one.")
        if not instruction.strip():
            raise ValueError("`instruction` is empty: say what to do.")
        with borrowed(model, designer):
            if model.designer is None:
                raise ValueError('Nobody designs: connect a DIM Designer of the kind "self" or "openai".')
            images = model.image_processor.to_rgb(pictures)
            model._interrupt = False
            designed = model.design(images, [instruction], callback=Reporter(1).on_design)
        return (str(designed[0]),)


class DIMEdit:
    """Edits pictures."""

    CATEGORY = CATEGORY
    FUNCTION = "edit"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "blueprint")
    DESCRIPTION = (
        "Edits each picture of a batch as the instruction says. A connected blueprint is painted from as it is; else"
        " the connected designer writes one, or the model's own."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("DIM_EDIT_MODEL",),
                "image": ("IMAGE",),
                "instruction": INSTRUCTION,
                **SETTINGS,
            },
            "optional": {
                "designer": ("DIM_DESIGNER",),
                "blueprint": ("STRING", {"forceInput": True, "tooltip": "What to paint from, if not empty."}),
                "negative_prompt": ("STRING", {"default": "", "tooltip": "What to keep away from."}),
            },
        }

    def edit(
        self,
        model: "DIMEditPipeline",
        image: "torch.Tensor",
        instruction: str,
        designer: DesignerSettings | None = None,
        blueprint: str = "",
        negative_prompt: str = "",
        **settings: Any,
    ) -> tuple["torch.Tensor", str]:
        if not instruction.strip() and not blueprint.strip():
            raise ValueError("`instruction` is empty: say what to do, or connect a `blueprint`.")
        pictures = to_pictures(image)
        with borrowed(model, designer):
            images, blueprints = paint(
                model,
                len(pictures),
                settings,
                image=pictures,
                prompt=instruction if instruction.strip() else None,
                blueprint=blueprint if blueprint.strip() else None,
                negative_prompt=negative_prompt if negative_prompt.strip() else None,
            )
        return (images, join_texts(blueprints))


class DIMGenerate:
    """Paints pictures from text."""

    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "prompt")
    DESCRIPTION = "Paints pictures from text. A connected designer rewrites the prompt first."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("DIM_T2I_MODEL",),
                "prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "What to paint, in words."}),
                **SETTINGS,
            },
            "optional": {
                "designer": ("DIM_DESIGNER",),
                "negative_prompt": ("STRING", {"default": "", "tooltip": "What to keep away from."}),
            },
        }

    def generate(
        self,
        model: "DIMPipeline",
        prompt: str,
        designer: DesignerSettings | None = None,
        negative_prompt: str = "",
        **settings: Any,
    ) -> tuple["torch.Tensor", str]:
        if not prompt.strip():
            raise ValueError("`prompt` is empty: say what to paint.")
        with borrowed(model, designer):
            images, rewritten = paint(
                model, 1, settings, prompt=prompt, negative_prompt=negative_prompt if negative_prompt.strip() else None
            )
        return (images, join_texts(rewritten or [prompt]))


NODE_CLASS_MAPPINGS = {
    "DIMLoadEdit": DIMLoadEdit,
    "DIMLoadText2Image": DIMLoadText2Image,
    "DIMDesigner": DIMDesigner,
    "DIMDesign": DIMDesign,
    "DIMEdit": DIMEdit,
    "DIMGenerate": DIMGenerate,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DIMLoadEdit": "Load DIM (edit)",
    "DIMLoadText2Image": "Load DIM (text to image)",
    "DIMDesigner": "DIM Designer",
    "DIMDesign": "DIM Design",
    "DIMEdit": "DIM Edit",
    "DIMGenerate": "DIM Generate",
}
