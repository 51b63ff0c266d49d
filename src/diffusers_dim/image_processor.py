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
"""From whatever a person calls a picture to what the painter's autoencoder sees."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN
from PIL import Image, ImageOps


MAX_ASPECT_RATIO = 200

ImageInput = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]


class DIMImageProcessor(PixArtImageProcessor):
    r"""
    Image processor of the DIM pipelines: reads sources, chooses sizes, and resizes as the published code does.

    Args:
        vae_scale_factor (`int`, defaults to `32`):
            Pixels a latent in each direction; heights and widths are multiples of it.
        base_size (`int`, defaults to `1024`):
            Side in pixels of the square whose area the model was trained at.
    """

    def __init__(self, vae_scale_factor: int = 32, base_size: int = 1024):
        super().__init__(vae_scale_factor=vae_scale_factor)
        self.base_size = base_size

    def to_rgb(self, image: ImageInput) -> list[Image.Image]:
        r"""
        Reads pictures as a person sees them: EXIF rotation applied, transparency over white, palettes resolved, 16
        bits scaled to 8.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                PIL images of any mode; arrays `(height, width)`, `(height, width, channels)` or `(batch, height,
                width, channels)`; tensors `(channels, height, width)` or `(batch, channels, height, width)`; 1 to 4
                channels; uint8, uint16 or floating point in [0, 1].

        Returns:
            `list[PIL.Image.Image]`: RGB pictures.

        Raises:
            ValueError: If there is no picture, one is empty, of an unknown type or shape, beyond an aspect ratio of
                200:1, or has values that are not finite or not in [0, 1].
        """
        if isinstance(image, (list, tuple)):
            pictures = [picture for item in image for picture in self.to_rgb(item)]
            if not pictures:
                raise ValueError("`image` is an empty list: give at least one image.")
            return pictures
        if isinstance(image, Image.Image):
            pictures = [image]
        elif isinstance(image, torch.Tensor):
            if image.ndim not in (3, 4):
                raise ValueError(
                    "An image tensor has to be (channels, height, width) or (batch, channels, height, width), but is"
                    f" of shape {tuple(image.shape)}."
                )
            if image.is_floating_point():
                image = image.float()
            array = np.moveaxis(image.detach().cpu().numpy(), -3, -1)
            pictures = [self._array_to_pil(item) for item in (array if array.ndim == 4 else [array])]
        elif isinstance(image, np.ndarray):
            if image.ndim not in (2, 3, 4):
                raise ValueError(
                    "An image array has to be (height, width), (height, width, channels) or (batch, height, width,"
                    f" channels), but is of shape {image.shape}."
                )
            pictures = [self._array_to_pil(item) for item in (image if image.ndim == 4 else [image])]
        else:
            raise ValueError(
                "`image` has to be a PIL image, a NumPy array, a torch tensor or a list of them, but is"
                f" {type(image).__name__}."
            )

        if not pictures:
            raise ValueError(
                f"`image` is a batch of no images, of shape {tuple(np.shape(cast(Any, image)))}: give at least one."
            )
        for picture in pictures:
            if picture.width == 0 or picture.height == 0:
                raise ValueError(f"An image of {picture.width}x{picture.height} pixels is empty.")
            if max(picture.size) > MAX_ASPECT_RATIO * min(picture.size):
                raise ValueError(
                    f"An image of {picture.width}x{picture.height} pixels is beyond the aspect ratio of"
                    f" {MAX_ASPECT_RATIO}:1 that is allowed."
                )
        return [self._pil_to_rgb(picture) for picture in pictures]

    @staticmethod
    def _array_to_pil(array: np.ndarray) -> Image.Image:
        if array.ndim == 3 and array.shape[-1] not in (1, 2, 3, 4):
            raise ValueError(f"An image has to have 1 to 4 channels, but one has {array.shape[-1]} ({array.shape}).")
        if array.shape[0] == 0 or array.shape[1] == 0:
            raise ValueError(f"An image of {array.shape[1]}x{array.shape[0]} pixels is empty.")
        if np.issubdtype(array.dtype, np.floating):
            low, high = float(array.min()), float(array.max())
            if not (low >= 0.0 and high <= 1.0):  # also catches NaN
                raise ValueError(f"A floating-point image has to lie in [0, 1], but one lies in [{low}, {high}].")
            array = (array * 255.0).round().astype(np.uint8)
        elif array.dtype == np.uint16:
            array = (array / 257.0).round().astype(np.uint8)
        elif array.dtype != np.uint8:
            raise ValueError(f"An image has to be uint8, uint16 or floating point, but one is {array.dtype}.")
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)

    @staticmethod
    def _pil_to_rgb(image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # 16-bit grey, which PIL's own conversion would clip at 255.
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257.0).round().astype(np.uint8))
        elif image.mode == "F":
            image = DIMImageProcessor._array_to_pil(np.asarray(image))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")

    def get_default_height_width(self, image: Image.Image, use_resolution_binning: bool = True) -> tuple[int, int]:
        r"""
        The size an edit has when none is asked for: the nearest of SANA's aspect-ratio bins (diffusers'
        `pipeline_sana.py`), so that nothing of the picture is cut away but rounding.

        A base size that SANA has no bins for takes the ratios of its 1024 px bins at its own area, rounded to the
        VAE's factor. A picture longer than the longest bin (4:1) keeps its own ratio at the base area.

        Args:
            image (`PIL.Image.Image`): The source.
            use_resolution_binning (`bool`, defaults to `True`): Whether to choose a bin, or to keep the picture's own
                ratio at the base area, rounded to the VAE's factor.

        Returns:
            `tuple[int, int]`: Height and width in pixels.
        """
        return self.get_bin(image.height, image.width, use_resolution_binning)

    def get_bin(self, height: int, width: int, use_resolution_binning: bool = True) -> tuple[int, int]:
        """The same of a picture of `height` by `width` pixels."""
        bins = {
            512: ASPECT_RATIO_512_BIN,
            1024: ASPECT_RATIO_1024_BIN,
            2048: ASPECT_RATIO_2048_BIN,
            4096: ASPECT_RATIO_4096_BIN,
        }
        ratios = bins.get(self.base_size, ASPECT_RATIO_1024_BIN)
        ratio = height / width
        if use_resolution_binning and min(map(float, ratios)) <= ratio <= max(map(float, ratios)):
            height, width = self.classify_height_width_bin(height, width, ratios)
            scale = 1.0 if self.base_size in bins else self.base_size / 1024
        else:
            height, width = ratio**0.5, ratio**-0.5
            scale = self.base_size
        factor = self.config.vae_scale_factor
        height, width = (max(factor, round(side * scale / factor) * factor) for side in (height, width))
        # Rounding a short side down must not take the size beyond the ratio that is allowed.
        return min(height, MAX_ASPECT_RATIO * width), min(width, MAX_ASPECT_RATIO * height)

    def resize_and_crop(self, image: Image.Image, height: int, width: int) -> Image.Image:
        r"""
        The autoencoder's view of a source, exactly as the published code makes it: one side to its target with PIL's
        bilinear filter, the other truncated to an integer, then the centre.

        Args:
            image (`PIL.Image.Image`): An RGB picture.
            height (`int`): Height of the result in pixels.
            width (`int`): Width of the result in pixels.
        """
        if height * image.width >= width * image.height:
            size = (height * image.width // image.height, height)
        else:
            size = (width, width * image.height // image.width)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))

    def preprocess(self, image: ImageInput, height: int, width: int) -> torch.Tensor:
        r"""
        Args:
            image (`ImageInput`): One or more pictures, see [`~DIMImageProcessor.to_rgb`].
            height (`int`): Height in pixels.
            width (`int`): Width in pixels.

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, height, width)` in [-1, 1], float32.
        """
        pictures = [self.resize_and_crop(picture, height, width) for picture in self.to_rgb(image)]
        return self.normalize(self.numpy_to_pt(self.pil_to_numpy(pictures)))
