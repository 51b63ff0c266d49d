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
"""The blocks of text-to-image, put together."""

from diffusers import SequentialPipelineBlocks

from .before_denoise import DIMPrepareLatentsStep, DIMSetTimestepsStep
from .decoders import DIMDecoderStep
from .denoise import DIMDenoiseStep
from .encoders import DIMDesignStep, DIMTextEncoderStep
from .inputs import DIMInputStep
from .modular_pipeline import DIMBlocksMixin


class DIMDesignerBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """From prompts to what is painted from."""

    model_name = "dim"
    block_classes = [DIMInputStep, DIMDesignStep]
    block_names = ["input", "design"]

    @property
    def description(self) -> str:
        return "Has the designer write what is painted from, where it is not given."


class DIMTextEncoderBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """From texts to conditions."""

    model_name = "dim"
    block_classes = [DIMInputStep, DIMTextEncoderStep]
    block_names = ["input", "encode"]

    @property
    def description(self) -> str:
        return "Encodes what is painted from into condition tokens."


class DIMBeforeDenoiseBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """Timesteps and noise."""

    model_name = "dim"
    block_classes = [DIMSetTimestepsStep, DIMPrepareLatentsStep]
    block_names = ["set_timesteps", "prepare_latents"]

    @property
    def description(self) -> str:
        return "Makes ready what the denoising loop starts from."


class DIMBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    r"""
    Draw-In-Mind's text-to-image in blocks, each of which can be swapped, left out, or run on its own. The pictures are
    those of [`DIMPipeline`], whose functions the blocks call.

    A designer block is whatever outputs `blueprint`, a text a prompt; without one, prompts are painted from as they
    are.
    """

    model_name = "dim"
    block_classes = [
        DIMDesignerBlocks,
        DIMTextEncoderBlocks,
        DIMBeforeDenoiseBlocks,
        DIMDenoiseStep,
        DIMDecoderStep,
    ]
    block_names = ["designer", "text_encoder", "before_denoise", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Paints pictures from text with Draw-In-Mind."
