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
"""The painter: SANA's linear-attention transformer, with noisy and source latents side by side in its channels."""

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel, SanaTransformerBlock


class DIMTransformer2DModel(SanaTransformer2DModel, CacheMixin, ModelMixin):
    r"""
    SANA1.5's transformer (https://huggingface.co/papers/2501.18427, diffusers' `sana_transformer.py`) as DIM uses it.

    Weights and config keys are those of [`SanaTransformer2DModel`]: a folder saved by one loads into the other. For
    text-to-image `in_channels == out_channels`; for editing `in_channels == 2 * out_channels`, the noisy latents
    first, then the source latents (Draw-In-Mind, https://huggingface.co/papers/2509.01986, section 3).
    """

    _repeated_blocks = ["SanaTransformerBlock"]

    def enable_cache(self, config: Any) -> None:
        r"""
        Turns on one of diffusers' step caches, such as `FirstBlockCacheConfig`, see [`~diffusers.CacheMixin`].

        Args:
            config (`PyramidAttentionBroadcastConfig`, `FirstBlockCacheConfig`, ...): Which cache, and how.
        """
        # The caches look a block's class up, and diffusers does not register SANA's.
        TransformerBlockRegistry.register(SanaTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)
