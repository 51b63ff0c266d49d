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
"""What the frozen models make of samples: computed batch by batch, or read from a folder where it was kept."""

import argparse
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..data import UnreadableSampleError
from ..files import write_lines, written_aside
from ..pipelines import DIMEditPipeline, DIMPipeline


TENSORS = ("hidden_states", "latents", "image_latents")
FACTS = "facts.json"


@torch.no_grad()
def encode_samples(
    pipe: DIMPipeline, samples: list[dict[str, Any]], height: int, width: int, max_sequence_length: int = 8192
) -> list[dict[str, torch.Tensor]]:
    r"""
    Runs the frozen models, vision-language model and autoencoder, on samples of one size.

    Args:
        pipe ([`DIMPipeline`]):
            Of either kind. Its transformer is not used; its connector, which may be `None`, for its number of null
            rows alone.
        samples (`list[dict]`):
            Each with a `prompt`, a `target` and, all or none, a `source` (RGB PIL images).
        height (`int`):
            Height in pixels at which the target is painted.
        width (`int`):
            Width in pixels.
        max_sequence_length (`int`, defaults to 8192):
            The last so many condition tokens are kept, at most as many as the null condition has rows.

    Returns:
        `list[dict[str, torch.Tensor]]`, one a sample, on the models' devices: `hidden_states` `(tokens, hidden_size)`
        in the vision-language model's dtype; `latents` and, of a source, `image_latents`, both `(latent_channels,
        height / factor, width / factor)`, float32.
    """
    if not samples:
        return []
    if pipe.connector is not None:
        max_sequence_length = min(max_sequence_length, pipe.connector.config.max_sequence_length)
    sources = [sample["source"] for sample in samples] if "source" in samples[0] else None
    hidden_states, mask = pipe.encode_hidden_states(
        [sample["prompt"] for sample in samples],
        sources,
        height,
        width,
        device=pipe.text_encoder.device,
        max_sequence_length=max_sequence_length,
    )
    # Clones, so that one sample kept does not keep its whole batch.
    lengths = mask.sum(dim=1).tolist()
    items = [{"hidden_states": row[:length].clone()} for row, length in zip(hidden_states, lengths)]
    pictures = {"latents": [sample["target"] for sample in samples], "image_latents": sources}
    for name, images in pictures.items():
        if images is not None:
            for item, latents in zip(items, pipe.prepare_image_latents(images, height, width, pipe.vae.device)):
                item[name] = latents.clone(memory_format=torch.contiguous_format)
    return items


