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
"""From what a person gives to what the other blocks take."""

from typing import Any

import torch
from diffusers import InputParam, ModularPipelineBlocks, OutputParam
from PIL import Image

from ..pipelines.pipeline_dim_edit import repeat_blueprint
from .modular_pipeline import DIMBlocksMixin, DIMEditModularPipeline, DIMModularPipeline


def describe_text_inputs() -> list[InputParam]:
    """Prompt and blueprint, as blocks that read a person's words take them."""
    return [
        InputParam("prompt", type_hint=str | list[str], description="What to do or to paint, in words."),
        InputParam(
            "blueprint",
            type_hint=str | list[str | None],
            description="What is painted from in the prompt's place, one for all or one a prompt, None where a"
            " designer is to write it.",
        ),
    ]


def describe_text_outputs() -> list[OutputParam]:
    """The same as lists, one a prompt."""
    return [
        OutputParam("prompt", type_hint=list[str], description="The prompts."),
        OutputParam("blueprint", type_hint=list[str | None], description="A blueprint a prompt, or None."),
    ]


def choose_size(components: DIMEditModularPipeline, block_state: Any) -> None:
    """Sets height and width, in pixels, by the pictures where none were given."""
    if block_state.height is None:
        size = components.get_height_width(block_state.image, block_state.use_resolution_binning)
        block_state.height, block_state.width = size


class DIMEditInputStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Reads the sources of edits and their texts, pairs them, and chooses the size."""

    model_name = "dim-edit"

    @property
    def description(self) -> str:
        return "Reads the sources as RGB pictures, one a prompt, and chooses the size that they are edited at."

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam(
                "image",
                required=True,
                type_hint=Any,
                description="What to edit, one picture for all prompts or one a prompt: PIL images of any mode, arrays"
                " or tensors.",
            ),
            *describe_text_inputs(),
            InputParam(
                "height",
                type_hint=int,
                description="Height in pixels, with `width`; by default the nearest of SANA's bins to the source.",
            ),
            InputParam("width", type_hint=int, description="Width in pixels."),
            InputParam(
                "use_resolution_binning",
                type_hint=bool,
                default=True,
                description="Without a size: whether to take the nearest bin or the source's own ratio.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("image", type_hint=list[Image.Image], description="RGB pictures, one a prompt."),
            *describe_text_outputs(),
            OutputParam("height", type_hint=int, description="Height in pixels."),
            OutputParam("width", type_hint=int, description="Width in pixels."),
        ]

    @torch.no_grad()
    def __call__(self, components: DIMEditModularPipeline, state: Any) -> tuple[DIMEditModularPipeline, Any]:
        block_state = self.get_block_state(state)
        images, prompt = components.read_inputs(block_state.image, block_state.prompt, block_state.blueprint)
        if prompt is None:
            raise ValueError("Give `prompt`, or a `blueprint` for each image.")
        components.check_texts(prompt)
        components.check_size(block_state.height, block_state.width)
        block_state.image = components.repeat_images(images, len(prompt))
        block_state.prompt = prompt
        block_state.blueprint = repeat_blueprint(block_state.blueprint, len(prompt))
        choose_size(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class DIMImageInputStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Reads the sources of edits alone, and chooses the size."""

    model_name = "dim-edit"

    @property
    def description(self) -> str:
        return "Reads the sources as RGB pictures and chooses the size that they are edited at."

    @property
    def inputs(self) -> list[InputParam]:
        return [param for param in DIMEditInputStep().inputs if param.name not in ("prompt", "blueprint")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            param for param in DIMEditInputStep().intermediate_outputs if param.name not in ("prompt", "blueprint")
        ]

    @torch.no_grad()
    def __call__(self, components: DIMEditModularPipeline, state: Any) -> tuple[DIMEditModularPipeline, Any]:
        block_state = self.get_block_state(state)
        components.check_size(block_state.height, block_state.width)
        block_state.image = components.image_processor.to_rgb(block_state.image)
        choose_size(components, block_state)
        self.set_block_state(state, block_state)
        return components, state


class DIMInputStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Reads the texts of pictures to be painted from text alone."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Makes lists of prompts, and of the texts that stand for them."

    @property
    def inputs(self) -> list[InputParam]:
        return describe_text_inputs()

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return describe_text_outputs()

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        prompt = block_state.prompt
        if prompt is None:
            raise ValueError("`prompt` says what to paint and cannot be None.")
        components.check_texts(prompt)
        block_state.prompt = [prompt] if isinstance(prompt, str) else prompt
        block_state.blueprint = repeat_blueprint(block_state.blueprint, len(block_state.prompt))
        self.set_block_state(state, block_state)
        return components, state
