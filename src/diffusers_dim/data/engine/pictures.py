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
"""Pictures made small enough to be compared quickly, and where two differ."""

import math
from collections.abc import Sequence

from PIL import Image, ImageChops, ImageFilter


WORK_SIDE = 256  # pixels of the longer side at which pictures are compared


def reduce_picture(image: Image.Image) -> Image.Image:
    """Means of squares of pixels, so that the longer side has at most `WORK_SIDE`. Much faster than to resize."""
    return image.reduce(math.ceil(max(image.size) / WORK_SIDE))


def change_mask(
    source: Image.Image,
    target: Image.Image,
    threshold: int = 16,
    reduced: Sequence[Image.Image] | None = None,
) -> Image.Image:
    """
    Where two pictures differ: both are smoothed at a longer side of at most 256 pixels, where JPEG's noise averages
    out, and compared channel by channel.

    Args:
        source (`PIL.Image.Image`): An RGB picture.
        target (`PIL.Image.Image`): Another, which is resized to the source's size if it has not that.
        threshold (`int`, defaults to 16): By how many levels of 255 one of the channels has to differ.
        reduced (`Sequence[PIL.Image.Image]`, *optional*): Both by [`reduce_picture`], where they are there already.

    Returns:
        An "L" picture of the source's size, 255 where they differ and 0 elsewhere.
    """
    first, second = reduced or (reduce_picture(source), reduce_picture(target))
    if target.size != source.size:  # else both are reduced alike, pixel by pixel
        second = target.resize(first.size, Image.Resampling.BILINEAR)
    first, second = (image.filter(ImageFilter.BoxBlur(1)) for image in (first, second))
    red, green, blue = ImageChops.difference(first, second).split()
    most = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    return most.point([255 * (level > threshold) for level in range(256)]).resize(
        source.size, Image.Resampling.NEAREST
    )