def make_placeholder(
    connector_config: Mapping[str, Any],
    transformer_config: Mapping[str, Any],
    height: int,
    width: int,
    vae_scale_factor: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    r"""
    A sample of zeros and one token: what a process without samples trains on, at weight 0, to keep up with the others.

    Args:
        connector_config (`Mapping`): Of the [`DIMConnector`], for its `hidden_size`.
        transformer_config (`Mapping`): Of the [`DIMTransformer2DModel`], for its channels.
        height (`int`): Height in pixels.
        width (`int`): Width in pixels.
        vae_scale_factor (`int`): Pixels a latent in each direction.
        dtype (`torch.dtype`, defaults to `torch.float32`): Of the hidden states, as the vision-language model's.

    Returns:
        `dict[str, torch.Tensor]` as [`encode_samples`] makes one.
    """
    channels = transformer_config["out_channels"]
    shape = (channels, height // vae_scale_factor, width // vae_scale_factor)
    item = {"hidden_states": torch.zeros(1, connector_config["hidden_size"], dtype=dtype)}
    item["latents"] = torch.zeros(shape)
    if transformer_config["in_channels"] > channels:
        item["image_latents"] = torch.zeros(shape)
    return item


def collate_encoded(
    items: list[dict[str, Any]],
    device: torch.device,
    placeholder: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    Batches encoded samples of one size.

    Args:
        items (`list[dict]`):
            As [`encode_samples`] or [`PrecomputedDataset`] gives them.
        device (`torch.device`):
            Where the batch is put.
        placeholder (`dict[str, torch.Tensor]`, *optional*):
            Stands in where there are no items, see [`make_placeholder`].

    Returns:
        `dict[str, torch.Tensor]`: [`DIMTrainingModel`]'s inputs `hidden_states` `(batch_size, tokens, hidden_size)`,
        zeros on the right where padded, `attention_mask` `(batch_size, tokens)` only where something is padded,
        `latents` and for edits `image_latents`; and `weights` `(batch_size,)`, 1 for items and 0 for the placeholder.

    Raises:
        ValueError: If there are neither items nor a placeholder.
    """
    if not items and placeholder is None:
        raise ValueError("A batch needs items, or a placeholder in their place, but has neither.")
    rows = items or [placeholder]
    batch = {name: torch.stack([row[name] for row in rows]) for name in TENSORS[1:] if name in rows[0]}
    batch["hidden_states"] = pad_sequence([row["hidden_states"] for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["hidden_states"]) for row in rows])
    if (lengths != lengths[0]).any():  # nothing padded, no mask
        batch["attention_mask"] = torch.arange(batch["hidden_states"].shape[1]) < lengths[:, None]
    batch["weights"] = torch.full((len(rows),), float(len(items) > 0))
    return {name: tensor.to(device) for name, tensor in batch.items()}


def shard_path(folder: str | Path, number: int) -> Path:
    """Where a shard's tensors lie; its manifest has the same name and ends in `.jsonl`."""
    return Path(folder) / f"shard-{number:05}.safetensors"


def save_shard(folder: str | Path, number: int, rows: list[dict[str, Any]]) -> None:
    r"""
    Writes consecutive samples as `shard-{number}.safetensors` and then, which makes the shard count, its manifest
    `shard-{number}.jsonl`: a line a sample, with all of a row but its tensors.

    Args:
        folder (`str` or `Path`):
            Of [`PrecomputedDataset`].
        number (`int`):
            The shard's number: it holds the samples from `number * shard_size` on.
        rows (`list[dict]`):
            In the data's order, each with `id`, `length` (characters of the prompt), `height` and `width` (of the
            target picture, or `None` where that could not be read), `fields` (what else is known of the sample) and
            either the tensors of [`encode_samples`] or a `reason` why there are none.
    """
    path = shard_path(folder, number)
    tensors = {f"{position}.{name}": row[name] for position, row in enumerate(rows) for name in TENSORS if name in row}
    with written_aside(path) as aside:
        save_file(tensors, aside)
    lines = []
    for row in rows:
        line = {name: value for name, value in row.items() if name not in TENSORS}
        if "hidden_states" in row:
            line["tokens"] = len(row["hidden_states"])
        lines.append(json.dumps(line))
    write_lines(path.with_suffix(".jsonl"), lines)


def load_manifest(folder: str | Path, number: int) -> list[dict[str, Any]] | None:
    """The rows of a shard without their tensors, or `None` if it is not finished."""
    path = shard_path(folder, number).with_suffix(".jsonl")
    if not (path.exists() and shard_path(folder, number).exists()):
        return None
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_vae_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a VAE's config the latents depend on: pixels a latent in each direction, channels, scaling factor."""
    return {
        "vae_scale_factor": 2 ** (len(config["encoder_block_out_channels"]) - 1),
        "latent_channels": config["latent_channels"],
        "scaling_factor": config["scaling_factor"],
    }


@lru_cache(maxsize=256)
def open_shard(path: Path, mtime_ns: int, process: int) -> Any:
    """A shard, kept open, since opening reads its whole header, 2 ms at a time; each process has its own."""
    return safe_open(path, framework="pt")


class PrecomputedDataset(Dataset):
    r"""
    Samples encoded by `examples/precompute_conditions.py`, in the order of the data they were made of.

    Args:
        folder (`str` or `Path`):
            With `facts.json` and, for each shard, a safetensors file and a manifest.
        max_samples (`int`, *optional*):
            Use only the first so many samples.

    Items are dicts of a sample's `id` and small fields, and of the tensors of [`encode_samples`]: latents in float32,
    hidden states in the dtype they were kept in.

    Attributes:
        facts (`dict`): What the samples were made with.
        kind (`str`): "edit" or "t2i".

    Raises:
        ValueError: If the folder holds no such samples, or not all of them yet.
    """

    def __init__(self, folder: str | Path, max_samples: int | None = None):
        self.folder = Path(folder)
        path = self.folder / FACTS
        if not path.is_file():
            raise ValueError(f"{folder} holds no {FACTS}: it is no folder of precompute_conditions.py.")
        self.facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.kind: str = self.facts["kind"]
        count, shard_size = self.facts["samples"], self.facts["shard_size"]
        shards = range(-(-count // shard_size))
        manifests = [load_manifest(self.folder, number) for number in shards]
        missing = [shard_path(folder, number).name for number in shards if manifests[number] is None]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(shards)} shards, such as {missing[0]}: run"
                " precompute_conditions.py again, which goes on where it was stopped."
            )
        self.rows = [row for manifest in manifests for row in manifest][:max_samples]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        if "reason" in row:
            raise UnreadableSampleError(row["id"], row["reason"])
        number, position = divmod(index, self.facts["shard_size"])
        item = {**row["fields"], "id": row["id"]}
        path = shard_path(self.folder, number)
        shard = open_shard(path, path.stat().st_mtime_ns, os.getpid())
        for name in TENSORS[: 3 if self.kind == "edit" else 2]:
            item[name] = shard.get_tensor(f"{position}.{name}")
            if name != "hidden_states":
                item[name] = item[name].float()
        return item

    def id(self, index: int) -> str:
        return self.rows[index]["id"]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width in pixels of the target picture that was encoded, before it was resized."""
        row = self.rows[index]
        if row["height"] is None:
            raise UnreadableSampleError(row["id"], row["reason"])
        return row["height"], row["width"]

    def length(self, index: int) -> int:
        """Characters of the prompt."""
        return self.rows[index]["length"]

    def check(self, pipe: DIMPipeline, args: argparse.Namespace) -> None:
        r"""
        Refuses samples that a pipeline cannot be trained on, or not as on the data they were made of.

        Args:
            pipe ([`DIMPipeline`]):
                What is to be trained: an edit pipeline or one for text-to-image, its VAE and its vision-language model
                not needed.
            args (`argparse.Namespace`):
                The training script's options, of which `pretrained_model_name_or_path` and `revision` (where the VAE's
                config is read), `resolution`, `aspect_ratio_bucketing` and `max_sequence_length` matter.

        Raises:
            ValueError: That names what the samples were made with and what is asked for.
        """
        vae_config = AutoencoderDC.load_config(
            args.pretrained_model_name_or_path, subfolder="vae", revision=args.revision
        )
        asked = {
            "kind": "edit" if isinstance(pipe, DIMEditPipeline) else "t2i",
            "resolution": args.resolution,
            "aspect_ratio_bucketing": args.aspect_ratio_bucketing,
            "hidden_size": pipe.connector.config.hidden_size,
            **read_vae_facts(vae_config),
            "latent_channels": pipe.transformer.config.out_channels,
        }
        # Another limit is as good where neither cuts anything.
        max_sequence_length = min(args.max_sequence_length, pipe.connector.config.max_sequence_length)
        longest = max((row["tokens"] for row in self.rows if "tokens" in row), default=0)
        if longest > max_sequence_length or longest >= self.facts["max_sequence_length"]:
            asked["max_sequence_length"] = max_sequence_length
        wrong = [
            f"{name} {self.facts[name]}, not {value}" for name, value in asked.items() if self.facts[name] != value
        ]
        if wrong:
            raise ValueError(
                f"{self.folder} was made for {'; '.join(wrong)}: train as it was made, or make one as you train."
            )
