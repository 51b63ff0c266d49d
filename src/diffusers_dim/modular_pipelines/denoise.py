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
"""The denoising loop with a guider: what goes into the painter, what it predicts, and the scheduler's step."""

from typing import Any

import torch
from diffusers import (
    ComponentSpec,
    DPMSolverMultistepScheduler,
    FasterCacheConfig,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
)
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import ConfigSpec

from ..models import DIMTransformer2DModel
from ..pipelines.denoiser_dim import DIMDenoiser
from .modular_pipeline import DIMBlocksMixin, DIMModularPipeline, get_guider_spec


def takes_one_batch(guider: BaseGuidance) -> bool:
    """Whether a guider's predictions may be made in one batch: if it changes no model between them."""
    return type(guider).prepare_models is BaseGuidance.prepare_models and guider.num_conditions == 2


class DIMLoopBeforeDenoiser(DIMBlocksMixin, ModularPipelineBlocks):
    """Within the loop: noisy latents alone go in."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Within the denoising loop: prepares what goes into the transformer, the noisy latents."

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("latents", required=True, type_hint=torch.Tensor, description="Noisy latents.")]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        block_state.latent_model_input = block_state.latents
        return components, block_state


class DIMEditLoopBeforeDenoiser(DIMLoopBeforeDenoiser):
    """Within the loop: the source's latents go in beside the noisy ones."""

    model_name = "dim-edit"

    @property
    def description(self) -> str:
        return f"{super().description[:-1]} with the sources' behind them along the channels."

    @property
    def inputs(self) -> list[InputParam]:
        return [*super().inputs, InputParam.template("image_latents")]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        block_state.latent_model_input = torch.cat([block_state.latents, block_state.image_latents], dim=1)
        return components, block_state


class DIMLoopDenoiser(DIMBlocksMixin, ModularPipelineBlocks):
    """
    Within the loop: the transformer predicts the flow under the guider's conditions, and the guider makes one of them.

    The two conditions of a guider that changes no model go through the transformer in one batch, as in the pipeline;
    those of others one by one.
    """

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Within the denoising loop: predicts the flow under guidance."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [get_guider_spec(), ComponentSpec("transformer", DIMTransformer2DModel)]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_guidance_scale", default=7.5, description="The checkpoint's own guidance scale.")]

    @property
    def inputs(self) -> list[InputParam]:
        names = ("prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask")
        return [
            *(InputParam.template(name, kwargs_type="denoiser_input_fields") for name in names),
            InputParam("attention_kwargs", type_hint=dict[str, Any], description="Passed to the transformer."),
        ]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        guider, transformer = components.guider, components.transformer
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        batches = guider.prepare_inputs(
            {
                "encoder_hidden_states": (block_state.prompt_embeds, block_state.negative_prompt_embeds),
                "encoder_attention_mask": (block_state.prompt_embeds_mask, block_state.negative_prompt_embeds_mask),
            }
        )
        conditions = [(batch.encoder_hidden_states, batch.encoder_attention_mask) for batch in batches]
        if any(embeds is None for embeds, _ in conditions):
            raise ValueError(
                f"{type(guider).__name__} guides away from something, but there are no `negative_prompt_embeds`: run"
                " the text encoder with the guider that is to be used."
            )

        given = block_state.latent_model_input
        block_state.denoiser.start_step(len(batches))
        if takes_one_batch(guider):
            # That to guide away from comes first.
            flows = block_state.denoiser(i, given, conditions[::-1], block_state.attention_kwargs).chunk(2)[::-1]
            for batch, flow in zip(batches, flows):
                guider.prepare_models(transformer)
                batch.noise_pred = flow
                guider.cleanup_models(transformer)
        else:
            for batch, condition in zip(batches, conditions):
                name = getattr(batch, guider._identifier_key) if len(batches) > 1 else None
                guider.prepare_models(transformer)
                batch.noise_pred = block_state.denoiser(i, given, [condition], block_state.attention_kwargs, name)
                guider.cleanup_models(transformer)
        block_state.noise_pred = guider(batches)[0]
        return components, block_state


class DIMLoopAfterDenoiser(DIMBlocksMixin, ModularPipelineBlocks):
    """Within the loop: the scheduler's step."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Within the denoising loop: takes the scheduler's step."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler", DPMSolverMultistepScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam.template("generator")]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam.template("latents")]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        kwargs = components.prepare_step_kwargs(block_state.generator)
        step = components.scheduler.step(block_state.noise_pred, t, block_state.latents, **kwargs, return_dict=False)
        block_state.latents = step[0]
        return components, block_state


class DIMDenoiseStep(DIMBlocksMixin, LoopSequentialPipelineBlocks):
    """Walks from noise to latents of a picture along the timesteps."""

    model_name = "dim"
    block_classes = [DIMLoopBeforeDenoiser, DIMLoopDenoiser, DIMLoopAfterDenoiser]
    block_names = ["before_denoiser", "denoiser", "after_denoiser"]

    @property
    def description(self) -> str:
        return (
            "Walks from noise to latents of pictures along the timesteps, at each of them by its sub-blocks: what goes"
            " into the transformer, its prediction under the guider, and the scheduler's step."
        )

    @property
    def loop_expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("scheduler", DPMSolverMultistepScheduler),
            ComponentSpec("transformer", DIMTransformer2DModel),
            get_guider_spec(),
        ]

    @property
    def loop_inputs(self) -> list[InputParam]:
        return [
            InputParam.template("timesteps", required=True),
            InputParam.template("num_inference_steps", required=True, default=None),
        ]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        guider, transformer = components.guider, components.transformer
        components.check_embeds(block_state.prompt_embeds, block_state.prompt_embeds_mask, "prompt")
        guider.set_state(step=None, num_inference_steps=None, timestep=None)
        if isinstance(getattr(transformer, "_cache_config", None), FasterCacheConfig) and not takes_one_batch(guider):
            raise ValueError(
                "FasterCacheConfig is on, which compares the branches of guidance in one batch, but"
                f" {type(guider).__name__} does not make it of two."
            )
        components.check_step_cache(
            block_state.num_inference_steps,
            getattr(guider, "guidance_scale", 1.0),
            (guider._start, guider._stop),
        )
        # Blocks of the user's own may change conditions, weights or a LoRA's scale.
        block_state.denoiser = DIMDenoiser(transformer, block_state.timesteps, watch=True)
        with self.progress_bar(total=len(block_state.timesteps)) as progress_bar:
            for i, t in enumerate(block_state.timesteps):
                components._current_timestep = t
                components, block_state = self.loop_step(components, block_state, i=i, t=t)
                progress_bar.update()
        components._current_timestep = None
        self.set_block_state(state, block_state)
        return components, state


class DIMEditDenoiseStep(DIMDenoiseStep):
    """The same for edits, with the sources' latents beside the noisy ones."""

    model_name = "dim-edit"
    block_classes = [DIMEditLoopBeforeDenoiser, DIMLoopDenoiser, DIMLoopAfterDenoiser]
