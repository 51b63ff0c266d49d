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
"""What the denoising loop starts from."""

from typing import Any

import torch
from diffusers import ComponentSpec, DPMSolverMultistepScheduler, InputParam, ModularPipelineBlocks, OutputParam

from ..models import DIMTransformer2DModel
from .modular_pipeline import DIMBlocksMixin, DIMModularPipeline


class DIMSetTimestepsStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Sets the scheduler to the start of a call."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Sets the scheduler to the start of a call."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler", DPMSolverMultistepScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("num_inference_steps", default=30),
            InputParam.template("sigmas"),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam("timesteps", type_hint=torch.Tensor, description="The scheduler's timesteps."),
            OutputParam("num_inference_steps", type_hint=int, description="Their number."),
        ]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        steps, sigmas = block_state.num_inference_steps, block_state.sigmas
        components.check_steps(steps, sigmas=sigmas)
        block_state.timesteps = components.prepare_timesteps(steps, components._execution_device, sigmas=sigmas)
        block_state.num_inference_steps = len(block_state.timesteps)
        self.set_block_state(state, block_state)
        return components, state


class DIMPrepareLatentsStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Draws the noise of pictures that are painted from text alone."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Draws the noise that the loop starts from, for `num_images_per_prompt` pictures a prompt."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("transformer", DIMTransformer2DModel)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam.template("prompt_embeds"),
            InputParam("height", type_hint=int, description="Height in pixels, with `width`; by default the model's."),
            InputParam("width", type_hint=int, description="Width in pixels."),
            InputParam.template("num_images_per_prompt"),
            InputParam.template("generator"),
            InputParam(
                "latents", type_hint=torch.Tensor, description="Noise to start from, where none is to be drawn."
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="Noise, float32, a row a picture.")]

    def get_size(self, components: DIMModularPipeline, block_state: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        if block_state.height is None and block_state.width is None:
            block_state.height = block_state.width = components.image_processor.base_size
        components.check_size(block_state.height, block_state.width)
        return block_state.height, block_state.width

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        components.check_checkpoint()
        prompts, repeats = len(block_state.prompt_embeds), block_state.num_images_per_prompt
        if repeats < 1:
            raise ValueError(f"`num_images_per_prompt` has to be at least 1, but is {repeats}.")
        components.check_generator(block_state.generator, prompts, repeats)
        height, width = self.get_size(components, block_state)
        components.check_latents(block_state.latents, prompts * repeats, height, width)
        block_state.latents = components.prepare_latents(
            prompts * repeats,
            height,
            width,
            components._execution_device,
            block_state.generator,
            block_state.latents,
        )
        self.set_block_state(state, block_state)
        return components, state


class DIMEditPrepareLatentsStep(DIMPrepareLatentsStep):
    """Draws the noise of edits, of the size of the sources' latents, and repeats those for each picture."""

    model_name = "dim-edit"

    @property
    def description(self) -> str:
        return f"{super().description} Repeats the sources' latents for each of them."

    @property
    def inputs(self) -> list[InputParam]:
        sized = [param for param in super().inputs if param.name not in ("height", "width")]
        return [*sized, InputParam.template("image_latents", note="a row a prompt, or one for all")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        repeated = OutputParam("image_latents", type_hint=torch.Tensor, description="A row a picture.")
        return [*super().intermediate_outputs, repeated]

    def get_size(self, components: DIMModularPipeline, block_state: Any) -> tuple[int, int]:
        image_latents, prompts = block_state.image_latents, len(block_state.prompt_embeds)
        if len(image_latents) not in (1, prompts):
            raise ValueError(f"Got `image_latents` of {len(image_latents)} sources for {prompts} prompts.")
        if len(image_latents) == 1:
            image_latents = image_latents.expand(prompts, -1, -1, -1)
        block_state.image_latents = image_latents.repeat_interleave(block_state.num_images_per_prompt, dim=0)
        height, width = (side * components.vae_scale_factor for side in image_latents.shape[-2:])
        return height, width
