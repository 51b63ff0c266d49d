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
"""Which samples make which batch: aspect-ratio buckets, and an order that the number of processes does not change."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..image_processor import DIMImageProcessor


# Batches whose samples are sorted by length together: few enough that a batch's neighbours still differ by chance.
BATCHES_SORTED_TOGETHER = 50


@lru_cache(maxsize=1 << 16)  # pictures of a data set have few sizes
def find_bucket(
    size: tuple[int, int], resolution: int, vae_scale_factor: int, aspect_ratio_bucketing: bool
) -> tuple[int, int]:
    """
    Height and width in pixels that a picture of such a size is trained at: the square of side `resolution`, or the
    nearest of SANA's aspect ratios at about its area, as the pipelines choose it.
    """
    if not aspect_ratio_bucketing:
        return resolution, resolution
    return DIMImageProcessor(vae_scale_factor, base_size=resolution).get_bin(*size)


class BatchOrder:
    r"""
    Puts samples into global micro-batches, those of all processes together, each of one bucket.

    An epoch's order follows from seed and epoch alone. What is left of a bucket when no full batch is left is not used
    in that epoch, and is another part of it in the next.

    Args:
        buckets (`Sequence[tuple[int, int] | None]`):
            Each sample's size in training; `None` for one that cannot be read.
        global_size (`int`):
            Samples a global micro-batch.
        seed (`int`, defaults to 0):
            Of the order.
        lengths (`Sequence[int]`, *optional*):
            Of the prompts: samples of like length then share batches.

    Raises:
        ValueError: If there is no full batch.
    """

    def __init__(
        self,
        buckets: Sequence[tuple[int, int] | None],
        global_size: int,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
    ):
        self.members: dict[tuple[int, int], list[int]] = {}
        for index, bucket in enumerate(buckets):
            if bucket is not None:
                self.members.setdefault(bucket, []).append(index)
        self.global_size = global_size
        self.seed = seed
        self.lengths = lengths
        self.batches_per_epoch = sum(len(indices) // global_size for indices in self.members.values())
        self.left_over = sum(len(indices) % global_size for indices in self.members.values())
        if self.batches_per_epoch == 0:
            most = max(map(len, self.members.values()), default=0)
            raise ValueError(
                f"There is no batch of {global_size} samples over all processes: of {len(buckets)} samples at most"
                f" {most} are readable and of one size. Lower --train_batch_size or the number of processes, or turn"
                " --aspect_ratio_bucketing off."
            )

    def epoch(self, epoch: int) -> list[tuple[tuple[int, int], list[int]]]:
        """The global micro-batches of an epoch: bucket and indices of each."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        size, batches = self.global_size, []
        for bucket, indices in self.members.items():
            order = torch.randperm(len(indices), generator=generator).tolist()[: len(indices) // size * size]
            shuffled = [indices[i] for i in order]
            if self.lengths is not None:
                chunk = BATCHES_SORTED_TOGETHER * size
                shuffled = [
                    index
                    for start in range(0, len(shuffled), chunk)
                    for index in sorted(shuffled[start : start + chunk], key=self.lengths.__getitem__)
                ]
            batches += [(bucket, shuffled[start : start + size]) for start in range(0, len(shuffled), size)]
        if len(self.members) == 1 and self.lengths is None:
            # In random order as they are, so that micro-batches of half the size are these in halves.
            return batches
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
