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
"""Embeddings of pictures by networks of transformers."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional


class PictureEmbedder(torch.nn.Module):
    """
    A CLIP or DINOv2 model that embeds pictures. Weights are read from safetensors alone.

    Args:
        model (`str`): Folder or Hub repository id.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where it runs.

    Attributes:
        kind (`str`): The model's type, such as "clip" or "dinov2".
        name (`str`): The model's name.
        side (`int`): Of the squares that it takes, in pixels.
        mean, std (`torch.Tensor` of shape `(1, 3, 1, 1)`): Of the colours that it was trained on.

    Raises:
        OSError: If there is no such model.
        ValueError: If it is of another kind.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: str, device: torch.device | str = "cpu"):
        super().__init__()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        self.kind = AutoConfig.from_pretrained(model).model_type
        if not self.kind.startswith(("clip", "dino")):
            raise ValueError(f"{model}: has to be a CLIP or DINOv2 model, but is a {self.kind}.")
        folder = Path(model)
        self.name = folder.resolve().name if folder.is_dir() else model
        processor: Any = AutoImageProcessor.from_pretrained(model)
        self.side = int(processor.crop_size["height"])
        self.network = AutoModel.from_pretrained(model, use_safetensors=True).to(device).eval()
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1).to(device), persistent=False)

    @torch.no_grad()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """
        Embeds pictures.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, 3, side, side)`): Of mean 0 and deviation 1 in its colours.

        Returns:
            `torch.Tensor` of shape `(batch_size, features)`.
        """
        if self.kind.startswith("clip"):
            return self.network.get_image_features(pixel_values=pixels).pooler_output
        return self.network(pixel_values=pixels).pooler_output

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """The same of pictures in uint8, of any size."""
        pixels = pictures / 255
        if pixels.shape[-2:] != (self.side, self.side):
            pixels = functional.interpolate(pixels, (self.side, self.side), mode="bicubic", antialias=True)
        return self.embed((pixels - self.mean) / self.std)
