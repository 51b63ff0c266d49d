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
"""The blocks of edits, put together."""

from diffusers import SequentialPipelineBlocks

from .before_denoise import DIMEditPrepareLatentsStep, DIMSetTimestepsStep
from .decoders import DIMDecoderStep
from .denoise import DIMEditDenoiseStep
from .encoders import DIMEditDesignStep, DIMEditTextEncoderStep, DIMVaeEncoderStep
from .inputs import DIMEditInputStep, DIMImageInputStep
from .modular_pipeline import DIMBlocksMixin


class DIMEditDesignerBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """From sources and instructions to blueprints."""

    model_name = "dim-edit"
    block_classes = [DIMEditInputStep, DIMEditDesignStep]
    block_names = ["input", "design"]

    @property
    def description(self) -> str:
        return "Has the designer write what is painted from, where it is not given."


class DIMEditTextEncoderBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """From sources and texts to conditions."""

    model_name = "dim-edit"
    block_classes = [DIMEditInputStep, DIMEditTextEncoderStep]
    block_names = ["input", "encode"]

    @property
    def description(self) -> str:
        return "Encodes what is painted from into condition tokens."


class DIMVaeEncoderBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """From sources to latents."""

    model_name = "dim-edit"
    block_classes = [DIMImageInputStep, DIMVaeEncoderStep]
    block_names = ["input", "encode"]

    @property
    def description(self) -> str:
        return "Encodes the sources into latents."


class DIMEditBeforeDenoiseBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    """Timesteps and noise."""

    model_name = "dim-edit"
    block_classes = [DIMSetTimestepsStep, DIMEditPrepareLatentsStep]
    block_names = ["set_timesteps", "prepare_latents"]

    @property
    def description(self) -> str:
        return "Makes ready what the denoising loop starts from."


class DIMEditBlocks(DIMBlocksMixin, SequentialPipelineBlocks):
    r"""
    Draw-In-Mind's edits in blocks, each of which can be swapped, left out, or run on its own. The pictures are
    those of [`DIMEditPipeline`], whose functions the blocks call.

    A designer block is whatever outputs `blueprint`, a text a prompt; without one, prompts are painted from as they
    are.
    """

    model_name = "dim-edit"
    block_classes = [
        DIMEditDesignerBlocks,
        DIMEditTextEncoderBlocks,
        DIMVaeEncoderBlocks,
        DIMEditBeforeDenoiseBlocks,
        DIMEditDenoiseStep,
        DIMDecoderStep,
    ]
    block_names = ["designer", "text_encoder", "vae_encoder", "before_denoise", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Edits pictures as instructions say with Draw-In-Mind."
