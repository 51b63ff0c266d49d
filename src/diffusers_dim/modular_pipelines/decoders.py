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
"""From latents to pictures."""

from typing import Any

import torch
from diffusers import AutoencoderDC, ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam

from .modular_pipeline import DIMBlocksMixin, DIMModularPipeline


class DIMDecoderStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Decodes latents."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Decodes latents into pictures."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderDC)]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="Denoised latents."),
            InputParam("output_type", type_hint=str, default="pil", description='"pil", "np", "pt" or "latent".'),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam.template("images")]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        components.check_output_type(block_state.output_type)
        block_state.images = components.decode_latents(block_state.latents, block_state.output_type)
        self.set_block_state(state, block_state)
        return components, state
