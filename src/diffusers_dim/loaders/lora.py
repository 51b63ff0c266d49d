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
"""LoRA of the painter and of the connector, in one file of diffusers' format."""

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from typing import Any

import torch
from diffusers.loaders import SanaLoraLoaderMixin
from torch import nn

from ..models import DIMConnector


logger = logging.getLogger(__name__)


class DIMLoraLoaderMixin(SanaLoraLoaderMixin):
    r"""
    Loads LoRA layers into [`DIMTransformer2DModel`] and [`DIMConnector`], saves, fuses, weights and unloads them.

    A file holds `transformer.*` keys, as those trained for [`~diffusers.SanaPipeline`] do, `connector.*` keys, or
    both; [`~diffusers.SanaPipeline`] itself reads the first and passes over the second.
    """

    _lora_loadable_modules = ["transformer", "connector"]
    connector_name = "connector"

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        low_cpu_mem_usage: bool = True,
        **kwargs: Any,
    ) -> None:
        r"""
        Loads an adapter under one name into each component that it has weights for, and makes it the only active one.
        Weights for a component that this pipeline does not have are passed over with a warning, so that a pipeline
        that only encodes and one that only paints take their parts of the same file. A load that fails leaves no part
        of the adapter behind.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict[str, torch.Tensor]`):
                A folder, a file, a Hub repository, or the weights themselves.
            adapter_name (`str`, *optional*):
                What [`set_adapters`] and its like call the adapter; `default_0` and so on by default.
            hotswap (`bool`, defaults to `False`):
                Whether to put the weights in the place of the adapter `adapter_name`, so that a compiled model needs
                no new compilation; see [`~loaders.PeftAdapterMixin.load_lora_adapter`].
            low_cpu_mem_usage (`bool`, defaults to `True`):
                Whether to leave out the initialisation of weights that are overwritten at once.
            kwargs (*optional*):
                `weight_name`, `subfolder`, `revision`, `token` and the other arguments of
                [`~loaders.StableDiffusionLoraLoaderMixin.lora_state_dict`].

        Raises:
            ValueError: If the weights are not those of a LoRA, if `adapter_name` is in use or, with `hotswap`, is not
                in use by the components that the new weights are for.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            pretrained_model_name_or_path_or_dict = pretrained_model_name_or_path_or_dict.copy()
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, **{**kwargs, "return_lora_metadata": True}
        )
        foreign = [key for key in state_dict if "lora" not in key]
        if foreign:
            raise ValueError(f"Not a LoRA: every weight's name has to contain 'lora', but {foreign[:3]} do not.")

        parts = [name for name in self._lora_loadable_modules if any(key.startswith(f"{name}.") for key in state_dict)]
        if not parts:
            logger.warning(
                f"Nothing is loaded: the weights' names have to begin with one of {self._lora_loadable_modules} and a"
                f" dot, but are {list(state_dict)[:3]} and so on."
            )
        components = [name for name in parts if getattr(self, name) is not None]
        for name in parts:
            if name not in components:
                logger.warning(f"The LoRA has weights for the {name}, which this pipeline lacks: passed over.")
        if not components:
            return

        users: dict[str, list[str]] = {}
        for name, adapters in self.get_list_adapters().items():
            for adapter in adapters:
                users.setdefault(adapter, []).append(name)
        if adapter_name is None:
            adapter_name = next(name for number in count(len(users)) if (name := f"default_{number}") not in users)
        in_use = users.get(adapter_name, [])
        if hotswap and in_use != components:
            raise ValueError(
                f"`hotswap` needs an adapter {adapter_name!r} of {components}, which the weights are for, but that"
                f" name is in use by {in_use}: load without `hotswap`."
            )
        if not hotswap and set(in_use) & set(components):
            raise ValueError(f"The adapter name {adapter_name!r} is in use by {in_use}: give another one.")

        loaders = {
            self.transformer_name: self.load_lora_into_transformer,
            self.connector_name: self.load_lora_into_connector,
        }
        with ExitStack() as undo:
            for name in components:
                model = getattr(self, name)
                if not hotswap and any(name in names for names in users.values()):
                    undo.callback(model.delete_adapters, adapter_name)
                elif not hotswap:
                    undo.callback(model.unload_lora)
                loaders[name](
                    state_dict,
                    model,
                    adapter_name=adapter_name,
                    _pipeline=self,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    hotswap=hotswap,
                    metadata=metadata if any(key.startswith(f"{name}.") for key in metadata or {}) else None,
                )
                model.train(model.training)  # new layers are born in training mode, with their dropout at work
            undo.pop_all()
        if not hotswap:
            # The components that this adapter has no weights for would go on with the one before.
            for name in self.get_list_adapters():
                getattr(self, name).set_adapters(adapter_name)

    @classmethod
    def load_lora_into_connector(
        cls,
        state_dict: dict[str, torch.Tensor],
        connector: DIMConnector,
        adapter_name: str | None = None,
        _pipeline: "DIMLoraLoaderMixin | None" = None,
        low_cpu_mem_usage: bool = False,
        hotswap: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """
        Loads the `connector.*` weights of `state_dict` into `connector`, as `load_lora_into_transformer` does with the
        transformer's.
        """
        logger.info(f"Loading {cls.connector_name}.")
        connector.load_lora_adapter(
            state_dict,
            prefix=cls.connector_name,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        connector_lora_layers: dict[str, nn.Module | torch.Tensor] | None = None,
        connector_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        r"""
        Saves an adapter as one `pytorch_lora_weights.safetensors`.

        Args:
            save_directory (`str` or `os.PathLike`): The folder; made if it is not there.
            transformer_lora_layers (`dict`, *optional*): `peft.get_peft_model_state_dict` of the transformer.
            is_main_process (`bool`, defaults to `True`): As in diffusers.
            weight_name (`str`, *optional*): Another name of the file.
            save_function (`Callable`, *optional*): Used in place of the safetensors library.
            safe_serialization (`bool`, defaults to `True`): Whether to write safetensors or a pickle.
            transformer_lora_adapter_metadata (`dict`, *optional*): `peft_config[...].to_dict()` of the transformer.
            connector_lora_layers (`dict`, *optional*): `peft.get_peft_model_state_dict` of the connector.
            connector_lora_adapter_metadata (`dict`, *optional*): `peft_config[...].to_dict()` of the connector.

        Raises:
            ValueError: If there are layers of neither.
        """
        parts = {
            cls.transformer_name: (transformer_lora_layers, transformer_lora_adapter_metadata),
            cls.connector_name: (connector_lora_layers, connector_lora_adapter_metadata),
        }
        lora_layers = {name: layers for name, (layers, _) in parts.items() if layers}
        if not lora_layers:
            raise ValueError("Give at least one of `transformer_lora_layers` and `connector_lora_layers`.")
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=lora_layers,
            lora_metadata={name: parts[name][1] for name in lora_layers},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(
        self,
        components: list[str] = ["transformer", "connector"],
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the adapters' weights to those of `components`; see [`~loaders.lora_base.LoraBaseMixin.fuse_lora`]."""
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] = ["transformer", "connector"], **kwargs: Any) -> None:
        """Takes them out again; see [`~loaders.lora_base.LoraBaseMixin.unfuse_lora`]."""
        super().unfuse_lora(components, **kwargs)
