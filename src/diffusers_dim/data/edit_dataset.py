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
"""Edit pairs from a jsonl file of the form in which DIM-Edit was released."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler


EDIT_FIELDS = ("id", "image_path", "image_path_target", "prompt")


class EditDataset(Dataset):
    r"""
    One edit a line: `id`, `image_path` (source), `image_path_target` and `prompt` (an instruction or a blueprint).

    Args:
        jsonl (`str` or `Path`):
            The file. Every line is read and checked at once, pictures when an item is asked for.
        image_root (`str` or `Path`, *optional*):
            What image paths are relative to; the file's own folder by default.

    Items are dicts of the line's fields with `source` and `target`, RGB PIL images, added.

    Raises:
        ValueError: If the file holds no line, or a line is no JSON object or lacks a field; the line is named.
    """

    def __init__(self, jsonl: str | Path, image_root: str | Path | None = None):
        self.root = Path(image_root) if image_root is not None else Path(jsonl).parent
        self.samples: list[dict[str, Any]] = []
        with open(jsonl, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    sample = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{jsonl}, line {number} is not JSON: {error}.") from error
                missing = [name for name in EDIT_FIELDS if not isinstance(sample, dict) or name not in sample]
                if missing:
                    raise ValueError(f"{jsonl}, line {number} lacks {missing}: a line needs {list(EDIT_FIELDS)}.")
                self.samples.append(sample)
        if not self.samples:
            raise ValueError(f"{jsonl} holds no samples.")

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.samples[index])
        for name, field in (("source", "image_path"), ("target", "image_path_target")):
            with Image.open(self.root / sample[field]) as image:
                sample[name] = image.convert("RGB")
        return sample


class EpochSampler(Sampler[int]):
    """
    Indices in an order that follows from seed and epoch alone, so that a resumed run finds its place.

    Args:
        length (`int`): Number of samples.
        seed (`int`): Seed of the orders.

    Attributes:
        epoch (`int`): Which order the next iteration has.
    """

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()
