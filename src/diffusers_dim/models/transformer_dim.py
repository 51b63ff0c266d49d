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

from diffusers.models.cache_utils import CacheMixin
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel


class DIMTransformer2DModel(SanaTransformer2DModel, CacheMixin):
    r"""
    SANA1.5's transformer (https://huggingface.co/papers/2501.18427, diffusers' `sana_transformer.py`) as DIM uses it.

    Weights and config keys are those of [`SanaTransformer2DModel`]: a folder saved by one loads into the other. For
    text-to-image `in_channels == out_channels`; for editing `in_channels == 2 * out_channels`, the noisy latents
    first, then the source latents (Draw-In-Mind, https://huggingface.co/papers/2509.01986, section 3).
    """

    _repeated_blocks = ["SanaTransformerBlock"]
