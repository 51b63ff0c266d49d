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
"""What the blocks work on: the components, and the pipelines' own steps, which are not written a second time."""

import importlib
import os
from copy import deepcopy
from typing import Any

from diffusers import ClassifierFreeGuidance, ComponentsManager, ComponentSpec, ModularPipeline
from diffusers.configuration_utils import FrozenDict

from ..hub.code import use_package_classes
from ..image_processor import DIMImageProcessor
from ..loaders.lora import DIMLoraLoaderMixin
from ..models import DIMTransformer2DModel
from ..pipelines import DIMEditPipeline, DIMPipeline


class DIMModularPipeline(ModularPipeline, DIMLoraLoaderMixin):
    r"""
    Draw-In-Mind in blocks, text-to-image: [`DIMBlocks`] and whatever is made of them.

    Its folders are those of [`DIMPipeline`] (`model_index.json`) and those that it saves itself
    (`modular_model_index.json`). The guider takes the checkpoint's own guidance scale, and the designer is the one
    that the folder names.

    Args:
        blocks (`ModularPipelineBlocks`, *optional*):
            The blocks; the default ones without.
        pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*):
            A folder or a Hub repository, whose components `load_components` loads.
        components_manager (`ComponentsManager`, *optional*):
            Where components are kept, and offloaded from.
        collection (`str`, *optional*):
            Their collection's name there.
        kwargs:
            Passed to `ModularPipeline`: `revision`, `cache_dir`, `token` and so on.
    """

    default_blocks_name = "DIMBlocks"
    _latent_inputs = DIMPipeline._latent_inputs
    _interrupt = False
    _current_timestep = None

    # The steps of a call are the pipeline's own functions: they ask for components, the device and configs alone.
    designer = DIMPipeline.designer
    interrupt = DIMPipeline.interrupt
    current_timestep = DIMPipeline.current_timestep
    check_checkpoint = DIMPipeline.check_checkpoint
    check_size = DIMPipeline.check_size
    check_steps = DIMPipeline.check_steps
    check_step_cache = DIMPipeline.check_step_cache
    check_embeds = DIMPipeline.check_embeds
    check_latents = DIMPipeline.check_latents
    check_texts = staticmethod(DIMPipeline.check_texts)
    check_output_type = staticmethod(DIMPipeline.check_output_type)
    check_sequence_length = staticmethod(DIMPipeline.check_sequence_length)
    check_generator = staticmethod(DIMPipeline.check_generator)
    encode_prefix = DIMPipeline.encode_prefix
    encode_hidden_states = DIMPipeline.encode_hidden_states
    encode_prompt = DIMPipeline.encode_prompt
    prepare_timesteps = DIMPipeline.prepare_timesteps
    prepare_latents = DIMPipeline.prepare_latents
    prepare_image_latents = DIMPipeline.prepare_image_latents
    prepare_step_kwargs = DIMPipeline.prepare_step_kwargs
    decode_latents = DIMPipeline.decode_latents
    _ask_designer = DIMPipeline._ask_designer
    _null_length = DIMPipeline._null_length

    def __init__(
        self,
        blocks: Any = None,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
        **kwargs: Any,
    ):
        if blocks is None:
            package = importlib.import_module(__package__)
            blocks = getattr(package, self.default_blocks_name)()
        folder = pretrained_model_name_or_path
        super().__init__(
            blocks=blocks,
            pretrained_model_name_or_path=None if folder is None else os.fspath(folder),  # diffusers parses it
            components_manager=components_manager,
            collection=collection,
            **kwargs,
        )
        self._folder_configs: dict[str, dict[str, Any]] = {}
        self.designer = self.config.get("designer")
        if self.designer is not None:
            # Nobody asked for it in this program: a call must not fail over it.
            self.designer.on_failure = "instruction"
        spec, scale = self._component_specs.get("guider"), self.config.get("default_guidance_scale")
        if spec is not None and spec.default_creation_method == "from_config" and scale is not None:
            self.update_components(guider=get_guider_spec(scale).create())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DIMModularPipeline":
        """
        A pipeline of the default blocks with a folder's or repository's settings; `load_components` loads its models.
        For other blocks, `blocks.init_pipeline(folder)`.
        """
        return cls(pretrained_model_name_or_path=pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_pipeline_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> tuple:
        modular, standard = super()._load_pipeline_config(pretrained_model_name_or_path, **kwargs)
        return modular, None if standard is None else use_package_classes(standard)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        `ModularPipeline.save_pretrained`: loaded models and `modular_model_index.json`, which names this folder for
        them. It names no guider that was made in memory: see `docs/modular.md`.
        """
        super().save_pretrained(str(save_directory), **{"overwrite_modular_index": True, **kwargs})

    def _get_component_config(self, name: str) -> dict[str, Any] | None:
        """The config of a component: the loaded one's or, since its size counts before it is loaded, the folder's."""
        component = getattr(self, name, None)
        if component is not None:
            return component.config
        spec = self._component_specs.get(name)
        folder = spec.pretrained_model_name_or_path if spec is not None else self._pretrained_model_name_or_path
        if folder is None:
            return None
        if name not in self._folder_configs:
            self._folder_configs[name] = DIMTransformer2DModel.load_config(folder, subfolder=name)
        return self._folder_configs[name]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent in each direction; the released models' 32 where there is no autoencoder."""
        config = self._get_component_config("vae")
        return 32 if config is None else 2 ** (len(config["encoder_block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent; without an autoencoder those of the transformer, or else the released models' 32."""
        config = self._get_component_config("vae")
        if config is not None:
            return config["latent_channels"]
        config = self._get_component_config("transformer")
        return 32 if config is None else config["out_channels"]

    @property
    def image_processor(self) -> DIMImageProcessor:
        """Reads pictures and chooses sizes for the models that are there, or those of the folder."""
        config = self._get_component_config("transformer")
        factor = self.vae_scale_factor
        return DIMImageProcessor(factor, (32 if config is None else config["sample_size"]) * factor)

    @property
    def requires_unconditional_embeds(self) -> bool:
        """Whether the guider guides away from something, at any step."""
        guider = self.guider
        # It remembers the last call's last step, at which it may have been off.
        guider.set_state(step=None, num_inference_steps=None, timestep=None)
        return guider._enabled and guider.num_conditions > 1


class DIMEditModularPipeline(DIMModularPipeline):
    r"""
    Draw-In-Mind in blocks, edits: [`DIMEditBlocks`] and whatever is made of them. See [`DIMModularPipeline`].
    """

    default_blocks_name = "DIMEditBlocks"
    _latent_inputs = DIMEditPipeline._latent_inputs

    get_height_width = DIMEditPipeline.get_height_width
    read_inputs = DIMEditPipeline.read_inputs
    encode_shared_prefix = DIMEditPipeline.encode_shared_prefix
    design = DIMEditPipeline.design
    views_agree = staticmethod(DIMEditPipeline.views_agree)
    repeat_images = staticmethod(DIMEditPipeline.repeat_images)


class DIMBlocksMixin:
    """Makes a pipeline of this package's class of a block or of blocks, which diffusers would look up in itself."""

    def init_pipeline(
        self,
        pretrained_model_name_or_path: str | os.PathLike | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
    ) -> DIMModularPipeline:
        """A pipeline of a copy of these blocks, see [`DIMModularPipeline`] for the arguments."""
        kind: str = self.model_name  # type: ignore[attr-defined]
        pipeline_class = DIMModularPipeline if kind == "dim" else DIMEditModularPipeline
        return pipeline_class(deepcopy(self), pretrained_model_name_or_path, components_manager, collection)

    def check_components(self, components: DIMModularPipeline) -> None:
        """Raises a `ValueError` if what the block needs is not loaded."""
        needed = [spec.name for spec in self.expected_components]  # type: ignore[attr-defined]
        missing = [name for name in needed if getattr(components, name, None) is None]
        if missing:
            raise ValueError(
                f"{type(self).__name__} needs {missing}, which are not loaded: call `load_components()`, and see what"
                " it warned of, or give them by `update_components`."
            )


def get_guider_spec(guidance_scale: float = 7.5) -> ComponentSpec:
    """Classifier-free guidance (https://huggingface.co/papers/2207.12598), which any other guider may stand for."""
    return ComponentSpec(
        "guider",
        ClassifierFreeGuidance,
        config=FrozenDict({"guidance_scale": guidance_scale}),
        default_creation_method="from_config",
    )
