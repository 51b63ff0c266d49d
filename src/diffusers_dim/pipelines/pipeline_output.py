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
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image


@dataclass
class DIMPipelineOutput(BaseOutput):
    """
    Output of the DIM pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The pictures, `batch_size * num_images_per_prompt` of them: PIL images, an array `(batch, height, width,
            3)` or a tensor `(batch, 3, height, width)` in [0, 1], or latents `(batch, channels, height, width)`.
        blueprints (`list[str | None]`, *optional*):
            For an edit: the blueprint each prompt was painted from, `None` where the prompt went in verbatim.
    """

    images: list[Image.Image] | np.ndarray | torch.Tensor
    blueprints: list[str | None] | None = None
