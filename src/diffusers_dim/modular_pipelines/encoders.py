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
"""The designer, and what turns texts and pictures into conditions and latents."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderDC, ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam
from diffusers.modular_pipelines import ConfigSpec
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from ..models import DIMConnector, DIMProcessor
from ..models.prefix_dim import DIMPrefix
from .modular_pipeline import DIMBlocksMixin, DIMEditModularPipeline, DIMModularPipeline, get_guider_spec


def describe_lists(*names: str) -> list[InputParam]:
    """What an input step has made ready, by name."""
    known = {
        "image": (list[Image.Image], "RGB pictures, one a prompt, from the input step."),
        "prompt": (list[str], "The prompts, from the input step."),
        "blueprint": (list[str | None], "A blueprint a prompt, or None where there is none."),
        "height": (int, "Height in pixels of the picture to be painted."),
        "width": (int, "Width in pixels of the picture to be painted."),
    }
    return [InputParam(name, required=True, type_hint=known[name][0], description=known[name][1]) for name in names]


class DIMDesignStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Has the pipeline's `designer` rewrite prompts for text-to-image. Without one it leaves them as they are."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return "Has `pipe.designer` write what is painted from, where it is not given. Without a designer, nothing."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", Qwen2_5_VLForConditionalGeneration),
            ComponentSpec("processor", DIMProcessor),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("designer", default=None, description='The designer\'s name: "self" or None.')]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *describe_lists("prompt", "blueprint"),
            InputParam(
                "callback_on_design",
                type_hint=Callable,
                description="Called as `callback(pipe, index, text)` while the text for that prompt grows.",
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("blueprint", type_hint=list[str | None], description="A blueprint a prompt, or None.")]

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        blueprint = list(block_state.blueprint)
        rows = [row for row, text in enumerate(blueprint) if text is None]
        if components.designer is not None and rows:
            prompts = [block_state.prompt[row] for row in rows]
            texts = components._ask_designer("rewrite", prompts, callback=block_state.callback_on_design)
            for row, text in zip(rows, texts):
                blueprint[row] = text
        block_state.blueprint = blueprint
        self.set_block_state(state, block_state)
        return components, state


class DIMEditDesignStep(DIMDesignStep):
    """Has the pipeline's `designer` write the blueprints of edits that have none. Without one it writes none."""

    model_name = "dim-edit"

    @property
    def inputs(self) -> list[InputParam]:
        return [*describe_lists("image", "height", "width"), *super().inputs]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        prefix = OutputParam(
            "prefix",
            type_hint=DIMPrefix,
            description="What the model has made of the pictures, for the text encoder; None where it saw none.",
        )
        return [*super().intermediate_outputs, prefix]

    @torch.no_grad()
    def __call__(self, components: DIMEditModularPipeline, state: Any) -> tuple[DIMEditModularPipeline, Any]:
        block_state = self.get_block_state(state)
        images, size = block_state.image, (block_state.height, block_state.width)
        block_state.prefix = None
        if not any(block_state.blueprint):
            block_state.prefix = components.encode_shared_prefix(images, *size, components._execution_device)
        block_state.blueprint = components.design(
            images,
            block_state.prompt,
            block_state.blueprint,
            block_state.callback_on_design,
            block_state.prefix,
            *size,
        )
        self.set_block_state(state, block_state)
        return components, state


class DIMTextEncoderStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Encodes texts into condition tokens; the connector's learned null condition is the branch to guide away from."""

    model_name = "dim"

    @property
    def description(self) -> str:
        return (
            "Encodes the blueprints, or the prompts where there are none, into condition tokens. What the guider"
            " guides away from are the first rows of the connector's learned null condition, or the negative prompt."
        )

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [
            ComponentSpec("text_encoder", Qwen2_5_VLForConditionalGeneration),
            ComponentSpec("processor", DIMProcessor),
            ComponentSpec("connector", DIMConnector),
            get_guider_spec(),
        ]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [ConfigSpec("default_guidance_scale", default=7.5, description="The checkpoint's own guidance scale.")]

    @property
    def inputs(self) -> list[InputParam]:
        return [
            *describe_lists("prompt", "blueprint"),
            InputParam(
                "negative_prompt",
                type_hint=str | list[str],
                description="What to guide away from; the learned null condition by default and for empty texts.",
            ),
            InputParam(
                "max_sequence_length",
                type_hint=int,
                default=8192,
                description="The last so many condition tokens are kept.",
            ),
            InputParam(
                "attention_kwargs", type_hint=dict[str, Any], description="`scale` scales the connector's LoRA layers."
            ),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [
            OutputParam.template("prompt_embeds", note="connector outputs, a row a prompt"),
            OutputParam.template("prompt_embeds_mask"),
            OutputParam.template("negative_prompt_embeds", note="the null condition's rows without a negative prompt"),
            OutputParam.template("negative_prompt_embeds_mask"),
        ]

    def get_view(self, block_state: Any) -> dict[str, Any]:
        """What `encode_prompt` is told of the source pictures."""
        return {}

    @torch.no_grad()
    def __call__(self, components: DIMModularPipeline, state: Any) -> tuple[DIMModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        negative_prompt = block_state.negative_prompt
        components.check_texts(block_state.prompt, negative_prompt)
        components.check_sequence_length(block_state.max_sequence_length)
        if isinstance(negative_prompt, list) and len(negative_prompt) != len(block_state.prompt):
            raise ValueError(f"Got {len(negative_prompt)} negative prompts for {len(block_state.prompt)} prompts.")
        pairs = zip(block_state.prompt, block_state.blueprint)
        (
            block_state.prompt_embeds,
            block_state.prompt_embeds_mask,
            block_state.negative_prompt_embeds,
            block_state.negative_prompt_embeds_mask,
        ) = components.encode_prompt(
            [prompt if blueprint is None else str(blueprint) for prompt, blueprint in pairs],
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=components.requires_unconditional_embeds,
            max_sequence_length=block_state.max_sequence_length,
            lora_scale=(block_state.attention_kwargs or {}).get("scale"),
            **self.get_view(block_state),
        )
        self.set_block_state(state, block_state)
        return components, state


class DIMEditTextEncoderStep(DIMTextEncoderStep):
    """The same for edits, whose sources the model sees before the texts."""

    model_name = "dim-edit"

    @property
    def inputs(self) -> list[InputParam]:
        prefix = InputParam(
            "prefix", type_hint=DIMPrefix, description="What the designer has made of the pictures, to read on from."
        )
        return [*describe_lists("image", "height", "width"), prefix, *super().inputs]

    def get_view(self, block_state: Any) -> dict[str, Any]:
        prefix, block_state.prefix = block_state.prefix, None  # a copy of the pictures' keys and values
        return {
            "image": block_state.image,
            "height": block_state.height,
            "width": block_state.width,
            "prefix": prefix,
        }


class DIMVaeEncoderStep(DIMBlocksMixin, ModularPipelineBlocks):
    """Encodes sources into latents."""

    model_name = "dim-edit"

    @property
    def description(self) -> str:
        return "Encodes the sources, brought to size, into latents."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("vae", AutoencoderDC)]

    @property
    def inputs(self) -> list[InputParam]:
        return describe_lists("image", "height", "width")

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam.template("image_latents", note="scaled, a row a source")]

    @torch.no_grad()
    def __call__(self, components: DIMEditModularPipeline, state: Any) -> tuple[DIMEditModularPipeline, Any]:
        block_state = self.get_block_state(state)
        self.check_components(components)
        block_state.image_latents = components.prepare_image_latents(
            block_state.image, block_state.height, block_state.width, components._execution_device
        )
        self.set_block_state(state, block_state)
        return components, state
