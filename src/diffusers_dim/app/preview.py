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
"""Small pictures of latents while they are denoised, at next to no cost and for any autoencoder."""

import torch
from PIL import Image


# Colours across a latent, at most.
DETAIL = 4
RIDGE = 1e-4


class LatentPreview:
    r"""
    Turns latents into small pictures by a linear map that is fitted, by least squares, to the edit's own source: its
    latents and its pixels are known. No weights, no numbers of any model, and no decoding.

    Args:
        source (`PIL.Image.Image`): The painter's view of the source, `width` x `height` pixels.
        source_latents (`torch.Tensor`): Its latents `(1, channels, height / factor, width / factor)`.
    """

    def __init__(self, source: Image.Image, source_latents: torch.Tensor):
        rows, columns = source_latents.shape[-2:]
        self.detail = min(DETAIL, source.height // rows)
        small = source.resize((columns * self.detail, rows * self.detail), Image.Resampling.BOX)
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(small.height, small.width, 3)
        colors = torch.nn.functional.pixel_unshuffle(pixels.movedim(-1, 0).double(), self.detail)
        known, wanted = self._features(source_latents)[0], colors.flatten(1).T
        square = known.T @ known / len(known)
        ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        self.matrix = torch.linalg.solve(square + ridge, known.T @ wanted / len(known)).float()

    @staticmethod
    def _features(latents: torch.Tensor) -> torch.Tensor:
        """`(pictures, rows * columns, channels + 1)`: the channels of each place, and a one."""
        flat = latents.detach().to("cpu", torch.float64).flatten(2).mT
        return torch.cat([flat, torch.ones_like(flat[..., :1])], dim=-1)

    def draw(self, latents: torch.Tensor) -> list[Image.Image]:
        """
        Pictures of latents `(pictures, channels, height / factor, width / factor)`, up to four pixels a latent in each
        direction.
        """
        rows, columns = latents.shape[-2:]
        colors = (self._features(latents).float() @ self.matrix).mT.unflatten(-1, (rows, columns))
        pixels = torch.nn.functional.pixel_shuffle(colors, self.detail).round().clamp(0, 255).to(torch.uint8)
        return [Image.fromarray(picture.movedim(0, -1).contiguous().numpy()) for picture in pixels]
