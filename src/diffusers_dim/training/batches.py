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
"""From a batch of samples to what the training model takes."""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ..data import TrainingBatch
from ..pipelines import DIMEditPipeline, DIMPipeline
from .conditions import collate_encoded, encode_samples, make_placeholder
from .distributed import is_sharded
from .objective import sample_noise


def make_inputs(
    batch: TrainingBatch, pipe: DIMPipeline, args: argparse.Namespace, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    r"""
    Encodes a process's share of a batch, unless it is encoded already, and draws its noise.

    Args:
        batch ([`TrainingBatch`]):
            Of samples, or of encoded ones where `--precomputed_conditions` is given.
        pipe ([`DIMPipeline`]):
            Its frozen models encode; not needed with `--precomputed_conditions`.
        args (`argparse.Namespace`):
            The script's options.
        device (`torch.device`):
            Where to put the inputs.

    Returns:
        [`DIMTrainingModel`]'s inputs, and weights `(batch_size,)`: 1 for a sample, 0 for the placeholder that stands
        in where none of the share could be read, so that this process keeps up with the others.
    """
    items = batch.samples
    if args.precomputed_conditions is None:
        # A text encoder in parts is called by all processes or none.
        samples = batch.samples or [blank_sample(pipe)] * args.shard_text_encoder
        items = encode_samples(pipe, samples, batch.height, batch.width, args.max_sequence_length)
        items = items[: len(batch.samples)]
    if items:
        inputs = collate_encoded(items, device)
    else:
        # Of any size, since it counts nothing.
        placeholder = make_placeholder(pipe.connector.config, pipe.transformer.config, 4, 4, vae_scale_factor=1)
        inputs = collate_encoded([], device, placeholder)
    inputs["hidden_states"] = inputs["hidden_states"].float()  # the connector's own, whatever they were kept in
    weights = inputs.pop("weights")
    noise, timesteps, dropped = sample_noise(
        batch.positions or [0], inputs["latents"].shape[1:], args.seed, args.conditioning_dropout_prob
    )
    inputs |= {"noise": noise.to(device), "timesteps": timesteps.to(device), "dropped": dropped.to(device)}
    return inputs, weights


def blank_sample(pipe: DIMPipeline) -> dict[str, Any]:
    """A sample that says and shows nothing."""
    picture = Image.new("RGB", (pipe.vae_scale_factor, pipe.vae_scale_factor))
    sample = {"id": "", "prompt": " ", "target": picture}
    return {**sample, "source": picture} if isinstance(pipe, DIMEditPipeline) else sample


def complete_pipeline(
    pipe: DIMPipeline, load: Callable[[dict[str, torch.nn.Module]], DIMPipeline], **trained: torch.nn.Module
) -> DIMPipeline:
    """
    A pipeline of `trained` components and the frozen ones of `pipe`, on one process; where those are not there, or are
    in parts, `load` reads it, given the components that it need not read.
    """
    if pipe.vae is None or is_sharded(pipe.text_encoder):
        return load(trained)
    settings = {name: pipe.config[name] for name in ("default_guidance_scale", "designer")}
    return type(pipe)(**pipe.components | trained, **settings)
