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
"""The vision-language model's state after the pictures, from which several texts about them are read."""

from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, Qwen2_5_VLForConditionalGeneration


@dataclass(frozen=True)
class DIMPrefix:
    r"""
    What the vision-language model has made of the start that a batch of conversations has in common with others about
    the same pictures: the system message, the user turn's head and the picture. It serves the blueprint's design and
    its encoding alike, so that pictures are seen once.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`): The start's tokens, no row padded.
        hidden_states (`torch.Tensor` of shape `(batch_size, length, hidden_size)`): The last ones, after the norm.
        past_key_values (`DynamicCache`): Keys and values of all layers. Not to be changed: see [`~DIMPrefix.select`].
        rope_deltas (`torch.LongTensor` of shape `(batch_size, 1)`):
            By how much positions after the picture differ from the count of tokens, since a picture's tokens take as
            many positions as its longer side has (Qwen2-VL, https://huggingface.co/papers/2409.12191, section 2.1).
    """

    input_ids: torch.Tensor
    hidden_states: torch.Tensor
    past_key_values: DynamicCache
    rope_deltas: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.input_ids.shape[1]

    @classmethod
    def compute(cls, text_encoder: Qwen2_5_VLForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> "DIMPrefix":
        """The prefix of [`DIMProcessor.encode_prefix`]'s inputs, on their device."""
        outputs = text_encoder(
            **inputs,
            past_key_values=DynamicCache(config=text_encoder.config),
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=1,
        )
        device = inputs["input_ids"].device
        hidden_states, rope_deltas = outputs.hidden_states[-1].to(device), text_encoder.model.rope_deltas.to(device)
        return cls(inputs["input_ids"], hidden_states, outputs.past_key_values, rope_deltas)

    def select(self, rows: list[int]) -> "DIMPrefix":
        """Some of the rows, each as often as it is named, with keys and values that may be added to."""
        cache = DynamicCache()
        for index, layer in enumerate(self.past_key_values.layers):
            # Added keys are put into new tensors: rows that stay as they are need no copy.
            whole = rows == list(range(len(self.input_ids)))
            keys, values = (states if whole else states[rows] for states in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return DIMPrefix(self.input_ids[rows], self.hidden_states[rows], cache, self.rope_deltas[rows])

    def copy_to(self, cache: Cache) -> None:
        """Fills an empty cache of another kind."""
        for index, layer in enumerate(self.past_key_values.layers):
            cache.update(layer.keys, layer.values, index)

    def extend(
        self,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
    ) -> torch.Tensor:
        """
        Reads on, and leaves the prefix as it was.

        Args:
            text_encoder ([`~transformers.Qwen2_5_VLForConditionalGeneration`]): The model of the prefix.
            input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`): What follows, padded on the right.
            attention_mask (`torch.LongTensor` of shape `(batch_size, tokens)`): 1 where a token is none of padding.

        Returns:
            Last hidden states `(batch_size, length + tokens, hidden_size)`, those of the prefix among them.
        """
        rows = list(range(len(self.input_ids)))
        positions = self.length + torch.arange(input_ids.shape[1], device=input_ids.device) + self.rope_deltas
        outputs = text_encoder(
            input_ids=input_ids,
            attention_mask=torch.cat([torch.ones_like(self.input_ids), attention_mask], dim=1),
            position_ids=positions.expand(3, -1, -1),
            past_key_values=self.select(rows).past_key_values,
            output_hidden_states=True,
            use_cache=True,
            logits_to_keep=1,
        )
        return torch.cat([self.hidden_states, outputs.hidden_states[-1].to(self.hidden_states.device)], dim=1)
