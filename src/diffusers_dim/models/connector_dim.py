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
"""The MLP connector between the vision-language model and the painter, and the learned null condition."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from torch import nn


@dataclass
class DIMConnectorOutput(BaseOutput):
    """
    Output of [`DIMConnector`].

    Args:
        prompt_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, caption_channels)` or `None`):
            The condition tokens; `None` when no hidden states were given.
        null_embeds (`torch.Tensor` of shape `(null_length, caption_channels)` or `None`):
            The first rows of the null condition; `None` when no `null_length` was given.
    """

    prompt_embeds: torch.Tensor | None = None
    null_embeds: torch.Tensor | None = None


class DIMConnector(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Two linear layers with an exact GELU between them, applied to every token, and a learned null condition for
    classifier-free guidance (Draw-In-Mind, https://huggingface.co/papers/2509.01986, section 3).

    Args:
        hidden_size (`int`, defaults to `2048`):
            Width of the vision-language model's hidden states.
        caption_channels (`int`, defaults to `2304`):
            Width of the condition tokens, the transformer's `caption_channels`.
        max_sequence_length (`int`, defaults to `8192`):
            Rows of the null condition, and so the longest condition that can be guided.
    """

    _supports_gradient_checkpointing = False
    _no_split_modules: list[str] = []
    _skip_layerwise_casting_patterns = ["null_condition"]

    @register_to_config
    def __init__(self, hidden_size: int = 2048, caption_channels: int = 2304, max_sequence_length: int = 8192):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, caption_channels)
        self.linear_2 = nn.Linear(caption_channels, caption_channels)
        self.null_condition = nn.Parameter(torch.randn(max_sequence_length, caption_channels) / caption_channels**0.5)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None = None,
        null_length: int | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> DIMConnectorOutput | tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Last hidden states of the vision-language model, after its final norm.
            null_length (`int`, *optional*):
                How many rows of the null condition to return. They come through `forward`, not through the parameter,
                so that every kind of offloading has them on the right device.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`DIMConnectorOutput`] or a tuple of the same two values.
            attention_kwargs (`dict`, *optional*):
                `{"scale": ...}` scales LoRA layers.

        Raises:
            ValueError: If `null_length` is above the null condition's rows.
        """
        prompt_embeds = None
        if hidden_states is not None:
            prompt_embeds = self.linear_2(F.gelu(self.linear_1(hidden_states)))

        null_embeds = None
        if null_length is not None:
            if null_length > self.config.max_sequence_length:
                raise ValueError(
                    f"`null_length` is {null_length}, but this connector's null condition has only"
                    f" {self.config.max_sequence_length} rows."
                )
            null_embeds = self.null_condition[:null_length]

        if not return_dict:
            return (prompt_embeds, null_embeds)
        return DIMConnectorOutput(prompt_embeds=prompt_embeds, null_embeds=null_embeds)
